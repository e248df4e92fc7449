"""What a comparison leaves: a Markdown table, a JSON file with every run, and plots."""

import json
import math
import statistics
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl

# a file is drawn, never a window
mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from experiments.compare_plan import Comparison, Plan
from experiments.compare_runs import Result
from experiments.machine import machine
from experiments.tracking import read

Points = list[tuple[float, float, float]]


def curve(out: Path, key: str) -> Points:
    """Validation loss of a run: (tokens, seconds, loss); before the first step no time has passed."""
    rows = read(out / key / "metrics.jsonl")
    rows = [row for row in rows if row.get("eval/loss") is not None]
    return [(row["tokens"], round(row.get("time/seconds", 0.0), 3), row["eval/loss"]) for row in rows]


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def arm_report(comparison: Comparison, now: Plan, results: dict[str, Result], arm: str, out: Path) -> dict[str, Any]:
    """One arm's row of the table, its tuning curves, and the loss curves of its repeated runs."""
    runs = [comparison.run(arm, now.best[arm], seed) for seed in comparison.seeds]
    ended = [results[run.key] for run in runs if run.key in results]
    done = [result for result in ended if result.status == "done"]
    tuning = {
        knob: {
            "bracketed": found.bracketed,
            "candidates": [
                {"value": value, "loss": loss if math.isfinite(loss) else None}
                for value, loss in zip(found.candidates, found.losses, strict=False)
            ],
        }
        for knob, found in now.tunings[arm].items()
    }
    report: dict[str, Any] = {
        "args": comparison.arms[arm].args,
        "best": now.best[arm],
        "tuning": tuning,
        "tuning_runs": sum(
            result.run.arm == arm and result.run.seed == comparison.tune_seed for result in results.values()
        ),
        "seeds_done": [result.run.seed for result in done],
        "seeds_ended_otherwise": {str(result.run.seed): result.status for result in ended if result.status != "done"},
        "curves": {str(result.run.seed): curve(out, result.run.key) for result in done},
    }
    if done:
        report["val_loss"] = _spread([result.loss for result in done])
        for name in ("opt_state_bytes", "adamw_state_bytes"):
            report[name] = int(done[0].summary[name])
        for name in ("seconds", "tokens_per_second"):
            report[name] = _spread([result.summary[name] for result in done])
    return report


def threads_of_runs(results: dict[str, Result], out: Path) -> list[int]:
    """The thread counts that the runs worked with; this process has its own."""
    files = [out / key / "environment.json" for key in results]
    return sorted({json.loads(file.read_text())["environment"]["threads"] for file in files if file.exists()})


def table(document: dict[str, Any]) -> str:
    """The comparison in Markdown, then what did not go well."""
    knobs, base = document["knobs"], document["baseline"]
    arms = document["arms"]
    head = ["optimizer", *knobs, "val loss, nats/token", "seeds", f"loss - {base}", "state bytes", "÷ AdamW"]
    head += ["seconds", "tokens/s", "tuning runs"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    notes = []
    for name, arm in arms.items():
        best = [f"{arm['best'][knob]:g}" for knob in knobs]
        seeds = f"{len(arm['seeds_done'])} of {len(document['seeds'])}"
        if "val_loss" not in arm:
            cells = [name, *best, "no finished run", seeds, *[""] * 5, str(arm["tuning_runs"])]
        else:
            loss = arm["val_loss"]
            gap = f"{loss['mean'] - arms[base]['val_loss']['mean']:+.4f}" if "val_loss" in arms[base] else ""
            cells = [name, *best, f"{loss['mean']:.4f} ± {loss['std']:.4f}", seeds, gap, f"{arm['opt_state_bytes']:,}"]
            cells += [f"{arm['opt_state_bytes'] / arm['adamw_state_bytes']:.3f}", f"{arm['seconds']['mean']:.1f}"]
            cells += [f"{arm['tokens_per_second']['mean']:,.0f}", str(arm["tuning_runs"])]
        lines.append("| " + " | ".join(cells) + " |")
        notes += [f"{name}: {knob} is not bracketed." for knob, t in arm["tuning"].items() if not t["bracketed"]]
        notes += [f"{name}: seed {seed} {how}." for seed, how in arm["seeds_ended_otherwise"].items()]
    notes += [
        f"{run['status'].capitalize()}: {run['key']}: {run['message']}."
        for run in document["runs"]
        if run["status"] != "done"
    ]
    notes += [
        f"{run['key']}: {run['skipped_steps']} steps skipped, their gradient was no number."
        for run in document["runs"]
        if run["skipped_steps"]
    ]
    notes += [] if document["complete"] else ["Not complete: some runs are missing."]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def _mean_curve(curves: list[Points], column: int) -> tuple[list[float], list[float], list[float], list[float]]:
    # seeds evaluate at the same steps; a seed without its last rows shortens the mean
    rows = list(zip(*curves, strict=False))
    xs = [statistics.fmean(point[column] for point in row) for row in rows]
    losses = [[point[2] for point in row] for row in rows]
    return xs, [statistics.fmean(row) for row in losses], [min(row) for row in losses], [max(row) for row in losses]


# arms may lie on top of each other: tell them apart by more than colour
_STYLES = tuple(zip(("o", "s", "^", "D", "v", "P"), ("-", "--", "-.", ":", "-", "--"), strict=True))


def _styled(arms: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, str]]:
    for (name, arm), (marker, line) in zip(arms.items(), cycle(_STYLES), strict=False):
        yield name, arm, marker, line


