"""Times on one device, its ceilings, and whole steps beside the optimizers that they are compared with.

Times of kernels are those of the device, which is kept busy with copies while the host launches what is timed. Times of
steps are what they take one after the other, each from the end of the one before, host included; what a call costs the
host, and for how long the device works, are figures of their own, because the host is what a short step waits for.

The matrices are those of LLaMA-7B, and of one of its 32 layers for Muon. Of an optimizer with a refresh period a whole
one is timed, after steps that have compiled and allocated everything: its mean and its worst step are measured.
"""

import functools
import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from experiments.bench_workloads import Workload, gradient_sets, llama_shapes, parameters
from lowrank_optim import DCTAdamW, GaLoreAdamW, Muon, orthogonalize

Action = Callable[[], object]
Figures = dict[str, Any]

SAMPLES = 7
# a sample is of so many calls as take this long
_SAMPLE_MS, _CALLS = 1.0, 20
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
GAP = 200
_LR = 1e-5
# the most that a figure is to be, by its name; one that is not here is only reported
_TIMES_FASTER = {"4096x4096": 1.5, "4096x11008": 2, "32x256x4096": 4, "32x1024x11008": 4}
MOST: dict[str, float] = {
    **{f"orthogonalize {size} ÷ compiled Newton–Schulz, CUDA graphs": 1 / x for size, x in _TIMES_FASTER.items()},
    **{f"GaLoreAdamW r={r}, mean of a period ÷ AdamW": 1.0 for r in (1024, 256)},
    **{f"DCTAdamW r={r}, median step ÷ AdamW": 1.0 for r in (1024, 256)},
    **{f"{kind} r={r}, worst step ÷ its median": 2.0 for kind in ("GaLoreAdamW", "DCTAdamW") for r in (1024, 256)},
    "Muon in int8 ÷ in float32, step": 1.0,
}


class WallTimer:
    """Milliseconds by the clock on the wall, for a CPU."""

    device = "cpu"

    def laps(self, action: Action, count: int, ahead_ms: float = 0.0) -> list[float]:
        """Return the time of each of so many calls in a row."""
        return [self.host_ms(action) for _ in range(count)]

    def host_ms(self, action: Action) -> float:
        """Return the time until a call returns."""
        start = time.perf_counter()
        action()
        return 1e3 * (time.perf_counter() - start)

    def busy_ms(self, action: Action) -> float:
        """Return for how long the device computes."""
        return self.host_ms(action)

    def replay(self, action: Action) -> Action:
        """Return what launches all of `action` at once."""
        return action


class CudaTimer(WallTimer):
    """Milliseconds by the events of the device."""

    device = "cuda"

    def __init__(self) -> None:
        self._source = torch.ones(1 << 28, device="cuda")
        self._target = torch.empty_like(self._source)

    def laps(self, action: Action, count: int, ahead_ms: float = 0.0) -> list[float]:
        """Do as said; the device is first given copies for at least `ahead_ms`, while the host launches the calls."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        torch.cuda.synchronize()
        # 2 GiB each, which takes the fastest memory of today .25 ms
        for _ in range(math.ceil(ahead_ms / 0.25)):
            self._target.copy_(self._source)
        events[0].record()
        for event in events[1:]:
            action()
            event.record()
        events[-1].synchronize()
        return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]

    def host_ms(self, action: Action) -> float:
        """Return the time until a call returns, which waits for nothing that was launched before."""
        torch.cuda.synchronize()
        found = super().host_ms(action)
        torch.cuda.synchronize()
        return found

    def busy_ms(self, action: Action) -> float:
        """Return the sum of the times of all that runs on the device."""
        # otherwise each start and stop is announced
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            action()
            torch.cuda.synchronize()
        # the ranges that optimizers name are not work
        work = [event for event in prof.key_averages() if not event.key.startswith("Optimizer.")]
        return sum(float(event.self_device_time_total) for event in work) / 1e3

    def replay(self, action: Action) -> Action:
        """Return the replay of a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            action()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            action()
        return graph.replay


