"""Step time, worst step, state and peak extra memory of optimizers, measured side by side in one process.

    python -m experiments.bench --threads 2 --out experiments/results/bench_cpu.json
    python -m experiments.bench --gpu
    python -m experiments.bench --gpu --workload 25m 1b 7b --out experiments/results/bench_gpu.json
    python -m experiments.bench --family projected --threads 2 --out bench.json
    python -m experiments.bench --family muon --threads 2 --out experiments/results/bench_muon_cpu.json
    python -m experiments.bench --workload tiny --gap 5 --entries adamw_fused galore_subspace

All optimizers take turns, one step each a round, so that noise on a shared machine hits all the same.

Family "galore": the first step is the fastest of several on fresh optimizers. After it every step of the refresh period
is timed in several periods and its fastest time kept; medians, minima and the worst step are taken over that period.
Families "projected" and "muon": steps are much alike, so medians and minima are over a number of rounds as they came.
In "muon" operations are counted too, and some of its peers write to the gradients: there each optimizer is handed a
fresh copy, outside its time.

Family "kernels" is what --gpu measures where nothing else is asked for: two ceilings, every kernel as a fraction of the
time that they allow, and whole steps beside their targets. It writes to experiments/results, by the device's name.

Figures in parentheses are floors: the time this machine would need if memory moved at its copy bandwidth and arithmetic
ran at its matrix-product speed, both measured in the same process.
"""

import argparse
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.bench_entries import ENTRIES, FAMILIES
from experiments.bench_flops import flop_report
from experiments.bench_measure import Gradients, Limits, Racer, line_up, measure_extra, measure_limits, race
from experiments.bench_tables import kernel_tables, tables
from experiments.bench_targets import CudaTimer, Figures, WallTimer, measure_ceilings, target_parts
from experiments.bench_workloads import WORKLOADS, Workload, gradient_sets, least_work
from experiments.machine import command, machine

RESULTS = Path(__file__).parent / "results"


class BaselineError(ValueError):
    """The optimizer that ratios are to cannot be measured; one line for the user."""


