"""How a kernel's function becomes an operation that torch knows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton
from torch import Tensor
from torch.library import custom_op, triton_op

from .apply import apply_kernel

_INTERPRETED = not isinstance(apply_kernel, triton.JITFunction)


def operation(
    name: str, fake: Callable[..., Any], *, mutates: tuple[str, ...] = (), opaque: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Register a function; `fake` says what its result looks like."""

    def register(function: Callable[..., Any]) -> Any:
        make: Any = custom_op if opaque or _INTERPRETED else triton_op
        made = make(f"lowrank_optim::{name}", function, mutates_args=mutates)
        made.register_fake(fake)
        return made

    return register


def nothing(*_: Any) -> None:
    """Return what an operation that only writes does."""


def parts_of(first: Tensor, count: int) -> Tensor:
    """Return the stack of `count` tensors in one piece of memory, by its first: no two results may share theirs."""
    return first.as_strided((count, *first.shape), (first.numel(), *first.stride()))


def rates(lr: float | Tensor) -> tuple[Tensor | None, float]:
    """Return the rate as an operation takes it, whose arguments are of one type each."""
    return (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)


def columns_of(states: Sequence[Mapping[str, Tensor]], name: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return a moment of each state, and its scales where it has some."""
    return [state[name] for state in states], [state[f"{name}_scale"] for state in states if f"{name}_scale" in state]


def states_of(**columns: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Return the states of columns, the other way around; an empty column is none."""
    found = {name: column for name, column in columns.items() if column}
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
