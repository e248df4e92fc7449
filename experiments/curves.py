"""Plots of a run from its `metrics.jsonl`: loss over tokens, memory over steps, and how well bases fit.

`python -m experiments.curves RUN_DIR` draws them again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.tracking import read

Rows = Sequence[dict[str, Any]]


def pyplot() -> Any:
    """matplotlib's pyplot, which is slow to import and may be missing; a file is drawn, never a window."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def curve(rows: Rows, x: str, y: str) -> tuple[list[float], list[float]]:
    """The points of one metric over its axis; rows without it, and values that were not finite, are left out."""
    points = [(row[x], row[y]) for row in rows if row.get(y) is not None]
    return [p[0] for p in points], [p[1] for p in points]


def draw_loss(rows: Rows, path: Path, run: str = "") -> None:
    """Training and validation loss over tokens."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    ax.plot(*curve(rows, "tokens", "train/loss"), lw=1, alpha=0.6, label="training")
    x, y = curve(rows, "tokens", "eval/loss")
    ax.plot(x, y, "o-", ms=4, label=f"validation, last {y[-1]:.3f}" if y else "validation")
    ax.set(xlabel="tokens", ylabel="loss (nats per token)", title=run or "Loss")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def draw_memory(rows: Rows, path: Path, run: str = "") -> None:
    """Left: what the run must hold, to the byte, beside AdamW's state. Right: what the machine measured."""
    plt = pyplot()
    fig, (exact, measured) = plt.subplots(1, 2, figsize=(10.0, 4.0), layout="constrained")
    shown = (
        ("mem/adamw_state_bytes", "AdamW's state", "--"),
        ("mem/opt_state_bytes", "optimizer state", "-"),
        ("mem/basis_bytes", "bases (part of it)", ":"),
        ("mem/params_bytes", "weights", "-."),
        ("mem/grads_bytes", "gradients", (0, (1, 4))),
    )
    for name, label, style in shown:
        x, y = curve(rows, "step", name)
        exact.plot(x, [v / 2**20 for v in y], ls=style, label=f"{label}, {y[-1] / 2**20:.2f} MiB" if y else label)
    if run:
        fig.suptitle(run)
    exact.set(xlabel="step", ylabel="MiB", title="Computed")
    for name, label in (
        ("rss", "resident (RSS)"),
        ("rss_peak", "resident (RSS), peak"),
        ("allocated_cur", "allocated"),
        ("allocated_peak", "allocated, peak"),
        ("peak_in_backward", "peak in the backward pass"),
        ("peak_in_step", "peak in the optimizer step"),
    ):
        x, y = curve(rows, "step", f"mem/{name}_gib")
        if y:
            measured.plot(x, y, label=label)
    measured.set(xlabel="step", ylabel="GiB", title="Measured")
    for ax in (exact, measured):
        ax.grid(alpha=0.3)
        # from zero, so that heights compare, with room for the legend
        ax.set_ylim(0, 1.5 * ax.get_ylim()[1])
        if ax.lines:
            ax.legend(fontsize=8, loc="upper right", ncols=2)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def draw_basis(rows: Rows, path: Path, run: str = "") -> None:
    """Left: what bases see of gradients, and keep of themselves. Right: how many directions that is. Means."""
    plt = pyplot()
    fig, (shares, ranks) = plt.subplots(1, 2, figsize=(10.0, 4.0), layout="constrained")
    shares.plot(*curve(rows, "step", "basis/captured_energy"), label="energy captured")
    shares.plot(*curve(rows, "step", "basis/subspace_overlap"), ".", ms=4, label="overlap with the basis before")
    shares.set(xlabel="step", ylabel="share", title="Bases, mean of matrices", ylim=(0, 1.05))
    shares.legend()
    ranks.plot(*curve(rows, "step", "basis/effective_rank"))
    ranks.set(xlabel="step", ylabel="effective rank", title="Directions in use, mean of matrices")
    ranks.set_ylim(bottom=0)
    for ax in (shares, ranks):
        ax.grid(alpha=0.3)
    if run:
        fig.suptitle(run)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def draw(directory: Path) -> list[Path]:
    """Writes `loss.png`, `memory.png` and, where there are bases, `basis.png`; returns their paths."""
    rows = read(directory / "metrics.jsonl")
    drawn = {"loss.png": draw_loss, "memory.png": draw_memory}
    if any("basis/captured_energy" in row for row in rows):
        drawn["basis.png"] = draw_basis
    for name, plot in drawn.items():
        plot(rows, directory / name, directory.resolve().name)
    return [directory / name for name in drawn]


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the plots of one run directory; what is missing is one line on stderr and 2."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        print("usage: python -m experiments.curves RUN_DIR", file=sys.stderr)
        return 2
    try:
        for written in draw(Path(argv[0])):
            print(written)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
