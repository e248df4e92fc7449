"""Where a gradient is looked at from: which bases there are, at which rank, on which side."""

import math
from collections.abc import Callable
from typing import Any

from lowrank_optim._types import Basis, Side
from lowrank_optim.columns import DCT, Hadamard, Identity
from lowrank_optim.orthonormal import SVD, RandomizedSVD, SubspaceIteration
from lowrank_optim.random_bases import Gaussian, Random

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


def resolve(rank: int | float, proj_type: str, shape: tuple[int, int]) -> tuple[int, Side]:
    """Return the rank as a number and the side as one of three: the only place that decides either.

    Args:
        rank: an int, clamped to min(m, n), or a float in (0, 1] that is a fraction of it.
        proj_type: GaLore's: `std` compresses the short side (right of a square), `reverse_std` the long one,
            `left` and `right` the one they name, `full` both.
        shape: (m, n).
    """
    m, n = shape
    short = min(m, n)
    count = max(1, round(rank * short)) if isinstance(rank, float) else min(rank, short)
    sides: dict[str, Side] = {
        "std": "right" if m >= n else "left",
        "reverse_std": "left" if m >= n else "right",
        "left": "left",
        "right": "right",
        "full": "both",
    }
    return count, sides[proj_type]


def compresses(basis: Basis, shape: tuple[int, int], moments: int = 2) -> bool:
    """Say whether a basis and so many moments of coordinates take fewer numbers than the moments of the matrix."""
    m, n = shape
    return basis.numel(shape) + moments * math.prod(basis.coords_shape(shape)) < moments * m * n


_BASES: dict[str, Callable[..., Basis]] = {
    "svd": lambda rank, side, size: SVD(rank, side),
    "rsvd": lambda rank, side, size: RandomizedSVD(rank, side),
    "subspace": lambda rank, side, size: SubspaceIteration(rank, side),
    "random": lambda rank, side, size: Random(rank, side),
    "gaussian": lambda rank, side, size, **options: Gaussian(rank, side, **options),
    "dct": DCT,
    "identity": Identity,
    "hadamard": Hadamard,
}
# those whose coordinates can be lifted and whose moments can be moved
NAMES = tuple(name for name in _BASES if name != "gaussian")
# those of columns of a fixed basis, of which no side can be "both"
COLUMNS = ("dct", "identity", "hadamard")


def make(name: str, rank: int | float, proj_type: str, shape: tuple[int, int], **options: Any) -> Basis:
    """Return the basis of this name for an m×n matrix; `rank` and `proj_type` as in `resolve`.

    Raises:
        ValueError: for "hadamard" and a side that is no power of two.
    """
    count, side = resolve(rank, proj_type, shape)
    size = shape[1 if side == "right" else 0]
    if name == "hadamard" and size & (size - 1):
        raise ValueError(f"Invalid basis: 'hadamard', which needs a side of 2, 4, 8, ..., not the {size} of {shape}")
    return _BASES[name](count, side, size, **options)
