"""How a state is allocated, matched and filled when one is loaded, and whose turn is when."""

import functools
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowrank_optim._half import takes
from lowrank_optim._types import HOST, NewState, Rule, State, compute_dtype

FORMAT_VERSION = 1


class Clocks:
    """Host copies of the step tensors, so that no step waits for a device."""

    def __init__(self) -> None:
        # by a parameter's id: its tensor, the version of that when it was last seen, and its number
        self._known: dict[int, tuple[Tensor, int, int]] = {}

    def taken(self, p: Tensor, state: State) -> int:
        """Return how many updates `p` has had, reading its tensor only when something else has written to it."""
        step = state["step"]
        known = self._known.get(id(p))
        if known is None or known[0] is not step or known[1] != step._version:
            known = self._known[id(p)] = (step, step._version, int(step.item()))
        return known[2]

    def count_(self, p: Tensor, state: State, taken: int) -> None:
        """Say how many it has had now."""
        step = state["step"].fill_(taken)
        self._known[id(p)] = (step, step._version, taken)


def alike(p: Tensor) -> Hashable:
    """Return what parameters that are stepped together have in common."""
    grad = p.grad
    # of a parameter the class of its tensor, which mostly is known without looking
    kind = Tensor if type(p) is torch.nn.Parameter else type(p.detach())
    return (p.shape, p.dtype, p.device, kind, None if grad is None else (grad.dtype, type(grad)))


def as_is(rule: Rule, p: Tensor) -> bool:
    """Return whether a rule is handed the gradients of parameters like this in their own precision."""
    return p.grad is not None and p.grad.dtype == p.dtype and takes(rule, p.grad)


def together(rule: Rule, p: Tensor, chunk_bytes: int) -> int:
    """Return how many parameters like this are stepped at once."""
    count = getattr(rule, "need_as_is", rule.need) if as_is(rule, p) else rule.need
    need = max(1, count(p.shape) * compute_dtype(p).itemsize)
    return max(1, chunk_bytes * (_chunks_at_once(p.device) if p.is_cuda else 1) // need)


@functools.cache
def _chunks_at_once(device: torch.device) -> int:
    """Return how many times `chunk_bytes` a step takes on a GPU, which waits for the host unless it is handed much.

    One for each 8 GiB: with the usual 64 MiB, one byte in 128 of what activations have left when a step begins.
    """
    # a tensor may stand for one that is on no device of this machine
    if not torch.cuda.is_available():
        return 4
    return max(4, torch.cuda.get_device_properties(device).total_memory >> 33)


def rate(lr: float | Tensor) -> float | Tensor:
    """Return a learning rate; a tensor stays where it is, and of no dimensions it mixes with every dtype and device."""
    return lr.reshape(()).to(torch.promote_types(lr.dtype, torch.float32)) if isinstance(lr, Tensor) else lr


# of a state tensor: its name, shape, dtype and device, the last None where the host reads it
Need = tuple[str, torch.Size, torch.dtype, torch.device | None]


def needs(rule: Rule, p: Tensor) -> list[Need]:
    """Return what a rule keeps for parameters like this."""
    wanted = rule.init(p.shape, shapes(p)).items()
    return [(name, x.shape, x.dtype, None if _on_the_host(name) else p.device) for name, x in wanted]


def fits(state: State | None, needs: list[Need]) -> bool:
    """Return whether all that is needed is there, and where it is needed."""
    if not state:
        return False
    for name, shape, dtype, device in needs:
        kept = state.get(name)
        if kept is None or kept.shape != shape or kept.dtype != dtype or (device is not None and kept.device != device):
            return False
    return True


def _on_the_host(name: str) -> bool:
    # what further blocks of a split keep has a number at the end
    return name.rstrip("_0123456789") in HOST


def strayed(state: State, p: Tensor) -> tuple[bool, bool]:
    """Return whether a state is elsewhere than its parameter, and whether it holds the other kind of numbers."""
    device, other = p.device, torch.float32 if compute_dtype(p) == torch.float64 else torch.float64
    moved = recast = False
    for name, value in state.items():
        # a user may keep something else there
        if isinstance(value, Tensor) and not _on_the_host(name):
            moved, recast = moved or value.device != device, recast or value.dtype == other
    return moved, recast


def pairs(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> Iterator[tuple[Any, Tensor, dict[str, Any]]]:
    """Yield (saved id, parameter, saved group) in order; torch itself refuses lists that do not match."""
    for old, new in zip(saved, own, strict=False):
        for pid, p in zip(old["params"], new["params"], strict=False):
            yield pid, p, old


def with_roles(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the saved groups; one that says no role, because torch made it, has that of the group it goes to."""
    roles = [{"role": group["role"]} if "role" in group else {} for group in own]
    return [{**role, **group} for role, group in zip(roles, saved, strict=True)] if len(roles) == len(saved) else saved


def check_groups(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """Raise ValueError for saved groups of a later format, or whose parameters are these in another order."""
    for group in saved:
        if group.get("format_version", 1) > FORMAT_VERSION:
            raise ValueError(
                f"the state was saved in format {group['format_version']}, by a newer lowrank_optim; "
                f"this one reads up to {FORMAT_VERSION}"
            )
    for old, new in zip(saved, own, strict=False):
        theirs, ours = old.get("param_names") or [], new.get("param_names") or []
        if theirs != ours and sorted(theirs) == sorted(ours):
            raise ValueError("the saved parameters have the names of these, in another order")


def filled(fresh: State, saved: State) -> State:
    """Return `fresh` with the values of `saved` in it, each in the dtype, layout and placement of `fresh`."""
    for name, value in fresh.items():
        if name in saved:
            # torch's older optimizers keep `step` as a number
            source = saved[name] if isinstance(saved[name], Tensor) else torch.tensor(float(saved[name]))
            value.copy_(source.reshape(value.shape))
    return fresh


def shapes(p: Tensor) -> NewState:
    """Return an allocator of nothing but shapes."""

    def new(shape: Any, dtype: torch.dtype | None = None, *, host: bool = False) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype or compute_dtype(p), device="meta")

    return new


def code_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype of codes, and None for numbers, of which any kind is read."""
    return x.dtype if x.dtype in (torch.int8, torch.uint8) else None


def spread(groups: list[dict[str, Any]]) -> dict[Tensor, float]:
    """Spread the matrices, and the vectors, evenly over [0, 1), in the order in which they were given."""
    kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
    for group in groups:
        for p in group["params"]:
            kinds[p.dim() > 1].append(p)
    # vectors have turns of their own: they are not refreshed, but rounded apart by them
    return {p: (i + 0.5) / len(params) for params in kinds for i, p in enumerate(params)}
