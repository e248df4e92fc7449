"""Momentum, and what is made of it: orthogonalized whole, in coordinates, or after being completed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lowrank_optim import passes
from lowrank_optim._types import (
    Factored,
    Move,
    NewState,
    Rule,
    Selecting,
    State,
    Storage,
    Tick,
    Update,
    dense,
    matrix_shape,
)
from lowrank_optim.steering import Steered

Form = Literal["ema", "sum"]
FORMS = get_args(Form)

_NAME = "momentum_buffer"


@dataclass(frozen=True)
class Momentum:
    """M ← βM + (1−β)G ("ema", torch) or M ← βM + G ("sum"); the update is made of M, or of Nesterov's look ahead.

    With `steer` None the update is the momentum itself. State: one moment of the gradient's shape, and with `beta2`
    one number for each row.

    Args:
        storage: how the momentum is kept.
        steer: what is made of it.
        momentum: β.
        nesterov: look ahead: βM + (1−β)G, or βM + G, after M's own update.
        form: the one or the other sum.
        beta2: decay of the mean squares of rows (NorMuon, arXiv 2510.05491).
        less: share of the gradient that is taken out of what is steered; see `Completed`.
    """

    storage: Storage
    steer: Steered | None
    momentum: float = 0.95
    nesterov: bool = True
    form: Form = "ema"
    beta2: float | None = None
    less: float = 0.0

    def takes(self, grad: Tensor) -> bool:
        """Return whether kernels read it as it is."""
        return self._plan(grad) is not None

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate the momentum."""
        state = self.storage.init(_NAME, shape, new)
        if self.beta2 is not None:
            # as many dimensions as the parameter, so that a layout cuts it as it cuts the gradient
            state["row_avg_sq"] = new(self._rows(shape))
        return state

    def updates(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> list[Update | None]:
        """Advance the momenta and return the updates."""
        return self.moved_updates(grads, states, ticks, [None] * len(grads))

    def moved_updates(
        self, grads: list[Tensor], states: list[State], ticks: list[Tick], moves: Sequence[Move | None]
    ) -> list[Update | None]:
        """Move the momenta where there is a move, advance them and return the updates."""
        how = self._plan(grads[0])
        if how is not None and self.steer is not None and not any(move is not None for move in moves):
            numbers: dict[str, Any] = {"momentum": self.momentum, "nesterov": self.nesterov, "form": self.form}
            seeds = [tick.seed for tick in ticks]
            normalized = passes.normalized_momenta_(
                grads, states, kept=self.storage.name, **numbers, eps=self.steer.eps, seeds=seeds, dtype=how.dtype
            )
            return list(self.steer.of_normalized(normalized, how))
        whole = torch.empty(len(grads), *grads[0].shape, dtype=grads[0].dtype, device=grads[0].device)
        for grad, state, tick, move, out in zip(grads, states, ticks, moves, whole, strict=True):
            moment = self.moment(state, grad.shape, grad.dtype)
            if move is not None:
                moment = move.first(moment)
            if self.form == "ema":
                moment.lerp_(grad, 1 - self.momentum)
            else:
                moment.mul_(self.momentum).add_(grad)
            if self.nesterov:
                self._look_ahead(grad, moment, out)
            else:
                out.copy_(moment)
            if self.less:
                out.sub_(grad, alpha=self.less)
            self.storage.write_([state], _NAME, [moment], [tick.seed])
        if self.steer is None:
            return list(whole)
        if self.beta2 is None:
            return list(self.steer(whole))
        return list(self.steer(whole, [state["row_avg_sq"] for state in states], self.beta2))

    def need(self, shape: Sequence[int]) -> int:
        """Count what steering needs; unsteered, a gradient, a momentum, an update and a weight."""
        return (4 if self.steer is None else self.steer.copies) * math.prod(shape)

    def moment(self, state: State, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the momentum."""
        return self.storage.read([state], _NAME, shape, dtype)[0]

    def mean(self, tick: Tick) -> float:
        """Return what makes the momentum a mean of gradients."""
        return 1.0 if self.form == "ema" else 1 - self.momentum

    def _plan(self, like: Tensor) -> Any:
        """Return how a normalized momentum is steered where kernels make one; None elsewhere."""
        whole = self.beta2 is None and not self.less and like.numel() > 0
        if self.steer is None or not whole or not passes.in_one_pass(like):
            return None
        return self.steer.planned(like.shape, like.device.type)

    def _look_ahead(self, grad: Tensor, moment: Tensor, out: Tensor) -> None:
        if self.form == "ema":
            torch.lerp(grad, moment, self.momentum, out=out)
        else:
            torch.add(grad, moment, alpha=self.momentum, out=out)

    def _rows(self, shape: Sequence[int]) -> tuple[int, ...]:
        flatten = self.steer is None or self.steer.layout.flatten
        return (shape[0], *[1] * (len(shape) - 1)) if flatten else (*shape[:-1], 1)


@dataclass(frozen=True)
class Stateless:
    """The gradient itself, steered: spectral descent. State: none."""

    steer: Steered

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate nothing."""
        return {}

    def updates(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> list[Update | None]:
        """Return the updates."""
        return list(self.steer(torch.stack(grads)))

    def need(self, shape: Sequence[int]) -> int:
        """Count what steering needs."""
        return self.steer.copies * math.prod(shape)


@dataclass(frozen=True)
class Completed:
    """A momentum that is kept in coordinates, lifted, completed by a share of the gradient outside, then steered whole.

    U = lift(momentum in coordinates) + c·(G − lift(R)), where R are G's coordinates: an m×n matrix of full rank whose
    state is r×n. The lift is linear, so the inner momentum takes c·R out of its update and one lift serves both.

    Args:
        inner: `Projected`, around a momentum that is not steered and is `less` the same share.
        share: c.
        steer: what is made of U.
    """

    inner: Rule
    share: float
    steer: Steered

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate what `inner` keeps."""
        return self.inner.init(shape, new)

    def updates(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> list[Update | None]:
        """Advance the inner momenta and return the updates of the completed matrices."""
        inner = list(self.inner.updates(grads, states, ticks))
        live = [i for i, lifted in enumerate(inner) if lifted is not None]
        found: list[Update | None] = [None] * len(grads)
        if live:
            whole = torch.stack([_plus(inner[i], grads[i].flatten(1), self.share) for i in live])
            for i, update in zip(live, self.steer(whole), strict=True):
                found[i] = update
        return found

    def need(self, shape: Sequence[int]) -> int:
        """Count what steering needs, which is more than what was needed before it."""
        return max(self.steer.copies * math.prod(shape), self.inner.need(shape))


def _plus(update: Update | None, grad: Tensor, share: float) -> Tensor:
    """Return the update plus a share of the gradient."""
    assert update is not None
    if isinstance(update, Factored):
        return torch.addmm(grad, *update, beta=share)
    return torch.add(dense(update), grad, alpha=share)


@dataclass(frozen=True)
class Trimmed:
    """Momentum with error feedback along the columns that have most of it (Trion, arXiv 2505.17967; Dion2).

    M ← M + G, m = M Q for the columns Q of a fixed basis with the largest sums of magnitudes, M ← M − (1−μ) m Qᵀ; the
    update is the steered m, lifted. State: one moment of the gradient's shape; nothing is kept of the selection.
    """

    storage: Storage
    basis: Selecting
    steer: Steered
    momentum: float = 0.95

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate the momentum."""
        return self.storage.init(_NAME, matrix_shape(shape), new)

    def updates(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> list[Update | None]:
        """Advance the momenta and return the updates."""
        chosen: list[State] = []
        coords = []
        for grad, state, tick in zip(grads, states, ticks, strict=True):
            grad = grad.flatten(1)
            moment = self.storage.read([state], _NAME, grad.shape, grad.dtype)[0].add_(grad)
            coefficients = self.basis.analyze(moment)
            index = self.basis.select(coefficients.energies())
            chosen.append({"basis_index": index})
            coords.append(coefficients.take(index))
            spent = self.basis.lift(chosen[-1], coords[-1])
            if isinstance(spent, Factored):
                moment.addmm_(*spent, alpha=self.momentum - 1)
            else:
                moment.add_(spent, alpha=self.momentum - 1)
            self.storage.write_([state], _NAME, [moment], [tick.seed])
        steered = self.steer(torch.stack(coords))
        return [self.basis.lift(state, made) for state, made in zip(chosen, steered, strict=True)]

    def need(self, shape: Sequence[int]) -> int:
        """Count a gradient, a momentum, a weight, and what steering the coordinates needs."""
        matrix = matrix_shape(shape)
        return 3 * math.prod(matrix) + self.steer.copies * math.prod(self.basis.coords_shape(matrix))
