"""The small side of M-FAC: a ring of m gradients seen through their products with each other, in float64."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Divisor = Literal["window", "count"]
DIVISORS = get_args(Divisor)

# how far from one a matrix times its inverse may be, so that there is nothing left of it when it is refined
_LEFT = 1e-8
# what may be left over of a column when it is used, and the least eigenvalue of a unit diagonal where it is more
_SOLVED, _RANK = 0.1, 1e-10
# the least damping that a relative one comes to
_LEAST = 1e-290
# how much larger than their sum the terms of a combination may be for float32
_CANCELLED = 64
# weights between it and its inverse are float32, and so are rows with these weights
_SMALL = 1e-25


@dataclass(frozen=True)
class Ring:
    """K = (c λ I + S)⁻¹ for the products S = G Gᵀ of the rows of a window, each (b, m, m), as rows come and go.

    F = λI + (1/c) GᵀG has the inverse F⁻¹x = (x − Gᵀ K G x)/λ, and for the row g_j of the window F⁻¹g_j = c Gᵀ K e_j,
    in which nothing cancels. Rows of zeros, as in a window that is not full, change neither.

    A row that is replaced changes K by two terms of rank one, O(m²). K is made anew from S, O(m³), once in m rows,
    where it has lost its digits, and with each row where c or λ changes with it: as long as a window that counts its
    gradients is not full, and where damping is relative. The column of the newest row is refined, and is all of K that
    is as good as solving with S; what else is wanted is `solved`.

    Args:
        num_grads: m.
        damping: λ, or its ratio to the mean of ‖g‖² in the window.
        divisor: c is m ("window") or the number of rows that there are ("count").
        relative: what damping is.
    """

    num_grads: int
    damping: float
    divisor: Divisor = "window"
    relative: bool = False

    def divide(self, pushed: int) -> int:
        """Return c after so many rows."""
        return self.num_grads if self.divisor == "window" else max(1, min(pushed, self.num_grads))

    def damp(self, gram: Tensor, pushed: int) -> Tensor:
        """Return λ of each block, (b, 1), after so many rows."""
        if not self.relative:
            return gram.new_full((len(gram), 1), self.damping)
        mean = gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) / max(1, min(pushed, self.num_grads))
        # a window of zeros has no size that a damping could be a ratio to; and what is divided by is not denormal
        return (self.damping * torch.where(mean > 0, mean, 1)).clamp_(min=_LEAST)

    def slot(self, pushed: int) -> int:
        """Return where the next row goes."""
        return pushed % self.num_grads

    def push_(self, gram: Tensor, inverse: Tensor, row: Tensor, pushed: int) -> None:
        """Replace the oldest row, by its products (b, m) with all rows, itself included."""
        slot = self.slot(pushed)
        gram[:, slot, :] = row
        gram[:, :, slot] = row
        shift = self.shift(gram, pushed + 1)
        changes = self.relative or (self.divisor == "count" and pushed < self.num_grads)
        if not changes and slot > 0 and _replaced_(inverse, gram, slot, row, shift):
            _keep_(gram, inverse, slot, shift, _corrected(gram, inverse, slot, shift))
        else:
            self.refactor_(gram, inverse, pushed + 1)
            self.solve_newest_(gram, inverse, pushed)

    def solve_newest_(self, gram: Tensor, inverse: Tensor, pushed: int) -> None:
        """Solve for the column of the row that has come after so many others: more precise than that of an inverse."""
        slot, shift = self.slot(pushed), self.shift(gram, pushed + 1)
        unit = torch.zeros_like(gram[:, :, :1])
        unit[:, slot] = 1
        _keep_(gram, inverse, slot, shift, solved(gram, shift, unit).squeeze(2))

    def weights(self, gram: Tensor, inverse: Tensor, pushed: int) -> Tensor:
        """Return c K e_j, (b, m, 1), for the row that has come after so many others.

        ‖F⁻¹g‖ is at most √(c/λ)/2 for a row g, and what rounding has made more than twice that is made shorter.
        """
        count = self.divide(pushed + 1)
        found = count * inverse[:, :, self.slot(pushed), None]
        length = (found * (gram @ found)).sum((1, 2)).clamp_(min=0).sqrt_()
        most = (count / self.damp(gram, pushed + 1)[:, 0]).sqrt()
        return found * (most / length.clamp(min=1e-300)).clamp_(max=1)[:, None, None]

    def shift(self, gram: Tensor, pushed: int) -> Tensor:
        """Return c λ of each block, (b, 1)."""
        return self.divide(pushed) * self.damp(gram, pushed)

    def refactor_(self, gram: Tensor, inverse: Tensor, pushed: int) -> None:
        """Make the inverse anew."""
        half = root(gram, self.shift(gram, pushed))
        torch.matmul(half.mT, half, out=inverse)


def _replaced_(inverse: Tensor, gram: Tensor, slot: int, row: Tensor, shift: Tensor) -> bool:
    """Replace one row and column of the matrix that `inverse` is the inverse of; say whether it is that still.

    Terms of rank one have errors that grow with the square of the condition. The host waits to know, as it has waited
    for the gradient.
    """
    # without the slot: its row and column become zeros
    column = inverse[:, :, slot].clone()
    inverse.baddbmm_(column.unsqueeze(2), (-column / column[:, slot, None]).unsqueeze(1))
    inverse[:, slot, :] = 0
    inverse[:, :, slot] = 0
    # with the new row, bordered by what it has in common with the others
    border = torch.matmul(inverse, row.unsqueeze(2)).squeeze(2)
    rest = row[:, slot] + shift[:, 0] - torch.linalg.vecdot(border, row)
    border[:, slot] = -1
    inverse.baddbmm_(border.unsqueeze(2), (border / rest[:, None]).unsqueeze(1))
    return bool((_left(gram, inverse[:, :, slot], slot, shift).norm(dim=1) <= _LEFT).all())


def _left(gram: Tensor, column: Tensor, slot: int, shift: Tensor) -> Tensor:
    """Return what a column of the inverse leaves over of the column of the identity that it is to make."""
    left = torch.matmul(gram, column.unsqueeze(2)).squeeze(2).add_(shift * column).neg_()
    left[:, slot] += 1
    return left


def _corrected(gram: Tensor, inverse: Tensor, slot: int, shift: Tensor) -> Tensor:
    """Return a column of the inverse, with what it leaves over put right once."""
    column = inverse[:, :, slot]
    return column + torch.matmul(inverse, _left(gram, column, slot, shift).unsqueeze(2)).squeeze(2)


def _keep_(gram: Tensor, inverse: Tensor, slot: int, shift: Tensor, column: Tensor) -> None:
    """Make this a column of the inverse, and the row too, unless it leaves too much over."""
    # as large as A itself is there
    sizes = (gram.diagonal(dim1=1, dim2=2) + shift).sqrt()
    left = _left(gram, column, slot, shift) * sizes[:, slot, None] / sizes
    if not bool((left.norm(dim=1) <= _SOLVED).all()):
        column = _bounded(gram, slot, shift)
    inverse[:, slot, :] = column
    inverse[:, :, slot] = column


def _bounded(gram: Tensor, slot: int, shift: Tensor) -> Tensor:
    """Return a column of the inverse of a matrix that float64 cannot tell from a singular one.

    With unit diagonal, and no eigenvalue below what float64 can tell from zero.
    """
    whole = _shifted(gram, shift)
    scale = whole.diagonal(dim1=1, dim2=2).rsqrt()
    values, vectors = torch.linalg.eigh(whole * scale[:, :, None] * scale[:, None, :])
    parts = vectors[:, slot, :] / values.clamp_(min=_RANK)
    return torch.matmul(vectors, parts.unsqueeze(2)).squeeze(2) * scale * scale[:, slot, None]


def solved(gram: Tensor, shift: Tensor, y: Tensor) -> Tensor:
    """Return (shift·I + S)⁻¹ y of vectors (b, m, p), in O(m³).

    More precise than any inverse, where (x − GᵀK G x)/λ is what is left of a difference: by as much as the condition.
    """
    factor, info = torch.linalg.cholesky_ex(_shifted(gram, shift))
    if not bool(info.any()):
        return torch.cholesky_solve(y, factor)
    half = _root_by_eigenvalues(gram, shift)
    return half.mT @ (half @ y)


def root(gram: Tensor, shift: Tensor) -> Tensor:
    """Return R with RᵀR = (shift·I + S)⁻¹ for each block; S has no negative eigenvalues but by rounding."""
    factor, info = torch.linalg.cholesky_ex(_shifted(gram, shift))
    if not bool(info.any()):
        unit = torch.eye(gram.size(1), dtype=gram.dtype, device=gram.device).expand_as(gram)
        found: Tensor = torch.linalg.solve_triangular(factor, unit, upper=False)
        return found
    return _root_by_eigenvalues(gram, shift)


def _root_by_eigenvalues(gram: Tensor, shift: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return torch.mul(vectors.mT, (values.clamp_(min=0) + shift).rsqrt_().unsqueeze(2))


def needs_float64(gram: Tensor, weights: Tensor) -> bool:
    """Say whether rows with these weights (b, m, 1) have a sum that float32 loses. The host waits to know.

    Rows that nearly depend on each other have such weights: their terms are much larger than their sum. So have rows
    that are very large or very small.
    """
    terms = (weights.abs() * gram.diagonal(dim1=1, dim2=2).unsqueeze(2).sqrt()).sum((1, 2))
    total = (weights * (gram @ weights)).sum((1, 2)).clamp_(min=0).sqrt_()
    size = weights.abs().amax((1, 2))
    ordinary = (size > _SMALL) & (size < 1 / _SMALL) | (size == 0)
    # not so for NaN either
    return not bool(((terms <= _CANCELLED * total) & ordinary).all())


def _shifted(gram: Tensor, shift: Tensor) -> Tensor:
    whole = gram.clone()
    whole.diagonal(dim1=1, dim2=2).add_(shift)
    return whole


def logdet(gram: Tensor, shift: Tensor) -> float:
    """Return log det(I + S/shift), summed over blocks."""
    values = torch.linalg.eigvalsh(gram).clamp_(min=0)
    return float(torch.log1p(values / shift).sum())


def check_numbers(num_grads: int, damping: float, divisor: str) -> None:
    """Raise ValueError for a number of M-FAC that is out of its range."""
    if isinstance(num_grads, bool) or not isinstance(num_grads, int) or num_grads < 1:
        raise ValueError(f"Invalid num_grads: {num_grads!r}, must be an int >= 1")
    number = isinstance(damping, int | float) and not isinstance(damping, bool)
    if not (number and 1e-30 <= damping <= 1e30):
        raise ValueError(f"Invalid damping: {damping!r}, must be a number in [1e-30, 1e30]")
    if divisor not in DIVISORS:
        raise ValueError(f"Invalid divisor: {divisor!r}, must be one of {', '.join(DIVISORS)}")
