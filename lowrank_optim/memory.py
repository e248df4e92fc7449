"""What an optimizer keeps, to the byte, and what a step needs beside it."""

import contextlib
import resource
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Phase = Literal["forward", "backward", "step"]

_GIB = 1 << 30


@dataclass(frozen=True)
class StateBytes:
    """Bytes of optimizer state on this rank.

    Attributes:
        total: all of it.
        by_name: per state name, such as `exp_avg` or `basis`.
        by_parameter: per parameter, then per name. Parameters are called by their names where the optimizer was
            given names, else `group.index`; a name that repeats is followed by its group.
    """

    total: int
    by_name: dict[str, int]
    by_parameter: dict[str, dict[str, int]]

    def __str__(self) -> str:
        names = ", ".join(f"{name} {size:,}" for name, size in sorted(self.by_name.items()))
        return f"{self.total:,} bytes of optimizer state ({names})"


def state_bytes(optimizer: torch.optim.Optimizer) -> StateBytes:
    """Count the bytes of every state tensor, as allocated, for any `torch.optim.Optimizer`.

    A tensor counts with the whole storage that it keeps alive, once; a sharded one with this rank's part. Tensors
    inside dicts, lists and tuples count; objects that are none of these hold what nobody can see, and do not.

    Example:
        >>> opt = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3, 2))])
        >>> state_bytes(opt).total
        0
    """
    seen: set[int] = set()
    by_parameter: dict[str, dict[str, int]] = {}
    for g, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]
        for name, p in zip(names, group["params"], strict=True):
            if optimizer.state.get(p):
                # names may repeat, when two models share an optimizer
                label = f"{name} (group {g})" if name in by_parameter else name
                by_parameter[label] = {key: _nbytes(value, seen) for key, value in optimizer.state[p].items()}
    by_name: Counter[str] = Counter()
    for sizes in by_parameter.values():
        by_name.update(sizes)
    return StateBytes(sum(by_name.values()), dict(by_name), by_parameter)


def adamw_state_bytes(params: Iterable[Tensor]) -> int:
    """Return what AdamW with float32 moments would keep: 2·4 bytes an element and 4 for `step`, a parameter."""
    return sum(8 * p.numel() + 4 for p in {id(p): p for p in params}.values() if p.requires_grad)


class MemoryMeter:
    """Memory of a training loop: computed exactly where it can be, measured where it must be.

    Args:
        model: whose parameters and gradients are counted.
        optimizer: whose state is counted.

    Example:
        >>> model, x = torch.nn.Linear(4, 2), torch.ones(1, 4)
        >>> opt = torch.optim.AdamW(model.parameters())
        >>> meter = MemoryMeter(model, opt)
        >>> with meter.phase("forward"):
        ...     loss = model(x).square().mean()
        >>> with meter.phase("backward"):
        ...     loss.backward()
        >>> with meter.phase("step"):
        ...     opt.step()
        >>> sorted(meter.read())[:2]
        ['mem/basis_bytes', 'mem/grads_bytes']
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._peaks: dict[Phase, int] = {}
        self._grads = 0

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Measure the allocator's peak within a phase (CUDA); a phase entered again keeps its largest peak."""
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield
        finally:
            if cuda:
                self._peaks[name] = max(self._peaks.get(name, 0), torch.cuda.max_memory_allocated(self._device))
            if name == "backward":
                # gradients are freed between steps, so they are counted while they are there
                self._grads = _nbytes([p.grad for p in self._model.parameters()], set())

    def read(self) -> dict[str, float]:
        """Return what is known since the last `read`, under the names that the tracker logs.

        `mem/params_bytes`, `mem/grads_bytes`, `mem/opt_state_bytes` and `mem/basis_bytes` (the part of the state that
        holds bases) are computed. On CUDA `mem/{allocated,reserved,active}_{cur,peak}_gib` and
        `mem/peak_in_{forward,backward,step}_gib` come from the allocator; elsewhere `mem/rss_gib` and
        `mem/rss_peak_gib` are the resident set of the process.
        """
        state = state_bytes(self._optimizer)
        seen: set[int] = set()
        values: dict[str, float] = {
            "mem/params_bytes": sum(_nbytes(p, seen) for p in self._model.parameters()),
            "mem/grads_bytes": self._grads,
            "mem/opt_state_bytes": state.total,
            "mem/basis_bytes": sum(size for name, size in state.by_name.items() if name.startswith("basis")),
        }
        values |= self._cuda() if self._device.type == "cuda" else _resident_set()
        self._peaks.clear()
        return values

    def _cuda(self) -> dict[str, float]:
        stats = torch.cuda.memory_stats(self._device)
        values = {}
        for kind in ("allocated", "reserved", "active"):
            values[f"mem/{kind}_cur_gib"] = stats[f"{kind}_bytes.all.current"] / _GIB
            values[f"mem/{kind}_peak_gib"] = stats[f"{kind}_bytes.all.peak"] / _GIB
        if self._peaks:
            # each phase resets the allocator's own peak
            values["mem/allocated_peak_gib"] = max(self._peaks.values()) / _GIB
        return values | {f"mem/peak_in_{name}_gib": peak / _GIB for name, peak in self._peaks.items()}


def _nbytes(value: Any, seen: set[int]) -> int:
    """Return the bytes that `value` keeps alive beyond the storages already `seen`."""
    if isinstance(value, dict):
        return sum(_nbytes(v, seen) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(_nbytes(v, seen) for v in value)
    if not isinstance(value, Tensor):
        return 0
    storage = getattr(value, "_local_tensor", value).untyped_storage()
    if storage._cdata in seen:
        return 0
    seen.add(storage._cdata)
    return storage.nbytes()


def _resident_set() -> dict[str, float]:
    # Linux counts the peak in KiB, macOS in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    values = {"mem/rss_peak_gib": peak / _GIB}
    statm = Path("/proc/self/statm")
    if statm.exists():
        values["mem/rss_gib"] = int(statm.read_text().split()[1]) * resource.getpagesize() / _GIB
    return values
