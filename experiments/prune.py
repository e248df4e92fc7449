"""Pruning a small network that knows the digits: M-FAC's OBS against magnitudes, one-shot and gradually.

`python -m experiments.prune` chooses damping and block size (and, where there is fine-tuning, its rate) by validation
accuracy on the first seed, repeats the best on all seeds, and leaves a JSON file, a table and a plot.
"""

import argparse
import copy
import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.curves import pyplot
from experiments.machine import command, machine, versions
from experiments.prune_data import accuracy, batches, dense, load, matrices, train
from lowrank_optim import OBSPruner, sparsity_schedule

REGIMES = {
    "once": "one-shot, one Fisher matrix",
    "rounds": "one-shot, {recomputations} Fisher matrices",
    "gradual": "gradual, with fine-tuning",
}
METHODS = {"magnitude": "magnitude", "published": "M-FAC, published update", "joint": "M-FAC, joint update"}


@dataclass(frozen=True)
class Plan:
    """What is run."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    targets: tuple[float | str, ...] = (0.5, 0.75, 0.9, 0.95, 0.98, "2:4")
    tune_targets: tuple[float, ...] = (0.9, 0.95)
    dampings: tuple[float, ...] = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5)
    blocks: tuple[int | None, ...] = (None, 512)
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    # of the window, tried with the best damping and block size of the joint update
    windows: tuple[tuple[int, int], ...] = ((64, 8), (256, 8), (128, 1), (256, 1), (128, 32))
    dense_steps: int = 600
    stages: int = 8
    stage_steps: int = 60
    recomputations: int = 16


QUICK = Plan((0,), (0.5, "2:4"), (0.5,), (1e-5,), (None,), (1e-3,), ((4, 2),), 30, 2, 3, 2)


@dataclass(frozen=True)
class Job:
    """One network that is pruned once."""

    regime: str
    method: str
    target: float | str
    seed: int
    damping: float = 1e-5
    block: int | None = None
    lr: float | None = None
    num_grads: int = 128
    batch: int = 8


def losses(model: nn.Module, job: Job) -> Iterator[Tensor]:
    """Those of single examples or of small batches; none, for magnitudes, whose F is the identity therefore."""
    if job.method == "magnitude":
        yield 0 * torch.stack([p.sum() for _, p in matrices(model)]).sum()
        return
    for x, y in batches(load().train, job.batch, job.seed + 200):
        yield nn.functional.cross_entropy(model(x), y)


def prune(job: Job, plan: Plan) -> dict[str, Any]:
    """Prune a copy of the dense network and say how good it still is."""
    begin = time.perf_counter()
    model = copy.deepcopy(dense(job.seed, plan.dense_steps))
    magnitude = job.method == "magnitude"
    pattern = (2, 4) if job.target == "2:4" else None
    share = 0.5 if isinstance(job.target, str) else job.target
    pruner = OBSPruner(
        matrices(model),
        1 if magnitude else job.num_grads,
        job.damping,
        block_size=job.block,
        pattern=pattern,
        joint=job.method == "joint",
        # on a CPU the faster one, because all products are in float64 and nothing has to be converted
        dtype=torch.float64,
    )
    draw = functools.partial(losses, model, job)
    if job.regime == "gradual":
        assert job.lr is not None
        data = batches(load().train, 32, job.seed + 300)
        for stage, part in enumerate(sparsity_schedule(share, plan.stages), 1):
            pruner.prune(draw, part, recomputations=1)
            # the last sparsity, which is what counts, is trained for longer
            steps = plan.stage_steps * (3 if stage == plan.stages else 1)
            train(model, data, steps, job.lr, pruner.masks.hold)
    else:
        pruner.prune(draw, share, recomputations=plan.recomputations if job.regime == "rounds" else 1)
    data_set = load()
    return {
        **asdict(job),
        "sparsity": pruner.masks.sparsity,
        "val": accuracy(model, data_set.val),
        "test": accuracy(model, data_set.test),
        "seconds": round(time.perf_counter() - begin, 2),
    }


def _alone(job_and_plan: tuple[Job, Plan]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return prune(*job_and_plan)


class Runs:
    """All that has been run, each job once; `pool` runs some at a time."""

    def __init__(self, plan: Plan, pool: Any = None) -> None:
        self.plan, self._pool = plan, pool
        self.rows: dict[Job, dict[str, Any]] = {}

    def run(self, jobs: Sequence[Job]) -> None:
        """Run those that have not been run."""
        new = [(job, self.plan) for job in dict.fromkeys(jobs) if job not in self.rows]
        self._take(new, map(_alone, new) if self._pool is None else self._pool.imap(_alone, new))

    def _take(self, new: list[tuple[Job, Plan]], found: Iterator[dict[str, Any]]) -> None:
        for i, ((job, _), row) in enumerate(zip(new, found, strict=True), 1):
            self.rows[job] = row
            said = (
                f"{job.regime} {job.method} {job.target} seed {job.seed}: val {row['val']:.3f} test {row['test']:.3f}"
            )
            print(f"{i}/{len(new)}  {said}  {row['seconds']} s", file=sys.stderr, flush=True)

    def best(self, candidates: Sequence[Job]) -> tuple[Job, list[dict[str, Any]]]:
        """Return the setting with the best mean validation accuracy at the sparsities of tuning, and all of them."""
        targets = self.plan.tune_targets
        self.run([replace(job, target=target) for job in candidates for target in targets])
        means = [sum(self.rows[replace(job, target=t)]["val"] for t in targets) / len(targets) for job in candidates]
        knobs = ("regime", "method", "damping", "block", "lr", "num_grads", "batch")
        table = [{k: asdict(job)[k] for k in knobs} | {"val": v} for job, v in zip(candidates, means, strict=True)]
        return candidates[means.index(max(means))], table


def tune(runs: Runs) -> tuple[list[Job], list[dict[str, Any]], list[dict[str, Any]]]:
    """Choose damping and block size for each one-shot method and rate for each gradual one, on the first seed."""
    plan, seed = runs.plan, runs.plan.seeds[0]
    grid, chosen = [], [Job("once", "magnitude", 0.0, seed)]
    grads = plan.windows[0][0] if plan is QUICK else 128
    for regime in ("once", "rounds"):
        for method in ("published", "joint"):
            start = Job(regime, method, 0.0, seed, num_grads=grads)
            best, table = runs.best([replace(start, damping=damping) for damping in plan.dampings])
            # blocks of the best damping, which is in both lists
            best, more = runs.best([replace(best, block=block) for block in plan.blocks])
            chosen.append(best)
            grid += [*table, *more[1:]]
    joint = chosen[-1]
    _, windows = runs.best([joint, *(replace(joint, num_grads=m, batch=size) for m, size in plan.windows)])
    rounds = [job for job in chosen if job.regime == "rounds"]
    for job in (chosen[0], *rounds):
        best, table = runs.best([replace(job, regime="gradual", lr=lr) for lr in plan.lrs])
        chosen.append(best)
        grid += table
    return chosen, grid, windows


def cells(document: dict[str, Any], regime: str, method: str) -> list[tuple[float, float]]:
    """Mean and standard deviation of the test accuracy at each target, in per cent."""
    found = []
    for target in document["plan"]["targets"]:
        keys = (regime, method, target)
        values = [r["test"] for r in document["runs"] if (r["regime"], r["method"], r["target"]) == keys]
        found.append((100 * statistics.fmean(values), 100 * statistics.stdev(values) if len(values) > 1 else 0.0))
    return found


def rows(document: dict[str, Any]) -> Iterator[tuple[str, str, list[tuple[float, float]]]]:
    """The lines of the table."""
    for chosen in document["chosen"]:
        regime, method = chosen["regime"], chosen["method"]
        yield regime, method, cells(document, regime, method)


def write(document: dict[str, Any], folder: Path) -> None:
    """Leave the numbers, the table and the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prune_digits.json").write_text(json.dumps(document, indent=1) + "\n")
    targets = document["plan"]["targets"]
    names = [target if isinstance(target, str) else f"{target:.0%}" for target in targets]
    whole = [100 * row["test"] for row in document["dense"]]
    lines = [
        f"Test accuracy in per cent of a network of {document['weights']:,} weights, mean ± standard deviation over "
        f"{len(whole)} seeds; before pruning {statistics.fmean(whole):.2f}. `{document['command']}`",
        "",
        "| | | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for regime, method, found in rows(document):
        text = " | ".join(f"{mean:.1f} ± {std:.1f}" for mean, std in found)
        lines.append(f"| {document['regimes'][regime]} | {document['methods'][method]} | {text} |")
    for title, key in (
        ("Chosen", "chosen"),
        ("The grid", "grid"),
        ("The window, one-shot in rounds, joint", "windows"),
    ):
        knobs = list(document[key][0])
        lines += ["", f"{title} (`val`: mean accuracy on the first seed at the sparsities of tuning):", ""]
        lines += ["| " + " | ".join(knobs) + " |", "|---" * len(knobs) + "|"]
        lines += ["| " + " | ".join(_shown(row[knob]) for knob in knobs) + " |" for row in document[key]]
    (folder / "prune_digits.md").write_text("\n".join(lines) + "\n")
    draw(document, folder / "prune_digits.png")


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(document: dict[str, Any], path: Path) -> None:
    """Test accuracy over sparsity, one picture for each way of pruning."""
    targets = document["plan"]["targets"]
    shown = [i for i, target in enumerate(targets) if not isinstance(target, str)]
    plt = pyplot()
    fig, axes = plt.subplots(1, len(REGIMES), figsize=(12, 4), sharey=True, layout="constrained")
    axis = dict(zip(REGIMES, axes, strict=True))
    for regime, method, found in rows(document):
        mean, std = zip(*(found[i] for i in shown), strict=True)
        mark, color = {"magnitude": ("o", "C0"), "published": ("s", "C1"), "joint": ("^", "C2")}[method]
        labels = [f"{targets[i]:.0%}" for i in shown]
        axis[regime].errorbar(labels, mean, std, marker=mark, color=color, capsize=3, label=METHODS[method])
    for regime, ax in axis.items():
        ax.set(title=document["regimes"][regime], xlabel="sparsity")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy (per cent)")
    axes[0].legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def measured(runs: Runs) -> dict[str, Any]:
    """Tune, run everything and return what the files are made of."""
    plan = runs.plan
    chosen, grid, windows = tune(runs)
    final = [replace(job, target=target, seed=seed) for seed in plan.seeds for job in chosen for target in plan.targets]
    runs.run(final)
    models = [dense(seed, plan.dense_steps) for seed in plan.seeds]
    data = load()
    return {
        "machine": machine() | {"versions": versions(("torch", "numpy", "scikit-learn"))},
        "plan": asdict(plan),
        "weights": sum(p.numel() for _, p in matrices(models[0])),
        "dense": [{"val": accuracy(m, data.val), "test": accuracy(m, data.test)} for m in models],
        "regimes": {name: text.format(recomputations=plan.recomputations) for name, text in REGIMES.items()},
        "methods": METHODS,
        "chosen": [{k: v for k, v in asdict(job).items() if k not in ("target", "seed")} for job in chosen],
        "grid": grid,
        "windows": windows,
        "runs": [runs.rows[job] for job in final],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run all and write the results."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--results", type=Path, default=Path("experiments/results/prune_digits"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args(argv)
    plan = QUICK if args.quick else Plan()
    if args.jobs == 1:
        document = measured(Runs(plan))
    else:
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            document = measured(Runs(plan, pool))
    write({"command": command("experiments.prune", argv)} | document, args.results)


if __name__ == "__main__":
    main()
