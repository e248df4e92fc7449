"""The static form of M-FAC: what a window comes to when no more gradients do."""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_optim import windows
from lowrank_optim.windows import Blocks


class StaticInverseFisher:
    """F⁻¹ in its static form, T = R G with RᵀR = K, which `InverseFisher.static` makes: F⁻¹ = (I − TᵀT)/λ.

    The rows of T are the published v_i of a static window, up to a factor and the order in which they are combined.
    They are kept in float64, because 1 − Σ T² cancels: d·m numbers of 8 bytes.
    """

    def __init__(self, rows: Tensor, blocks: Blocks, damping: float, dtype: torch.dtype) -> None:
        self._rows, self._blocks, self._damping, self._dtype = rows, blocks, damping, dtype

    @torch.no_grad()
    def solve(self, x: Tensor) -> Tensor:
        """Return F⁻¹x of a vector (d,), or of each row of a batch (p, d), in O(d m)."""
        return each(x, self._blocks, self._solve, self._rows.device).to(self._dtype)

    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """Return the diagonal of F⁻¹, (d,), in O(d m)."""
        sums = self._rows.square().sum(1)
        return self._blocks.join((1 - sums).div_(self._damping).unsqueeze(2)).squeeze(0).to(self._dtype)

    @torch.no_grad()
    def element(self, i: int, j: int) -> float:
        """Return the element (i, j) of F⁻¹, in O(m).

        Raises:
            IndexError: out of range.
        """
        one, two = self._blocks.place(i), self._blocks.place(j)
        if one[0] != two[0]:
            return 0.0
        common = float(self._rows[one[0], :, one[1]] @ self._rows[two[0], :, two[1]])
        return ((one == two) - common) / self._damping

    def _solve(self, x: Tensor) -> Tensor:
        inside = windows.combination(self._rows, windows.products(self._rows, x), torch.float64)
        return (x - inside).div_(self._damping)


def each(x: Tensor, blocks: Blocks, solve: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """Return what `solve` makes of (b, n, p) numbers in float64, in the shape of `x`."""
    if x.dim() not in (1, 2) or x.size(-1) != blocks.size:
        raise ValueError(f"Invalid x: of shape {tuple(x.shape)}, must be ({blocks.size},) or (p, {blocks.size})")
    rows = x if x.dim() == 2 else x.unsqueeze(0)
    return blocks.join(solve(blocks.split(rows.to(device, torch.float64)))).reshape(x.shape)