def summarize(racer: Racer, work: Workload, limits: Limits, gap: int, length: int) -> dict[str, Any]:
    """All figures of one optimizer, each with its floor; times in milliseconds, memory in bytes."""
    least = least_work(racer.entry, work)
    period = racer.best_period(length)
    raw = torch.tensor(racer.times, dtype=torch.float64) * 1e3
    first, median, worst = min(racer.firsts) * 1e3, float(period.median()), float(period.max())
    step_floor = limits.step_ms(least)
    refresh = sorted((limits.refresh_ms(flops) for flops in least.refresh_flops), reverse=True)
    # spread over the period, or all in one step; a short period has some in every step
    at_once = -(-len(refresh) // gap) if racer.entry.stagger else len(refresh)
    always = len(refresh) // gap if racer.entry.stagger or gap == 1 else 0
    figures = {
        "first_ms": first,
        "first_floor_ms": step_floor + limits.refresh_ms(least.first_flops),
        "median_ms": median,
        "median_floor_ms": step_floor + sum(refresh[len(refresh) - always :]),
        "min_ms": float(period.min()),
        "worst_ms": worst,
        "worst_floor_ms": step_floor + sum(refresh[:at_once]),
        "worst_over_median": worst / median,
        "worst_over_median_with_first": max(first, worst) / median,
        "amortized_ms": float(period.mean()),
        "amortized_floor_ms": step_floor + sum(refresh) / gap,
        # as it came, noise included
        "raw_median_ms": float(raw.median()),
        "raw_worst_ms": float(raw.max()),
        "state_bytes": racer.state[0],
        "state_floor_bytes": least.state_bytes,
        "state_held_bytes": racer.state[1],
        "extra_ordinary_bytes": racer.extra["ordinary"],
        "extra_ordinary_floor_bytes": least.extra_bytes,
        "extra_worst_bytes": racer.extra["worst"],
        "extra_worst_floor_bytes": least.refresh_extra_bytes,
    }
    figures |= {"note": racer.entry.note} if racer.entry.note else {}
    return figures | {"first_step_ms": _rounded(racer.firsts), "step_ms": _rounded(racer.times)}


def _rounded(times: list[float]) -> list[float]:
    return [round(seconds * 1e3, 4) for seconds in times]


def bench(
    workload: str,
    names: Sequence[str],
    *,
    gap: int,
    periods: int,
    baseline: str,
    device: str,
    rounds: int | None = None,
    flops: bool = False,
) -> dict[str, Any]:
    """Measure the named optimizers on one workload; the result is what the JSON file holds.

    With `rounds` the steps that follow the first one are so many, whatever the refresh period, and all of them count.
    """
    work = WORKLOADS[workload]
    limits = measure_limits(device, work.dtype, small=workload == "tiny")
    entries = {name: ENTRIES[name] for name in names}
    copied = any(entry.writes_gradients for entry in entries.values())
    gradients = Gradients(gradient_sets(work, device), copied)
    racers, absent = line_up(entries, work, gap, device, gradients)
    if baseline not in racers:
        raise BaselineError(f"--baseline {baseline}: {absent.get(baseline, 'not among the entries')}")
    length, steps, firsts = (gap, periods * gap, periods) if rounds is None else (rounds, rounds, 1)
    race(racers, work, gradients, gap, steps, device, firsts=firsts)
    for racer in racers.values():
        measure_extra(racer, work, gradients, gap, device, length)
    results = {name: summarize(racer, work, limits, gap, length) for name, racer in racers.items()}
    for name, figures in results.items():
        for key in ("median", "min", "amortized"):
            figures[f"{key}_over_baseline"] = figures[f"{key}_ms"] / results[baseline][f"{key}_ms"]
            form = entries[name].float32_form
            if form in results:
                figures[f"{key}_over_float32"] = figures[f"{key}_ms"] / results[form][f"{key}_ms"]
    report = {
        "workload": workload,
        "shapes": [list(shape) for shape in work.shapes],
        "parameters": work.numel,
        "dtype": str(work.dtype).removeprefix("torch."),
        "rank": work.rank,
        "gap": gap,
        "periods": periods,
        "rounds": rounds,
        "gradients_copied": copied,
        "baseline": baseline,
        "copy_gb_per_s": limits.copy_bytes_per_s / 1e9,
        "matmul_gflop_per_s": limits.matmul_flops_per_s / 1e9,
        "float32_matmul_gflop_per_s": limits.float32_matmul_flops_per_s / 1e9,
        "bfloat16_matmul_gflop_per_s": limits.bfloat16_matmul_flops_per_s / 1e9,
        "results": results,
        "absent": absent,
    }
    return report | (flop_report({name: entries[name] for name in racers}, work, device) if flops else {})


def bench_kernels(document: Figures, timer: WallTimer, save: Callable[[], None], *, shrink: int = 1) -> None:
    """Add ceilings, kernels and targets to the document, and save it after each part; a part that fails is listed.

    With `shrink` all sizes are that much smaller, for tests.
    """
    # Triton is not everywhere, and each test decides when it is imported
    from experiments import bench_kernels as kernels

    start = time.perf_counter()
    ceilings, document["ceilings"] = measure_ceilings(timer, shrink)
    document |= {"kernels": [], "targets": [], "failures": []}
    parts: list[tuple[str, str, Callable[[], list[Figures]]]] = [
        ("kernels", f"{case.kernel} {case.size}", functools.partial(kernels.measure, case, timer, ceilings))
        for case in kernels.cases(timer.device, shrink)
    ]
    parts += [("targets", part.name, part.measure) for part in target_parts(timer, shrink)]
    for where, name, measure in parts:
        try:
            document[where] += measure()
        # whatever it is, the other parts are worth having
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0]
            document["failures"].append({"part": name, "error": f"{type(error).__name__}: {said}"})
        torch.cuda.empty_cache()
        document["seconds"] = round(time.perf_counter() - start, 1)
        print(f"{document['seconds']} s: {name}", file=sys.stderr, flush=True)
        save()


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help="default: 25m; with --gpu: 25m 1b 7b")
    parser.add_argument(
        "--family",
        choices=[*FAMILIES, "kernels"],
        help="sets what the next four are by default; default: galore, or with --gpu and no workload kernels",
    )
    parser.add_argument("--entries", nargs="+", choices=ENTRIES, help="optimizers, default: all of the family")
    parser.add_argument("--baseline", choices=ENTRIES, help="ratios are to this one")
    parser.add_argument("--rounds", type=int, help="steps to time, instead of whole refresh periods")
    parser.add_argument("--flops", action=argparse.BooleanOptionalAction, help="count operations")
    parser.add_argument("--gap", type=int, default=200, help="refresh period in steps")
    parser.add_argument("--periods", type=int, default=2, help="refresh periods to time, where --rounds is not given")
    parser.add_argument("--threads", type=int, help="torch threads, default: torch's own choice")
    parser.add_argument("--gpu", action="store_true", help="measure on the CUDA device")
    parser.add_argument("--out", type=Path, help="write the figures as JSON here")
    args = parser.parse_args(argv)
    named = [name for name in ("workload", "entries", "baseline", "rounds", "flops") if getattr(args, name) is not None]
    args.family = args.family or ("kernels" if args.gpu and not named else "galore")
    if args.family == "kernels":
        if named:
            parser.error(f"--family kernels takes no --{named[0]}")
        if not args.gpu:
            parser.error("--family kernels needs --gpu")
    family = FAMILIES.get(args.family, FAMILIES["galore"])
    args.entries = args.entries or list(family.names)
    args.baseline = args.baseline or family.baseline
    args.flops = family.flops if args.flops is None else args.flops
    for name in ("gap", "periods", "rounds", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.baseline not in args.entries:
        parser.error(f"--baseline {args.baseline} must be among --entries: {' '.join(args.entries)}")
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device, and torch finds none")
    args.rounds = args.rounds or family.rounds
    args.workload = args.workload or (["25m", "1b", "7b"] if args.gpu else ["25m"])
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and save the figures."""
    argv = sys.argv[1:] if argv is None else argv
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if args.gpu else "cpu"
    document: dict[str, Any] = {"command": command("experiments.bench", argv), "machine": machine(device)}
    if args.family == "kernels":
        _bench_kernels(document, args.out)
        return
    document["workloads"] = []
    for workload in args.workload:
        sizes = {"gap": args.gap, "periods": args.periods, "rounds": args.rounds}
        try:
            report = bench(workload, args.entries, **sizes, baseline=args.baseline, device=device, flops=args.flops)
        except BaselineError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        document["workloads"].append(report)
        document["load_average_after"] = machine(device)["load_average"]
        print(tables(report), flush=True)
        if args.out:
            # after every workload: a long run that is cut short keeps what it has
            _save(document, args.out)


def _bench_kernels(document: Figures, out: Path | None) -> None:
    name = re.sub("[^a-z0-9]+", "_", document["machine"]["device"].lower()).strip("_")
    out = out or RESULTS / f"{name}.json"
    document["machine"]["capability"] = list(torch.cuda.get_device_capability())
    bench_kernels(document, CudaTimer(), lambda: _save(document, out))
    print(kernel_tables(document), flush=True)


def _save(document: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
