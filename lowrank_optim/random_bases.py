"""Bases that are drawn at random and ask nothing of a gradient."""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim._types import Factored, NewState, Side, State
from lowrank_optim.orthonormal import Orthonormal, Rotation

# numbers that a shared matrix has at least
_SHARED = 1 << 12


@dataclass(frozen=True)
class Random(Orthonormal):
    """A random subspace, a new one at each refresh: the range of a Gaussian matrix. State as `SVD`."""

    guarded: ClassVar[bool] = False

    def start_(self, state: State, grad: Tensor, seed: int = 0) -> None:
        """Do as `refresh_`."""
        self.refresh_(state, grad, seed)

    def refresh_(self, state: State, grad: Tensor, seed: int = 0) -> None:
        """Draw; nothing is asked of the gradient."""
        for place, (name, kept) in enumerate((n, state[n]) for n in ("basis", "basis_right") if n in state):
            rows = kept if name == "basis" and self.side != "right" else kept.mT
            rows.copy_(ops.orthonormalize(ops.normal(tuple(rows.shape), seed + place, kept)))


@dataclass(frozen=True)
class Gaussian:
    """A random matrix P with entries N(0, 1/r), of which only the seed is kept: R = G Pᵀ (right) or P G (left).

    Not orthonormal: lengths are kept on average, which suits what only looks at norms (APOLLO, arXiv 2412.05270). P is
    made again at each use by one product: columns of one normal matrix that all matrices of a size share, with signs of
    one random vector, both made once for the process, each beginning where the seed says. So there are not more
    different P than these beginnings, 4096 max(size, 4096/r), and no generator runs in a step. State: `basis_seed`, one
    int64 on the CPU.
    """

    guarded: ClassVar[bool] = False

    rank: int
    side: Side = "right"
    # sets the seeds of one optimizer apart from those of another
    seed: int = 0
    # in which the product is made; None is the gradient's
    dtype: torch.dtype | None = None

    def init(self, shape: tuple[int, int], new: NewState) -> State:
        """Allocate the basis."""
        return {"basis_seed": new((1,), torch.int64, host=True)}

    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return (m, r) or (r, n)."""
        m, n = shape
        return (m, self.rank) if self.side == "right" else (self.rank, n)

    def numel(self, shape: tuple[int, int]) -> int:
        """Return how many numbers are kept."""
        return 2  # float32 numbers, in the place of one int64

    def start_(self, state: State, grad: Tensor, seed: int = 0) -> None:
        """Do as `refresh_`."""
        self.refresh_(state, grad, seed)

    def refresh_(self, state: State, grad: Tensor, seed: int = 0) -> None:
        """Take the next seed."""
        # times a large prime: the seeds of a step are less than 2³²
        state["basis_seed"].fill_(seed + self.seed * 4_294_967_311)

    def follow_(self, state: State, grad: Tensor, moment: Tensor, weights: tuple[float, float], seed: int = 0) -> None:
        """Set the basis from the sum."""
        self.refresh_(state, grad, seed)

    def project(self, state: State, grad: Tensor) -> Tensor:
        """Return the coordinates."""
        return self.project_all([state], [grad])[0]

    def project_all(self, states: list[State], grads: list[Tensor]) -> list[Tensor]:
        """Return the coordinates of matrices of one shape, some at a time parts of one tensor; see `ops.stacks`."""
        like = grads[0]
        # float64 is there for precision, and keeps it
        dtype = like.dtype if self.dtype is None or like.dtype == torch.float64 else self.dtype
        m, n = like.shape
        shape, count = self.coords_shape((m, n)), len(grads)
        # small enough that an allocator keeps what is free again
        size = max(1, ops.part_size(like.device) // math.prod(shape))
        some = (like.new_empty((min(size, count - start), *shape)) for start in range(0, count, size))
        found = [coords for stack in some for coords in stack.unbind()]
        for state, grad, coords in zip(states, grads, found, strict=True):
            grad = grad.to(dtype)
            matrix = self.matrix(state, grad)
            left, right = (grad, matrix.mT) if self.side == "right" else (matrix, grad)
            if dtype == coords.dtype:
                torch.mm(left, right, out=coords)
            else:
                coords.copy_(left @ right)
        return found

    def lift(self, state: State, coords: Tensor) -> Factored:
        """Return the factors."""
        raise NotImplementedError("a Gaussian matrix is not orthonormal: coordinates are not lifted through it")

    def move(self, old: State, state: State) -> Rotation:
        """Return the way from the one basis to the other."""
        raise NotImplementedError("a Gaussian matrix is not orthonormal: moments are not moved through it")

    def overlap(self, old: State, state: State) -> None:
        """Measure nothing: it is not orthonormal."""

    def matrix(self, state: State, grad: Tensor) -> Tensor:
        """Draw P, (r, size of the compressed side)."""
        size = grad.size(-1 if self.side == "right" else -2)
        # the golden ratio's digits spread neighbours: first where columns begin, then where signs do
        mixed = int(state["basis_seed"]) * 0x9E3779B97F4A7C15 >> 16 & 0xFFFF_FFFF_FFFF
        room = max(size, _SHARED // self.rank)
        columns = _normal_columns(self.rank, size + room, grad.dtype, grad.device)
        signs = _signs(size + _SHARED, grad.dtype, grad.device)
        mixed, first = divmod(mixed, room)
        return columns.narrow(1, first, size) * signs.narrow(0, mixed % _SHARED, size)


@functools.cache
def _normal_columns(rank: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (rank, count) numbers from N(0, 1/rank)."""
    return ops.normal((rank, count), 0, torch.empty((), dtype=dtype, device=device)).mul_(1 / math.sqrt(rank))


@functools.cache
def _signs(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return so many random numbers ±1."""
    return ops.signs(count, 1, torch.empty((), dtype=dtype, device=device))