def sampled(actions: Sequence[Action], timer: WallTimer, *, with_host: bool = False) -> Figures:
    """Return milliseconds of one call, median and minimum of samples of several calls, which take turns.

    With `with_host` the device may wait for the host, as it does where nothing else is to be done.
    """
    turns = itertools.cycle(actions)

    def call() -> None:
        next(turns)()

    # the first compiles, each fills its cache of constants
    for _ in range(max(2, len(actions))):
        call()
    host = min(timer.host_ms(call) for _ in range(5))
    one = min(timer.laps(call, 3, 3 * host))
    calls = max(2, min(_CALLS, round(_SAMPLE_MS / max(one, 1e-6))))

    def several() -> None:
        for _ in range(calls):
            call()

    # half as much again, because the host may be slower now
    ahead = 0.0 if with_host else 1.5 * host * calls * SAMPLES
    times = [lap / calls for lap in timer.laps(several, SAMPLES, ahead)]
    return summary(times) | {"host_ms": round(host, 5), "calls": calls}


def summary(times: Sequence[float]) -> Figures:
    """Return median, minimum and all of some times in milliseconds."""
    median = float(torch.tensor(times, dtype=torch.float64).quantile(0.5))
    return {"median_ms": median, "min_ms": min(times), "times_ms": [round(x, 5) for x in times]}


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best, in numbers per millisecond."""

    bytes_per_ms: float
    flops_per_ms: float

    def floor_ms(self, nbytes: float, flops: float) -> float:
        """Return the least time, with memory and arithmetic side by side."""
        return max(nbytes / self.bytes_per_ms, flops / self.flops_per_ms)


def measure_ceilings(timer: WallTimer, shrink: int = 1) -> tuple[Ceilings, Figures]:
    """Measure a copy, as bytes read and written, and a bfloat16 product of 8192³ of random numbers."""
    source, side = torch.ones((1 << 28) // shrink**2, device=timer.device), 8192 // shrink
    copy = sampled([functools.partial(torch.empty_like(source).copy_, source)], timer)
    nbytes = 2 * source.nbytes
    a, b = (torch.randn(side, side, device=timer.device).bfloat16() for _ in range(2))
    product = sampled([lambda: a @ b], timer)
    found = Ceilings(nbytes / copy["median_ms"], 2 * side**3 / product["median_ms"])
    rates = {"copy_gb_per_s": found.bytes_per_ms / 1e6, "bfloat16_tflop_per_s": found.flops_per_ms / 1e9}
    return found, rates | {"product_side": side, "copy": copy, "product": product}


class Part(NamedTuple):
    """Some targets that share a measurement."""

    name: str
    measure: Callable[[], list[Figures]]


def target(name: str, figure: float, **beside: Any) -> Figures:
    """Return a row of the table: the figure, its limit, and whether that is kept; None where there is none."""
    most = MOST.get(name)
    return {"target": name, "figure": figure, "most": most, "met": None if most is None else figure <= most} | beside


def target_parts(timer: WallTimer, shrink: int = 1, gap: int = GAP) -> Iterator[Part]:
    """Yield what is measured together; with `shrink` all sizes are that much smaller, for tests."""

    def s(n: int) -> int:
        return max(8, n // shrink)

    def work(layers: int) -> Workload:
        return Workload(llama_shapes(layers, s(4096), s(11008)), rank=0, dtype=torch.bfloat16)

    for shape in ((4096, 4096), (4096, 11008), (32, 256, 4096), (32, 1024, 11008)):
        size = "x".join(map(str, shape))
        measured = functools.partial(_orthogonalize, size, (*shape[:-2], s(shape[-2]), s(shape[-1])), timer)
        yield Part(f"orthogonalize {size}", measured)
    ranks = {r: s(r) for r in (1024, 256)}
    yield Part("projected AdamW", functools.partial(_projected, work(32 if shrink == 1 else 4), timer, ranks, gap))
    yield Part("Muon", functools.partial(_muon, work(1), timer))


def standard(x: Tensor) -> Tensor:
    """Return what five steps of Newton–Schulz in bfloat16 make of x, as Muon's first code has them."""
    x = x.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in JORDAN:
        r = x @ x.mT
        x = a * x + (b * r + c * r @ r) @ x
    return x


