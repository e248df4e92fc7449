"""A model of a few hundred weights, and the ways in which GaLoreAdamW trains it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW

PROJECTED = [
    {"rank": 2, "update_proj_gap": 3, "scale": 1.0, "basis": "svd"},
    {"rank": 2, "update_proj_gap": 2, "scale": 1.0, "basis": "subspace"},
]
# a rank is not an option for AdamW's groups, so those parameters come in a dict
WAYS = [pytest.param({}, id="adamw"), *(pytest.param(way, id=way["basis"]) for way in PROJECTED)]


def make(params: Any, way: dict[str, Any], **options: Any) -> GaLoreAdamW:
    params = list(params)
    return GaLoreAdamW(params if way or isinstance(params[0], dict) else [{"params": params}], **(way | options))


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
