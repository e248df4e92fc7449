"""What a step can tell about itself to whoever listens; silent, and free, where nobody does."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank_optim._types import Factored, Update, dense

# numbers of one parameter, by name: one for each matrix that it holds, each a tensor so that nobody waits for it
Readings = dict[str, list[Tensor]]


@dataclass
class Probe:
    """Collects readings of parameters."""

    readings: dict[int, Readings] = field(default_factory=dict)
    # the parameters of the chunk that is being stepped, by their ids
    chunk: Sequence[int] = ()

    def note(self, i: int, name: str, value: Tensor) -> None:
        """Keep a reading of the i-th parameter of the chunk."""
        self.readings.setdefault(self.chunk[i], {}).setdefault(name, []).append(value)


_probe: ContextVar[Probe | None] = ContextVar("lowrank_optim_probe", default=None)


@contextmanager
def listen(probe: Probe | None) -> Iterator[None]:
    """Let this probe listen within the block."""
    token = _probe.set(probe)
    try:
        yield
    finally:
        _probe.reset(token)


def listening() -> bool:
    """Say whether somebody listens."""
    return _probe.get() is not None


def chunk(params: Sequence[Tensor]) -> None:
    """Say whose numbers come next; what they have said before is forgotten."""
    if (probe := _probe.get()) is not None:
        probe.chunk = [id(p) for p in params]
        for pid in probe.chunk:
            probe.readings.pop(pid, None)


@contextmanager
def within(i: int, count: int) -> Iterator[None]:
    """Take what is said of `count` matrices within the block as said of the i-th parameter."""
    probe = _probe.get()
    if probe is None:
        yield
        return
    outer, probe.chunk = probe.chunk, [probe.chunk[i]] * count
    try:
        yield
    finally:
        probe.chunk = outer


def captured(i: int, seen: Tensor, coords: Tensor) -> None:
    """Note which share of the energy of a matrix its basis sees, and of how many directions that is made.

    The number of directions is (tr C)² / ‖C‖² for C the Gram matrix of the coordinates: r if they are alike, 1 if one
    dominates, whatever way the basis is turned.
    """
    if (probe := _probe.get()) is None:
        return
    # norms, which form nothing of a matrix's size
    energy = torch.linalg.vector_norm(coords).square()
    tiny = torch.finfo(coords.dtype).tiny
    probe.note(
        i, "captured_energy", energy / torch.linalg.vector_norm(seen, dtype=coords.dtype).square().clamp(min=tiny)
    )
    gram = coords @ coords.mT if coords.size(-2) < coords.size(-1) else coords.mT @ coords
    probe.note(i, "effective_rank", (energy / torch.linalg.vector_norm(gram).clamp(min=tiny)).square())


def overlapping(i: int, overlap: Tensor | None) -> None:
    """Note which share of the subspace that was lies in the one that is."""
    if overlap is not None and (probe := _probe.get()) is not None:
        probe.note(i, "subspace_overlap", overlap)


def updated(i: int, update: Update) -> None:
    """Note the root mean square of an update, before the learning rate."""
    if (probe := _probe.get()) is None:
        return
    if isinstance(update, Factored):
        # ‖L R‖² = ⟨Lᵀ L, R Rᵀ⟩
        left, right = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in update)
        left, right = left.mT @ left, right @ right.mT
        numel = update.left.size(-2) * update.right.size(-1)
        square = (left * right.mT).sum().clamp(min=0) / max(1, numel)
    else:
        whole = dense(update)
        square = torch.linalg.vector_norm(whole).square() / max(1, whole.numel())
    probe.note(i, "update_rms", square.sqrt())
