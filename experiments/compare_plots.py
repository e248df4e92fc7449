"""The plots of a comparison: loss over tokens, seconds and state, and how it was tuned."""

import math
import statistics
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler

# a file is drawn, never a window
mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from experiments.compare_runs import short

Points = list[tuple[float, float, float]]


def _mean_curve(curves: list[Points], column: int) -> tuple[list[float], list[float], list[float], list[float]]:
    # seeds evaluate at the same steps; a seed without its last rows shortens the mean
    rows = list(zip(*curves, strict=False))
    xs = [statistics.fmean(point[column] for point in row) for row in rows]
    losses = [[point[2] for point in row] for row in rows]
    return xs, [statistics.fmean(row) for row in losses], [min(row) for row in losses], [max(row) for row in losses]


# arms may lie on top of each other: tell them apart by more than colour
_STYLES = tuple(zip(("o", "s", "^", "D", "v", "P"), ("-", "--", "-.", ":", "-", "--"), strict=True))


def _styled(arms: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], str]]:
    for i, ((name, arm), (marker, line)) in enumerate(zip(arms.items(), cycle(_STYLES), strict=False)):
        # by its place, so that an arm has one colour in all plots
        yield name, arm, {"marker": marker, "color": f"C{i}"}, line


def _legend(ax: Axes, **more: Any) -> None:
    handles = ax.get_legend_handles_labels()[0]
    if len(handles) > 6:
        # a long one hides what it explains
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), **more)
    elif handles:
        ax.legend(**more)


def _draw_curves(ax: Axes, arms: dict[str, Any], column: int) -> None:
    shown: list[float] = []
    for name, arm, mark, style in _styled(arms):
        curves = [points for points in arm["curves"].values() if points]
        if not curves:
            continue
        x, mean, low, high = _mean_curve(curves, column)
        (line,) = ax.plot(x, mean, **mark, ls=style, ms=4, label=f"{name}, last {mean[-1]:.3f}")
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)
        # the loss before training says nothing and hides the rest
        shown += [*(low[1:] or low), *(high[1:] or high)]
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) or 0.1
        ax.set_ylim(min(shown) - margin, max(shown) + margin)
        _legend(ax)
    ax.set(xlabel=("tokens", "seconds of training")[column], ylabel="validation loss (nats per token)")


def _draw_state(ax: Axes, arms: dict[str, Any]) -> None:
    for name, arm, mark, _ in _styled(arms):
        if "val_loss" in arm:
            loss, size = arm["val_loss"], arm["opt_state_bytes"] / 2**20
            label = f"{name}, {size:.2f} MiB, {loss['mean']:.3f}"
            ax.errorbar(size, loss["mean"], loss["std"], ls="none", **mark, ms=8, mfc="none", capsize=4, label=label)
    ax.set(xlabel="optimizer state (MiB)", ylabel="final validation loss (nats per token)")
    ax.set_xlim(left=0)
    ax.margins(x=0.1, y=0.4)
    _legend(ax)


