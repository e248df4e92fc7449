"""How far M-FAC is from the two passes over its window that any method needs, measured side by side in one process.

    python -m experiments.bench_fisher --threads 2 --out experiments/results/bench_fisher_cpu.json

The floor is G g and Gᵀ c (`torch.mv`) for a float32 matrix G of m gradients of all d parameters. Each contender is made
alone, its window filled with random gradients, and takes turns with the floor, one after the other, so that noise on a
shared machine hits both alike; ratios are of medians and of minima of the same rounds. A round of an optimizer is a
whole step, weights included; of `InverseFisher` it is the call that it is named after.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.bench_measure import peak_extra_bytes, synchronize
from experiments.bench_workloads import WORKLOADS, Workload, parameters
from experiments.machine import command, machine
from lowrank_optim import MFAC, InverseFisher, state_bytes

DAMPING = 1e-5
# as in the workloads: gradients small beside one
SCALE = 1e-3
_FLOAT = 4


@dataclass(frozen=True)
class Size:
    """Matrices and the number of gradients."""

    work: Workload
    num_grads: int

    @property
    def window_bytes(self) -> int:
        """Bytes of a float32 window."""
        return _FLOAT * self.num_grads * self.work.numel

    @property
    def ring_bytes(self) -> int:
        """Bytes of what is kept of a window's products, and of its two counters."""
        return 16 * self.num_grads**2 + 16


# windows of equal size, 3.2 GB: all eight layers and few gradients, two layers and many
SIZES = {
    "25m": Size(WORKLOADS["25m"], 32),
    "6m": Size(replace(WORKLOADS["25m"], shapes=WORKLOADS["25m"].shapes[:14]), 128),
    "tiny": Size(WORKLOADS["tiny"], 8),
}


@dataclass(frozen=True)
class Made:
    """What is timed, what it keeps in bytes, what it is to keep, and the gradients that are other ones each time."""

    action: Callable[[], object]
    kept: int
    formula: int
    grads: Sequence[Tensor]

    def renew(self) -> None:
        """Draw new gradients: in a window of equal ones float32 will not do, and every step is careful."""
        for grad in self.grads:
            grad.normal_(0, SCALE)


@dataclass(frozen=True)
class Contender:
    """Something to be timed: how it is made, and how often it must read as many bytes as a float32 window has."""

    make: Callable[[Size, str], Made]
    reads: float


def _mfac(**options: Any) -> Callable[[Size, str], Made]:
    def make(size: Size, device: str) -> Made:
        params = parameters(size.work, device)
        generator = torch.Generator(device).manual_seed(2)
        optimizer = MFAC(params, **({"num_grads": size.num_grads, "damping": DAMPING} | options))
        for p in params:
            p.grad = SCALE * torch.randn(p.shape, generator=generator, device=device)
        # a first step finds the bases
        optimizer.step()
        fill(optimizer, params, generator)
        kept = state_bytes(optimizer)
        grads = [p.grad for p in params if p.grad is not None]
        return Made(optimizer.step, kept.total, mfac_bytes(size, kept.by_name, **options), grads)

    return make


def mfac_bytes(size: Size, by_name: dict[str, int], **options: Any) -> int:
    """Return what MFAC's docstring promises; of bases that are not a formula of it, what is there."""
    item = 2 if options.get("state_dtype") == "bfloat16" else _FLOAT
    rank = options.get("rank")
    numbers = size.work.numel
    if rank is not None:
        numbers = sum(max(shape) * max(1, math.floor(rank * min(shape))) for shape in size.work.shapes)
    copies = size.num_grads + (1 if options.get("momentum") else 0)
    rings = len(size.work.shapes) if options.get("scope") == "parameter" else 1
    bases = sum(value for name, value in by_name.items() if name.startswith("basis"))
    # an optimizer counts one thing more
    return item * copies * numbers + rings * (size.ring_bytes + 8) + 4 * len(size.work.shapes) + bases


def fill(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], generator: torch.Generator) -> None:
    """Fill windows that have been allocated and not yet written to, whose pages would cost nothing to read.

    Products are made to match, and no gradient counts as pushed, so that the next step finds the inverse from them.
    """
    lead = optimizer.state[params[0]]
    for p in params:
        state = optimizer.state[p]
        window = written(state["window"], generator).flatten(1)
        lead = state if "gram" in state else lead
        own = products(window)
        lead["gram"].copy_(own) if state is lead else lead["gram"].add_(own)
        lead["window_step"].zero_()


