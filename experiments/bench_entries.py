"""The optimizers of the benchmark, in three families: GaLore over its period, all projected AdamW, and momentum."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from experiments import bench_costs as costs
from experiments.bench_workloads import Entry
from lowrank_optim import APOLLOAdamW, AuON, DCTAdamW, FiraAdamW, GaLoreAdamW, LDAdamW, LowRankMuon, Muon, Trion

LR = 1e-3
SCALE = 0.25
# torch.optim.Muon's default, for the whole family: each pays for its decay
MUON_DECAY = 0.1

Params = list[nn.Parameter]


def _adamw(**options: Any) -> Entry:
    return Entry(lambda params, rank, gap: torch.optim.AdamW(params, lr=LR, weight_decay=0.0, **options), costs.adamw)


def _galore_group(params: Params, rank: int, gap: int) -> dict[str, Any]:
    return {"params": params, "rank": rank, "update_proj_gap": gap, "scale": SCALE, "proj_type": "std"}


def _galore(basis: str, *, stagger: bool = True, state_dtype: str = "float32", **fields: Any) -> Entry:
    def build(params: Params, rank: int, gap: int) -> torch.optim.Optimizer:
        groups = [_galore_group(params, rank, gap)]
        return GaLoreAdamW(groups, lr=LR, basis=basis, stagger=stagger, state_dtype=state_dtype)

    cost = costs.galore(basis, stagger=stagger, state_dtype=state_dtype)
    return Entry(build, cost, refreshes=True, stagger=stagger, **fields)


def _galore_torch(params: Params, rank: int, gap: int) -> torch.optim.Optimizer:
    # imports transformers and bitsandbytes, so only when asked for
    peer: Any = importlib.import_module("galore_torch")
    optimizer: torch.optim.Optimizer = peer.GaLoreAdamW(
        [_galore_group(params, rank, gap)], lr=LR, no_deprecation_warning=True
    )
    return optimizer


def _projected(
    kind: Callable[..., torch.optim.Optimizer], cost: costs.CostOf, form: str | None = None, **options: Any
) -> Entry:
    def build(params: Params, rank: int, gap: int) -> torch.optim.Optimizer:
        return kind(params, **({"lr": LR, "rank": rank} | options))

    return Entry(build, cost, float32_form=form)


def _apollo_torch(params: Params, rank: int, gap: int) -> torch.optim.Optimizer:
    peer: Any = importlib.import_module("apollo_torch")
    kind = {"proj": "random", "scale_type": "channel", "scale": 1.0}
    optimizer: torch.optim.Optimizer = peer.APOLLOAdamW([_galore_group(params, rank, gap) | kind], lr=LR)
    return optimizer


def _fira(params: Params, rank: int, gap: int) -> torch.optim.Optimizer:
    peer: Any = importlib.import_module("fira")
    group = _galore_group(params, rank, gap)
    group["alpha"] = group.pop("scale")
    optimizer: torch.optim.Optimizer = peer.FiraAdamW([group], lr=LR, no_deprecation_warning=True)
    return optimizer


def _muon(cost: costs.CostOf, *, float32_form: str | None = None, **options: Any) -> Entry:
    def build(params: Params, rank: int, gap: int) -> torch.optim.Optimizer:
        return Muon(params, lr=LR, weight_decay=MUON_DECAY, **options)

    return Entry(build, cost, float32_form=float32_form)


def _stored(state_dtype: str) -> Entry:
    return _muon(costs.muon(state_dtype, either_form=True), float32_form="muon", state_dtype=state_dtype)


def _lowrank_muon(basis: str, residual: float | None = None) -> Entry:
    def build(params: Params, rank: int, gap: int) -> torch.optim.Optimizer:
        # "dct" chooses its columns anew at each step, as by default
        every = None if basis == "dct" else gap
        options: dict[str, Any] = {"rank": rank, "basis": basis, "update_proj_gap": every, "residual": residual}
        return LowRankMuon(params, lr=LR, weight_decay=MUON_DECAY, **options)

    cost = costs.lowrank_muon(basis, residual=residual is not None)
    return Entry(build, cost, refreshes=basis != "dct", stagger=basis != "dct")


def _trion(basis: str) -> Entry:
    def build(params: Params, rank: int, gap: int) -> torch.optim.Optimizer:
        return Trion(params, lr=LR, weight_decay=MUON_DECAY, rank=rank, basis=basis)

    return Entry(build, costs.trion(basis))


def _auon(steps: int) -> Entry:
    def build(params: Params, rank: int, gap: int) -> torch.optim.Optimizer:
        return AuON(params, lr=LR, weight_decay=MUON_DECAY, ns_steps=steps)

    return Entry(build, costs.auon(steps))


def _peer_muon(build: Callable[[Params], torch.optim.Optimizer], **fields: Any) -> Entry:
    return Entry(lambda params, rank, gap: build(params), costs.muon(), writes_gradients=True, **fields)


def _heavyball(params: Params) -> torch.optim.Optimizer:
    peer: Any = importlib.import_module("heavyball")
    optimizer: torch.optim.Optimizer = peer.Muon(params, lr=LR, betas=(0.95, 0.99), weight_decay=MUON_DECAY)
    return optimizer


def _pytorch_optimizer(params: Params) -> torch.optim.Optimizer:
    peer: Any = importlib.import_module("pytorch_optimizer")
    groups = [{"params": params, "use_muon": True}]
    optimizer: torch.optim.Optimizer = peer.Muon(groups, lr=LR, weight_decay=MUON_DECAY)
    return optimizer


def _muon_optimizer(params: Params) -> torch.optim.Optimizer:
    peer: Any = importlib.import_module("muon")
    optimizer: torch.optim.Optimizer = peer.SingleDeviceMuon(params, lr=LR, weight_decay=MUON_DECAY)
    return optimizer


_GALORE: dict[str, Entry] = {
    "adamw_loop": _adamw(foreach=False, fused=False),
    "adamw_foreach": _adamw(foreach=True),
    "adamw_fused": _adamw(fused=True),
    "galore_svd": _galore("svd"),
    "galore_svd_unstaggered": _galore("svd", stagger=False),
    "galore_subspace": _galore("subspace"),
    "galore_subspace_unstaggered": _galore("subspace", stagger=False),
    "galore_torch": Entry(_galore_torch, costs.galore("svd", state_dtype=None), refreshes=True),
}

_IDENTITY = {"basis": "identity", "update_proj_gap": 1, "carry": "rotate", "scale": 1.0}
_ONE = {"rank": 1, "scale": 128.0, "scale_type": "tensor", "proj_dtype": "float32"}

_PROJECTED: dict[str, Entry] = {
    "galore_torch": _GALORE["galore_torch"],
    "galore_subspace": _GALORE["galore_subspace"],
    "galore_subspace_every_step": _projected(GaLoreAdamW, costs.every_step, basis="subspace", update_proj_gap=1),
    "dct_adamw": _projected(DCTAdamW, costs.dct_adamw()),
    "dct_adamw_ages": _projected(DCTAdamW, costs.dct_adamw(ages=True), column_ages=True),
    "dct_adamw_int8": _projected(DCTAdamW, costs.dct_adamw(state_dtype="int8"), "dct_adamw", state_dtype="int8"),
    "dct_adamw_error_int8": _projected(DCTAdamW, costs.dct_adamw(error="int8"), error_feedback="int8"),
    "identity": _projected(GaLoreAdamW, costs.columns, **_IDENTITY),
    "fira": _projected(FiraAdamW, costs.galore("subspace"), basis="subspace"),
    "fira_peer": Entry(_fira, costs.galore("svd", state_dtype=None), refreshes=True),
    "ldadam": _projected(LDAdamW, costs.ldadam),
    "apollo": _projected(APOLLOAdamW, costs.apollo, proj_dtype="float32"),
    "apollo_bfloat16": _projected(APOLLOAdamW, costs.apollo_bfloat16, "apollo", proj_dtype="bfloat16"),
    "apollo_mini": _projected(APOLLOAdamW, lambda shape, rank, dtype: costs.apollo(shape, 1, dtype), **_ONE),
    "apollo_torch": Entry(_apollo_torch, costs.apollo, refreshes=True),
    "adamw_fused": _GALORE["adamw_fused"],
}

_MUON: dict[str, Entry] = {
    "torch_muon": Entry(
        lambda params, rank, gap: torch.optim.Muon(params, lr=LR, weight_decay=MUON_DECAY), costs.muon()
    ),
    "muon": _muon(costs.muon(either_form=True)),
    "muon_bfloat16": _stored("bfloat16"),
    "muon_int8": _stored("int8"),
    "muon_int4": _stored("int4"),
    "normuon": _muon(costs.muon(either_form=True, row_averages=True), normuon_beta2=0.95),
    "lowrank_muon": _lowrank_muon("dct"),
    "lowrank_muon_residual": _lowrank_muon("dct", residual=0.3),
    "lowrank_muon_svd": _lowrank_muon("svd"),
    "lowrank_muon_subspace": _lowrank_muon("subspace"),
    "trion": _trion("dct"),
    "dion2": _trion("identity"),
    "auon": _auon(0),
    "hybrid_auon": _auon(1),
    "galore_svd": _GALORE["galore_svd"],
    "galore_svd_int8": _galore("svd", state_dtype="int8", float32_form="galore_svd"),
    "adamw_fused": _GALORE["adamw_fused"],
    "heavyball": _peer_muon(
        _heavyball,
        compiles=True,
        note="as it comes: with torch.compile (max-autotune-no-cudagraphs), compiled before the first timed step; "
        "You's coefficients, stochastic rounding to bfloat16",
    ),
    "pytorch_optimizer": _peer_muon(_pytorch_optimizer, note="as it comes: matrices of one shape in one batch"),
    "muon_optimizer": _peer_muon(_muon_optimizer, note="SingleDeviceMuon, as it comes"),
}

ENTRIES: dict[str, Entry] = _GALORE | _PROJECTED | _MUON


@dataclass(frozen=True)
class Family:
    """Optimizers that are measured together: their names, the one that ratios are to, and how many rounds.

    None: whole refresh periods, because what matters is the one step in many that finds a basis. Otherwise steps are
    much alike, and a number of rounds gives their median.
    """

    names: tuple[str, ...]
    baseline: str
    rounds: int | None
    # also count operations, and set them beside the formulas
    flops: bool


FAMILIES = {
    "galore": Family(tuple(_GALORE), "adamw_fused", rounds=None, flops=False),
    "projected": Family(tuple(_PROJECTED), "galore_torch", rounds=15, flops=False),
    "muon": Family(tuple(_MUON), "torch_muon", rounds=15, flops=True),
}
