"""M-FAC as a rule: gradients of several parameters in one window, and the newest one times the inverse Fisher."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_optim import windows
from lowrank_optim._types import Move, NewState, State, Storage, Tick, Update
from lowrank_optim._warn import warn_once
from lowrank_optim.gram import Ring, needs_float64
from lowrank_optim.views import View

_MOMENTUM = "momentum_buffer"
# columns for each row of a window, below which it is cheap to be careful
_SQUARE = 16


@dataclass(frozen=True)
class Member:
    """How one parameter takes part in a window.

    State: `window`, `num_grads` times what is seen of it; with momentum, one moment of that shape. One parameter of
    those that share a window leads it: `gram` and `gram_inverse`, how many gradients have come (`window_step`) and been
    refused (`window_refused`), and whether to compute in float64 (`window_careful`), int64 on the CPU.

    Args:
        ring: the m×m side.
        view: what is seen.
        storage: of the momentum.
        dtype: of the window; None for that of the mathematics.
        momentum: β of V ← βV + (1−β)U, of updates U.
        leads: whether it keeps what is shared.
    """

    ring: Ring
    view: View
    storage: Storage
    dtype: torch.dtype | None = None
    momentum: float = 0.0
    leads: bool = True

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate the state."""
        count, seen = self.ring.num_grads, self.view.shape(shape)
        state = {"window": new((count, *seen), self.dtype)} | self.view.init(shape, new)
        if self.momentum:
            state |= self.storage.init(_MOMENTUM, seen, new)
        if self.leads:
            state |= {name: new((count, count), torch.float64) for name in ("gram", "gram_inverse")}
            counts = ("window_step", "window_refused", "window_careful")
            state |= {name: new((), torch.int64, host=True) for name in counts}
        return state

    def averaged(self, state: State, update: Tensor, seed: int) -> Tensor:
        """Return the momentum of updates, advanced by this one, in its place."""
        if not self.momentum:
            return update
        moment = self.storage.read([state], _MOMENTUM, update.shape, update.dtype)[0]
        moment.lerp_(update, 1 - self.momentum)
        # an update may be written to by whoever applies it
        update.copy_(moment)
        self.storage.write_([state], _MOMENTUM, [moment], [seed])
        return update

    def move_(self, state: State, move: Move, dtype: torch.dtype, seed: int) -> None:
        """Take window and momentum to where is looked from now."""
        for row in state["window"]:
            row.copy_(move.first(row.to(dtype)))
        if self.momentum:
            moment = self.storage.read([state], _MOMENTUM, state["window"].shape[1:], dtype)[0]
            self.storage.write_([state], _MOMENTUM, [move.first(moment).clone()], [seed])