def written(window: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a window with one random row, turned by another number of places in each: drawing all would take minutes."""
    row = SCALE * torch.randn(window[0].numel(), generator=generator, device=window.device)
    for i, kept in enumerate(window):
        kept.copy_(row.roll(i).view(kept.shape))
    return window


def products(window: Tensor) -> Tensor:
    """Return G Gᵀ."""
    return window.float() @ window.float().T


def _fisher(size: Size, device: str) -> tuple[InverseFisher, Tensor]:
    fisher = InverseFisher(size.work.numel, num_grads=size.num_grads, damping=DAMPING, device=torch.device(device))
    generator = torch.Generator(device).manual_seed(2)
    state = fisher.state_dict()
    state["gram"].copy_(products(written(state["window"][0], generator))[None])
    # a window that is not full is read as far as it is
    fisher.num_pushed = size.num_grads
    grad = SCALE * torch.randn(size.work.numel, generator=generator, device=device)
    fisher.push(grad)
    return fisher, grad


def _call(name: str) -> Callable[[Size, str], Made]:
    def make(size: Size, device: str) -> Made:
        fisher, grad = _fisher(size, device)
        action = getattr(fisher, name)
        call = action if name == "solve_newest" else partial(action, grad)
        return Made(call, fisher.nbytes, size.window_bytes + size.ring_bytes, [grad])

    return make


CONTENDERS = {
    "mfac": Contender(_mfac(), 2),
    "mfac_bfloat16": Contender(_mfac(state_dtype="bfloat16"), 1),
    "mfac_momentum": Contender(_mfac(momentum=0.9), 2),
    "mfac_parameter": Contender(_mfac(scope="parameter"), 2),
    "mfac_relative": Contender(_mfac(damping=1e-2, relative_damping=True), 2),
    "mfac_dct_quarter": Contender(_mfac(rank=0.25, basis="dct"), 0.5),
    "fisher_push": Contender(_call("push"), 1),
    "fisher_solve_newest": Contender(_call("solve_newest"), 1),
    "fisher_solve": Contender(_call("solve"), 2),
}


def _floor(size: Size, device: str) -> Callable[[], object]:
    generator = torch.Generator(device).manual_seed(3)
    window = written(torch.empty(size.num_grads, size.work.numel, device=device), generator)
    grad = SCALE * torch.randn(size.work.numel, generator=generator, device=device)
    weights = torch.randn(size.num_grads, generator=generator, device=device)

    # in place: a fresh result of 100 MB would cost its pages
    products, update = torch.empty_like(weights), torch.empty_like(grad)

    def passes() -> None:
        torch.mv(window, grad, out=products)
        torch.mv(window.T, weights, out=update)

    return passes


def _seconds(action: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def measure(floor: Callable[[], object], contender: Contender, size: Size, rounds: int, device: str) -> dict[str, Any]:
    """Take turns with the floor, in an order that alternates; return all figures of one contender."""
    made = contender.make(size, device)
    times: dict[str, list[float]] = {"floor": [], "own": []}
    pair = [("floor", floor), ("own", made.action)]
    # once before it counts
    floor()
    made.renew()
    made.action()
    for _ in range(rounds):
        made.renew()
        for name, action in pair:
            times[name].append(_seconds(action, device) * 1e3)
        pair.reverse()
    median, floor_median = (statistics.median(times[name]) for name in ("own", "floor"))
    return {
        "median_ms": median,
        "min_ms": min(times["own"]),
        "floor_median_ms": floor_median,
        "floor_min_ms": min(times["floor"]),
        "median_over_floor": median / floor_median,
        "min_over_floor": min(times["own"]) / min(times["floor"]),
        "gb_per_s": contender.reads * size.window_bytes / median / 1e6,
        "state_bytes": made.kept,
        "state_formula_bytes": made.formula,
        "extra_bytes": peak_extra_bytes(made.action, device),
        "own_ms": [round(x, 4) for x in times["own"]],
        "floor_ms": [round(x, 4) for x in times["floor"]],
    }


def bench(name: str, contenders: Sequence[str], rounds: int, device: str) -> dict[str, Any]:
    """Measure the contenders at one size."""
    size = SIZES[name]
    floor = _floor(size, device)
    results = {}
    for contender in contenders:
        print(f"{name}: {contender}", file=sys.stderr, flush=True)
        row = results[contender] = measure(floor, CONTENDERS[contender], size, rounds, device)
        print(f"  {row['median_over_floor']:.3f}, {row['min_over_floor']:.3f}", file=sys.stderr, flush=True)
        gc.collect()
    about = {"size": name, "matrices": len(size.work.shapes), "parameters": size.work.numel}
    about |= {"num_grads": size.num_grads, "window_bytes": size.window_bytes, "rounds": rounds}
    return about | {"results": results}


def table(report: dict[str, Any]) -> str:
    """Return the figures of one size as a Markdown table."""
    lines = [
        f"### {report['size']}: {report['matrices']} matrices, d = {report['parameters']:,}, "
        f"m = {report['num_grads']}, a float32 window of {report['window_bytes'] / 1e9:.2f} GB",
        "",
        "| what | median, ms | min, ms | GB/s | median ÷ floor | min ÷ floor | state, bytes | beyond the formula "
        "| extra, MiB |",
        "|---|" + "---:|" * 8,
    ]
    for name, row in report["results"].items():
        lines.append(
            f"| {name} | {row['median_ms']:.4g} | {row['min_ms']:.4g} | {row['gb_per_s']:.2f} | "
            f"{row['median_over_floor']:.3f} | {row['min_over_floor']:.3f} | {row['state_bytes']:,} | "
            f"{row['state_bytes'] - row['state_formula_bytes']:,} | {row['extra_bytes'] / 2**20:.1f} |"
        )
    floors = [row["floor_median_ms"] for row in report["results"].values()]
    return "\n".join([*lines, "", f"Floors, medians: {min(floors):.4g} to {max(floors):.4g} ms.", ""])


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench_fisher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["25m", "6m"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=15, help="of each contender with the floor")
    parser.add_argument("--threads", type=int, help="torch threads, default: torch's own choice")
    parser.add_argument("--gpu", action="store_true", help="measure on the CUDA device")
    parser.add_argument("--out", type=Path, help="write the figures as JSON here")
    args = parser.parse_args(argv)
    for name, value in (("rounds", args.rounds), ("threads", args.threads)):
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device, and torch finds none")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and save the figures."""
    argv = sys.argv[1:] if argv is None else argv
    args = _arguments(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = "cuda" if args.gpu else "cpu"
    document: dict[str, Any] = {"command": command("experiments.bench_fisher", argv), "machine": machine(device)}
    document["sizes"] = []
    for name in args.size:
        document["sizes"].append(bench(name, args.contenders, args.rounds, device))
        document["load_average_after"] = machine(device)["load_average"]
        print(table(document["sizes"][-1]), flush=True)
        if args.out:
            # after each size: a long run that is cut short keeps what it has
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
