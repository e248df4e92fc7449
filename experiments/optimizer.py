"""The optimizer of a run and its learning rate."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

import lowrank_optim
from experiments.config import ConfigError, OptimConfig
from lowrank_optim import ParamGroups, param_groups

# taken by every optimizer, and passed on by `build_optimizer` itself
SHARED = ("name", "lr", "other_lr", "weight_decay")


@dataclass(frozen=True)
class Known:
    """What one optimizer takes beside `SHARED`.

    Args:
        make: Makes it from groups and keyword arguments.
        arguments: Keyword arguments of `make`, by the option that fills each.
        of_matrices: Options that are keys of the matrices' group.
        tuned: Values that stand for a null here.
    """

    make: Callable[..., torch.optim.Optimizer]
    arguments: Mapping[str, str] = field(default_factory=dict)
    of_matrices: tuple[str, ...] = ()
    tuned: Mapping[str, Any] = field(default_factory=dict)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _without(names: Mapping[str, str], *taken: str) -> dict[str, str]:
    return {option: name for option, name in names.items() if option not in taken}


def _ours(name: str) -> Callable[..., torch.optim.Optimizer]:
    def make(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(lowrank_optim, name)(*args, **kwargs)
        return optimizer

    return make


def _adamw(groups: ParamGroups, **kwargs: Any) -> torch.optim.Optimizer:
    fused = not any(p.is_meta for group in groups for _, p in group["params"])
    # copies, because torch takes the names out of the groups it is given
    return torch.optim.AdamW([dict(group) for group in groups], **kwargs, fused=fused)


_STORED = ("state_dtype",)
_ADAM = _same("betas", "eps")
_GAP = {"update_proj_gap": 50}
_PROJECTED = ("rank", "update_proj_gap", "basis")
# what is no matrix is AdamW's
_FALLBACK = {"betas": "fallback_betas", "eps": "fallback_eps"}
_MOMENTUM = _same("momentum", "nesterov", "stochastic_rounding")
_SCHULZ = _same("ns_coefficients", "ns_steps", "ns_dtype", "method")
_FISHER = _same("momentum", "num_grads", "damping", "relative_damping", "divisor", "scope", "stochastic_rounding")
_MUON = {**_MOMENTUM, **_SCHULZ, **_FALLBACK, **_same("adjust_lr_fn")}

OPTIMIZERS: dict[str, Known] = {
    "adamw": Known(_adamw, _same("betas", "eps")),
    "galore_adamw": Known(
        _ours("GaLoreAdamW"),
        {**_ADAM, **_same("stagger", "residual_scale", "carry", "adaptive_overlap", "residual", "error_feedback")},
        (*_PROJECTED, "scale", "proj_type", *_STORED),
        _GAP,
    ),
    "dct_adamw": Known(
        _ours("DCTAdamW"),
        {**_ADAM, **_same("stagger", "ranking", "carry", "column_ages", "error_feedback")},
        ("rank", "update_proj_gap", "proj_type", *_STORED),
    ),
    "apollo_adamw": Known(
        _ours("APOLLOAdamW"),
        {**_ADAM, **_same("stagger", "scale_type", "proj_dtype")},
        (*_PROJECTED, "scale", "proj_type", *_STORED),
        _GAP,
    ),
    "fira_adamw": Known(
        _ours("FiraAdamW"),
        {**_ADAM, **_same("stagger", "carry", "published_code")},
        (*_PROJECTED, "scale", "proj_type", *_STORED),
        _GAP,
    ),
    "ldadamw": Known(_ours("LDAdamW"), {**_ADAM, **_same("rho", "error_feedback")}, ("rank", "proj_type", *_STORED)),
    "muon": Known(_ours("Muon"), {**_MUON, **_same("momentum_form", "normuon_beta2", "cautious")}, _STORED),
    "lowrank_muon": Known(_ours("LowRankMuon"), {**_MUON, **_same("residual", "stagger")}, (*_PROJECTED, *_STORED)),
    "trion": Known(_ours("Trion"), _without(_MUON, "nesterov"), ("rank", "basis", *_STORED)),
    "auon": Known(_ours("AuON"), {**_MUON, **_same("gamma", "normalize")}, _STORED),
    "steepest_descent": Known(_ours("SteepestDescent"), {**_MOMENTUM, **_SCHULZ}, _STORED),
    # whole gradients in the window, or coordinates
    "mfac": Known(_ours("MFAC"), _FISHER, _STORED),
    "lowrank_mfac": Known(_ours("MFAC"), _FISHER, (*_PROJECTED, "proj_type", *_STORED)),
}


def build_optimizer(model: nn.Module, c: OptimConfig) -> tuple[torch.optim.Optimizer, ParamGroups]:
    """The optimizer and the groups it was given; `lr` goes to the matrices, `other_lr` to everything else.

    Raises:
        ConfigError: If a value is out of range, or one was given that this optimizer does not take.
    """
    known = OPTIMIZERS[c.name]
    _refuse_unknown(known, c)
    given = {f.name: getattr(c, f.name) for f in fields(c)}
    given = {name: known.tuned.get(name) if value is None else value for name, value in given.items()}
    arguments = {name: given[option] for option, name in known.arguments.items() if given[option] is not None}
    of_matrices = {name: given[name] for name in known.of_matrices if given[name] is not None}
    try:
        groups = param_groups(model, weight_decay=c.weight_decay, other_lr=c.other_lr, **of_matrices)
        return known.make(groups, lr=c.lr, **arguments), groups
    except ValueError as error:
        raise ConfigError(f"optim: {error}") from error


def _refuse_unknown(known: Known, c: OptimConfig) -> None:
    # null by default, so a value is meant to do something; how to project is left out, so that one command line with
    # another name compares projecting with not
    taken = {*SHARED, *known.arguments, *known.of_matrices, *_PROJECTED}
    for option in fields(c):
        if option.default is None and option.name not in taken and (value := getattr(c, option.name)) is not None:
            raise ConfigError(f"optim.{option.name}={value} means nothing to optim.name={c.name}")


def lr_factor(step: int, steps: int, warmup: int, floor: float) -> float:
    """Factor on every learning rate at `step` (from 1): linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