def _draw_tuning(ax: Axes, arms: dict[str, Any], knob: str) -> None:
    values: set[float] = set()
    pairs: list[str] = []
    for name, arm, mark, style in _styled(arms):
        found = arm["tuning"].get(knob, {"candidates": []})["candidates"]
        points = [(c["value"], c["loss"]) for c in found if c["loss"] is not None]
        if not points:
            continue
        if any(isinstance(value, list) for value, _ in points):
            # several numbers in one have no place on an axis but the order in which they are met
            pairs += [short(value) for value, _ in points if short(value) not in pairs]
            points = [(pairs.index(short(value)) + 1, loss) for value, loss in points]
        else:
            values |= {value for value, _ in points}
        ax.plot(*zip(*points, strict=True), **mark, ls=style, ms=4, label=name)
    if pairs:
        ax.set_xticks(range(1, len(pairs) + 1), pairs)
    elif values and min(values) > 0:
        ax.set_xscale("log")
        # values that were run, which seldom are powers of ten, as far apart as their labels need
        ticks: list[float] = []
        for value in sorted(values):
            if not ticks or math.log(value / ticks[-1]) > math.log(max(values) / min(values)) / 8:
                ticks.append(value)
        ax.set_xticks(ticks, [f"{value:.2g}" for value in ticks])
        ax.set_xticks([], minor=True)
    ax.set(title="on the tuning seed", xlabel=knob, ylabel="validation loss, nats per token")
    _legend(ax)


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Who is not beaten: nobody has both less state and less loss; by state, names of (state, loss)."""
    order = sorted(points, key=lambda name: points[name])
    return [name for i, name in enumerate(order) if all(points[other][1] > points[name][1] for other in order[:i])]


def _draw_pareto(ax: Axes, arms: dict[str, Any]) -> None:
    shown = {name: arm for name, arm in arms.items() if "val_loss" in arm}
    sizes = {name: arm["matrix_state_bytes"] for name, arm in shown.items()}
    kept = [size for size in sizes.values() if size]
    if not kept:
        return
    # a logarithmic axis has no place for nothing: one of its own, left of all others
    nothing = min(kept) / 4
    points = {name: (sizes[name] or nothing, arm["val_loss"]["mean"]) for name, arm in shown.items()}
    best = front(points)
    ax.step([points[name][0] for name in best], [points[name][1] for name in best], where="post", color="0.7", lw=1)
    for name, arm, mark, _ in _styled(arms):
        if name not in shown:
            continue
        x, y = points[name]
        label = f"{name}  {y:.3f} ± {arm['val_loss']['std']:.3f}" + (" *" if name in best else "")
        ax.errorbar(x, y, arm["val_loss"]["std"], ls="none", **mark, ms=7, mfc="none", capsize=3, label=label)
    ax.set_xscale("log", base=2)
    ticks = sorted({*kept, nothing} if 0 in sizes.values() else set(kept))
    far = [tick for i, tick in enumerate(ticks) if not i or tick / ticks[i - 1] > 1.15]
    ax.set_xticks(far, ["none" if tick == nothing else f"{tick / 2**10:,.0f}" for tick in far], rotation=45)
    ax.set_xticks([], minor=True)
    ax.set(xlabel="state of the matrices (KiB)", ylabel="final validation loss (nats per token)")
    _legend(ax, title="* nobody has less of both")


def draw(document: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Loss over tokens, over seconds, over state bytes, the same for the matrices alone, and the tuning curves."""
    # more arms than the usual colours
    many = cycler(color=[mpl.colormaps["tab20"](i) for i in range(20)])
    colors = many if len(document["arms"]) > 10 else mpl.rcParams["axes.prop_cycle"]
    with mpl.rc_context({"axes.prop_cycle": colors}):
        return _draw(document["arms"], document["knobs"], folder, stem)


def _draw(arms: dict[str, Any], knobs: list[str], folder: Path, stem: str) -> list[Path]:
    written = []
    wide = 6.4 if len(arms) < 7 else 8.6

    def save(fig: Any, what: str) -> None:
        for ax in fig.axes:
            ax.grid(alpha=0.3)
        written.append(folder / f"{stem}_{what}.png")
        fig.savefig(written[-1], dpi=120)
        plt.close(fig)

    # one measurement at the end is no curve
    is_curve = any(len(points) > 1 for arm in arms.values() for points in arm["curves"].values())
    for column, what in enumerate(("tokens", "seconds") if is_curve else ()):
        fig, ax = plt.subplots(figsize=(wide, 4.2), layout="constrained")
        _draw_curves(ax, arms, column)
        save(fig, what)
    fig, ax = plt.subplots(figsize=(wide, 4.2), layout="constrained")
    _draw_state(ax, arms)
    save(fig, "state")
    if any(arm.get("matrix_state_bytes") for arm in arms.values()):
        fig, ax = plt.subplots(figsize=(9.0, 4.8), layout="constrained")
        _draw_pareto(ax, arms)
        save(fig, "pareto")
    fig, axes = plt.subplots(1, len(knobs), figsize=((wide - 1) * len(knobs), 4.2), layout="constrained", squeeze=False)
    for ax, knob in zip(axes[0], knobs, strict=True):
        _draw_tuning(ax, arms, knob)
    save(fig, "tuning")
    return written
