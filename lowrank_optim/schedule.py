"""When a basis is found again."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim._types import NewState, State, Tick

# 9 of 10 is less than 0.9 in float32, and so may 1 be
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Schedule:
    """Every `gap` steps. With `stagger` each matrix has its own turn within the period.

    Without it all matrices refresh together at steps 0, gap, 2·gap, ..., as GaLore's own code does. State: none.
    """

    # whether `moved_` looks at the overlap
    compares: ClassVar[bool] = False

    gap: int = 200
    stagger: bool = True

    def init(self, new: NewState) -> State:
        """Allocate nothing."""
        return {}

    def due(self, state: State, tick: Tick) -> bool:
        """Say whether this is a refresh boundary."""
        done = tick.step - 1
        return done == 0 or (done - self._turn(tick)) % self.gap == 0

    def moved_(self, state: State, tick: Tick, overlap: Tensor | None) -> None:
        """Take note of a refresh, and of which share of the one subspace lies in the other."""

    def _turn(self, tick: Tick) -> int:
        return int(tick.turn * self.gap) if self.stagger else 0


@dataclass(frozen=True)
class Adaptive(Schedule):
    """Less often where the subspace stays: each refresh that finds it again lengthens that matrix's own period.

    The overlap of the subspace that is found with the one that has served is ‖P_newᵀ P_old‖² / r, which knows nothing
    of signs or of the order of vectors, and is r/n by chance. Where it is at least `overlap`, the period doubles, up to
    `most` times `gap`; where it is less, the period is `gap` again. The first comparison needs a basis that has been
    found by the basis's own method. State: `basis_due`, two int64 on the CPU: the step of the next refresh and the
    period.
    """

    compares: ClassVar[bool] = True

    overlap: float = 0.9
    most: int = 16

    def init(self, new: NewState) -> State:
        """Allocate the next step and the period."""
        return {"basis_due": new((2,), torch.int64, host=True)}

    def due(self, state: State, tick: Tick) -> bool:
        """Say whether the step has come."""
        return tick.step == 1 or tick.step >= int(state["basis_due"][0])

    def moved_(self, state: State, tick: Tick, overlap: Tensor | None) -> None:
        """Set the next step; makes the host wait for `overlap`."""
        if tick.step == 1 and self.stagger:
            # a sketch is no evidence: the next basis is not compared with it
            self._set_(state, 1 + max(1, self._turn(tick)), 0)
            return
        period = int(state["basis_due"][1])
        found_again = overlap is not None and float(overlap) >= self.overlap - _ROUNDING
        period = min(2 * period, self.most * self.gap) if found_again and period else self.gap
        self._set_(state, tick.step + period, period)

    def _set_(self, state: State, due: int, period: int) -> None:
        for place, number in zip(state["basis_due"], (due, period), strict=True):
            place.fill_(number)
