"""Optimizers that treat matrices in their own way and leave the rest to AdamW."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim import distributed
from lowrank_optim._checks import check_choice, check_fallback, check_newton_schulz, require
from lowrank_optim._types import Rule
from lowrank_optim.adam import Adam
from lowrank_optim.coefficients import table
from lowrank_optim.optimizer import Group, RuleOptimizer
from lowrank_optim.orthogonal import METHODS, Spectral
from lowrank_optim.steering import ADJUSTMENTS, NUCLEAR, Layout
from lowrank_optim.storage import STATE_DTYPES, storage

# Newton–Schulz coefficients as published by Keller Jordan, used five times
JORDAN = (3.4445, -4.775, 2.0315)
# the default of `ns_steps`, torch's
_STEPS = 5
# what other packages call the numbers of their AdamW groups
_THEIR_KEYS = {"betas": "fallback_betas", "eps": "fallback_eps"}
NS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class MatrixOptimizer(RuleOptimizer):
    """Groups with the role "matrix" follow `_matrix_rule`; those with any other role are AdamW.

    A group that names no role is a matrix group as far as its parameters have two dimensions or more; the others, if
    there are any, become a group of their own with the role "vector". `use_muon`, by which other packages sort, is
    understood as a role too.
    """

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        super().__init__(params, {**defaults, "role": "matrix"})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, or two where one without a role holds matrices and vectors; see `RuleOptimizer`."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            super().add_param_group(param_group)
            return
        count = len(self.param_groups)
        try:
            for group in _by_role(param_group, fallback=self.defaults["fallback_lr"] is not None):
                if group["role"] != "matrix" and self.defaults["fallback_lr"] is not None:
                    group.setdefault("lr", self.defaults["fallback_lr"])
                super().add_param_group(group)
                if "role" not in param_group:
                    distributed.refuse_flattened_group(self.param_groups[-1]["params"], type(self).__name__)
        except (ValueError, RuntimeError, TypeError):
            for group in self.param_groups[count:]:
                for p in group["params"]:
                    self.state.pop(p, None)
            del self.param_groups[count:]
            raise

    def _spectral(self, group: Group, p: Tensor, usual: str = "bfloat16") -> Spectral:
        """Return the orthogonalization that a group asks for; float64 parameters keep their precision."""
        dtype = torch.float64 if p.dtype == torch.float64 else NS_DTYPES[group["ns_dtype"] or usual]
        return Spectral(group["method"], _hashable(group["ns_coefficients"]), group["ns_steps"], group["eps"], dtype)

    def _layout(self, group: Group, p: Tensor) -> Layout:
        """Return which matrices a parameter holds; raises ValueError where it cannot hold them."""
        layout = Layout.of(group)
        layout.check(p.shape)
        return layout

    def _matrix_rule(self, group: Group, p: Tensor) -> Rule:
        """Return what is done with a matrix."""
        raise NotImplementedError

    def _rule(self, group: Group, p: Tensor) -> Rule:
        if group["role"] == "matrix" and p.numel():
            if distributed.is_sharded(p):
                distributed.refuse_shards(p, type(self).__name__)
            return self._matrix_rule(group, p)
        betas = cast("tuple[float, float]", tuple(group["fallback_betas"]))
        return Adam(storage(group["state_dtype"]), betas, group["fallback_eps"])

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_choice(group, "state_dtype", STATE_DTYPES)
        check_fallback(group)
        if group["role"] == "matrix":
            for p in group.get("params", ()):
                # a loaded group holds numbers
                if isinstance(p, Tensor) and p.dim() < 2:
                    raise ValueError(
                        f"{type(self).__name__}: a parameter of shape {tuple(p.shape)} is in a group with the role "
                        "'matrix', which needs two dimensions or more; give vectors a group with role='vector' (AdamW)"
                    )


def check_spectral(group: Group, *, least_steps: int = 1) -> None:
    """Raise ValueError for a value that says how to orthogonalize and is out of its range."""
    check_newton_schulz(group, methods=METHODS, dtypes=tuple(NS_DTYPES), least_steps=least_steps)
    if group["adjust_lr_fn"] is not None:
        check_choice(group, "adjust_lr_fn", (*ADJUSTMENTS, NUCLEAR))
    if group["ns_steps"]:
        coefficients, steps = _hashable(group["ns_coefficients"]), group["ns_steps"]
        if steps == _STEPS and isinstance(coefficients, str) and (own := len(table(coefficients))) != _STEPS:
            # nobody asks for a table of another length by the default
            require(False, group, "ns_steps", f"{own}, for which {coefficients!r} is made, or another number than 5")
        table(coefficients, steps)


def _hashable(coefficients: Any) -> Any:
    """Return nested tuples in the place of lists, which a state read from a file may hold."""
    return tuple(map(_hashable, coefficients)) if isinstance(coefficients, list | tuple) else coefficients


def _by_role(group: Group, *, fallback: bool) -> list[Group]:
    """Return the group with a role, or as two groups where it has none and holds both kinds.

    What other packages call AdamW's numbers is renamed in a group for AdamW. With a `fallback`, the lr of a group of
    both kinds is that of its matrices.
    """
    if "role" not in group and "use_muon" in group:
        require(isinstance(group["use_muon"], bool), group, "use_muon", "a bool")
        group = {**group, "role": "matrix" if group["use_muon"] else "other"}
    if "role" in group:
        theirs = {} if group["role"] == "matrix" else _THEIR_KEYS
        return [{new if (new := theirs.get(key, key)) not in group else key: value for key, value in group.items()}]
    params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    if isinstance(params, set):
        # torch says what is wrong with it
        return [{**group, "role": "matrix"}]
    kinds: dict[str, list[Any]] = {"matrix": [], "vector": []}
    for item in params:
        p = item[1] if isinstance(item, tuple) else item
        kinds["vector" if isinstance(p, Tensor) and p.dim() < 2 else "matrix"].append(item)
    if not kinds["matrix"] and not kinds["vector"]:
        return [{**group, "params": [], "role": "matrix"}]
    if fallback and all(kinds.values()):
        rest = {key: value for key, value in group.items() if key != "lr"}
        return [
            {**group, "params": kinds["matrix"], "role": "matrix"},
            {**rest, "params": kinds["vector"], "role": "vector"},
        ]
    return [{**group, "params": items, "role": kind} for kind, items in kinds.items() if items]
