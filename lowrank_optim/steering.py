"""From momenta to updates: which matrices a parameter holds, a direction for each, and its factor."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lowrank_optim._types import Direction

# a matrix's own blocks of rows: how many equal ones, or the rows of each
Split = int | Sequence[int] | None


def _original(rows: int, columns: int) -> float:
    return math.sqrt(max(1.0, rows / columns))


# factors on the direction of a matrix (rows = outputs, columns = inputs)
ADJUSTMENTS: dict[str, Callable[[int, int], float]] = {
    "original": _original,
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "rms_to_rms": lambda rows, columns: math.sqrt(rows / columns),
    "none": lambda rows, columns: 1.0,
}
# and one that is read from the momentum: its nuclear norm, as ⟨direction, momentum⟩
NUCLEAR = "nuclear"


@dataclass(frozen=True)
class Layout:
    """How a parameter is seen as matrices: (b, rows, columns) each, of which a split makes several.

    Args:
        flatten: more than two dimensions are one matrix by `flatten(1)` (a convolution); else the leading ones count
            matrices (stacked experts).
        split: blocks of rows that are matrices of their own (fused query, key and value; heads).
    """

    flatten: bool = True
    split: Split = None

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Layout":
        """Return the layout that the keys `split` and `flatten` of a parameter group ask for."""
        split = group.get("split")
        return cls(group.get("flatten", True), split if split is None or isinstance(split, int) else tuple(split))

    def blocks(self, x: Tensor) -> list[Tensor]:
        """Return views of `x` (k, *shape of the parameter) as stacks (k, b, rows, columns)."""
        if x.dim() < 3:
            # vectors and scalars: one row each
            x = x.reshape(len(x), 1, 1, -1)
        elif self.flatten or x.dim() == 3:
            x = x.flatten(2).unsqueeze(1)
        else:
            x = x.flatten(1, -3)
        if self.split is None:
            return [x]
        k, b, rows, columns = x.shape
        if isinstance(self.split, int):
            return [x.reshape(k, b * self.split, rows // self.split, columns)]
        return list(torch.split(x, list(self.split), dim=-2))

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError for a split that does not fit a parameter of this shape."""
        rows = shape[0] if self.flatten else shape[-2]
        if isinstance(self.split, int) and rows % self.split:
            raise ValueError(f"Invalid split: {self.split!r}, must divide the {rows} rows of {tuple(shape)}")
        if isinstance(self.split, Sequence) and sum(self.split) != rows:
            raise ValueError(f"Invalid split: {self.split!r}, must add up to the {rows} rows of {tuple(shape)}")


@dataclass(frozen=True)
class Steered:
    """A stack of momenta becomes a stack of updates: a direction for each matrix, and its factor.

    Args:
        direction: such as Newton–Schulz.
        layout: which matrices a parameter holds.
        adjust: one of `ADJUSTMENTS`, or "nuclear".
        shape: of the matrix that the factor is for, where the one at hand holds its coordinates.
    """

    direction: Direction
    layout: Layout = Layout()
    adjust: str = "original"
    shape: tuple[int, int] | None = None

    @property
    def eps(self) -> float:
        """Return the least norm that a direction divides by."""
        return float(getattr(self.direction, "eps", 0.0))

    @property
    def copies(self) -> int:
        """Return how many tensors of a parameter's size are there at once: gradient, weight, and all between them."""
        # an exact polar factor is made in float64
        return 16 if getattr(self.direction, "method", None) == "eigh" else 10

    def __call__(self, x: Tensor, row_avg_sqs: list[Tensor] | None = None, beta2: float = 0.0) -> Tensor:
        """Return the updates of `x` (k, *shape), in its dtype; with `row_avg_sqs` the rows evened out (NorMuon)."""
        found = torch.empty_like(x, memory_format=torch.contiguous_format)
        averages = None if row_avg_sqs is None else torch.stack(row_avg_sqs)
        seen = [x, found] if averages is None else [x, found, averages]
        for block, out, *average in zip(*map(self.layout.blocks, seen), strict=True):
            out.copy_(self.direction(block))
            if average:
                _even_(out, average[0], beta2)
            if self.adjust == NUCLEAR:
                out.mul_((out * block).sum((-2, -1), keepdim=True))
            else:
                out.mul_(ADJUSTMENTS[self.adjust](*(self.shape or block.shape[-2:])))
        if row_avg_sqs is not None and averages is not None:
            for i, kept in enumerate(row_avg_sqs):
                kept.copy_(averages[i])
        return found

    def planned(self, shape: Sequence[int], device: str) -> Any:
        """Return how a parameter of this shape is steered once it is normalized; None if it is not one matrix.

        What a direction means by normalized, and how it is done then, is its own.
        """
        plain = len(shape) >= 2 and self.layout.split is None and (self.layout.flatten or len(shape) == 2)
        asked = getattr(self.direction, "planned", None)
        if asked is None or not plain or self.adjust == NUCLEAR:
            return None
        return asked((shape[0], math.prod(shape[1:])), device)

    def of_normalized(self, x: Tensor, how: Any) -> Tensor:
        """Return the updates of normalized parameters (k, *shape), in their dtype."""
        matrices = x.flatten(2)
        made: Tensor = cast("Any", self.direction).of_normalized(matrices, how)
        factor = ADJUSTMENTS[self.adjust](*(self.shape or matrices.shape[-2:]))
        return (made if factor == 1 else made.mul_(factor)).view_as(x)


def _even_(made: Tensor, row_avg_sq: Tensor, beta2: float) -> None:
    """Divide each row by the root of its running mean square, and keep the Frobenius norm of each matrix."""
    row_avg_sq.lerp_(made.square().mean(-1, keepdim=True), 1 - beta2)
    norm = torch.linalg.matrix_norm(made, keepdim=True)
    made.div_(row_avg_sq.sqrt().clamp_(min=1e-10))
    made.mul_(norm / torch.linalg.matrix_norm(made, keepdim=True).clamp_(min=1e-30))
