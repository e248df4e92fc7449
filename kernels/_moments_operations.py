"""Kernels over gradients and moments as operations that torch knows; see `registered`.

All stay opaque to a compiler: they find their tensors by addresses in a table.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ._operation import columns_of, nothing, operation, parts_of, rates, states_of
from ._rounding import wrapped
from .adam import stored_adam_directions_ as _adam
from .adamw import adamw_ as _adamw
from .momentum import normalized_momenta_ as _momenta

_ADAM_WRITES = ("firsts", "first_scales", "seconds", "second_scales")


def _fake_stack(grads: Sequence[Tensor], *_: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty((len(grads), *grads[0].shape), dtype=dtype, device=grads[0].device)


@operation("stored_adam_directions_", _fake_stack, mutates=_ADAM_WRITES, opaque=True)
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
    states = states_of(exp_avg=firsts, exp_avg_scale=first_scales, exp_avg_sq=seconds, exp_avg_sq_scale=second_scales)
    numbers: dict[str, Any] = {"betas": tuple(betas), "eps": eps, "steps": steps, "seeds": seeds, "scale": scale}
    return parts_of(_adam(grads, states, state_dtype=state_dtype, **numbers, dtype=dtype)[0], len(grads))


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
    kept = (*columns_of(states, "exp_avg"), *columns_of(states, "exp_avg_sq"))
    numbers = (state_dtype, list(betas), eps, list(steps), list(map(wrapped, seeds)), scale)
    return list(_stored_adam_directions_(list(grads), *kept, *numbers, dtype=dtype).unbind())


@operation("normalized_momenta_", _fake_stack, mutates=("momenta", "scales"), opaque=True)
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
    states = states_of(momentum_buffer=momenta, momentum_buffer_scale=scales)
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
    made: Tensor = _normalized_momenta_(list(grads), *columns_of(states, "momentum_buffer"), *numbers, dtype=dtype)
    return made


@operation("adamw_", nothing, mutates=("params", "exp_avgs", "exp_avg_sqs"), opaque=True)
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
    numbers = (*rates(lr), list(betas), eps, weight_decay, None if seeds is None else list(map(wrapped, seeds)))
    _adamw_(*tensors, list(steps), *numbers)
