"""The small side of M-FAC: a ring of m gradients seen through their products with each other, in float64."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Divisor = Literal["window", "count"]
DIVISORS = get_args(Divisor)

# relative error of a product in float64
_ROUNDING = 3e-16


@dataclass(frozen=True)
class Ring:
    """K = (c λ I + S)⁻¹ for the products S = G Gᵀ of the rows of a window, each (b, m, m), as rows come and go.

    F = λI + (1/c) GᵀG has the inverse F⁻¹x = (x − Gᵀ K G x)/λ, and for the row g_j of the window F⁻¹g_j = c Gᵀ K e_j,
    in which nothing cancels. Rows of zeros, as in a window that is not full, change neither.

    A row that is replaced changes K by two terms of rank one, O(m²). K is made anew from S, O(m³), once in m rows,
    where it has become worse than rounding makes it, and with each row where c or λ changes with it: as long as a
    window that counts its gradients is not full, and where damping is relative.

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
        # a window of zeros has no size that a damping could be a ratio to
        return self.damping * torch.where(mean > 0, mean, 1)

    def slot(self, pushed: int) -> int:
        """Return where the next row goes."""
        return pushed % self.num_grads

    def push_(self, gram: Tensor, inverse: Tensor, row: Tensor, pushed: int) -> None:
        """Replace the oldest row, by its products (b, m) with all rows, itself included."""
        slot = self.slot(pushed)
        gram[:, slot, :] = row
        gram[:, :, slot] = row
        changes = self.relative or (self.divisor == "count" and pushed < self.num_grads)
        if not changes and slot > 0:
            shift = self.shift(gram, pushed + 1)
            self._replace_(inverse, slot, row, shift)
            if _holds(gram, inverse, shift, slot):
                return
        self.refactor_(gram, inverse, pushed + 1)

    def shift(self, gram: Tensor, pushed: int) -> Tensor:
        """Return c λ of each block, (b, 1)."""
        return self.divide(pushed) * self.damp(gram, pushed)

    def refactor_(self, gram: Tensor, inverse: Tensor, pushed: int) -> None:
        """Make the inverse anew."""
        half = root(gram, self.shift(gram, pushed))
        torch.matmul(half.mT, half, out=inverse)

    def _replace_(self, inverse: Tensor, slot: int, row: Tensor, shift: Tensor) -> None:
        """Replace one row and column of the matrix that `inverse` is the inverse of."""
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


def _holds(gram: Tensor, inverse: Tensor, shift: Tensor, slot: int) -> bool:
    """Say whether a column of the inverse is as good as it would be if it were made anew.

    It is when what it is to solve is solved to rounding. By terms of rank one its error grows with the square of the
    condition instead. The host waits here, as it has for the gradient.
    """
    column = inverse[:, :, slot]
    error = torch.matmul(gram, column.unsqueeze(2)).squeeze(2) + shift * column
    error[:, slot] -= 1
    # the trace is no less than the norm
    size = gram.diagonal(dim1=1, dim2=2).sum(1) + shift[:, 0]
    bound = _ROUNDING * (size * column.norm(dim=1) + 1)
    # not so for NaN either
    return bool((error.norm(dim=1) <= bound).all())


def root(gram: Tensor, shift: Tensor) -> Tensor:
    """Return R with RᵀR = (shift·I + S)⁻¹ for each block; S has no negative eigenvalues but by rounding."""
    whole = gram.clone()
    whole.diagonal(dim1=1, dim2=2).add_(shift)
    factor, info = torch.linalg.cholesky_ex(whole)
    if not bool(info.any()):
        unit = torch.eye(gram.size(1), dtype=gram.dtype, device=gram.device).expand_as(gram)
        found: Tensor = torch.linalg.solve_triangular(factor, unit, upper=False)
        return found
    values, vectors = torch.linalg.eigh(gram)
    return torch.mul(vectors.mT, (values.clamp_(min=0) + shift).rsqrt_().unsqueeze(2))


def logdet(gram: Tensor, shift: Tensor) -> float:
    """Return log det(I + S/shift), summed over blocks."""
    values = torch.linalg.eigvalsh(gram).clamp_(min=0)
    return float(torch.log1p(values / shift).sum())


def check_numbers(num_grads: int, damping: float, divisor: str) -> None:
    """Raise ValueError for a number of M-FAC that is out of its range."""
    if isinstance(num_grads, bool) or not isinstance(num_grads, int) or num_grads < 1:
        raise ValueError(f"Invalid num_grads: {num_grads!r}, must be an int >= 1")
    number = isinstance(damping, int | float) and not isinstance(damping, bool)
    if not (number and math.isfinite(damping) and damping > 0):
        raise ValueError(f"Invalid damping: {damping!r}, must be a finite number > 0")
    if divisor not in DIVISORS:
        raise ValueError(f"Invalid divisor: {divisor!r}, must be one of {', '.join(DIVISORS)}")
