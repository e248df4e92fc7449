"""What the convex experiment leaves: tables in Markdown and one plot."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

# a file is drawn, never a window
mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Document = dict[str, Any]
_STYLES = {"M-FAC": ("C0", "-"), "SGD": ("C1", "--"), "AdamW": ("C2", "-."), "stochastic Newton": ("0.4", ":")}


def _median(values: Sequence[float | None]) -> str:
    """Return the median and the range over seeds; a seed that never got there makes the range open."""
    there = sorted(value for value in values if value is not None)
    if len(there) <= len(values) / 2:
        return f"never ({len(there)} of {len(values)} seeds)" if there else "never"
    middle = sorted(values, key=lambda value: float("inf") if value is None else value)[len(values) // 2]
    assert middle is not None
    last = f"{there[-1]:.3g}" if len(there) == len(values) else "never"
    return f"{middle:.3g} ({there[0]:.3g} to {last})"


def _setting(setting: dict[str, Any], at_edge: Sequence[str]) -> str:
    def shown(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {shown(value)}" + ("*" if name in at_edge else "") for name, value in setting.items())


def claim(problem: Document, level: str) -> str:
    """Say who reaches a level in fewest steps on every seed, of the three that do not know the Hessian."""
    steps = {name: problem["methods"][name]["levels"][level]["steps"] for name in ("M-FAC", "SGD", "AdamW")}
    far = float("inf")
    medians = {
        name: sorted(far if at is None else at for at in every)[len(every) // 2] for name, every in steps.items()
    }
    own, other = medians["M-FAC"], min(medians["SGD"], medians["AdamW"])
    if own == other == far:
        return "nobody gets there"
    each = [[far if at is None else at for at in every] for every in steps.values()]
    wins = sum(mfac < min(sgd, adamw) for mfac, sgd, adamw in zip(*each, strict=True))
    ratio = "M-FAC alone" if other == far else "not M-FAC" if own == far else f"{own / other:.2f}"
    return f"{ratio}; fewer on {wins} of {len(steps['M-FAC'])} seeds"


def _race(problem: Document) -> Iterator[str]:
    levels = list(problem["newton_steps"])
    names = list(problem["methods"])
    yield "Steps to a share of the initial suboptimality, median over seeds (range):"
    yield ""
    yield f"| share | {' | '.join(names)} | Newton, whole gradients | M-FAC's steps ÷ fewest of SGD and AdamW |"
    yield "|---|" + "---:|" * (len(names) + 2)
    for level in levels:
        cells = [_median(problem["methods"][name]["levels"][level]["steps"]) for name in names]
        yield f"| {level} | {' | '.join(cells)} | {problem['newton_steps'][level]} | {claim(problem, level)} |"
    yield ""
    yield "Milliseconds to the same, one thread, beside other work on the machine:"
    yield ""
    yield f"| share | {' | '.join(names)} |"
    yield "|---|" + "---:|" * len(names)
    for level in levels:
        each = [problem["methods"][name]["levels"][level]["seconds"] for name in names]
        cells = [_median([None if x is None else 1e3 * x for x in seconds]) for seconds in each]
        yield f"| {level} | {' | '.join(cells)} |"
    yield ""
    rates = ", ".join(f"{name} {problem['methods'][name]['microseconds_per_step']:.0f}" for name in names)
    tried = ", ".join(f"{name} {problem['methods'][name]['settings_tried']}" for name in names)
    yield f"Microseconds a step, gradient included: {rates}. Settings tried: {tried}."
    yield ""
    yield "Best settings on the tuning seed (* the edge of what was tried):"
    yield ""
    for name in names:
        for level in levels:
            found = problem["methods"][name]["levels"][level]
            at = found["tuning_steps"]
            yield f"- {name}, {level}: {_setting(found['setting'], found['at_edge'])} ({at if at else 'never'})"


def _directions(rows: list[Document]) -> Iterator[str]:
    yield "| point | gradients of | damping | " + " | ".join(f"m = {m}" for m in _windows(rows)) + " | ∇f itself |"
    yield "|---|---|---:|" + "---:|" * (len(_windows(rows)) + 1)
    keys = dict.fromkeys((row["point"], row["gradients_of"], row["damping_share"]) for row in rows)
    for key in keys:
        mine = [row for row in rows if (row["point"], row["gradients_of"], row["damping_share"]) == key]
        cells = [f"{row['cosine']:.2f} / {row['cosine_in_hessian_norm']:.2f}" for row in mine]
        own = f"{mine[0]['gradient_cosine']:.2f} / {mine[0]['gradient_cosine_in_hessian_norm']:.2f}"
        yield f"| {key[0]} | {key[1]} | {key[2]:g} | {' | '.join(cells)} | {own} |"


def _windows(rows: list[Document]) -> list[int]:
    return list(dict.fromkeys(row["num_grads"] for row in rows))


def _coordinates(rows: list[Document]) -> Iterator[str]:
    yield "| damping ÷ mean of ‖g‖² | basis | rank | cosine | ‖U‖ ÷ ‖U whole‖ | ‖difference‖ ÷ ‖U whole‖ |"
    yield "|---:|---|---:|---:|---:|---:|"
    for row in rows:
        yield (
            f"| {row['damping_share']:g} | {row['basis']} | {row['rank']:g} | {row['cosine']:.3f} | "
            f"{row['norm_ratio']:.3f} | {row['relative_difference']:.2g} |"
        )


def markdown(document: Document) -> str:
    """Return everything as Markdown."""
    machine = document["machine"]
    lines = [
        "# M-FAC on convex problems with a known Hessian",
        "",
        f"`{document['command']}`, {machine['cpu']}, {machine['threads']} thread(s), torch "
        f"{machine['versions']['torch']}, scikit-learn {document['scikit_learn']}, {machine['date']}. Tuned on seed "
        f"{document['tune_seed']} by the steps to each share, repeated on seeds {document['seeds']}; at most "
        f"{document['steps']} steps. All methods see the same minibatches. float64. `after` is where a learning rate "
        "that falls as 1/(1 + t/after) has halved. Stochastic Newton knows the Hessian and is a bound, not a rival.",
    ]
    for name, problem in document["problems"].items():
        about = problem["about"]
        lines += [
            "",
            f"## {name}: {about['size']} parameters, {about['rows']} rows, batches of {about['batch']}, condition "
            f"{about['condition']:.3g}",
            "",
            *_race(problem),
            "",
            "Cosine of F⁻¹∇f with H⁻¹∇f (Euclidean / in the norm of H), window of m gradients at one point, damping as "
            "a share of the largest eigenvalue of GᵀG/m:",
            "",
            *_directions(problem["directions"]),
        ]
    lines += [
        "",
        "## A window of coordinates beside a window of whole gradients",
        "",
        "A small MLP, the same gradients for all, those of the last half window; the basis is found again every m "
        f"gradients, m = {document['coordinates'][0]['num_grads']}:",
        "",
        *_coordinates(document["coordinates"]),
    ]
    return "\n".join(lines) + "\n"


def _draw_problem(ax: Axes, name: str, problem: Document) -> None:
    lowest = 1.0
    for method, report in problem["methods"].items():
        color, style = _STYLES[method]
        columns = list(zip(*report["curves"], strict=True))
        steps = range(len(columns))
        middle = [statistics.median(column) for column in columns]
        ax.plot(steps, middle, color=color, ls=style, lw=1.4, label=method)
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        ax.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
        lowest = min(lowest, *middle)
    for level in problem["newton_steps"]:
        ax.axhline(float(level), color="0.8", lw=0.8, zorder=0)
    ax.set(title=name, xlabel="steps", ylabel="suboptimality ÷ initial", yscale="log", ylim=(lowest / 2, 3))
    ax.grid(alpha=0.3)


def draw(document: Document, path: Path) -> None:
    """Draw suboptimality against steps, median and range over seeds, of each method's setting for the lowest share."""
    problems = document["problems"]
    rows = -(-len(problems) // 2)
    columns = min(2, len(problems))
    fig, axes = plt.subplots(rows, columns, figsize=(5.6 * columns, 4 * rows), layout="constrained", squeeze=False)
    for ax, (name, problem) in zip(axes.flat, problems.items(), strict=False):
        _draw_problem(ax, name, problem)
    for ax in axes.flat[len(problems) :]:
        ax.set_axis_off()
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    fig.savefig(path, dpi=120)
    plt.close(fig)
