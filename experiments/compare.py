"""Tuned comparison of optimizers: learning rates on one seed until bracketed, then the best on fresh seeds.

    python -m experiments.compare --config experiments/configs/compare_tiny.yaml --jobs 2

Every run is a process of its own (`python -m experiments.pretrain`), and a finished one is known by its `summary.json`:
the same command goes on where it was stopped. Every arm is tuned by the same procedure. `search: coordinate` tunes one
argument after the other, with as many candidates for every arm: the starting grid, factors of 2 outward while the best
lies at an edge, and, for arms that were bracketed sooner than others, values between the best and its neighbours.
`search: grid` runs every setting of a full grid, and factors of 2 outward along its first argument.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from experiments.compare_fork import Forks
from experiments.compare_plan import Comparison, load, plan
from experiments.compare_report import write_report
from experiments.compare_runs import Result, collect, run_all
from experiments.machine import command


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML with arms, common arguments and seeds")
    parser.add_argument("--out", type=Path, help="directory of the runs, default: runs/NAME_OF_THE_CONFIG")
    parser.add_argument("--results", type=Path, help="directory of table, JSON and plots, default: --out")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each when more than one")
    parser.add_argument("--fork", action="store_true", help="fork the runs from this process: faster, not for a GPU")
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds of the repeated runs")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more arguments of every run")
    parser.add_argument("--report_only", action="store_true", help="run nothing, report what there is")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if bad := [item for item in args.set if "=" not in item]:
        parser.error(f"--set takes KEY=VALUE, got {bad[0]!r}")
    args.out = args.out or Path("runs") / args.config.stem
    args.results = args.results or args.out
    return args


def _adjusted(comparison: Comparison, args: argparse.Namespace) -> Comparison:
    for name in args.arms or ():
        if name not in comparison.arms:
            raise ValueError(f"--arms: {name!r} is not an arm; arms: {', '.join(comparison.arms)}")
    arms = {name: arm for name, arm in comparison.arms.items() if name in (args.arms or comparison.arms)}
    baseline = comparison.baseline if comparison.baseline in arms else ""
    extra = dict(item.split("=", 1) for item in args.set)
    threads = {"train.threads": 1} if args.jobs > 1 else {}
    common = comparison.common | threads | extra
    seeds = tuple(args.seeds or comparison.seeds)
    return replace(comparison, arms=arms, baseline=baseline, common=common, seeds=seeds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and write the report; 1 if a run failed, 2 if the comparison itself is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    args = _arguments(argv)
    try:
        comparison = _adjusted(load(args.config), args)
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    results: dict[str, Result] = {}
    now = plan(comparison, results)
    start = Forks(args.out) if args.fork else None
    while now.wanted:
        new = collect(now.wanted, args.out)
        results |= new
        left = [run for run in now.wanted if run.key not in new]
        if args.report_only and not new:
            break
        if not args.report_only:
            results |= run_all(left, args.out, args.jobs, start)
        now = plan(comparison, results)
    told = command("experiments.compare", argv)
    print(write_report(comparison, now, results, args.out, args.results, args.config.stem, told, args.jobs))
    return int(any(result.status == "failed" for result in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
