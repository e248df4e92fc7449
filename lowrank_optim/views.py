"""What of a parameter's gradient enters a window: all of it, the weights that are not zero, or coordinates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowrank_optim._types import Basis, Lifted, Move, NewState, State, matrix_shape
from lowrank_optim._warn import warn_once


class View(Protocol):
    """What of a parameter's gradient is in the window."""

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of what is seen of a parameter of this shape."""
        ...

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate what is kept to see it."""
        ...

    def blind(self, grad: Tensor) -> bool:
        """Say whether this first gradient shows no place to look from; the host may wait to know."""
        ...

    def turn_(self, state: State, grad: Tensor, first: bool, seed: int) -> Move | None:
        """Look from elsewhere; return how what has been seen gets there."""
        ...

    def see(self, state: State, grad: Tensor) -> Tensor:
        """Return what is seen of a gradient."""
        ...

    def lift(self, state: State, seen: Tensor, shape: Sequence[int]) -> Lifted:
        """Return the update of the whole parameter that is seen as this."""
        ...


@dataclass(frozen=True)
class Whole:
    """All of it, as it is."""

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape."""
        return tuple(shape)

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate nothing."""
        return {}

    def blind(self, grad: Tensor) -> bool:
        """Say no."""
        return False

    def turn_(self, state: State, grad: Tensor, first: bool, seed: int) -> None:
        """Stay."""

    def see(self, state: State, grad: Tensor) -> Tensor:
        """Return the gradient."""
        return grad

    def lift(self, state: State, seen: Tensor, shape: Sequence[int]) -> Tensor:
        """Return what is seen."""
        return seen


@dataclass(frozen=True)
class Nonzero:
    """The weights that were not exactly zero when the state was made; the others have no update. State: int32 each."""

    count: int

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return how many there are."""
        return (self.count,)

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate their places."""
        return {"window_index": new((self.count,), torch.int32)}

    def blind(self, grad: Tensor) -> bool:
        """Say no."""
        return False

    def turn_(self, state: State, grad: Tensor, first: bool, seed: int) -> None:
        """Stay."""

    def see(self, state: State, grad: Tensor) -> Tensor:
        """Return their gradient."""
        return grad.reshape(-1).index_select(0, state["window_index"])

    def lift(self, state: State, seen: Tensor, shape: Sequence[int]) -> Tensor:
        """Return zeros, and at their places what is seen."""
        whole = seen.new_zeros(math.prod(shape))
        return whole.index_copy_(0, state["window_index"].long(), seen).view(tuple(shape))


@dataclass(frozen=True)
class Coordinates:
    """The coordinates of a matrix in a basis. What lies outside is in no window, and has no update."""

    basis: Basis

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return (m, r) or (r, n)."""
        return self.basis.coords_shape(matrix_shape(shape))

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate the basis."""
        return self.basis.init(matrix_shape(shape), new)

    def blind(self, grad: Tensor) -> bool:
        """Say whether it is zero."""
        return not bool(grad.any())

    def turn_(self, state: State, grad: Tensor, first: bool, seed: int) -> Move | None:
        """Find the basis again from this gradient; one that would find nothing stays as it is."""
        grad = grad.flatten(1)
        if self.basis.guarded and self.blind(grad):
            return None
        kept = {name: value.clone() for name, value in state.items() if name.startswith("basis")}
        try:
            if first:
                self.basis.start_(state, grad, seed)
            if not first or self.basis.guarded:
                self.basis.refresh_(state, grad, seed)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            warn_once(f"a basis could not be refreshed ({error}): the old one serves until the next turn (said once)")
            return None
        return self.basis.move(kept, state)

    def see(self, state: State, grad: Tensor) -> Tensor:
        """Return the coordinates."""
        return self.basis.project(state, grad.flatten(1))

    def lift(self, state: State, seen: Tensor, shape: Sequence[int]) -> Lifted:
        """Return the matrix that has these coordinates, as factors where the basis has them."""
        return self.basis.lift(state, seen)
