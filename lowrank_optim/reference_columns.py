"""A step of Adam along the columns of a fixed basis that have most energy, in plain torch.

Kernels that do it in one pass are tested against this file.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowrank_optim import reference


def select_columns_(energies: Sequence[Tensor] | Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Set each matrix's sorted indices to those of its columns of most energy, and return where they were before.

    Of equal energies the one with the lower index is taken first; NaN is more than any number.

    Args:
        energies: of each matrix (n,), or all of them, (k, n).
        indices: of each, (r,) of int32; updated in place.

    Returns:
        (k, r) of int32: where among the old indices, which were sorted, each new one was, or -1.
    """
    places = []
    for energy, index in zip(energies, indices, strict=True):
        r = index.numel()
        # topk does not promise an order of equal numbers
        new = torch.sort(energy, descending=True, stable=True).indices[:r].sort().values.to(index.dtype)
        place = torch.searchsorted(index, new).clamp_(max=max(0, r - 1))
        places.append(place.masked_fill_(index[place] != new, -1).to(torch.int32))
        index.copy_(new)
    return torch.stack(places)


def chosen_adam_directions_(
    coefficients: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    places: Tensor,
    *,
    dim: int,
    betas: tuple[float, float],
    eps: float,
    steps: Sequence[int],
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Move both moments to the chosen columns, advance them there, and return each scale·m̂ / (√v̂ + ε).

    Args:
        coefficients: of each matrix along all columns of the basis, whose number is the size of `dim`.
        states: of each, the "basis_index" of the chosen columns, and float32 "exp_avg" and "exp_avg_sq" of coordinates,
            as `coefficients` but for the rank along `dim`; updated in place.
        places: (k, r), where along `dim` the moments of each column are, or -1 for zeros; see `select_columns_`.
        dim: -1 or -2.
        betas: decay of the two moments.
        eps: ε.
        steps: of each, counting this one.
        scale: of the directions.
        dtype: of the directions, which are rounded to it once.
    """
    found = []
    for x, state, place, step in zip(coefficients, states, places, steps, strict=True):
        grad = x.index_select(dim, state["basis_index"]).to(torch.float32)
        enters = place < 0
        moments = []
        for name in ("exp_avg", "exp_avg_sq"):
            moved = state[name].index_select(dim, place.clamp(min=0))
            # filled: infinity times zero is none
            moments.append(moved.masked_fill_(enters if dim == -1 else enters.unsqueeze(-1), 0))
        direction = reference.adam_direction_(grad, *moments, betas=betas, eps=eps, step=step)
        found.append(direction.mul_(scale).to(dtype))
        for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            state[name].copy_(moment)
    return found
