"""How an update is made from gradients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim._types import Basis, Factored, NewState, Rule, State, Storage, Tick, Update, matrix_shape
from lowrank_optim._warn import warn_once


@dataclass(frozen=True)
class Adam:
    """m̂ / (√v̂ + ε), as `torch.optim.AdamW` computes it. State: two moments of the gradient's shape."""

    storage: Storage
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate both moments."""
        first = self.storage.init("exp_avg", shape, new)
        return first | self.storage.init("exp_avg_sq", shape, new, signed=False)

    def updates(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> list[Update | None]:
        """Advance the moments and return the directions."""
        exp_avgs = [self.storage.read(s, "exp_avg") for s in states]
        exp_avg_sqs = [self.storage.read(s, "exp_avg_sq") for s in states]
        steps = [tick.step for tick in ticks]
        directions = ops.adam_directions_(grads, exp_avgs, exp_avg_sqs, betas=self.betas, eps=self.eps, steps=steps)
        for state, exp_avg, exp_avg_sq in zip(states, exp_avgs, exp_avg_sqs, strict=True):
            self.storage.write_(state, "exp_avg", exp_avg)
            self.storage.write_(state, "exp_avg_sq", exp_avg_sq)
        return list(directions)


@dataclass(frozen=True)
class Projected:
    """Any rule, run on the coordinates of the gradient in a low-rank basis; the moments stay when the basis moves.

    The basis is refreshed every `gap` steps. With `stagger` each matrix has its own turn within the period, and the
    first step takes the basis's cheap `start_`, so that no step pays for many decompositions; without it all matrices
    refresh together at steps 0, gap, 2·gap, ..., as GaLore's own code does.

    A refresh needs a gradient that says something. Where it holds NaN or Inf (or so large numbers that Adam's second
    moment would), or where a matrix has not yet seen a
    nonzero one, the matrix and its step are left as they are, so the refresh is tried again at the next step; where
    the decomposition fails, the old basis serves until the next turn.
    """

    basis: Basis
    inner: Rule
    gap: int = 200
    scale: float = 1.0
    stagger: bool = True

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate the basis and the inner rule's state on coordinates."""
        matrix = matrix_shape(shape)
        return self.basis.init(matrix, new) | self.inner.init(self.basis.coords_shape(matrix), new)

    def updates(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> list[Update | None]:
        """Refresh where it is due, project, run the inner rule, and return the lifted updates as factors."""
        grads = [g.flatten(1) for g in grads]
        found: list[Update | None] = [None] * len(grads)
        skipped = self._refresh_(grads, states, ticks)
        live = [i for i in range(len(grads)) if i not in skipped]
        if live:
            coords = [self._project(states[i], grads[i]) for i in live]
            inner = self.inner.updates(coords, [states[i] for i in live], [ticks[i] for i in live])
            for i, update in zip(live, inner, strict=True):
                if update is not None:
                    dense = update.left @ update.right if isinstance(update, Factored) else update
                    # the inner rule hands over what it returns, so it may be scaled in place
                    found[i] = self.basis.lift(states[i], dense.mul_(self.scale))
        return found

    def _project(self, state: State, grad: Tensor) -> Tensor:
        coords = self.basis.project(state, grad)
        if coords.shape != self.basis.coords_shape(matrix_shape(grad.shape)):
            raise RuntimeError(
                "the rank or the side of a projected group has changed since its state was made; "
                "make a new optimizer, or keep them as they were"
            )
        return coords

    def due(self, tick: Tick) -> bool:
        """Say whether this is a refresh boundary."""
        done = tick.step - 1
        return done == 0 or (done - int(tick.turn * self.gap if self.stagger else 0)) % self.gap == 0

    def _refresh_(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> set[int]:
        """Refresh the matrices whose turn it is; return those that must sit this step out."""
        due = [i for i, tick in enumerate(ticks) if self.due(tick)]
        if not due:
            return set()
        # the only place on the step path where the host waits for the device
        sizes = torch.stack([torch.linalg.vector_norm(grads[i]) for i in due]).tolist()
        skipped = set()
        for i, size in zip(due, sizes, strict=True):
            first = ticks[i].step == 1
            if not math.isfinite(size):
                warn_once(
                    "a gradient held NaN, Inf or numbers whose squares are infinite when its basis was to be "
                    "refreshed: that matrix sits this step out and tries again at the next one (said once)"
                )
                skipped.add(i)
            elif size > 0:
                self._set_basis_(states[i], grads[i], first=first)
            elif first:
                skipped.add(i)
        return skipped

    def _set_basis_(self, state: State, grad: Tensor, *, first: bool) -> None:
        try:
            if first:
                self.basis.start_(state, grad)
            if not (first and self.stagger):
                self.basis.refresh_(state, grad)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            warn_once(f"a basis could not be refreshed ({error}): the old one serves until the next turn (said once)")
