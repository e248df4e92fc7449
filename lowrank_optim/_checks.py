"""What a group may hold: one line for each number, naming the argument, the value and the range."""

import difflib
import math
from typing import Any, Literal, get_args

from torch import Tensor

# what a group of `param_groups` is: "other" are matrices that are not targets, and all but "matrix" is for AdamW
Role = Literal["matrix", "embedding", "head", "other", "vector"]

# keys of other libraries' groups and of `param_groups`, accepted also by an optimizer to which they mean nothing
_IGNORED = {
    *("params", "param_names", "name", "initial_lr", "foreach", "fused", "swa_lr", "role", "split", "flatten"),
    # torch's AdamW says it of its own
    "decoupled_weight_decay",
}
# keys of one optimizer of this package, whose meaning would be lost silently in another
_PARTICULAR = {
    *("momentum_form", "normuon_beta2", "residual", "gamma", "normalize", "norm"),
    *("carry", "adaptive_overlap", "residual_scale", "ranking", "column_ages", "error_feedback", "scale_type", "rho"),
    *("num_grads", "damping", "relative_damping", "divisor", "scope", "sparse"),
    *("norm_growth", "published_code", "seed", "proj_dtype", "scale", "alpha", "proj", "enable_lowrank"),
}
_UNSUPPORTED = ("capturable", "differentiable", "amsgrad")


def check_group(group: dict[str, Any], known: dict[str, Any]) -> None:
    """Raise ValueError for a number that every optimizer has and that is out of its range."""
    check_lr(group["lr"])
    require(_number(group["weight_decay"]) and group["weight_decay"] >= 0, group, "weight_decay", "a number >= 0")
    for key in ("maximize", "cautious"):
        require(isinstance(group.get(key, False), bool), group, key, "a bool")
    require(isinstance(group["stochastic_rounding"], bool), group, "stochastic_rounding", "a bool")
    _check_adam(group, "betas", "eps")
    if group.get("role") is not None:
        require(group["role"] in get_args(Role), group, "role", f"one of {', '.join(get_args(Role))}")
    for key in _UNSUPPORTED:
        require(not group.get(key, False), group, key, "False: it is not supported")
    for key in sorted(map(str, group.keys() - known.keys() - _IGNORED)):
        if key in _PARTICULAR:
            raise ValueError(f"Invalid key {key!r} in a parameter group: it means nothing to this optimizer")
        near = difflib.get_close_matches(key, {*known, *_IGNORED}, n=1, cutoff=0.8)
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
    if group["rank"] is not None:
        check_rank(group)
    gap = group["update_proj_gap"]
    require(_whole(gap) and gap >= 1, group, "update_proj_gap", "an int >= 1")
    check_choice(group, "proj_type", proj_types)
    check_choice(group, "basis", bases)
    require(isinstance(group["stagger"], bool), group, "stagger", "a bool")
    # not keys of all
    if "scale" in group:
        require(_number(group["scale"]), group, "scale", "a finite number")


def check_adaptive(group: dict[str, Any]) -> None:
    """Raise ValueError unless the overlap that lengthens a period is None or a share of a subspace."""
    overlap = group["adaptive_overlap"]
    require(overlap is None or (_number(overlap) and 0 < overlap <= 1), group, "adaptive_overlap", "None or in (0, 1]")


def check_residual(group: dict[str, Any], residuals: tuple[str, ...]) -> None:
    """Raise ValueError for a value that says what becomes of the rest of a gradient and is out of its range."""
    known = ("None", *map(repr, residuals))
    require(group["residual"] is None or group["residual"] in residuals, group, "residual", " or ".join(known))
    share = group["residual_scale"]
    require(share is None or _number(share), group, "residual_scale", "None or a finite number")
    if group["error_feedback"] is not None:
        require(
            group["residual"] is None, group, "residual", "None with error_feedback, which keeps that part for later"
        )


def check_one_side(group: dict[str, Any], why: str) -> None:
    """Raise ValueError where coordinates have no side of the matrix left."""
    require(group["proj_type"] != "full", group, "proj_type", f"another than 'full': {why}")


def check_share(group: dict[str, Any], key: str) -> None:
    """Raise ValueError unless the value is a number from 0 to 1."""
    require(_number(group[key]) and 0 <= group[key] <= 1, group, key, "a number in [0, 1]")


def check_seed(group: dict[str, Any]) -> None:
    """Raise ValueError unless the seed is a whole number that leaves room for what is added to it."""
    require(_whole(group["seed"]) and 0 <= group["seed"] <= 1 << 30, group, "seed", "an int in [0, 2**30]")


def check_growth(group: dict[str, Any], key: str) -> None:
    """Raise ValueError unless the value is None or a factor of growth."""
    growth = group[key]
    require(growth is None or (_number(growth) and growth >= 1), group, key, "None or a number >= 1")


