"""What a comparison leaves: a Markdown table and a JSON file with every run; the plots are `compare_plots`'s."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from experiments.compare_plan import Comparison, Plan
from experiments.compare_plots import Points, draw
from experiments.compare_runs import Result, short
from experiments.machine import machine
from experiments.tracking import read


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
        "losses": {str(result.run.seed): result.loss for result in done},
        "seeds_done": [result.run.seed for result in done],
        "seeds_ended_otherwise": {str(result.run.seed): result.status for result in ended if result.status != "done"},
        "curves": {str(result.run.seed): curve(out, result.run.key) for result in done},
    }
    if done:
        report["val_loss"] = _spread([result.loss for result in done])
        # runs from before the matrices were counted apart do not say
        for name in ("opt_state_bytes", "adamw_state_bytes", "matrix_state_bytes"):
            report[name] = int(done[0].summary.get(name, 0))
        for name in ("seconds", "tokens_per_second"):
            report[name] = _spread([result.summary[name] for result in done])
    return report


def threads_of_runs(results: dict[str, Result], out: Path) -> list[int]:
    """The thread counts that the runs worked with; this process has its own."""
    files = [out / key / "environment.json" for key in results]
    return sorted({json.loads(file.read_text())["environment"]["threads"] for file in files if file.exists()})


def difference(arm: dict[str, Any], base: dict[str, Any]) -> str:
    """How much more an arm loses than the baseline, seed by seed: seeds move all arms alike, so this spreads less."""
    both = [seed for seed in arm["losses"] if seed in base["losses"]]
    gaps = [arm["losses"][seed] - base["losses"][seed] for seed in both]
    if not gaps:
        return ""
    spread = _spread(gaps)
    return f"{spread['mean']:+.4f} ± {spread['std']:.4f}" if len(gaps) > 1 else f"{spread['mean']:+.4f}"


def table(document: dict[str, Any]) -> str:
    """The comparison in Markdown, then what did not go well."""
    knobs, base = document["knobs"], document["baseline"]
    arms = document["arms"]
    head = ["optimizer", *knobs, "val loss, nats/token", "seeds", f"loss - {base}", "state bytes", "÷ AdamW"]
    head += ["of the matrices", "seconds", "tokens/s", "tuning runs"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    notes = []
    for name, arm in arms.items():
        best = [short(arm["best"][knob]) if knob in arm["best"] else "" for knob in knobs]
        seeds = f"{len(arm['seeds_done'])} of {len(document['seeds'])}"
        if "val_loss" not in arm:
            cells = [name, *best, "no finished run", seeds, *[""] * 6, str(arm["tuning_runs"])]
        else:
            loss = arm["val_loss"]
            gap = difference(arm, arms[base])
            cells = [name, *best, f"{loss['mean']:.4f} ± {loss['std']:.4f}", seeds, gap, f"{arm['opt_state_bytes']:,}"]
            cells += [f"{arm['opt_state_bytes'] / arm['adamw_state_bytes']:.3f}", f"{arm['matrix_state_bytes']:,}"]
            cells += [f"{arm['seconds']['mean']:.1f}"]
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