def _draw_curves(ax: Axes, arms: dict[str, Any], column: int) -> None:
    shown: list[float] = []
    for name, arm, marker, style in _styled(arms):
        curves = [points for points in arm["curves"].values() if points]
        if not curves:
            continue
        x, mean, low, high = _mean_curve(curves, column)
        (line,) = ax.plot(x, mean, marker=marker, ls=style, ms=4, label=f"{name}, last {mean[-1]:.3f}")
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)
        # the loss before training says nothing and hides the rest
        shown += [*(low[1:] or low), *(high[1:] or high)]
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) or 0.1
        ax.set_ylim(min(shown) - margin, max(shown) + margin)
        ax.legend()
    ax.set(xlabel=("tokens", "seconds of training")[column], ylabel="validation loss (nats per token)")


def _draw_state(ax: Axes, arms: dict[str, Any]) -> None:
    for name, arm, marker, _ in _styled(arms):
        if "val_loss" in arm:
            loss, size = arm["val_loss"], arm["opt_state_bytes"] / 2**20
            label = f"{name}, {size:.2f} MiB, {loss['mean']:.3f}"
            ax.errorbar(size, loss["mean"], loss["std"], fmt=marker, ms=8, mfc="none", capsize=4, label=label)
    ax.set(xlabel="optimizer state (MiB)", ylabel="final validation loss (nats per token)")
    ax.set_xlim(left=0)
    ax.margins(x=0.1, y=0.4)
    if ax.containers:
        ax.legend()


def _draw_tuning(ax: Axes, arms: dict[str, Any], knob: str) -> None:
    values: set[float] = set()
    for name, arm, marker, style in _styled(arms):
        found = arm["tuning"].get(knob, {"candidates": []})["candidates"]
        points = [(c["value"], c["loss"]) for c in found if c["loss"] is not None]
        if points:
            ax.plot(*zip(*points, strict=True), marker=marker, ls=style, ms=4, label=name)
            values |= {value for value, _ in points}
    ax.set_xscale("log")
    # values that were run, which seldom are powers of ten, as far apart as their labels need
    ticks: list[float] = []
    for value in sorted(values):
        if not ticks or math.log(value / ticks[-1]) > math.log(max(values) / min(values)) / 8:
            ticks.append(value)
    ax.set_xticks(ticks, [f"{value:.2g}" for value in ticks])
    ax.set_xticks([], minor=True)
    ax.set(title="on the tuning seed", xlabel=knob, ylabel="validation loss, nats per token")
    if ax.lines:
        ax.legend()


def draw(document: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Loss over tokens, over seconds, over state bytes, and the tuning curves."""
    arms, knobs = document["arms"], document["knobs"]
    written = []

    def save(fig: Any, what: str) -> None:
        for ax in fig.axes:
            ax.grid(alpha=0.3)
        written.append(folder / f"{stem}_{what}.png")
        fig.savefig(written[-1], dpi=120)
        plt.close(fig)

    for column, what in enumerate(("tokens", "seconds")):
        fig, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        _draw_curves(ax, arms, column)
        save(fig, what)
    fig, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    _draw_state(ax, arms)
    save(fig, "state")
    fig, axes = plt.subplots(1, len(knobs), figsize=(5.4 * len(knobs), 4.2), layout="constrained", squeeze=False)
    for ax, knob in zip(axes[0], knobs, strict=True):
        _draw_tuning(ax, arms, knob)
    save(fig, "tuning")
    return written


def write_report(
    comparison: Comparison,
    now: Plan,
    results: dict[str, Result],
    out: Path,
    folder: Path,
    stem: str,
    told: str,
    jobs: int,
) -> str:
    """Write STEM.json, STEM.md and the plots into `folder`; returns the table."""
    arms = {arm: arm_report(comparison, now, results, arm, out) for arm in comparison.arms}
    document = {
        "command": told,
        "machine": machine(),
        "threads_of_runs": threads_of_runs(results, out),
        "jobs": jobs,
        "complete": now.done,
        "baseline": comparison.baseline or next(iter(comparison.arms)),
        "knobs": comparison.knobs,
        "common": comparison.common,
        "tune_seed": comparison.tune_seed,
        "seeds": list(comparison.seeds),
        "arms": arms,
        "runs": [
            {
                "key": key,
                "arm": result.run.arm,
                "settings": result.run.settings,
                "seed": result.run.seed,
                "status": result.status,
                "loss": result.loss if result.status == "done" else None,
                "seconds": result.summary.get("seconds"),
                "tokens_per_second": result.summary.get("tokens_per_second"),
                "skipped_steps": result.summary.get("skipped_steps", 0),
                "message": result.message,
            }
            for key, result in results.items()
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    text = table(document)
    (folder / f"{stem}.md").write_text(f"`{told}`\n\nRuns at a time: {jobs}.\n\n{text}")
    draw(document, folder, stem)
    return text
