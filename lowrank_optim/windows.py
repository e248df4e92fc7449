"""The passes over a window of gradients: all that M-FAC does with numbers as long as the parameters.

A window is (b, m, n): for each of b blocks of parameters the last m gradients as rows. It is read in parts that fit a
cache (on a GPU, or where it is streamed there, a few megabytes), so that a window in another dtype or on another device
is converted as it passes and never copied whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_optim import ops

# of a window and of an operand beside it: which blocks, which columns
Part = tuple[slice, slice]

# gradients as large as that are refused, where the window is float64 and where it is not
_HUGE, _LARGE = 1e140, 1e30
# numbers up to it, and as small as its inverse, have squares whose sums are float32
_SQUARABLE = 1e12
# numbers whose sum is made in float32 at once
_SUMMED = 1 << 18

REFUSED = (
    "a gradient held NaN, Inf or numbers above 1e30: it has not entered the window of M-FAC, and what it would have "
    "updated stays as it is (said once)"
)


@dataclass(frozen=True)
class Blocks:
    """Vectors of `size` numbers as `count` blocks of `width`, the last one filled up with zeros."""

    size: int
    width: int

    @property
    def count(self) -> int:
        """Return how many blocks there are."""
        return -(-self.size // self.width)

    def split(self, rows: Tensor) -> Tensor:
        """Return (p, size) as (b, n, p)."""
        missing = self.count * self.width - self.size
        if missing:
            rows = torch.nn.functional.pad(rows, (0, missing))
        return rows.reshape(-1, self.count, self.width).permute(1, 2, 0)

    def join(self, blocks: Tensor) -> Tensor:
        """Return (b, n, p) as (p, size)."""
        return blocks.permute(2, 0, 1).reshape(blocks.size(2), self.count * self.width)[:, : self.size]

    def place(self, i: int) -> tuple[int, int]:
        """Return the block of a number, and its place there."""
        if not -self.size <= i < self.size:
            raise IndexError(f"index {i} is out of range for {self.size} parameters")
        return divmod(i % self.size, self.width)


def largest(grads: Sequence[Tensor]) -> float:
    """Return the largest magnitude; NaN where there is one. The host waits to know."""
    extremes = [torch.stack(torch.aminmax(grad)).abs().amax() for grad in grads if grad.numel()]
    return float(torch.stack([size.to(extremes[0]) for size in extremes]).amax()) if extremes else 0.0


def fits(size: float, dtype: torch.dtype) -> bool:
    """Say whether a gradient whose largest magnitude this is can be kept in `dtype`, and its products in float64."""
    return size < (_HUGE if dtype == torch.float64 else _LARGE)


def in_range(size: float) -> bool:
    """Say whether products of numbers of this size, and sums of them, are float32."""
    return size == 0 or 1 / _SQUARABLE < size < _SQUARABLE


def products(window: Tensor, x: Tensor) -> Tensor:
    """Return G x for each block, (b, m, p) in float64, where x is (b, n, p); each part of a sum in x's dtype.

    In float32 the sums of parts of at most 2¹⁸ numbers are added in float64.
    """
    found = torch.zeros(*window.shape[:2], x.size(2), dtype=torch.float64, device=x.device)
    for part, rows in _read(window, x, wide=True):
        if rows.size(0) == 1 and x.size(2) == 1:
            # as a batch of one it is half as fast
            found[part[0]] += torch.mv(rows[0], x[part][0, :, 0]).view(1, -1, 1)
        else:
            found[part[0]] += rows @ x[part]
    return found


def combination(window: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Gᵀ w for each block, (b, n, p) in `dtype`, where the weights are (b, m, p)."""
    b, _, n = window.shape
    found = torch.empty(b, n, weights.size(2), dtype=dtype, device=weights.device)
    weights = weights.to(dtype)
    for part, rows in _read(window, found, wide=True):
        if rows.size(0) == 1 and weights.size(2) == 1:
            torch.mv(rows[0].mT, weights[part[0]][0, :, 0], out=found[part][0, :, 0])
        else:
            found[part] = rows.mT @ weights[part[0]]
    return found


def gram(window: Tensor, device: torch.device, among: Tensor | None = None) -> Tensor:
    """Return G Gᵀ for each block, (b, m, m) in float64; with `among`, bool (b, n, 1), of those columns only."""
    b, m, _ = window.shape
    found = torch.zeros(b, m, m, dtype=torch.float64, device=device)
    for part, rows in _read(window, found):
        some = rows if among is None else rows * among[part].mT
        found[part[0]] += some @ rows.mT
    return found


def squares(window: Tensor, root: Tensor) -> Tensor:
    """Return the sums of squares of the columns of R G, (b, n) in float64, where R is (b, m, m)."""
    b, _, n = window.shape
    found = torch.empty(b, n, dtype=torch.float64, device=root.device)
    for part, rows in _read(window, root):
        found[part] = (root[part[0]] @ rows).square_().sum(1)
    return found


def transformed(window: Tensor, root: Tensor, dtype: torch.dtype) -> Tensor:
    """Return R G for each block, (b, m, n), computed in float64 and kept in `dtype`."""
    found = torch.empty(window.shape, dtype=dtype, device=root.device)
    for part, rows in _read(window, root):
        blocks, columns = part
        found[blocks, :, columns] = root[blocks] @ rows
    return found


def _read(window: Tensor, like: Tensor, *, wide: bool = False) -> Iterator[tuple[Part, Tensor]]:
    """Yield parts of the window in the dtype and on the device of `like`; each is scratch when the next one comes.

    They are `wide`, as far as what is made of them is not, where they are read as they are.
    """
    wide = wide and window.dtype == like.dtype and window.device == like.device
    scratch = None
    if window.dtype != like.dtype or window.device != like.device:
        # one memory for all: new memory for each is as slow to touch as it is to convert
        parts = [(stop.stop - stop.start) * (end.stop - end.start) for stop, end in _parts(window, like, wide)]
        scratch = torch.empty(max(parts, default=0) * window.size(1), dtype=like.dtype, device=like.device)
    for blocks, columns in _parts(window, like, wide):
        rows = window[blocks, :, columns]
        yield (blocks, columns), rows if scratch is None else scratch[: rows.numel()].view(rows.shape).copy_(rows)


def _parts(window: Tensor, like: Tensor, wide: bool) -> Iterator[Part]:
    b, m, n = window.shape
    # as much as fits a cache, or as may be summed in float32
    room = m * _SUMMED if wide else 4 * ops.part_size(like.device)
    width = max(1, min(n, room // m))
    height = max(1, room // (m * max(1, n)))
    for block in range(0, b, height):
        for column in range(0, n, width):
            yield slice(block, min(b, block + height)), slice(column, min(n, column + width))
