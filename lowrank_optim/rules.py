"""A rule in the coordinates of a basis: the composition that the projected optimizers are points of."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from lowrank_optim import probes
from lowrank_optim._half import takes
from lowrank_optim._types import (
    Basis,
    Lifted,
    Look,
    Move,
    NewState,
    Portable,
    Residual,
    Rule,
    State,
    Tick,
    Update,
    compute_dtype,
    dense,
    matrix_shape,
)
from lowrank_optim._warn import warn_once
from lowrank_optim.schedule import Schedule

Carry = Literal["keep", "reset", "rotate"]
CARRIES = get_args(Carry)


@dataclass(frozen=True)
class Forget:
    """A move that leaves nothing: every direction is a new one (FRUGAL's reset, arXiv 2411.07837)."""

    def first(self, moment: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(moment)

    def second(self, moment: Tensor, first: Tensor, unbias: tuple[float, float]) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(moment)

    def columns(self, numbers: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(numbers)


@dataclass(frozen=True)
class Projected:
    """Any rule, run on the coordinates of the gradient in a low-rank basis.

    When the basis moves, the moments stay as they are ("keep", GaLore), are zeroed ("reset", FRUGAL) or go with it
    ("rotate", LDAdam; for columns of a fixed basis a gather). With `follow` = ρ the basis is found from
    ρ·(mean gradient by the first moment) + (1 − ρ)·G instead of from the gradient G.

    The schedule says when the basis is refreshed. Where that is staggered, the first step takes the basis's cheap
    `start_`, so that no step pays for many decompositions. What becomes of the rest of the gradient, and the factor on
    the update, is the residual's.

    Most bases need a gradient that says something. Where it holds NaN or Inf (or so large numbers that Adam's second
    moment would), or where a matrix has not yet seen a nonzero one, the matrix and its step are left as they are, so
    the refresh is tried again at the next step; where the decomposition fails, the old basis serves until the next
    turn.
    """

    basis: Basis
    inner: Rule
    residual: Residual
    schedule: Schedule
    carry: Carry = "keep"
    follow: float | None = None

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate the basis, the inner rule's state on coordinates, and what the schedule and the residual keep."""
        matrix = matrix_shape(shape)
        inner = self.inner.init(self.basis.coords_shape(matrix), new)
        return self.basis.init(matrix, new) | self.schedule.init(new) | inner | self.residual.init(matrix, new)

    def takes(self, grad: Tensor) -> bool:
        """Return whether basis and residual do."""
        return takes(self.residual, grad) and takes(self.basis, grad)

    def updates(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> list[Update | None]:
        """Refresh where it is due, project, run the inner rule, and return what the residual makes of it."""
        found: list[Update | None] = [None] * len(grads)
        if (directions := self._at_once(grads, states, ticks)) is not None:
            return list(cast("Any", self.basis).lift_all(states, directions))
        seen = [self.residual.seen(state, grad.flatten(1)) for grad, state in zip(grads, states, strict=True)]
        turned = [_Turned() for _ in grads]
        skipped = self._refresh_(seen, states, ticks, turned)
        live = [i for i in range(len(grads)) if i not in skipped]
        if not live:
            return found
        kept, clocks, moves = [states[i] for i in live], [ticks[i] for i in live], [turned[i].move for i in live]
        rule, residual = self.inner, self.residual
        if grads[0].dtype != compute_dtype(grads[0]):
            # factors of updates of such weights are rounded to their dtype anyway
            rule, residual = _folded(rule, residual, grads[0].dtype)
            kept = cast("Any", self.basis).rounded(kept, grads[0].dtype)
        coords = self._coords(kept, [seen[i] for i in live], [turned[i].coords for i in live])
        inner: Iterable[Update | None]
        if any(move is not None for move in moves):
            inner = cast("Portable", rule).moved_updates(coords, kept, clocks, moves)
        else:
            inner = rule.updates(coords, kept, clocks)
        looks: dict[int, Look] = {}
        for i, r, update in zip(live, coords, inner, strict=True):
            probes.captured(i, seen[i], r)
            if update is not None:
                # the inner rule hands over what it returns, so it may be written to
                looks[i] = Look(seen[i], r, dense(update), ticks[i], turned[i].lost)
        seen_by = dict(zip(live, kept, strict=True))
        made = residual.updates(self.basis, [seen_by[i] for i in looks], list(looks.values())) if looks else []
        for i, update in zip(looks, made, strict=True):
            found[i] = update
        return found

    def _at_once(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> list[Tensor] | None:
        """Return the directions, scaled, of matrices that are all refreshed, where kernels find and advance them."""
        if self.carry != "rotate" or self.follow is not None or not self.takes(grads[0]) or probes.listening():
            return None
        all_due = all(self.schedule.due(state, tick) for state, tick in zip(states, ticks, strict=True))
        rule, _ = _folded(self.inner, self.residual, grads[0].dtype)
        advance, goes_along = getattr(self.basis, "adam_directions_", None), getattr(rule, "goes_along", None)
        if advance is None or goes_along is None or self.schedule.compares or not all_due or not goes_along(grads[0]):
            return None
        found: list[Tensor] | None = advance(states, [x.flatten(1) for x in grads], **cast("Any", rule).numbers(ticks))
        return found

    def need(self, shape: Sequence[int]) -> int:
        """Count what is looked at, and a weight and an update or what the inner rule needs, whichever is more."""
        matrix = matrix_shape(shape)
        whole, coords = math.prod(matrix), math.prod(self.basis.coords_shape(matrix))
        inner = self.inner.need(self.basis.coords_shape(matrix))
        if self.carry == "rotate":
            # both moments read, the matrices between the second one and what it becomes, and what the first one loses
            inner += (7 if self.residual.recovers else 5) * coords
        # coordinates and their direction are there while an update is made of them
        return (1 + self.residual.held) * whole + max(2 * whole, whole + 2 * coords, inner)

    def need_as_is(self, shape: Sequence[int]) -> int:
        """Count coordinates in 32 bits, and in 16 directions and a rounded basis, or what columns are selected from.

        Gradients are there, and updates are never formed.
        """
        m, n = matrix_shape(shape)
        rows, columns = self.basis.coords_shape((m, n))
        coords, side = rows * columns, self.basis.side
        # in halves of a number
        halves = 3 * coords + self.basis.numel((m, n))
        if side == "both":
            # one factor of an update, in 32 bits
            halves += 2 * rows * n
        if hasattr(self.basis, "adam_directions_"):
            # all coefficients, from the left those of a copy that is turned, and the columns that lift some of them
            selected, all_there = (columns * n, m * n) if side == "right" else (rows * m, 2 * m * n)
            halves = selected + max(all_there + coords, 3 * coords)
        # Adam advances what is kept; what steers holds copies
        inner = self.inner.need((rows, columns))
        return max(-(-halves // 2), inner if inner > 3 * coords else 0)

    def _coords(self, states: list[State], seen: list[Tensor], known: list[Tensor | None]) -> list[Tensor]:
        project_all = getattr(self.basis, "project_all", None)
        if project_all is not None and not any(found is not None for found in known):
            return list(project_all(states, seen))
        rows = zip(states, seen, known, strict=True)
        return [self.basis.project(state, grad) if found is None else found for state, grad, found in rows]

    def _refresh_(
        self, seen: list[Tensor], states: list[State], ticks: list[Tick], turned: list["_Turned"]
    ) -> set[int]:
        """Refresh the matrices whose turn it is; return those that must sit this step out."""
        due = [i for i, tick in enumerate(ticks) if self.schedule.due(states[i], tick)]
        skipped = set()
        for i, size in zip(due, self._sizes([seen[i] for i in due]), strict=True):
            if not math.isfinite(size):
                warn_once(
                    "a gradient held NaN, Inf or numbers whose squares are infinite when its basis was to be "
                    "refreshed: that matrix sits this step out and tries again at the next one (said once)"
                )
                # where it is not the gradient, it is what was to be added to it
                self.residual.forget_(states[i])
                skipped.add(i)
            elif size > 0:
                turned[i] = self._set_basis_(i, states[i], seen[i], ticks[i])
            elif ticks[i].step == 1:
                skipped.add(i)
        return skipped

    def _sizes(self, grads: list[Tensor]) -> list[float]:
        if not self.basis.guarded:
            # as good as any
            return [1.0] * len(grads)
        if not grads:
            return []
        # the only place on the step path where the host waits for the device, but for adaptive schedules
        sizes: list[float] = torch.stack(
            [torch.linalg.vector_norm(grad, dtype=compute_dtype(grad)) for grad in grads]
        ).tolist()
        return sizes

    def _set_basis_(self, i: int, state: State, seen: Tensor, tick: Tick) -> "_Turned":
        first = tick.step == 1
        try:
            if first:
                coords = self.basis.start_(state, seen, tick.seed)
                if not self.schedule.stagger and self.basis.guarded:
                    coords = self.basis.refresh_(state, seen, tick.seed)
                self.schedule.moved_(state, tick, None)
                return _Turned(coords)
            return self._turn_(i, state, seen, tick)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            warn_once(f"a basis could not be refreshed ({error}): the old one serves until the next turn (said once)")
            self.schedule.moved_(state, tick, None)
        return _Turned()

    def _turn_(self, i: int, state: State, seen: Tensor, tick: Tick) -> "_Turned":
        """Set the basis again; return how moments get there."""
        compares = self.schedule.compares or probes.listening()
        old: State = {}
        if compares or self.carry == "rotate":
            old = {name: state[name].clone() for name in state if name.startswith("basis")}
        moment = None
        if self.follow is not None or self.residual.recovers:
            shape = self.basis.coords_shape(matrix_shape(seen.shape))
            moment = cast("Portable", self.inner).moment(state, shape, compute_dtype(seen))
        if self.follow is None or moment is None:
            coords = self.basis.refresh_(state, seen, tick.seed)
        else:
            mean = self.follow * cast("Portable", self.inner).mean(tick)
            coords = self.basis.follow_(state, seen, moment, (mean, 1 - self.follow), tick.seed)
        overlap = self.basis.overlap(old, state) if compares else None
        probes.overlapping(i, overlap)
        self.schedule.moved_(state, tick, overlap)
        if self.carry == "keep":
            return _Turned(coords)
        move: Move = Forget() if self.carry == "reset" else self.basis.move(old, state)
        if moment is None or not self.residual.recovers:
            return _Turned(coords, move)
        # a copy: the stored moment has moved when the residual looks at what it was
        before = self.basis.lift(old, moment.clone())
        return _Turned(coords, move, (before, self.basis.lift(state, move.first(moment))))


def _folded(rule: Rule, residual: Residual, dtype: torch.dtype) -> tuple[Rule, Residual]:
    """Return a rule whose directions are in this dtype and scaled already, where it can, and the residual without."""
    scale = getattr(residual, "scale", None)
    if scale is None or not hasattr(rule, "dtype"):
        return rule, residual
    return replace(cast("Any", rule), dtype=dtype, scale=scale), replace(cast("Any", residual), scale=1.0)


@dataclass(frozen=True)
class _Turned:
    """What is known of a matrix whose basis has been set in this step."""

    # of the gradient, where they have come with it
    coords: Tensor | None = None
    move: Move | None = None
    # the first moment before and after, lifted
    lost: tuple[Lifted, ...] = ()
