"""The nouns that everything else is written in."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]
# which side of a matrix is looked at through a basis
Side = Literal["left", "right", "both"]
# the same moment of several parameters, which may be one tensor
Moments = Sequence[Tensor] | Tensor
_WORD = (1 << 64) - 1


class Factored(NamedTuple):
    """The matrix `left @ right`, never formed."""

    left: Tensor  # (m, r)
    right: Tensor  # (r, n)


Update = Tensor | Factored


class Tick(NamedTuple):
    """What a rule may know of time: plain numbers, so that no rule has to read a tensor."""

    step: int  # updates of this parameter, counting the one being made
    turn: float  # in [0, 1): this parameter's turn within a refresh period

    @property
    def seed(self) -> int:
        """Return a number that differs from step to step and from matrix to matrix, for rounding stochastically."""
        # the finalizer of splitmix64, which is one to one
        mixed = (self.step << 32 | int(self.turn * (1 << 32))) * 0x9E3779B97F4A7C15 & _WORD
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _WORD
        return mixed >> 32


class NewState(Protocol):
    """Allocates one zeroed state tensor where the parameter lives, placed as the parameter is placed."""

    def __call__(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return zeros; `dtype` None means the dtype in which the mathematics runs."""
        ...


class Storage(Protocol):
    """How a moment is kept between steps. The mathematics only sees what `read` returns."""

    # whether `read` returns the stored tensor itself, so that the mathematics works in place
    in_place: ClassVar[bool]

    def init(self, name: str, shape: Sequence[int], new: NewState, *, signed: bool = True) -> State:
        """Allocate the moment `name`; a quantized one brings a second tensor, its scales."""
        ...

    def read(self, states: Sequence[State], name: str, shape: Sequence[int], dtype: torch.dtype) -> Moments:
        """Return the moments in their shape and in the dtype of the mathematics, as tensors that may be worked on."""
        ...

    def write_(self, states: Sequence[State], name: str, values: Moments, seeds: Sequence[int]) -> None:
        """Keep the values, which are scratch afterwards; does nothing when the mathematics has worked in place.

        Where numbers are rounded stochastically, the seeds decide how.
        """
        ...

    def parts(self, state: State, names: Sequence[str], numel: int) -> Iterator[tuple[int, int, State]]:
        """Cut flat moments of `numel` elements; yield where a part starts and stops, and views that hold it.

        The parts are small enough to work on without regard to memory. One that starts at i is written with a seed
        that is larger by i.
        """
        ...


class Direction(Protocol):
    """What is done to the last two dimensions of a stack of momenta before it becomes a stack of updates."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the direction of each matrix of `x`, which is left as it is."""
        ...


class Basis(Protocol):
    """An r-dimensional subspace that an m×n matrix is looked at from."""

    # whether a refresh needs a gradient that is finite and not zero, and so one look by the host
    guarded: ClassVar[bool]

    def init(self, shape: tuple[int, int], new: NewState) -> State:
        """Allocate the basis of an m×n matrix, all zeros."""
        ...

    def start_(self, state: State, grad: Tensor) -> None:
        """Set the first basis from this gradient alone, at the price of a few products."""
        ...

    def refresh_(self, state: State, grad: Tensor) -> None:
        """Set the basis again by this basis's own method; it may read the one it replaces."""
        ...

    def project(self, state: State, grad: Tensor) -> Tensor:
        """Return the coordinates of `grad`."""
        ...

    def lift(self, state: State, coords: Tensor) -> Update:
        """Return the m×n matrix that has these coordinates."""
        ...

    def follow_(
        self, state: State, grad: Tensor, moment: Tensor, weights: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Set the basis again from a moment kept in coordinates as it will be with this gradient.

        Args:
            state: holds the basis.
            grad: the gradient, m×n.
            moment: coordinates in the basis that is replaced.
            weights: of the moment and of the gradient.

        Returns:
            In the new basis, the coordinates of the gradient, and those of what of the moment lies in it.
        """
        ...

    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the coordinates of an m×n matrix."""
        ...

    def numel(self, shape: tuple[int, int]) -> int:
        """Return how many numbers are kept for the basis of an m×n matrix."""
        ...


class Selecting(Basis, Protocol):
    """A basis that is some of the columns of a fixed one."""

    def transform(self, matrix: Tensor) -> Tensor:
        """Return the coefficients of `matrix` along all columns."""
        ...

    def select(self, coefficients: Tensor) -> Tensor:
        """Return the sorted indices of the columns to keep."""
        ...

    def take(self, coefficients: Tensor, index: Tensor) -> Tensor:
        """Return the coefficients along these columns."""
        ...


class Rule(Protocol):
    """Turns gradients into updates, for one bucket of same-shape parameters at a time."""

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate the state of one parameter; reads shapes only, so that it can run before any gradient."""
        ...

    def updates(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> list[Update | None]:
        """Advance the states and return what to subtract; None leaves a parameter and its step as they are."""
        ...

    def need(self, shape: Sequence[int]) -> int:
        """Return how many numbers the step of one parameter holds at once: gradient, weight, and all between them."""
        ...


class Portable(Rule, Protocol):
    """A rule whose one moment can be taken from one basis to another."""

    def moment(self, state: State, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the moment in its shape and in the dtype of the mathematics; it may be the stored tensor itself."""
        ...

    def keep_(self, state: State, moment: Tensor, tick: Tick) -> None:
        """Put `moment` in the place of the moment kept."""
        ...

    @property
    def weights(self) -> tuple[float, float]:
        """Return the weights of the moment and of the gradient in what the moment becomes."""
        ...


def dense(update: Update) -> Tensor:
    """Return the matrix that an update stands for."""
    return update.left @ update.right if isinstance(update, Factored) else update


def compute_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of the mathematics: float64 for float64 parameters, else float32."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of a parameter seen as one matrix: `flatten(1)`, as for a convolution."""
    m, *rest = shape
    n = 1
    for size in rest:
        n *= size
    return m, n