def _orthogonalize(size: str, shape: tuple[int, ...], timer: WallTimer) -> list[Figures]:
    inputs = [torch.randn(shape, device=timer.device).bfloat16() for _ in range(2)]
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": functools.partial(orthogonalize, coefficients="jordan", steps=5),
        "compiled": torch.compile(standard, dynamic=False),
    }
    found: Figures = {}
    for name, form in forms.items():
        actions = [functools.partial(form, x) for x in inputs]
        found[name] = sampled(actions, timer, with_host=True)
        found[f"{name}_graph"] = sampled([timer.replay(action) for action in actions], timer, with_host=True)
    rows = []
    for kind, label in (("", ""), ("_graph", ", CUDA graphs")):
        ours, other = found[f"ours{kind}"], found[f"compiled{kind}"]
        name = f"orthogonalize {size} ÷ compiled Newton–Schulz{label}"
        rows.append(target(name, ours["median_ms"] / other["median_ms"], ours=ours, other=other))
    return rows


def _steps(build: Callable[..., torch.optim.Optimizer], work: Workload, timer: WallTimer, n: int) -> Figures:
    """Return the times of n steps, after as many others, what they cost the host, and how long the device works."""
    params = parameters(work, timer.device)
    for p, grad in zip(params, gradient_sets(work, timer.device, count=1)[0], strict=True):
        p.grad = grad
    optimizer = build(params)
    # what a refresh compiles is no part of its time; of many matrices some are refreshed at every step
    first = timer.laps(optimizer.step, 1 + min(n, 20))[0]
    gc.collect()
    gc.disable()
    try:
        times = timer.laps(optimizer.step, n)
    finally:
        gc.enable()
    few = max(2, min(9, n))
    host = [round(timer.host_ms(optimizer.step), 5) for _ in range(few)]
    busy = [round(timer.busy_ms(optimizer.step), 5) for _ in range(3)]
    figures = {"first_ms": first, "mean_ms": sum(times) / n, "worst_ms": max(times)}
    figures |= {"host_ms": summary(host)["median_ms"], "busy_ms": summary(busy)["median_ms"]}
    return summary(times) | figures | {"host_times_ms": host, "busy_times_ms": busy}


def _projected(work: Workload, timer: WallTimer, ranks: dict[int, int], gap: int) -> list[Figures]:
    few = min(20, gap)
    adamw = _steps(functools.partial(torch.optim.AdamW, lr=_LR, fused=True), work, timer, few)
    rows = []
    for r, rank in ranks.items():
        build = functools.partial(GaLoreAdamW, lr=_LR, rank=rank, basis="subspace", update_proj_gap=gap)
        galore = _steps(build, work, timer, gap)
        dct = _steps(functools.partial(DCTAdamW, lr=_LR, rank=rank), work, timer, few)
        for name, found in ((f"GaLoreAdamW r={r}", galore), (f"DCTAdamW r={r}", dct)):
            both: Figures = {"ours": found, "other": adamw}
            rows.append(target(f"{name}, median step ÷ AdamW", found["median_ms"] / adamw["median_ms"], **both))
            if found is galore:
                rows.append(target(f"{name}, mean of a period ÷ AdamW", found["mean_ms"] / adamw["median_ms"], **both))
            rows.append(target(f"{name}, worst step ÷ its median", found["worst_ms"] / found["median_ms"], ours=found))
            rows.append(target(f"{name}, device busy ÷ AdamW's", found["busy_ms"] / adamw["busy_ms"], **both))
    return rows


def _muon(work: Workload, timer: WallTimer) -> list[Figures]:
    builds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "torch": functools.partial(torch.optim.Muon, lr=_LR),
        "float32": functools.partial(Muon, lr=_LR),
        "int8": functools.partial(Muon, lr=_LR, state_dtype="int8"),
    }
    found = {name: _steps(build, work, timer, 15) for name, build in builds.items()}
    rows = []
    for name, ours, other in (
        ("Muon ÷ torch.optim.Muon", "float32", "torch"),
        ("Muon in int8 ÷ torch.optim.Muon", "int8", "torch"),
        ("Muon in int8 ÷ in float32", "int8", "float32"),
    ):
        for key, label in (("median", "step"), ("busy", "device busy")):
            ratio = found[ours][f"{key}_ms"] / found[other][f"{key}_ms"]
            rows.append(target(f"{name}, {label}", ratio, ours=found[ours], other=found[other]))
    return rows
