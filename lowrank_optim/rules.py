"""How an update is made from gradients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim._types import Basis, NewState, Portable, Rule, State, Storage, Tick, Update, dense, matrix_shape
from lowrank_optim._warn import warn_once

_ADAM = ("exp_avg", "exp_avg_sq")
# added to a seed, so that the second moment is not rounded as the first one is
_APART = 0x2545F491


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
        steps, seeds = [tick.step for tick in ticks], [tick.seed for tick in ticks]
        numel, room = grads[0].numel(), ops.part_size(grads[0].device)
        if self.storage.in_place:
            return list(self._advance(grads, states, steps, seeds))
        found: list[Update | None] = []
        if numel > room:
            for one in zip(grads, states, steps, seeds, strict=True):
                found.append(self._advance_in_parts(*one))
            return found
        # so many at a time that the moments, which are there as numbers only now, take little memory
        size = room // max(1, numel)
        for i in range(0, len(grads), size):
            some = slice(i, i + size)
            found += self._advance(grads[some], states[some], steps[some], seeds[some])
        return found

    def need(self, shape: Sequence[int]) -> int:
        """Count a gradient, a direction and a weight."""
        return 3 * math.prod(shape)

    def _advance(self, grads: list[Tensor], states: list[State], steps: list[int], seeds: list[int]) -> list[Tensor]:
        like = grads[0]
        exp_avgs = self.storage.read(states, "exp_avg", like.shape, like.dtype)
        exp_avg_sqs = self.storage.read(states, "exp_avg_sq", like.shape, like.dtype)
        moments = list(exp_avgs), list(exp_avg_sqs)
        directions = ops.adam_directions_(grads, *moments, betas=self.betas, eps=self.eps, steps=steps)
        self.storage.write_(states, "exp_avg", exp_avgs, seeds)
        self.storage.write_(states, "exp_avg_sq", exp_avg_sqs, [seed + _APART for seed in seeds])
        return directions

    def _advance_in_parts(self, grad: Tensor, state: State, step: int, seed: int) -> Tensor:
        flat = grad.reshape(-1)
        direction = torch.empty_like(flat)
        for start, stop, views in self.storage.parts(state, _ADAM, flat.numel()):
            direction[start:stop] = self._advance([flat[start:stop]], [views], [step], [seed + start])[0]
        return direction.view(grad.shape)


@dataclass(frozen=True)
class Projected:
    """Any rule, run on the coordinates of the gradient in a low-rank basis.

    When the basis moves, the moments stay as they are (GaLore); with `carry`, a momentum is carried into the new basis,
    and the new basis is found from the momentum as it will be with this gradient, instead of from the gradient.

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
    carry: bool = False

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate the basis and the inner rule's state on coordinates."""
        matrix = matrix_shape(shape)
        return self.basis.init(matrix, new) | self.inner.init(self.basis.coords_shape(matrix), new)

    def updates(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> list[Update | None]:
        """Refresh where it is due, project, run the inner rule, and return the lifted updates as factors."""
        grads = [g.flatten(1) for g in grads]
        found: list[Update | None] = [None] * len(grads)
        # coordinates that came with a move of the basis
        known: dict[int, Tensor] = {}
        skipped = self._refresh_(grads, states, ticks, known)
        live = [i for i in range(len(grads)) if i not in skipped]
        if live:
            coords = [known[i] if i in known else self.basis.project(states[i], grads[i]) for i in live]
            inner = self.inner.updates(coords, [states[i] for i in live], [ticks[i] for i in live])
            for i, update in zip(live, inner, strict=True):
                if update is not None:
                    # the inner rule hands over what it returns, so it may be scaled in place
                    found[i] = self.basis.lift(states[i], dense(update).mul_(self.scale))
        return found

    def need(self, shape: Sequence[int]) -> int:
        """Count a gradient, and a weight and a direction or what the inner rule needs, whichever is more."""
        matrix = matrix_shape(shape)
        return math.prod(matrix) + max(2 * math.prod(matrix), self.inner.need(self.basis.coords_shape(matrix)))

    def due(self, tick: Tick) -> bool:
        """Say whether this is a refresh boundary."""
        done = tick.step - 1
        return done == 0 or (done - int(tick.turn * self.gap if self.stagger else 0)) % self.gap == 0

    def _refresh_(
        self, grads: list[Tensor], states: list[State], ticks: list[Tick], known: dict[int, Tensor]
    ) -> set[int]:
        """Refresh the matrices whose turn it is; return those that must sit this step out."""
        due = [i for i, tick in enumerate(ticks) if self.due(tick)]
        skipped = set()
        for i, size in zip(due, self._sizes([grads[i] for i in due]), strict=True):
            if not math.isfinite(size):
                warn_once(
                    "a gradient held NaN, Inf or numbers whose squares are infinite when its basis was to be "
                    "refreshed: that matrix sits this step out and tries again at the next one (said once)"
                )
                skipped.add(i)
            elif size > 0:
                coords = self._set_basis_(states[i], grads[i], ticks[i])
                if coords is not None:
                    known[i] = coords
            elif ticks[i].step == 1:
                skipped.add(i)
        return skipped

    def _sizes(self, grads: list[Tensor]) -> list[float]:
        if not self.basis.guarded:
            # as good as any
            return [1.0] * len(grads)
        if not grads:
            return []
        # the only place on the step path where the host waits for the device
        sizes: list[float] = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).tolist()
        return sizes

    def _set_basis_(self, state: State, grad: Tensor, tick: Tick) -> Tensor | None:
        first = tick.step == 1
        try:
            if first:
                self.basis.start_(state, grad)
            if not (first and self.stagger):
                if self.carry:
                    return self._follow_(state, grad, tick)
                self.basis.refresh_(state, grad)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            warn_once(f"a basis could not be refreshed ({error}): the old one serves until the next turn (said once)")
        return None

    def _follow_(self, state: State, grad: Tensor, tick: Tick) -> Tensor:
        inner = cast("Portable", self.inner)
        moment = inner.moment(state, self.basis.coords_shape(matrix_shape(grad.shape)), grad.dtype)
        coords, moved = self.basis.follow_(state, grad, moment, inner.weights)
        inner.keep_(state, moved, tick)
        return coords