def check_rank(group: dict[str, Any], least: int = 1) -> None:
    """Raise ValueError unless the rank is a number of vectors, `least` or more, or a fraction of the short side."""
    rank = group["rank"]
    fraction = isinstance(rank, float) and 0 < rank <= 1
    require(fraction or (_whole(rank) and rank >= least), group, "rank", f"an int >= {least} or a float in (0, 1]")


def check_uncut(group: dict[str, Any]) -> None:
    """Raise ValueError where a parameter is to be seen as several matrices by what has one basis for each."""
    one = "there is one basis for each parameter (Muon takes several matrices in one)"
    require(group.get("split") is None, group, "split", f"None: {one}")
    require(group.get("flatten", True) is True, group, "flatten", f"True: {one}")


def check_coordinates(group: dict[str, Any], *, bases: tuple[str, ...]) -> None:
    """Raise ValueError for a value that says in what coordinates a momentum is kept and is out of its range."""
    gap, share = group["update_proj_gap"], group["residual"]
    require(share is None or (_number(share) and share >= 0), group, "residual", "None or a number >= 0")
    if group["rank"] == 0 and not share:
        raise ValueError(f"Invalid rank: {group['rank']!r}, which keeps no momentum, needs a residual, such as 1.0")
    check_rank(group, least=0)
    require(gap is None or (_whole(gap) and gap >= 1), group, "update_proj_gap", "None or an int >= 1")
    check_choice(group, "basis", bases)
    require(isinstance(group["stagger"], bool), group, "stagger", "a bool")


def check_fallback(group: dict[str, Any]) -> None:
    """Raise ValueError for a number of the AdamW that is used beside the matrices and that is out of its range."""
    _check_adam(group, "fallback_betas", "fallback_eps")
    if group["fallback_lr"] is not None:
        check_lr(group["fallback_lr"])


def check_momentum(group: dict[str, Any]) -> None:
    """Raise ValueError for a value that says how momentum is kept and is out of its range."""
    beta = group["momentum"]
    require(_number(beta) and 0 <= beta < 1, group, "momentum", "a number in [0, 1)")
    require(isinstance(group.get("nesterov", False), bool), group, "nesterov", "a bool")
    check_layout(group)


def check_layout(group: dict[str, Any]) -> None:
    """Raise ValueError for a value that says which matrices a parameter holds and is out of its range."""
    require(isinstance(group.get("flatten", True), bool), group, "flatten", "a bool")
    if group.get("split") is not None:
        split = group["split"]
        sizes = [split] if _whole(split) else split
        fits = isinstance(sizes, list | tuple) and bool(sizes) and all(_whole(size) and size >= 1 for size in sizes)
        require(fits, group, "split", "a number of equal blocks of rows, or a sequence of the rows of each")


def check_beta2(group: dict[str, Any], key: str) -> None:
    """Raise ValueError unless the value is None or a decay."""
    beta = group[key]
    require(beta is None or (_number(beta) and 0 <= beta < 1), group, key, "None or a number in [0, 1)")


def check_cosh(group: dict[str, Any]) -> None:
    """Raise ValueError for a value of AuON's factor that is out of its range."""
    # the square of cosh(44) is no float32
    require(_number(group["gamma"]) and 0 <= group["gamma"] <= 32, group, "gamma", "a number in [0, 32]")
    require(isinstance(group["normalize"], bool), group, "normalize", "a bool")


def check_newton_schulz(
    group: dict[str, Any], *, methods: tuple[str, ...], dtypes: tuple[str, ...], least_steps: int
) -> None:
    """Raise ValueError for a value that says how to orthogonalize and is out of its range; coefficients apart."""
    steps = group["ns_steps"]
    require(_whole(steps) and least_steps <= steps < 100, group, "ns_steps", f"an int in [{least_steps}, 100)")
    require(_number(group["eps"]) and group["eps"] >= 0, group, "eps", "a number >= 0")
    check_choice(group, "method", methods)
    if group["ns_dtype"] is not None:
        check_choice(group, "ns_dtype", dtypes)


def check_choice(group: dict[str, Any], key: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of these words."""
    require(isinstance(group[key], str) and group[key] in allowed, group, key, f"one of {', '.join(allowed)}")


def require(holds: bool, group: dict[str, Any], key: str, allowed: str) -> None:
    """Raise ValueError naming the argument, its value and what is allowed."""
    if not holds:
        raise ValueError(f"Invalid {key}: {group[key]!r}, must be {allowed}")


def _check_adam(group: dict[str, Any], betas: str, eps: str) -> None:
    if betas in group:
        pair = isinstance(group[betas], tuple | list) and len(group[betas]) == 2
        inside = pair and all(_number(beta) and 0 <= beta < 1 for beta in group[betas])
        require(inside, group, betas, "two numbers in [0, 1)")
    if eps in group:
        require(_number(group[eps]) and group[eps] >= 0, group, eps, "a number >= 0")


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)
