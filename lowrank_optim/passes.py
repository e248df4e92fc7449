"""Kernels that pass once over gradients and what is kept of their moments; plain torch does the same step by step."""

from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_optim._backend import called, near, takes_triton
from lowrank_optim._half import HALF
from lowrank_optim._types import State

# rows of a launch
_MOST = 65535


def in_one_pass(x: Tensor) -> bool:
    """Return whether kernels pass over gradients like `x` and what is kept of their moments."""
    return takes_triton(x, faster=x.dtype != torch.float64)


def stored_adam_directions_(
    grads: list[Tensor],
    states: list[State],
    *,
    kept: str,
    betas: tuple[float, float],
    eps: float,
    steps: list[int],
    seeds: list[int],
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Advance the moments as each state keeps them, and return each scale · m̂ / (√v̂ + ε) in `dtype`, or float32.

    All in one kernel, where `in_one_pass`.
    """
    from lowrank_optim.kernels import adam as kernel

    if len(grads) > _MOST:
        parts = [slice(start, start + _MOST) for start in range(0, len(grads), _MOST)]
        how: dict[str, Any] = {"kept": kept, "betas": betas, "eps": eps, "scale": scale, "dtype": dtype}
        found: list[Tensor] = []
        for some in parts:
            how |= {"steps": steps[some], "seeds": seeds[some]}
            found += stored_adam_directions_(grads[some], states[some], **how)
        return found
    numbers: dict[str, Any] = {"betas": betas, "eps": eps, "steps": steps, "seeds": seeds, "scale": scale}
    function = called(kernel.stored_adam_directions_, grads[0])
    return function(grads, states, state_dtype=kept, **numbers, dtype=dtype or torch.float32)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[int],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seeds: list[int] | None = None,
) -> None:
    """Do as `reference_apply.adamw_` for contiguous weights and float32 moments, where `in_one_pass`."""
    from lowrank_optim.kernels import adamw as kernel

    weights = [p.detach() for p in params]
    numbers: dict[str, Any] = {"lr": near(lr, weights[0]), "betas": betas, "eps": eps, "weight_decay": weight_decay}
    called(kernel.adamw_, grads[0])(weights, grads, exp_avgs, exp_avg_sqs, steps, **numbers, seeds=seeds)


def dct_energies(x: Tensor, dim: int, ranking: Literal["l2", "l1"]) -> tuple[Tensor, Tensor] | None:
    """Return the DCT-II of a matrix of 16 bits and what it has along each DCT column; None where no kernel does."""
    if not _has_dct(x, dim):
        return None
    from lowrank_optim.kernels import dct as kernel

    return called(kernel.dct_energies, x)(x, dim, out_dtype=_coefficients(x), ranking=ranking)


def dct_adam_directions_(
    grads: list[Tensor], states: list[State], *, dim: int, ranking: Literal["l2", "l1"], **numbers: Any
) -> list[Tensor] | None:
    """Select DCT columns anew, move the moments there and return Adam's directions; None where no kernels do.

    `numbers` are `betas`, `eps`, `steps`, `scale` and `dtype` of `stored_adam_directions_`; moments are in float32.
    """
    if not _has_dct(grads[0], dim) or len(grads) > _MOST:
        return None
    from lowrank_optim.kernels import chosen_adam, dct, select

    like, out_dtype = grads[0], _coefficients(grads[0])
    values, energies = called(dct.all_dct_energies, like)(grads, dim, out_dtype=out_dtype, ranking=ranking)
    places = called(select.select_columns_, like)(energies, [state["basis_index"] for state in states])
    numbers["dtype"] = numbers["dtype"] or torch.float32
    advance = called(chosen_adam.chosen_adam_directions_, like)
    return advance(values, states, places, dim=dim, **numbers)


def _coefficients(x: Tensor) -> torch.dtype:
    """Return a dtype that coefficients fit, which may be the root of their number times as large as the elements."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _has_dct(x: Tensor, dim: int) -> bool:
    if x.dtype not in HALF or not takes_triton(x, faster=True):
        return False
    from lowrank_optim.kernels import dct as kernel

    return called(kernel.supports, x)(x.size(dim), x.dtype, x.device)


def normalized_momenta_(
    grads: list[Tensor],
    states: list[State],
    *,
    kept: str,
    momentum: float,
    nesterov: bool,
    form: Literal["ema", "sum"],
    eps: float,
    seeds: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Advance the momenta as each state keeps them, and return the updates over their norms, stacked, in `dtype`.

    All in two kernels, where `in_one_pass`.
    """
    from lowrank_optim.kernels import momentum as kernel

    numbers: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "form": form, "eps": eps}
    made = called(kernel.normalized_momenta_, grads[0])
    return made(grads, states, state_dtype=kept, **numbers, seeds=seeds, dtype=dtype)
