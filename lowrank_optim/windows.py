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

# between these, sums of the squares of numbers are float32; and beyond this they are not even float64
_SMALL, _LARGE, _HUGE = 1e-12, 1e12, 1e140
# weights between it and its inverse are float32, and so are gradients times them
_TINY = 1e-25
# numbers whose sum is made in float32 at once
_SUMMED = 1 << 18

REFUSED = (
    "a gradient held NaN, Inf or numbers whose squares are infinite: it has not entered the window of M-FAC, and what "
    "it would have updated stays as it is (said once)"
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
    return float(torch.stack([size.to(extremes[0].device) for size in extremes]).amax()) if extremes else 0.0


def fits(size: float) -> bool:
    """Say whether a gradient whose largest magnitude this is has squares that are finite."""
    return size < _HUGE


def new_row(windows: Sequence[Tensor], grads: Sequence[Tensor], size: float) -> Tensor:
    """Return the products of a gradient that has just entered a window with each of its rows, (b, m) in float64.

    Gradient and window may be in pieces, (b, n, 1) and (b, m, n) each, whose products add up. `size` is its largest
    magnitude, which is taken out where squares would leave the range of float32.
    """
    scale = 1.0 if size == 0 or _SMALL < size < _LARGE else size
    found = torch.zeros(1, 1, dtype=torch.float64, device=grads[0].device)
    for window, grad in zip(windows, grads, strict=True):
        part = products(window, grad if scale == 1 else grad / scale)[:, :, 0]
        found = found + part.mul_(scale).to(found.device)
    return found


def products(window: Tensor, x: Tensor) -> Tensor:
    """Return G x for each block, (b, m, p) in float64, where x is (b, n, p); each part of a sum in x's dtype.

    In float32 the sums of parts of at most 2¹⁸ numbers are added in float64.
    """
    found = torch.zeros(*window.shape[:2], x.size(2), dtype=torch.float64, device=x.device)
    for part in _parts(window, x):
        blocks, _ = part
        found[blocks] += _times(_read(window, part, x), x[part])
    return found


def combination(window: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Gᵀ w for each block, (b, n, p) in `dtype`, where the weights are (b, m, p) in float64."""
    b, _, n = window.shape
    found = torch.empty(b, n, weights.size(2), dtype=dtype, device=weights.device)
    small, scale = _scaled(weights, dtype)
    for part in _parts(window, found):
        blocks, _ = part
        rows = _read(window, part, found)
        if rows.size(0) == 1 and small.size(2) == 1:
            torch.mv(rows[0].mT, small[blocks][0, :, 0], out=found[part][0, :, 0])
        else:
            found[part] = rows.mT @ small[blocks]
        if scale is not None:
            found[part].mul_(scale[blocks])
    return found


def _scaled(weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return weights of another dtype, and what their sums are to be multiplied with.

    Weights are as small as gradients are large, squared: the root of their size is taken out, so that the products and
    the sums are as large as gradients times that root. On a CPU the host sees where that is not needed.
    """
    size = weights.abs().amax(1, keepdim=True)
    if weights.device.type == "cpu" and bool(((size > _TINY) & (size < 1 / _TINY) | (size == 0)).all()):
        return weights.to(dtype), None
    half = torch.where(size > 0, size, 1).sqrt_()
    return (weights / half).to(dtype), half.to(dtype)


def gram(window: Tensor, device: torch.device) -> Tensor:
    """Return G Gᵀ for each block, (b, m, m) in float64."""
    b, m, _ = window.shape
    found = torch.zeros(b, m, m, dtype=torch.float64, device=device)
    for part in _parts(window, found):
        blocks, _ = part
        rows = _read(window, part, found)
        found[blocks] += rows @ rows.mT
    return found


def squares(window: Tensor, root: Tensor) -> Tensor:
    """Return the sums of squares of the columns of R G, (b, n) in float64, where R is (b, m, m)."""
    b, _, n = window.shape
    found = torch.empty(b, n, dtype=torch.float64, device=root.device)
    for part in _parts(window, root):
        blocks, _ = part
        found[part] = (root[blocks] @ _read(window, part, root)).square_().sum(1)
    return found


def transformed(window: Tensor, root: Tensor, dtype: torch.dtype) -> Tensor:
    """Return R G for each block, (b, m, n), computed in float64 and kept in `dtype`."""
    found = torch.empty(window.shape, dtype=dtype, device=root.device)
    for part in _parts(window, root):
        blocks, columns = part
        found[blocks, :, columns] = root[blocks] @ _read(window, part, root)
    return found


def _times(rows: Tensor, x: Tensor) -> Tensor:
    if rows.size(0) == 1 and x.size(2) == 1:
        # as a batch of one it is half as fast
        return torch.mv(rows[0], x[0, :, 0]).view(1, -1, 1)
    return rows @ x


def _read(window: Tensor, part: Part, like: Tensor) -> Tensor:
    blocks, columns = part
    return window[blocks, :, columns].to(like.device, like.dtype)


def _parts(window: Tensor, like: Tensor) -> Iterator[Part]:
    b, m, n = window.shape
    room = 4 * ops.part_size(like.device)
    # nothing is converted: a part is what may be summed in float32
    room = room if window.dtype != like.dtype or window.device != like.device else m * _SUMMED
    width = max(1, min(n, room // m))
    height = max(1, room // (m * max(1, n)))
    for block in range(0, b, height):
        for column in range(0, n, width):
            yield slice(block, block + height), slice(column, column + width)
