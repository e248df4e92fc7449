"""How `bench` measures: interleaved step times, peak extra memory of a step, and what this machine can do at best."""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from experiments.bench_workloads import Entry, Work, Workload, parameters, state_sizes


def synchronize(device: str) -> None:
    """Wait for the GPU, so that a wall clock means something."""
    if device != "cpu":
        torch.cuda.synchronize(device)


@contextmanager
def _profiled() -> Iterator[profile]:
    # kineto announces every start and stop on stderr otherwise
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        yield prof


def _running_peak(prof: profile) -> int:
    # the exported trace is the public face of the allocator's events; LAPACK workspaces that torch allocates are in it
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    level = peak = 0
    memory = (event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0)
    for event in sorted(memory, key=lambda event: event["ts"]):
        level += event["args"]["Bytes"]
        peak = max(peak, level)
    return peak


def peak_extra_bytes(action: Callable[[], object], device: str = "cpu") -> int:
    """Highest number of bytes allocated during `action` above what was allocated before it.

    On the CPU the allocator tells the profiler of every block that torch allocates, also inside an operation; blocks
    that MKL allocates for itself are not seen. The freeing of a block is seen only if its allocation was profiled.
    """
    if device != "cpu":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _profiled() as prof:
        action()
    return _running_peak(prof)


