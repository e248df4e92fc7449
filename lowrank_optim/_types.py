"""The nouns that everything else is written in."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]
# which side of a matrix is looked at through a basis
Side = Literal["left", "right", "both"]
# the same moment of several parameters, which may be one tensor
Moments = Sequence[Tensor] | Tensor
_WORD = (1 << 64) - 1
# state that the host reads at each step, and that is on the CPU therefore
HOST = frozenset(["step", "piece_step", "basis_seed", "basis_due", "window_step", "window_refused", "window_careful"])


class Factored(NamedTuple):
    """The matrix `left @ right`, never formed."""

    left: Tensor  # (m, r)
    right: Tensor  # (r, n)


# what has coordinates
Lifted = Tensor | Factored


class Scaled(NamedTuple):
    """`matrix` times a factor for each row, each column or all of it, and a factored matrix; never formed."""

    matrix: Tensor  # (m, n); not ours to write to
    factors: Tensor  # (m, 1), (1, n) or (1, 1)
    plus: Factored | None = None


Update = Tensor | Factored | Scaled


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

    def __call__(self, shape: Sequence[int], dtype: torch.dtype | None = None, *, host: bool = False) -> Tensor:
        """Return zeros, by default in the dtype of the mathematics; with `host` on the CPU, for the host to read."""
        ...


class Storage(Protocol):
    """How a moment is kept between steps. The mathematics only sees what `read` returns."""

    # whether `read` returns the stored tensor itself, so that the mathematics works in place
    in_place: ClassVar[bool]

    @property
    def name(self) -> str:
        """Return what `state_dtype` calls it."""
        ...

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


class Move(Protocol):
    """What coordinates in the basis that was become in the basis that is."""

    def first(self, moment: Tensor) -> Tensor:
        """Return a moment that is a sum of gradients, in the basis that is."""
        ...

    def second(self, moment: Tensor, first: Tensor, unbias: tuple[float, float]) -> Tensor:
        """Return a mean of squares, in the basis that is, from it and the mean in the basis that was.

        They are means when `first` and `moment` are divided by `unbias`.
        """
        ...

    def columns(self, numbers: Tensor) -> Tensor:
        """Return one number for each direction, zero where it is a new one."""
        ...


class Basis(Protocol):
    """An r-dimensional subspace that an m×n matrix is looked at from.

    What sets a basis takes a seed, for those that draw it at random, and returns the coordinates of the gradient where
    they have come about by the way. `project_all` and `lift_all`, where a basis has them, do for lists what `project`
    and `lift` do for one matrix.
    """

    # whether a refresh needs a gradient that is finite and not zero, and so one look by the host
    guarded: ClassVar[bool]

    @property
    def side(self) -> Side:
        """Return what is looked at through the basis."""
        ...

    def init(self, shape: tuple[int, int], new: NewState) -> State:
        """Allocate the basis of an m×n matrix, all zeros, under names that begin with `basis`."""
        ...

    def start_(self, state: State, grad: Tensor, seed: int) -> Tensor | None:
        """Set the first basis from this gradient alone, at the price of a few products."""
        ...

    def refresh_(self, state: State, grad: Tensor, seed: int) -> Tensor | None:
        """Set the basis again by this basis's own method; it may read the one it replaces."""
        ...

    def follow_(
        self, state: State, grad: Tensor, moment: Tensor, weights: tuple[float, float], seed: int
    ) -> Tensor | None:
        """Set the basis again from a sum, with weights, of a moment in coordinates and this gradient."""
        ...

    def project(self, state: State, grad: Tensor) -> Tensor:
        """Return the coordinates of `grad`."""
        ...

    def lift(self, state: State, coords: Tensor) -> Lifted:
        """Return the m×n matrix that has these coordinates."""
        ...

    def move(self, old: State, state: State) -> Move:
        """Return what takes coordinates in the basis of `old` to that of `state`."""
        ...

    def overlap(self, old: State, state: State) -> Tensor | None:
        """Return which share of the one subspace lies in the other, in [0, 1]: ‖P_newᵀ P_old‖² / r; None if unknown."""
        ...

    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the coordinates of an m×n matrix."""
        ...

    def numel(self, shape: tuple[int, int]) -> int:
        """Return how many numbers are kept for the basis of an m×n matrix."""
        ...


class Coefficients(Protocol):
    """Those of a matrix along all columns of a fixed basis, in whatever order they have come."""

    def energies(self) -> Tensor:
        """Return the sum of squares or of magnitudes along each column."""
        ...

    def take(self, index: Tensor) -> Tensor:
        """Return the coefficients along these columns, in the orientation of the matrix."""
        ...


class Selecting(Basis, Protocol):
    """A basis that is some of the columns of a fixed one."""

    def analyze(self, matrix: Tensor) -> Coefficients:
        """Return the coefficients of `matrix` along all columns."""
        ...

    def select(self, energies: Tensor) -> Tensor:
        """Return the sorted indices of the columns to keep."""
        ...


class Rule(Protocol):
    """Turns gradients into updates, for one bucket of same-shape parameters at a time."""

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate the state of one parameter; reads shapes only, so that it can run before any gradient."""
        ...

    def updates(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> Iterable[Update | None]:
        """Advance the states and return, at once or as asked for, what to subtract; None leaves a parameter alone."""
        ...

    def need(self, shape: Sequence[int]) -> int:
        """Return how many numbers the step of one parameter holds at once: gradient, weight, and all between them."""
        ...


class Portable(Rule, Protocol):
    """A rule whose moments can be taken from one basis to another."""

    def moment(self, state: State, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the first moment in its shape and in the dtype of the mathematics; it may be the stored tensor."""
        ...

    def mean(self, tick: Tick) -> float:
        """Return the number that makes the first moment, as it was before this step, a mean of gradients."""
        ...

    def moved_updates(
        self, grads: list[Tensor], states: list[State], ticks: list[Tick], moves: Sequence[Move | None]
    ) -> list[Update | None]:
        """Move the moments where there is a move, then do what `updates` does."""
        ...


class Look(NamedTuple):
    """What is known of a matrix in one step, once it has been looked at through its basis."""

    matrix: Tensor  # m×n; the gradient, or what was looked at in its place
    coords: Tensor
    direction: Tensor  # what the inner rule has made of the coordinates; may be written to
    tick: Tick
    # the first moment before and after a move, lifted; empty where nothing has moved
    lost: Sequence[Lifted] = ()


class Residual(Protocol):
    """What becomes of the part of a gradient that its basis does not see, and so of the gradient as a whole."""

    # how many m×n matrices it holds in a step beside the gradient
    held: ClassVar[int]

    @property
    def recovers(self) -> float:
        """Return how much of what the first moment loses in a move is to be given back; see `ErrorFeedback`."""
        ...

    def init(self, shape: tuple[int, int], new: NewState) -> State:
        """Allocate what is kept for an m×n matrix."""
        ...

    def seen(self, state: State, grad: Tensor) -> Tensor:
        """Return what is looked at in the gradient's place."""
        ...

    def updates(self, basis: Basis, states: list[State], looks: list[Look]) -> list[Update]:
        """Return what to subtract from the weights, and keep what is for later."""
        ...

    def forget_(self, state: State) -> None:
        """Begin anew, because what is kept is not finite any more."""
        ...


def dense(update: Update) -> Tensor:
    """Return the matrix that an update stands for."""
    if isinstance(update, Scaled):
        whole = update.matrix * update.factors
        return whole if update.plus is None else whole.addmm_(*update.plus)
    return update.left @ update.right if isinstance(update, Factored) else update


def compute_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of the mathematics: float64 for float64 parameters, else float32."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of a parameter seen as one matrix: `flatten(1)`, as for a convolution."""
    m, *rest = shape
    return m, math.prod(rest)
