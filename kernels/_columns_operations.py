"""Kernels that select columns and move moments to them as operations that torch knows; see `registered`.

All stay opaque to a compiler: they find their tensors by addresses in a table.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ._operation import operation, parts_of
from .chosen_adam import chosen_adam_directions_ as _chosen
from .dct import all_dct_energies as _dct
from .select import select_columns_ as _select


def _fake_dct(xs: Sequence[Tensor], dim: int, *, out_dtype: torch.dtype, ranking: str = "l2") -> tuple[Tensor, Tensor]:
    m, n = xs[0].shape if dim == -1 else xs[0].mT.shape
    out = torch.empty((len(xs), m, n), dtype=out_dtype, device=xs[0].device)
    return out if dim == -1 else out.mT, torch.empty((len(xs), n), dtype=torch.float32, device=xs[0].device)


@operation("all_dct_energies", _fake_dct, opaque=True)
def _all_dct_energies(
    xs: Sequence[Tensor], dim: int, *, out_dtype: torch.dtype, ranking: str = "l2"
) -> tuple[Tensor, Tensor]:
    return _dct(xs, dim, out_dtype=out_dtype, ranking="l1" if ranking == "l1" else "l2")


def all_dct_energies(
    xs: Sequence[Tensor], dim: int, *, out_dtype: torch.dtype, ranking: Literal["l2", "l1"] = "l2"
) -> tuple[Tensor, Tensor]:
    """Do as `dct.all_dct_energies`."""
    made: tuple[Tensor, Tensor] = _all_dct_energies(list(xs), dim, out_dtype=out_dtype, ranking=ranking)
    return made


def _fake_places(energies: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    return torch.empty((len(indices), indices[0].numel()), dtype=torch.int32, device=indices[0].device)


@operation("select_columns_", _fake_places, mutates=("indices",), opaque=True)
def _select_columns_(energies: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    return _select(energies, indices)


def select_columns_(energies: Sequence[Tensor] | Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Do as `select.select_columns_`."""
    rows = energies.unbind() if isinstance(energies, Tensor) else energies
    made: Tensor = _select_columns_(list(rows), list(indices))
    return made


def _fake_chosen(
    coefficients: Sequence[Tensor], indices: Sequence[Tensor], *_: Any, dim: int, dtype: torch.dtype, **__: Any
) -> Tensor:
    r, others = indices[0].numel(), coefficients[0].size(-3 - dim)
    shape = (others, r) if dim == -1 else (r, others)
    return torch.empty((len(coefficients), *shape), dtype=dtype, device=coefficients[0].device)


@operation("chosen_adam_directions_", _fake_chosen, mutates=("firsts", "seconds"), opaque=True)
def _chosen_adam_directions_(
    coefficients: Sequence[Tensor],
    indices: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    places: Tensor,
    *,
    dim: int,
    betas: Sequence[float],
    eps: float,
    steps: Sequence[int],
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    rows = zip(indices, firsts, seconds, strict=True)
    states = [{"basis_index": index, "exp_avg": first, "exp_avg_sq": second} for index, first, second in rows]
    numbers: dict[str, Any] = {"betas": tuple(betas), "eps": eps, "steps": steps, "scale": scale}
    found = _chosen(coefficients, states, places, dim=dim, **numbers, dtype=dtype)
    return parts_of(found[0], len(found))


def chosen_adam_directions_(
    coefficients: Sequence[Tensor] | Tensor,
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
    """Do as `chosen_adam.chosen_adam_directions_`."""
    rows = coefficients.unbind() if isinstance(coefficients, Tensor) else coefficients
    kept = ([state[name] for state in states] for name in ("basis_index", "exp_avg", "exp_avg_sq"))
    numbers: dict[str, Any] = {"betas": list(betas), "eps": eps, "steps": list(steps), "scale": scale}
    made: Tensor = _chosen_adam_directions_(list(rows), *kept, places, dim=dim, **numbers, dtype=dtype)
    return list(made.unbind())
