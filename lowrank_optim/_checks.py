"""What a group may hold: one line for each number, naming the argument, the value and the range."""

import difflib
import math
from typing import Any

from torch import Tensor

# keys of other libraries' groups, which are accepted and mean nothing here
_IGNORED = {"params", "param_names", "name", "initial_lr", "foreach", "fused", "swa_lr"}
_UNSUPPORTED = ("capturable", "differentiable", "amsgrad")


def check_group(group: dict[str, Any], known: dict[str, Any]) -> None:
    """Raise ValueError for a number that every optimizer has and that is out of its range."""
    check_lr(group["lr"])
    require(_number(group["weight_decay"]) and group["weight_decay"] >= 0, group, "weight_decay", "a number >= 0")
    require(isinstance(group["maximize"], bool), group, "maximize", "a bool")
    if "betas" in group:
        betas = group["betas"]
        pair = isinstance(betas, tuple | list) and len(betas) == 2 and all(_number(b) and 0 <= b < 1 for b in betas)
        require(pair, group, "betas", "two numbers in [0, 1)")
    if "eps" in group:
        require(_number(group["eps"]) and group["eps"] >= 0, group, "eps", "a number >= 0")
    for key in _UNSUPPORTED:
        require(not group.get(key, False), group, key, "False: it is not supported")
    for key in group.keys() - known.keys() - _IGNORED:
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.8)
        if near:
            raise ValueError(f"unknown key {key!r} in a parameter group: did you mean {near[0]!r}?")


def check_lr(lr: Any) -> None:
    """Raise ValueError unless `lr` is a nonnegative number or a tensor of one element."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    elif not (_number(lr) and lr >= 0):
        raise ValueError(f"Invalid learning rate: {lr}, must be a number >= 0")


def check_projection(group: dict[str, Any], *, proj_types: tuple[str, ...], bases: tuple[str, ...]) -> None:
    """Raise ValueError for a value that says how to project and is out of its range."""
    rank = group["rank"]
    if rank is not None:
        fraction = isinstance(rank, float) and 0 < rank <= 1
        require(fraction or (_whole(rank) and rank >= 1), group, "rank", "an int >= 1 or a float in (0, 1]")
    gap = group["update_proj_gap"]
    require(_whole(gap) and gap >= 1, group, "update_proj_gap", "an int >= 1")
    require(_number(group["scale"]), group, "scale", "a finite number")
    require(group["proj_type"] in proj_types, group, "proj_type", f"one of {', '.join(proj_types)}")
    require(group["basis"] in bases, group, "basis", f"one of {', '.join(bases)}")
    require(isinstance(group["stagger"], bool), group, "stagger", "a bool")


def require(holds: bool, group: dict[str, Any], key: str, allowed: str) -> None:
    """Raise ValueError naming the argument, its value and what is allowed."""
    if not holds:
        raise ValueError(f"Invalid {key}: {group[key]!r}, must be {allowed}")


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)
