"""A model of a few hundred weights, and every way of using every optimizer of this package to train it."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import (
    MFAC,
    APOLLOAdamW,
    AuON,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    LDAdamW,
    LowRankMuon,
    Muon,
    SteepestDescent,
    Trion,
)
from lowrank_optim.optimizer import RuleOptimizer
from lowrank_optim.projected import ProjectedAdamW


@dataclass(frozen=True)
class Way:
    """An optimizer with the options that make it take one path through the package; called, it makes one.

    Args:
        name: which tests show.
        kind: the class.
        options: what it is given beside parameters.
    """

    name: str
    kind: type[RuleOptimizer]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, params: Iterable[Any], **options: Any) -> RuleOptimizer:
        params = list(params)
        if self.kind is GaLoreAdamW and not self.options and not isinstance(params[0], dict):
            # a rank is not an option for AdamW's groups, so those parameters come in a dict
            params = [{"params": params}]
        return self.kind(params, **(self.options | options))

    def rates(self, lr: float | Tensor) -> dict[str, Any]:
        """Return the options that make this the learning rate of every group."""
        return {"lr": lr, "fallback_lr": lr} if self.falls_back else {"lr": lr}

    @property
    def adam(self) -> bool:
        """Whether all parameters have moments of Adam, in coordinates or not."""
        return issubclass(self.kind, ProjectedAdamW)

    @property
    def falls_back(self) -> bool:
        """Whether it treats matrices in its own way, and what is none with an AdamW."""
        return not self.adam and self.kind is not MFAC

    @property
    def joint(self) -> bool:
        """Whether parameters share a state, so that one without a gradient takes part in that."""
        return self.kind is MFAC and self.options.get("scope") != "parameter"

    @property
    def counts(self) -> bool:
        """Whether how many gradients there have been matters, of zeros too."""
        return bool(self.options.keys() & {"divisor", "relative_damping"})

    @property
    def guarded(self) -> bool:
        """Whether a refresh of a basis waits for a gradient that is finite and not zero."""
        return self.basis in ("svd", "rsvd", "subspace")

    @property
    def basis(self) -> str:
        """The basis; "" where there is none, or one that asks nothing."""
        default = {FiraAdamW: "svd", LDAdamW: "subspace"}.get(self.kind, "")
        return str(self.options.get("basis", default))

    def seldom(self, gap: int) -> dict[str, Any]:
        """Return the options with which a guarded basis is refreshed every `gap` steps; LDAdam's always is, at each."""
        if self.kind is MFAC:
            return {"update_proj_gap": gap}
        return {"stagger": False, "update_proj_gap": gap} if self.guarded and self.kind is not LDAdamW else {}


# small gaps, so that the few steps of a test cross refreshes
_GALORE = {"rank": 2, "scale": 1.0}
# no decay, as for the others; products in float32, so that runs whose last bits differ may be compared
_MUON: dict[str, Any] = {"weight_decay": 0.0, "ns_dtype": "float32"}
_FISHER: dict[str, Any] = {"num_grads": 3, "damping": 0.1}

