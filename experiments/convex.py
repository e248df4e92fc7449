"""M-FAC against tuned SGD and AdamW, by steps and by time, on convex problems whose Hessian is known.

    python -m experiments.convex
    python -m experiments.convex --problems tiny --steps 100 --small --results runs/convex

Problems: least squares with a badly conditioned design, whose optimum is hard to reach (`least_squares`) or easy
(`least_squares_smooth`), and logistic regression on two data sets of scikit-learn, or on made-up data where that is not
installed. Every method is tuned over a grid of equally many settings by the steps to several levels of suboptimality,
one setting for each level, then repeated on other seeds.

Beside the race: how close F⁻¹∇f is to Newton's H⁻¹∇f for windows of several sizes, and how close updates from windows
of coordinates are to those from windows of whole gradients.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.convex_directions import WINDOWS, coordinates, directions
from experiments.convex_problems import MADE, REAL, default_problems, known, make
from experiments.convex_race import methods, newton_steps, repeat, tune
from experiments.convex_report import draw, markdown
from experiments.machine import command, machine, versions

LEVELS = (0.1, 0.03, 0.01, 0.003)
TUNE_SEED = 0
RESULTS = Path("experiments/results/convex")


def compare(name: str, *, steps: int, seeds: Sequence[int], small: bool, threads: int) -> dict[str, Any]:
    """Return everything about one problem."""
    torch.set_num_threads(threads)
    found = known(make(name))
    problem = found.problem
    report: dict[str, Any] = {
        "about": {
            "size": problem.size,
            "rows": len(problem.rows),
            "batch": problem.batch,
            "decay": problem.decay,
            "condition": found.largest / found.smallest,
            "largest_eigenvalue": found.largest,
            "initial_suboptimality": found.initial,
            "fisher_over_hessian": found.fisher_over_hessian,
        },
        "newton_steps": newton_steps(found, LEVELS),
        "methods": {},
    }
    for label, method in methods(found, steps, small=small).items():
        print(f"{name}: {label}, {len(method.grid)} settings", file=sys.stderr, flush=True)
        tuned = tune(found, method, TUNE_SEED, steps, LEVELS)
        report["methods"][label] = repeat(found, tuned, seeds, steps, LEVELS)
    report["directions"] = directions(found, WINDOWS[:2] if small else WINDOWS)
    return report


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.convex", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=(*MADE, *REAL), default=default_problems())
    parser.add_argument("--steps", type=int, default=300, help="at most so many")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="to repeat the best settings on")
    parser.add_argument("--small", action="store_true", help="small grids, for tests")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--jobs", type=int, default=1, help="problems at a time, each in a process of its own")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table, the figures and the plot")
    args = parser.parse_args(argv)
    for name in ("steps", "threads", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print the table, and write `convex.json`, `convex.md` and `convex.png`."""
    argv = sys.argv[1:] if argv is None else argv
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    document: dict[str, Any] = {
        "command": command("experiments.convex", argv),
        "machine": machine(),
        "scikit_learn": versions(["scikit-learn"])["scikit-learn"],
        "steps": args.steps,
        "tune_seed": TUNE_SEED,
        "seeds": args.seeds,
    }
    one = partial(compare, steps=args.steps, seeds=args.seeds, small=args.small, threads=args.threads)
    if args.jobs == 1:
        document["problems"] = {name: one(name) for name in args.problems}
    else:
        # a forked torch may wait for threads that it no longer has
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            document["problems"] = dict(zip(args.problems, pool.map(one, args.problems), strict=True))
    document["coordinates"] = coordinates(8, 20) if args.small else coordinates()
    document["load_average_after"] = machine()["load_average"]
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "convex.json").write_text(json.dumps(document) + "\n")
    (args.results / "convex.md").write_text(markdown(document))
    draw(document, args.results / "convex.png")
    print(markdown(document))


if __name__ == "__main__":
    main()
