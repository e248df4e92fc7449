"""Kernels as operations that torch knows: for `torch.compile`, fake tensors, and whatever else looks on.

Each function does as the kernel's own of the same name, with the launch shapes of the table. A compiler sees what is
launched, but for what stays opaque: kernels that find their tensors by addresses in a table, kernels with constants
that stay on the device, which a graph would make at each call, and all of them where they are interpreted.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from torch.library import custom_op, triton_op

from ._rounding import wrapped
from .adam import stored_adam_directions_ as _adam
from .adamw import adamw_ as _adamw
from .apply import apply_ as _apply
from .apply import apply_kernel
from .dct import dct_energies as _dct
from .dct import supports as _supports
from .factored_add import apply_sum_ as _apply_sum
from .momentum import normalized_momenta_ as _momenta
from .normalized import normalized as _normalized
from .recursion import Triple
from .recursion import gram_recursion as _recursion
from .symmetric import symmetric as _symmetric

_INTERPRETED = not isinstance(apply_kernel, triton.JITFunction)
torch.compiler.assume_constant_result(_supports)  # type: ignore[no-untyped-call]


def _operation(
    name: str, fake: Callable[..., Any], *, mutates: tuple[str, ...] = (), opaque: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Register a function; `fake` says what its result looks like."""

    def register(function: Callable[..., Any]) -> Any:
        made: Any = custom_op if opaque or _INTERPRETED else triton_op
        operation = made(f"lowrank_optim::{name}", function, mutates_args=mutates)
        operation.register_fake(fake)
        return operation

    return register


def _nothing(*_: Any) -> None: ...