ALL = [
    Way("adamw", GaLoreAdamW),
    Way("svd", GaLoreAdamW, _GALORE | {"update_proj_gap": 3, "basis": "svd"}),
    Way("subspace", GaLoreAdamW, _GALORE | {"update_proj_gap": 2, "basis": "subspace"}),
    Way("galore-int8", GaLoreAdamW, _GALORE | {"update_proj_gap": 2, "basis": "subspace", "state_dtype": "int8"}),
    Way("galore-int4", GaLoreAdamW, _GALORE | {"update_proj_gap": 3, "basis": "svd", "state_dtype": "int4"}),
    Way("rotate", GaLoreAdamW, _GALORE | {"update_proj_gap": 2, "basis": "subspace", "carry": "rotate"}),
    Way("reset", GaLoreAdamW, _GALORE | {"update_proj_gap": 3, "basis": "dct", "carry": "reset", "residual": "sign"}),
    Way("feedback", GaLoreAdamW, _GALORE | {"update_proj_gap": 2, "basis": "rsvd", "error_feedback": "float32"}),
    Way("random", GaLoreAdamW, _GALORE | {"update_proj_gap": 2, "basis": "random", "carry": "rotate"}),
    Way("adaptive", GaLoreAdamW, _GALORE | {"update_proj_gap": 2, "basis": "subspace", "adaptive_overlap": 0.5}),
    Way("identity", GaLoreAdamW, _GALORE | {"update_proj_gap": 2, "basis": "identity"}),
    Way("dct", DCTAdamW, {"rank": 2}),
    Way("dct-ages", DCTAdamW, {"rank": 2, "column_ages": True, "error_feedback": "int8"}),
    Way("dct-int8", DCTAdamW, {"rank": 2, "update_proj_gap": 2, "carry": "keep", "state_dtype": "int8"}),
    # projected in float32, so that runs whose last bits differ may be compared
    Way("apollo", APOLLOAdamW, {"rank": 2, "update_proj_gap": 3, "proj_dtype": "float32"}),
    Way("apollo-bfloat16", APOLLOAdamW, {"rank": 2, "update_proj_gap": 3}),
    Way("apollo-mini", APOLLOAdamW, {"rank": 1, "update_proj_gap": 2, "scale": 128.0, "scale_type": "tensor"}),
    Way("apollo-int8", APOLLOAdamW, {"rank": 2, "update_proj_gap": 2, "basis": "svd", "state_dtype": "int8"}),
    Way("fira", FiraAdamW, {"rank": 2, "update_proj_gap": 3}),
    Way(
        "fira-code",
        FiraAdamW,
        {"rank": 2, "update_proj_gap": 2, "basis": "subspace", "carry": "rotate", "published_code": True},
    ),
    Way("fira-int8", FiraAdamW, {"rank": 2, "update_proj_gap": 2, "norm_growth": None, "state_dtype": "int8"}),
    Way("ldadam", LDAdamW, {"rank": 2}),
    Way("ldadam-int4", LDAdamW, {"rank": 2, "error_feedback": "int4", "state_dtype": "int8"}),
    Way("muon", Muon, {"weight_decay": 0.0, "ns_dtype": "bfloat16"}),
    Way(
        "normuon",
        Muon,
        _MUON | {"normuon_beta2": 0.9, "momentum_form": "sum", "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
    ),
    Way("muon-nuclear", Muon, _MUON | {"adjust_lr_fn": "nuclear", "cautious": True, "method": "eigh"}),
    Way("muon-bfloat16", Muon, _MUON | {"state_dtype": "bfloat16"}),
    Way("muon-int8", Muon, _MUON | {"state_dtype": "int8"}),
    Way("muon-int4", Muon, _MUON | {"state_dtype": "int4", "fallback_lr": 3e-3}),
    Way("lowrank-dct", LowRankMuon, _MUON | {"rank": 2}),
    Way("lowrank-svd", LowRankMuon, _MUON | {"rank": 2, "basis": "svd", "update_proj_gap": 3}),
    Way("lowrank-int8", LowRankMuon, _MUON | {"rank": 0.5, "basis": "identity", "state_dtype": "int8"}),
    Way(
        "residual",
        LowRankMuon,
        _MUON | {"rank": 2, "basis": "subspace", "update_proj_gap": 2, "residual": 0.5, "state_dtype": "int4"},
    ),
    Way("stateless", LowRankMuon, _MUON | {"rank": 0, "residual": 1.0}),
    Way("trion", Trion, {"rank": 2, "ns_dtype": "float32"}),
    Way("dion2", Trion, {"rank": 0.5, "basis": "identity", "ns_dtype": "float32", "state_dtype": "int8"}),
    Way("auon", AuON),
    Way("hybrid-auon", AuON, {"ns_steps": 1, "ns_dtype": "float32", "state_dtype": "bfloat16"}),
    Way("steepest", SteepestDescent, {"ns_dtype": "float32"}),
    # windows that wrap around within a test's few steps
    Way("mfac", MFAC, _FISHER),
    Way("mfac-alone", MFAC, _FISHER | {"scope": "parameter", "divisor": "count", "momentum": 0.9}),
    Way("mfac-dct", MFAC, _FISHER | {"rank": 2, "update_proj_gap": 2, "momentum": 0.9}),
    Way("mfac-svd", MFAC, _FISHER | {"rank": 2, "basis": "svd", "relative_damping": True, "update_proj_gap": 3}),
    Way("mfac-bfloat16", MFAC, _FISHER | {"state_dtype": "bfloat16", "momentum": 0.5}),
    Way("steepest-int4", SteepestDescent, {"ns_dtype": "float32", "state_dtype": "int4"}),
]
WAYS = [pytest.param(way, id=way.name) for way in ALL]
NAMED = {way.name: way for way in ALL}
# where what is kept between steps makes no difference
PATHS = [pytest.param(way, id=way.name) for way in ALL if way.name == "muon-int4" or "state_dtype" not in way.options]
# one for each class, where the path within a class makes no difference
_ONES = ("svd", "dct", "apollo", "fira", "ldadam", "muon", "lowrank-dct", "trion", "auon", "steepest", "mfac")
CLASSES = [pytest.param(NAMED[name], id=name) for name in _ONES]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 10, bias=False))


def backward(model: nn.Module, seed: int = 0) -> Tensor:
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed))
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach()


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int, *, sign: int = 1) -> None:
    for seed in range(steps):
        opt.zero_grad()
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed))
        (sign * model(x).square().mean()).backward()
        opt.step()


def snapshot(model: nn.Module, opt: torch.optim.Optimizer) -> Any:
    return copy.deepcopy((list(model.parameters()), opt.state_dict()["state"]))


def same(one: Any, two: Any) -> bool:
    """Bit for bit, through lists and dicts."""
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two