@dataclass
class Limits:
    """What this machine does at best, measured in this process: the denominators of every floor."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float
    float32_matmul_flops_per_s: float
    bfloat16_matmul_flops_per_s: float

    def step_ms(self, work: Work) -> float:
        """Least time of a step without refresh: memory traffic and arithmetic may overlap."""
        products = work.step_flops / self.matmul_flops_per_s
        products += work.step_bfloat16_flops / self.bfloat16_matmul_flops_per_s
        return 1e3 * max(work.step_bytes / self.copy_bytes_per_s, products)

    def refresh_ms(self, flops: int) -> float:
        """Least time of a refresh, if a decomposition ran at the speed of a matrix product in float32."""
        return 1e3 * flops / self.float32_matmul_flops_per_s


def _best_seconds(action: Callable[[], object], device: str, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def measure_limits(device: str, dtype: torch.dtype, small: bool = False) -> Limits:
    """Copy bandwidth and matrix-product speed; `small` is for tests, where the figures need not be good."""
    # far beyond any cache on a CPU
    numel = 2**16 if small else 2**26
    source, target = torch.ones(numel, device=device), torch.empty(numel, device=device)
    # read once, written once
    bandwidth = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device, 5)
    size = 128 if small else (2048 if device == "cpu" else 8192)

    def product_speed(kind: torch.dtype) -> float:
        a, b = torch.randn(2, size, size, device=device).to(kind)
        return 2 * size**3 / _best_seconds(lambda: a @ b, device, 5)

    speeds = {kind: product_speed(kind) for kind in {torch.float32, torch.bfloat16, dtype}}
    return Limits(bandwidth, speeds[dtype], speeds[torch.float32], speeds[torch.bfloat16])


@dataclass
class Gradients:
    """Sets of gradients in turn, as they are, or each time as a copy where an optimizer of the run writes to them.

    All optimizers of a run are handed the same kind, so that the caches are as warm for one as for the other.
    """

    sets: list[list[Tensor]]
    copied: bool = False
    _scratch: list[Tensor] = field(default_factory=list)

    def at(self, step: int) -> list[Tensor]:
        """The gradients of this step, until the next call."""
        grads = self.sets[step % len(self.sets)]
        if not self.copied:
            return grads
        self._scratch = self._scratch or [torch.empty_like(g) for g in grads]
        for scratch, grad in zip(self._scratch, grads, strict=True):
            scratch.copy_(grad)
        return self._scratch


@dataclass
class Racer:
    """One optimizer on its own copy of the weights, with what has been measured of it."""

    entry: Entry
    params: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    times: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    state: tuple[int, int] = (0, 0)
    extra: dict[str, int] = field(default_factory=dict)

    def feed(self, grads: list[Tensor]) -> None:
        """Hand over gradients; all racers share the same tensors, see `Gradients`."""
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g

    def timed_step(self, device: str) -> float:
        """Seconds of one step."""
        synchronize(device)
        start = time.perf_counter()
        self.optimizer.step()
        synchronize(device)
        return time.perf_counter() - start

    def best_period(self, length: int) -> Tensor:
        """Milliseconds of each step of a period: the fastest of the periods, which is free of most noise."""
        after_first = torch.tensor(self.times, dtype=torch.float64) * 1e3
        return after_first.reshape(-1, length).amin(0)


def line_up(
    entries: dict[str, Entry], work: Workload, gap: int, device: str, gradients: Gradients
) -> tuple[dict[str, Racer], dict[str, str]]:
    """Build every optimizer; those whose package is missing come back with the reason."""
    racers, absent = {}, {}
    for name, entry in entries.items():
        params = parameters(work, device)
        # code that loads on the first step (peers, LAPACK, torch's own) is not charged to the first step
        some = params if entry.compiles else params[:1]
        try:
            warm = Racer(entry, some, entry.build(some, work.rank, gap))
            for step in range(1 + entry.compiles):
                warm.feed(gradients.at(step)[: len(some)])
                warm.optimizer.step()
        except ImportError as error:
            absent[name] = f"not installed: {error}"
            continue
        except RuntimeError as error:
            if not entry.compiles:
                raise
            # there may be no compiler
            absent[name] = f"cannot be compiled here: {str(error).strip().splitlines()[0]}"
            continue
        params = parameters(work, device)
        racers[name] = Racer(entry, params, entry.build(params, work.rank, gap))
    return racers, absent


def race(
    racers: dict[str, Racer], work: Workload, gradients: Gradients, gap: int, rounds: int, device: str, *, firsts: int
) -> None:
    """Round-robin: every racer takes one step a round, in an order that rotates, so noise hits all the same.

    The first step, on `firsts` fresh optimizers because each has but one; then, of the last of them, `rounds` more.
    """
    order = list(racers.values())
    gc.collect()
    gc.disable()
    try:
        for _ in range(firsts):
            for racer in order:
                racer.optimizer = racer.entry.build(racer.params, work.rank, gap)
                racer.feed(gradients.at(0))
                racer.firsts.append(racer.timed_step(device))
            order.append(order.pop(0))
        for t in range(1, 1 + rounds):
            for racer in order:
                racer.feed(gradients.at(t))
                racer.times.append(racer.timed_step(device))
            order.append(order.pop(0))
            if rounds >= 10 and t % (rounds // 10) == 0:
                print(f"round {t} of {rounds}", file=sys.stderr, flush=True)
    finally:
        gc.enable()
    for racer in order:
        racer.state = state_sizes(racer.optimizer)


def measure_extra(racer: Racer, work: Workload, gradients: Gradients, gap: int, device: str, length: int) -> None:
    """Peak extra memory of an ordinary step and of the most demanding step of a period.

    Where bases are refreshed that is of a fresh optimizer, because state must be allocated under the profiler for its
    replacement at a refresh to be seen as one. Profiling is slow on the CPU, so there only the slowest steps of the
    period are looked at: refreshes are slow.
    """
    if not racer.entry.refreshes:
        racer.feed(gradients.at(0))
        peak = peak_extra_bytes(racer.optimizer.step, device)
        racer.extra = {"ordinary": peak, "worst": peak}
        return
    period = racer.best_period(length)
    quick = int(period.argmin()) + 1
    slowest = period.topk(length if device != "cpu" else min(8, length)).indices
    candidates = {quick, *(int(index) + 1 for index in slowest)}

    def begin() -> None:
        racer.optimizer = racer.entry.build(racer.params, work.rank, gap)
        racer.feed(gradients.at(0))
        racer.optimizer.step()

    del racer.optimizer
    if device == "cpu":
        with _profiled():
            begin()
    else:
        begin()
    peaks = {}
    for t in range(1, max(candidates) + 1):
        racer.feed(gradients.at(t))
        if t in candidates:
            peaks[t] = peak_extra_bytes(racer.optimizer.step, device)
        else:
            racer.optimizer.step()
    racer.extra = {"ordinary": peaks[quick], "worst": max(peaks.values())}
