"""The nouns that everything else is written in."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]


class Factored(NamedTuple):
    """The matrix `left @ right`, never formed."""

    left: Tensor  # (m, r)
    right: Tensor  # (r, n)


Update = Tensor | Factored


class Tick(NamedTuple):
    """What a rule may know of time: plain numbers, so that no rule has to read a tensor."""

    step: int  # updates of this parameter, counting the one being made
    turn: float  # in [0, 1): this parameter's turn within a refresh period


class NewState(Protocol):
    """Allocates one zeroed state tensor where the parameter lives, placed as the parameter is placed."""

    def __call__(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return zeros; `dtype` None means the dtype in which the mathematics runs."""
        ...


class Storage(Protocol):
    """How a moment is kept between steps. The mathematics only sees what `read` returns."""

    def init(self, name: str, shape: Sequence[int], new: NewState, *, signed: bool = True) -> State:
        """Allocate the moment `name`; a quantized one brings a second tensor, its scales."""
        ...

    def read(self, state: State, name: str) -> Tensor:
        """Return the moment in the dtype of the mathematics; it may be the stored tensor itself."""
        ...

    def write_(self, state: State, name: str, value: Tensor) -> None:
        """Keep `value`; does nothing when the mathematics has already worked in place."""
        ...


class Basis(Protocol):
    """An r-dimensional subspace that an m×n matrix is looked at from."""

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

    def lift(self, state: State, coords: Tensor) -> Factored:
        """Return the m×n matrix that has these coordinates."""
        ...

    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the coordinates of an m×n matrix."""
        ...

    def numel(self, shape: tuple[int, int]) -> int:
        """Return how many numbers are kept for the basis of an m×n matrix."""
        ...


class Rule(Protocol):
    """Turns gradients into updates, for one bucket of same-shape parameters at a time."""

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate the state of one parameter; reads shapes only, so that it can run before any gradient."""
        ...

    def updates(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> list[Update | None]:
        """Advance the states and return what to subtract; None leaves a parameter and its step as they are."""
        ...


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
