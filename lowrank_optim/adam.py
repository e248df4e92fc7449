"""Adam's two moments, and the direction that is made of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import ops, passes
from lowrank_optim._types import Move, NewState, State, Storage, Tick, Update

_ADAM = ("exp_avg", "exp_avg_sq")
# added to a seed, so that the second moment is not rounded as the first one is
_APART = 0x2545F491


@dataclass(frozen=True)
class Adam:
    """m̂ / (√v̂ + ε), as `torch.optim.AdamW` computes it. State: two moments of the gradient's shape.

    With `aged`, the name of a dimension (-1 or -2) of coordinates whose length is the rank, each direction of the basis
    counts its own steps, and its bias correction uses that count: one that enters a basis is corrected as at a first
    step, where the count of the whole matrix would take its small second moment at its word. State: `column_step` too,
    one int32 for each direction.
    """

    storage: Storage
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    aged: int | None = None
    # of the directions, where a kernel makes them; None is that of the mathematics
    dtype: torch.dtype | None = None
    # what directions are multiplied by
    scale: float = 1.0

    def takes(self, grad: Tensor) -> bool:
        """Return whether a kernel reads it as it is."""
        return self.aged is None and passes.in_one_pass(grad)

    def init(self, shape: Sequence[int], new: NewState) -> State:
        """Allocate both moments."""
        state = self.storage.init("exp_avg", shape, new) | self.storage.init("exp_avg_sq", shape, new, signed=False)
        if self.aged is not None:
            state["column_step"] = new((shape[self.aged],), torch.int32)
        return state

    def updates(self, grads: list[Tensor], states: list[State], ticks: list[Tick]) -> list[Update | None]:
        """Advance the moments and return the directions."""
        return self.moved_updates(grads, states, ticks, [None] * len(grads))

    def moved_updates(
        self, grads: list[Tensor], states: list[State], ticks: list[Tick], moves: Sequence[Move | None]
    ) -> list[Update | None]:
        """Move the moments where there is a move, advance them, and return the directions."""
        if self._in_one_pass(grads[0], moves):
            for state, tick, move in zip(states, ticks, moves, strict=True):
                if move is not None:
                    self._move_(state, tick, move, state["exp_avg"], state["exp_avg_sq"])
            seeds = [0 if self.storage.in_place else tick.seed for tick in ticks]
            kept = self.storage.name
            return [*passes.stored_adam_directions_(grads, states, kept=kept, seeds=seeds, **self.numbers(ticks))]
        numel, room = grads[0].numel(), ops.part_size(grads[0].device)
        # so many at a time that the moments, which are there as numbers only now, take little memory
        size = len(grads) if self.storage.in_place else max(1, room // max(1, numel))
        found: list[Update | None] = []
        for i in range(0, len(grads), size):
            some = slice(i, i + size)
            # a move sees a whole matrix, and so do its directions' ages
            whole = self.storage.in_place or moves[i] is not None or self.aged is not None
            if numel > room and not whole:
                found.append(self._advance_in_parts(grads[i], states[i], ticks[i]))
            else:
                found += self._advance(grads[some], states[some], ticks[some], moves[some])
        return found

    def numbers(self, ticks: list[Tick]) -> dict[str, Any]:
        """Return what kernels need to know."""
        steps = [tick.step for tick in ticks]
        return {"betas": self.betas, "eps": self.eps, "steps": steps, "scale": self.scale, "dtype": self.dtype}

    def write_(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        ticks: list[Tick],
        *,
        lr: float | Tensor,
        weight_decay: float,
        apart: int | None,
    ) -> bool:
        """Advance the moments and write the weights in one launch; return False, and do nothing, where no kernel does.

        With `apart`, added to the seeds of moments, weights are rounded by chance.
        """
        plain = self.storage.in_place and self.aged is None and self.dtype is None and self.scale == 1
        if not plain or not passes.in_one_pass(grads[0]) or not all(p.is_contiguous() for p in params):
            return False
        firsts, seconds = ([state[name] for state in states] for name in _ADAM)
        if firsts[0].dtype != torch.float32:
            return False
        seeds = None if apart is None else [tick.seed + apart for tick in ticks]
        numbers: dict[str, Any] = {"lr": lr, "betas": self.betas, "eps": self.eps, "weight_decay": weight_decay}
        passes.adamw_(params, grads, firsts, seconds, [tick.step for tick in ticks], **numbers, seeds=seeds)
        return True

    def goes_along(self, like: Tensor) -> bool:
        """Return whether a kernel can take the moments along while it advances them."""
        return self.storage.in_place and self._in_one_pass(like, ())

    def need(self, shape: Sequence[int]) -> int:
        """Count a gradient, a direction and a weight, or moments that are read whole because of their ages."""
        whole = self.aged is not None and not self.storage.in_place
        return (5 if whole else 3) * math.prod(shape)

    def moment(self, state: State, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the first moment."""
        return self.storage.read([state], "exp_avg", shape, dtype)[0]

    def mean(self, tick: Tick) -> float:
        """Return what undoes the first moment's bias."""
        return 1 / self._unbias(tick)[0]

    def _in_one_pass(self, like: Tensor, moves: Sequence[Move | None]) -> bool:
        """Return whether a kernel does for gradients like this: it reads, advances and keeps what nothing moves."""
        moved = not self.storage.in_place and any(move is not None for move in moves)
        return self.aged is None and self.scale > 0 and not moved and like.numel() > 0 and passes.in_one_pass(like)

    def _advance(
        self, grads: list[Tensor], states: list[State], ticks: list[Tick], moves: Sequence[Move | None], start: int = 0
    ) -> list[Tensor]:
        like = grads[0]
        exp_avgs = self.storage.read(states, "exp_avg", like.shape, like.dtype)
        exp_avg_sqs = self.storage.read(states, "exp_avg_sq", like.shape, like.dtype)
        firsts, seconds = list(exp_avgs), list(exp_avg_sqs)
        for state, tick, move, *moments in zip(states, ticks, moves, firsts, seconds, strict=True):
            if move is not None:
                self._move_(state, tick, move, *moments)
        numbers: dict[str, Any] = {"betas": self.betas, "eps": self.eps}
        if self.aged is None:
            steps = [tick.step for tick in ticks]
            directions = ops.adam_directions_(grads, firsts, seconds, **numbers, steps=steps)
        else:
            ages = [self._ages(state, like) for state in states]
            rows = zip(grads, firsts, seconds, ages, strict=True)
            directions = [ops.adam_direction_(*three, **numbers, step=age) for *three, age in rows]
        if self.scale != 1:
            torch._foreach_mul_(directions, self.scale)
        seeds = [tick.seed + start for tick in ticks]
        self.storage.write_(states, "exp_avg", exp_avgs, seeds)
        self.storage.write_(states, "exp_avg_sq", exp_avg_sqs, [seed + _APART for seed in seeds])
        return directions

    def _advance_in_parts(self, grad: Tensor, state: State, tick: Tick) -> Tensor:
        flat = grad.reshape(-1)
        direction = torch.empty_like(flat)
        for start, stop, views in self.storage.parts(state, _ADAM, flat.numel()):
            direction[start:stop] = self._advance([flat[start:stop]], [views], [tick], [None], start)[0]
        return direction.view(grad.shape)

    def _move_(self, state: State, tick: Tick, move: Move, first: Tensor, second: Tensor) -> None:
        moved = move.second(second, first, self._unbias(tick))
        for kept, new in ((second, moved), (first, move.first(first))):
            if new is not kept:
                kept.copy_(new)
        if self.aged is not None:
            state["column_step"].copy_(move.columns(state["column_step"]))

    def _unbias(self, tick: Tick) -> tuple[float, float]:
        """Return what the moments, as they are before this step, are divided by to be means."""
        done = max(1, tick.step - 1)
        return 1 - self.betas[0] ** done, 1 - self.betas[1] ** done

    def _ages(self, state: State, like: Tensor) -> Tensor:
        """Count this step, and return the counts beside the directions that they are of."""
        ages = state["column_step"].add_(1).to(like.dtype)
        return ages if self.aged == -1 else ages.unsqueeze(-1)