def _fake_symmetric(a: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return torch.empty((a.size(0), a.size(1), a.size(1)), dtype=dtype or a.dtype, device=a.device)


@_operation("symmetric", _fake_symmetric)
def symmetric(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Do as `symmetric.symmetric`."""
    return _symmetric(a, b, c, alpha=alpha, beta=beta, gamma=gamma, dtype=dtype)


def _fake_like(x: Tensor, *_: Any, dtype: torch.dtype, **__: Any) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@_operation("normalized", _fake_like)
def normalized(x: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """Do as `normalized.normalized`."""
    return _normalized(x, eps=eps, dtype=dtype)


def _fake_dct(x: Tensor, dim: int, *, out_dtype: torch.dtype, ranking: str = "l2") -> tuple[Tensor, Tensor]:
    shape = x.shape if dim == -1 else x.mT.shape
    out = torch.empty(shape, dtype=out_dtype, device=x.device)
    return out if dim == -1 else out.mT, torch.empty(shape[1], dtype=torch.float32, device=x.device)


@_operation("dct_energies", _fake_dct, opaque=True)
def dct_energies(x: Tensor, dim: int, *, out_dtype: torch.dtype, ranking: str = "l2") -> tuple[Tensor, Tensor]:
    """Do as `dct.dct_energies`."""
    return _dct(x, dim, out_dtype=out_dtype, ranking="l1" if ranking == "l1" else "l2")


def supports(n: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Do as `dct.supports`; a compiled graph is for this n."""
    return _supports(index(n), dtype, device)


@_operation("gram_recursion", _fake_like, opaque=True)
def _gram_recursion(r: Tensor, triples: Sequence[float], *, dtype: torch.dtype) -> Tensor:
    return _recursion(r, list(zip(triples[::3], triples[1::3], triples[2::3], strict=True)), dtype=dtype)


def gram_recursion(r: Tensor, triples: Sequence[Triple], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Do as `recursion.gram_recursion`."""
    made: Tensor = _gram_recursion(r, [number for triple in triples for number in triple], dtype=dtype)
    return made


@_operation("apply_", _nothing, mutates=("param",))
def _apply_(
    param: Tensor, update: Tensor, rate: Tensor | None, lr: float, weight_decay: float, seed: int | None, cautious: bool
) -> None:
    _apply(param, update, lr=lr if rate is None else rate, weight_decay=weight_decay, seed=seed, cautious=cautious)


def apply_(
    param: Tensor,
    update: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float,
    seed: int | None = None,
    cautious: bool = False,
) -> None:
    """Do as `apply.apply_`."""
    _apply_(param, update, *_rates(lr), weight_decay, _seed(seed), cautious)


@_operation("apply_sum_", _nothing, mutates=("param",))
def _apply_sum_(
    param: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    matrix: Tensor | None,
    factors: Tensor | None,
    rate: Tensor | None,
    lr: float,
    weight_decay: float,
    seed: int | None,
) -> None:
    product = None if left is None or right is None else (left, right)
    scaled = None if matrix is None or factors is None else (matrix, factors)
    _apply_sum(param, product, scaled, lr=lr if rate is None else rate, weight_decay=weight_decay, seed=seed)


def apply_sum_(
    param: Tensor,
    product: tuple[Tensor, Tensor] | None,
    scaled: tuple[Tensor, Tensor] | None,
    *,
    lr: float | Tensor,
    weight_decay: float,
    seed: int | None = None,
) -> None:
    """Do as `factored_add.apply_sum_`."""
    tensors = (*(product or (None, None)), *(scaled or (None, None)))
    _apply_sum_(param, *tensors, *_rates(lr), weight_decay, _seed(seed))


def _rates(lr: float | Tensor) -> tuple[Tensor | None, float]:
    """Return the rate as an operation takes it, whose arguments are of one type each."""
    return (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)


def _seed(seed: int | None) -> int | None:
    """Return a seed that is within the integers of an operation."""
    return None if seed is None else wrapped(seed)


_ADAM_WRITES = ("firsts", "first_scales", "seconds", "second_scales")


def _fake_stack(grads: Sequence[Tensor], *_: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty((len(grads), *grads[0].shape), dtype=dtype, device=grads[0].device)


@_operation("stored_adam_directions_", _fake_stack, mutates=_ADAM_WRITES, opaque=True)
def _stored_adam_directions_(
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    first_scales: Sequence[Tensor],
    seconds: Sequence[Tensor],
    second_scales: Sequence[Tensor],
    state_dtype: str,
    betas: Sequence[float],
    eps: float,
    steps: Sequence[int],
    seeds: Sequence[int],
    scale: float,
    *,
    dtype: torch.dtype,
) -> Tensor:
    states = _states(exp_avg=firsts, exp_avg_scale=first_scales, exp_avg_sq=seconds, exp_avg_sq_scale=second_scales)
    numbers: dict[str, Any] = {"betas": tuple(betas), "eps": eps, "steps": steps, "seeds": seeds, "scale": scale}
    first = _adam(grads, states, state_dtype=state_dtype, **numbers, dtype=dtype)[0]
    # they are in one piece of memory; an operation returns no two tensors that share theirs
    return first.as_strided((len(grads), *first.shape), (first.numel(), *first.stride()))


def stored_adam_directions_(
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    state_dtype: str,
    betas: tuple[float, float],
    eps: float,
    steps: Sequence[int],
    seeds: Sequence[int],
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Do as `adam.stored_adam_directions_`."""
    kept = (*_columns(states, "exp_avg"), *_columns(states, "exp_avg_sq"))
    numbers = (state_dtype, list(betas), eps, list(steps), list(map(wrapped, seeds)), scale)
    return list(_stored_adam_directions_(list(grads), *kept, *numbers, dtype=dtype).unbind())


@_operation("normalized_momenta_", _fake_stack, mutates=("momenta", "scales"), opaque=True)
def _normalized_momenta_(
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    scales: Sequence[Tensor],
    state_dtype: str,
    momentum: float,
    nesterov: bool,
    form: str,
    eps: float,
    seeds: Sequence[int],
    *,
    dtype: torch.dtype,
) -> Tensor:
    states = _states(momentum_buffer=momenta, momentum_buffer_scale=scales)
    numbers: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "form": form, "eps": eps}
    return _momenta(grads, states, state_dtype=state_dtype, **numbers, seeds=seeds, dtype=dtype)


def normalized_momenta_(
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    state_dtype: str,
    momentum: float,
    nesterov: bool,
    form: Literal["ema", "sum"],
    eps: float,
    seeds: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Do as `momentum.normalized_momenta_`."""
    numbers = (state_dtype, momentum, nesterov, form, eps, list(map(wrapped, seeds)))
    made: Tensor = _normalized_momenta_(list(grads), *_columns(states, "momentum_buffer"), *numbers, dtype=dtype)
    return made


@_operation("adamw_", _nothing, mutates=("params", "exp_avgs", "exp_avg_sqs"), opaque=True)
def _adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    rate: Tensor | None,
    lr: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    seeds: Sequence[int] | None,
) -> None:
    numbers: dict[str, Any] = {"betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "seeds": seeds}
    _adamw(params, grads, exp_avgs, exp_avg_sqs, steps, lr=lr if rate is None else rate, **numbers)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seeds: Sequence[int] | None = None,
) -> None:
    """Do as `adamw.adamw_`."""
    tensors = map(list, (params, grads, exp_avgs, exp_avg_sqs))
    numbers = (*_rates(lr), list(betas), eps, weight_decay, None if seeds is None else list(map(wrapped, seeds)))
    _adamw_(*tensors, list(steps), *numbers)


def _columns(states: Sequence[Mapping[str, Tensor]], name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return a moment of each state, and its scales where it has some."""
    return [state[name] for state in states], [state[f"{name}_scale"] for state in states if f"{name}_scale" in state]


def _states(**columns: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Return the states of columns, the other way around; an empty column is none."""
    found = {name: column for name, column in columns.items() if column}
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
