"""Kernels as operations that torch knows: for `torch.compile`, fake tensors, and whatever else looks on.

Each function does as the kernel's own of the same name, with the launch shapes of the table. A compiler sees what is
launched, but for what stays opaque: kernels that find their tensors by addresses in a table, kernels with constants
that stay on the device, which a graph would make at each call, and all of them where they are interpreted.
"""

from collections.abc import Sequence
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor

from ._columns_operations import all_dct_energies as all_dct_energies
from ._columns_operations import chosen_adam_directions_ as chosen_adam_directions_
from ._columns_operations import select_columns_ as select_columns_
from ._moments_operations import adamw_ as adamw_
from ._moments_operations import normalized_momenta_ as normalized_momenta_
from ._moments_operations import stored_adam_directions_ as stored_adam_directions_
from ._operation import nothing, operation, rates
from ._rounding import wrapped
from .apply import apply_ as _apply
from .dct import supports as _supports
from .factored_add import apply_sum_ as _apply_sum
from .normalized import normalized as _normalized
from .recursion import Triple
from .recursion import gram_recursion as _recursion
from .symmetric import symmetric as _symmetric

torch.compiler.assume_constant_result(_supports)  # type: ignore[no-untyped-call]


def _fake_symmetric(a: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    return torch.empty((a.size(0), a.size(1), a.size(1)), dtype=dtype or a.dtype, device=a.device)


@operation("symmetric", _fake_symmetric)
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


@operation("normalized", _fake_like)
def normalized(x: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """Do as `normalized.normalized`."""
    return _normalized(x, eps=eps, dtype=dtype)


def dct_energies(
    x: Tensor, dim: int, *, out_dtype: torch.dtype, ranking: Literal["l2", "l1"] = "l2"
) -> tuple[Tensor, Tensor]:
    """Do as `dct.dct_energies`."""
    out, energies = all_dct_energies([x], dim, out_dtype=out_dtype, ranking=ranking)
    return out.squeeze(0), energies.squeeze(0)


def supports(n: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Do as `dct.supports`; a compiled graph is for this n."""
    return _supports(index(n), dtype, device)


@operation("gram_recursion", _fake_like, opaque=True)
def _gram_recursion(r: Tensor, triples: Sequence[float], *, dtype: torch.dtype) -> Tensor:
    return _recursion(r, list(zip(triples[::3], triples[1::3], triples[2::3], strict=True)), dtype=dtype)


def gram_recursion(r: Tensor, triples: Sequence[Triple], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Do as `recursion.gram_recursion`."""
    made: Tensor = _gram_recursion(r, [number for triple in triples for number in triple], dtype=dtype)
    return made


@operation("apply_", nothing, mutates=("param",))
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
    _apply_(param, update, *rates(lr), weight_decay, _seed(seed), cautious)


@operation("apply_sum_", nothing, mutates=("param",))
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
    _apply_sum_(param, *tensors, *rates(lr), weight_decay, _seed(seed))


def _seed(seed: int | None) -> int | None:
    """Return a seed that is within the integers of an operation."""
    return None if seed is None else wrapped(seed)
