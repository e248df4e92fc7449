"""A parameter that holds several matrices, each of which is treated as if it were alone."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_optim import probes
from lowrank_optim._types import NewState, Rule, State, Tick, Update, dense
from lowrank_optim.steering import Layout

# how far apart the turns of alike pieces of two parameters are kept, so that their seeds differ
_APART = 2.0**-28


@dataclass(frozen=True)
class Pieces:
    """Stacked experts, or fused query, key and value: a rule for each matrix of a parameter, with a state of its own.

    What equal matrices keep is stacked: the state of a rule with one more dimension in front. Where a split makes
    blocks of different sizes, those of each have names of their own: `exp_avg`, `exp_avg_1`, `exp_avg_2`. Each matrix
    counts its own steps in `piece_step` (int64 on the CPU), because its rule may leave one where it is in a step that
    the others take: an expert that has seen no token yet has no basis. Its weights still decay with the others'.

    Args:
        layout: which matrices the parameter holds.
        rule: what to do with a matrix of this shape.
    """

    layout: Layout
    rule: Callable[[tuple[int, int]], Rule]

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate the state of every matrix."""
        state: State = {}
        for place, stack in enumerate(self._stacks(torch.empty(shape, device="meta"))):
            count = len(stack)

            def stacked(
                shape: Sequence[int], dtype: torch.dtype | None = None, *, host: bool = False, count: int = count
            ) -> Tensor:
                return new((count, *shape), dtype, host=host)

            own = self.rule(_sides(stack)).init(_sides(stack), stacked)
            own["piece_step"] = new((count,), torch.int64, host=True)
            state |= {_named(name, place): value for name, value in own.items()}
        return state

    def updates(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> list[Update | None]:
        """Advance the states of all matrices, and return updates of whole parameters."""
        found = [torch.zeros_like(grad, memory_format=torch.contiguous_format) for grad in grads]
        moved = [False] * len(grads)
        stacks = [(self._stacks(grad), self._stacks(out)) for grad, out in zip(grads, found, strict=True)]
        counts = [len(stack) for stack in stacks[0][0]]
        for place, first in enumerate(stacks[0][0]):
            before = sum(counts[:place])
            rule = self.rule(_sides(first))
            for i, (cut, made) in enumerate(stacks):
                grad, out = cut[place], made[place]
                own = [dict(one) for one in self._own(states[i], place, len(grad))]
                steps = [one.pop("piece_step") for one in own]
                clocks = [_tick(ticks[i], int(step), before + j, sum(counts)) for j, step in enumerate(steps)]
                with probes.within(i, len(grad)):
                    # in no variable, so that they are gone when the next ones are made
                    moved[i] |= _keep_(rule.updates(list(grad), own, clocks), out, steps, clocks)
        return [update if any_ else None for update, any_ in zip(found, moved, strict=True)]

    def need(self, shape: Sequence[int]) -> int:
        """Count gradient and update of the whole, and what else is needed for all equal matrices at once."""
        stacks = self._stacks(torch.empty(shape, device="meta"))
        # each counts its own part of the gradient
        inner = max(len(stack) * self.rule(_sides(stack)).need(_sides(stack)) - stack.numel() for stack in stacks)
        return 2 * math.prod(shape) + inner

    def _stacks(self, x: Tensor) -> list[Tensor]:
        """Return the matrices of a parameter as stacks of equal ones, (count, rows, columns); views of it."""
        return [block.squeeze(0) for block in self.layout.blocks(x.unsqueeze(0))]

    def _own(self, state: State, place: int, count: int) -> Iterator[State]:
        """Yield the state of each matrix of a stack, as views."""
        ending = _named("", place)
        names = [name for name in state if name != "step" and _place(name) == place]
        for j in range(count):
            yield {name.removesuffix(ending): state[name][j] for name in names}


def _keep_(updates: Iterable[Update | None], out: Tensor, steps: list[Tensor], ticks: list[Tick]) -> bool:
    """Put the updates of matrices into their places and count their steps; say whether there are any."""
    moved = False
    for update, place, step, tick in zip(updates, out, steps, ticks, strict=True):
        if update is not None:
            place.copy_(dense(update).view_as(place))
            step.fill_(tick.step)
            moved = True
    return moved


def _sides(stack: Tensor) -> tuple[int, int]:
    return stack.size(-2), stack.size(-1)


def _named(name: str, place: int) -> str:
    return f"{name}_{place}" if place else name


def _place(name: str) -> int:
    ending = "".join(itertools.takewhile(str.isdigit, reversed(name)))[::-1]
    return int(ending) if ending and name.endswith(f"_{ending}") else 0


def _tick(tick: Tick, done: int, j: int, count: int) -> Tick:
    """Return the time of one matrix: the turns of a parameter's matrices are spread over the period too."""
    return Tick(done + 1, (tick.turn + j / count + j * _APART) % 1.0)