@dataclass(frozen=True)
class Preconditioned:
    """F⁻¹g, where F is over the last m gradients of all parameters of a window, and g the newest of them.

    Args:
        members: how each parameter takes part; one leads.
        gap: gradients between two turns of the views.
        absent: which members have no gradient in this step: zeros to the window, and no update. So is one whose view
            is blind at first: it waits for a gradient that is not zero.
    """

    members: tuple[Member, ...]
    gap: int
    absent: frozenset[int] = frozenset()

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate the state of the first member."""
        return self.members[0].init(shape, new)

    def updates(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> Iterator[Update | None]:
        """Let the gradient into the window and yield its product with the inverse, one parameter after the other.

        All of it at once would be as much new memory as there are parameters, and as slow as that is to touch.
        """
        lead = leader(states)
        size = windows.largest(grads)
        if not windows.fits(size, lead["window"].dtype):
            warn_once(windows.REFUSED)
            lead["window_refused"] += 1
            yield from [None] * len(grads)
            return
        pushed = int(lead["window_step"])
        first = [i for i, tick in enumerate(ticks) if tick.step == 1 and i not in self.absent]
        idle = self.absent.union(i for i in first if self.members[i].view.blind(grads[i]))
        self._turn_(lead, grads, states, ticks, pushed, idle)
        dtype, weights = self._push_(lead, grads, states, pushed, size)
        lead["window_step"] += 1
        for i, (member, grad, state, tick) in enumerate(zip(self.members, grads, states, ticks, strict=True)):
            yield None if i in idle else _update(member, grad, state, tick, weights, dtype)

    def need(self, shape: Sequence[int]) -> int:
        """Count a gradient, what is seen of it, an update and a weight."""
        return 4 * math.prod(shape)

    def rebuild_(self, states: list[State], pushed: int) -> None:
        """Make what is shared anew from the windows after so many gradients, in float64.

        What a window that has been cast cannot hold becomes zero.
        """
        lead = leader(states)
        lead["gram"].zero_()
        for state in states:
            if not math.isfinite(windows.largest([state["window"]])):
                state["window"].nan_to_num_(0.0, 0.0, 0.0)
            lead["gram"] += windows.gram(_rows(state), lead["gram"].device)[0]
        self.members[0].ring.refactor_(*_sides(lead), pushed)

    def _push_(
        self, lead: State, grads: list[Tensor], states: list[State], pushed: int, size: float
    ) -> tuple[torch.dtype, Tensor]:
        """Replace the oldest gradient; return the weights that make F⁻¹g of the window, (1, m, 1), and in what to.

        In float32 as long as that will do. A window whose rows nearly depend on each other, and one of very large or
        small numbers, is computed with in float64 until it has turned over.
        """
        ring, careful = self.members[0].ring, lead["window_careful"]
        slot = ring.slot(pushed)
        if slot == 0:
            # large ones may be in it still
            careful.fill_(pushed > 0 and not windows.in_range(float(lead["gram"].diagonal().amax().sqrt())))
        if not windows.in_range(size) or _is_small(states):
            careful.fill_(1)
        wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
        row = self._row_(grads, states, slot, torch.float64 if careful else wide).to(lead["gram"].device)
        ring.push_(*_sides(lead), row, pushed)
        weights = ring.weights(*_sides(lead), pushed)
        if wide == torch.float32 and not careful and needs_float64(lead["gram"].unsqueeze(0), weights):
            careful.fill_(1)
            # products that are float32 will not do either
            self.rebuild_(states, pushed + 1)
            ring.solve_newest_(*_sides(lead), pushed)
            weights = ring.weights(*_sides(lead), pushed)
        return torch.float64 if careful else wide, weights

    def _row_(self, grads: list[Tensor], states: list[State], slot: int, dtype: torch.dtype) -> Tensor:
        """Let a gradient into the window; return its products with all rows, (1, m)."""
        found = torch.zeros(1, 1, dtype=torch.float64, device=grads[0].device)
        for member, grad, state in zip(self.members, grads, states, strict=True):
            # products are of what is stored
            stored = state["window"][slot].copy_(member.view.see(state, grad))
            part = windows.products(_rows(state), stored.to(dtype).view(1, -1, 1))
            found = found + part.squeeze(2).to(found.device)
        return found

    def _turn_(
        self,
        lead: State,
        grads: list[Tensor],
        states: list[State],
        ticks: list[Tick],
        pushed: int,
        idle: frozenset[int],
    ) -> None:
        """Let each member look from elsewhere where it is time; the window goes with it, and so do its products."""
        moved = False
        for i, (member, grad, state, tick) in enumerate(zip(self.members, grads, states, ticks, strict=True)):
            first = tick.step == 1
            if i in idle or not (first or pushed % self.gap == 0):
                continue
            move = member.view.turn_(state, grad, first, tick.seed)
            # before the first there are zeros only
            if move is not None and not first:
                member.move_(state, move, grad.dtype, tick.seed)
                moved = True
        if moved:
            self.rebuild_(states, pushed)


def leader(states: list[State]) -> State:
    """Return the state that keeps what the others share."""
    return next(state for state in states if "gram" in state)


def _sides(lead: State) -> tuple[Tensor, Tensor]:
    return lead["gram"].unsqueeze(0), lead["gram_inverse"].unsqueeze(0)


def _is_small(states: list[State]) -> bool:
    """Say whether a window has so few columns that float64 costs nothing and its rows may depend on each other."""
    rows = states[0]["window"].size(0)
    return sum(state["window"].numel() for state in states) < _SQUARE * rows**2


def _update(member: Member, grad: Tensor, state: State, tick: Tick, weights: Tensor, dtype: torch.dtype) -> Update:
    made = windows.combination(_rows(state), weights.to(grad.device), dtype).to(grad.dtype)
    seen = member.averaged(state, made.view(state["window"].shape[1:]), tick.seed)
    return member.view.lift(state, seen, grad.shape)


def _rows(state: State) -> Tensor:
    """Return the window as one block, (1, m, n)."""
    window = state["window"]
    return window.view(1, len(window), math.prod(window.shape[1:]))
