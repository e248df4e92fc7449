"""The figures of `bench` as Markdown tables: times, memory, operations."""

from collections.abc import Iterator
from typing import Any

MIB = 2**20

Report = dict[str, Any]


def tables(report: Report) -> str:
    """The report as Markdown tables."""
    lines = [
        f"### {report['workload']}: {len(report['shapes'])} matrices, {report['parameters'] / 1e6:.1f}M parameters, "
        f"{report['dtype']}, rank {report['rank']}, gap {report['gap']}",
        "",
        *(_times_of_rounds(report) if report["rounds"] else _times_of_periods(report)),
        "",
        *_memory(report),
        *(["", *_operations(report)] if "flops" in report else []),
        "",
        *(f"Absent: {name}, {reason}." for name, reason in report["absent"].items()),
        *(f"{name}: {row['note']}." for name, row in report["results"].items() if "note" in row),
    ]
    return "\n".join(lines).rstrip() + "\n"


def kernel_tables(document: Report) -> str:
    """Ceilings, kernels and targets as Markdown tables."""
    ceilings, machine = document["ceilings"], document["machine"]
    versions = machine["versions"]
    known = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "cuda") if name in versions)
    lines = [
        f"### {machine['device']}: {known}",
        "",
        f"Copy {ceilings['copy_gb_per_s']:.0f} GB/s, bfloat16 product of {ceilings['product_side']}³ "
        f"{ceilings['bfloat16_tflop_per_s']:.4g} TFLOP/s. Of floor: the time that these allow over the median, "
        "float32 arithmetic included.",
        "",
        "| kernel | size | median, µs | min, µs | floor, µs | of floor | torch, µs | torch ÷ kernel | host, µs | error "
        "| torch form |",
        "|---|---|" + "---:|" * 8 + "---|",
        *map(_kernel, document["kernels"]),
        "",
        "Milliseconds. Steps are of LLaMA-7B's matrices, of Muon of one layer; busy: what the device worked.",
        "",
        "| target | ratio | at most | met | ours | other | host, ours | host, other | busy, ours | busy, other |",
        "|---|" + "---:|" * 9,
        *map(_target, document["targets"]),
        "",
        *(f"Failed: {row['part']}, {row['error']}." for row in document["failures"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _kernel(row: Report) -> str:
    cells = [row["kernel"], row["size"], *(f"{1e3 * row[f'{key}_ms']:.4g}" for key in ("median", "min", "floor"))]
    cells += [f"{row['floor_fraction']:.2f}", f"{1e3 * row['torch']['median_ms']:.4g}"]
    cells += [f"{row['torch_over_kernel']:.2f}", f"{1e3 * row['host_ms']:.3g}", f"{row['relative_error']:.1e}"]
    return f"| {' | '.join(cells)} | {row['torch']['form']} |"


def _target(row: Report) -> str:
    cells = [row["target"], f"{row['figure']:.3f}", "" if row["most"] is None else f"{row['most']:g}"]
    cells += [{None: "", True: "yes", False: "no"}[row["met"]]]
    sides = (row["ours"], row.get("other", {}))
    for key in ("median_ms", "host_ms", "busy_ms"):
        cells += [_ms(side[key]) if key in side else "" for side in sides]
    return f"| {' | '.join(cells)} |"


def _with_floor(figures: Report, key: str, unit: str) -> str:
    show = _mib if unit == "bytes" else _ms
    return f"{show(figures[f'{key}_{unit}'])} ({show(figures[f'{key}_floor_{unit}'])})"


def _mib(size: float) -> str:
    return f"{size / MIB:.3g}"


def _ms(time: float) -> str:
    return f"{time:.4g}" if time < 1e4 else f"{time:.0f}"


def _machine(report: Report) -> str:
    return (
        f"Milliseconds (floor). This machine: copy {report['copy_gb_per_s']:.1f} GB/s, matrix product "
        f"{report['matmul_gflop_per_s']:.0f} GFLOP/s"
    )


def _times_of_periods(report: Report) -> Iterator[str]:
    base = report["baseline"]
    yield f"{_machine(report)}. Fastest of {report['periods']} refresh periods, step by step."
    yield ""
    yield (
        "| optimizer | first step | median | min | worst step | worst ÷ median | with the first | mean of a period "
        f"| median ÷ {base} | mean ÷ {base} |"
    )
    yield "|---|" + "---:|" * 9
    for name, row in report["results"].items():
        cells = [_with_floor(row, key, "ms") for key in ("first", "median")] + [_ms(row["min_ms"])]
        cells += [_with_floor(row, "worst", "ms"), f"{row['worst_over_median']:.2f}"]
        cells += [f"{row['worst_over_median_with_first']:.2f}", _with_floor(row, "amortized", "ms")]
        cells += [f"{row['median_over_baseline']:.2f}", f"{row['amortized_over_baseline']:.2f}"]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _times_of_rounds(report: Report) -> Iterator[str]:
    base = report["baseline"]
    yield (
        f"{_machine(report)} in {report['dtype']}, {report['bfloat16_matmul_gflop_per_s']:.0f} in bfloat16. "
        f"{report['rounds']} rounds; each optimizer is handed "
        f"{'a copy of the gradients' if report['gradients_copied'] else 'the same gradients'}."
    )
    yield ""
    yield f"| optimizer | median | min | worst step | median ÷ {base} | min ÷ {base} | median ÷ its float32 form |"
    yield "|---|" + "---:|" * 6
    for name, row in report["results"].items():
        cells = [_with_floor(row, "median", "ms"), _ms(row["min_ms"]), _ms(row["worst_ms"])]
        cells += [f"{row['median_over_baseline']:.3f}", f"{row['min_over_baseline']:.3f}"]
        cells += [f"{row['median_over_float32']:.2f}" if "median_over_float32" in row else ""]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _memory(report: Report) -> Iterator[str]:
    base = report["baseline"]
    yield "MiB (floor). Held: storages that the state keeps alive, more than the state where it is a view of something."
    yield ""
    yield f"| optimizer | state | held | state ÷ {base} | peak extra, ordinary step | peak extra, worst step |"
    yield "|---|" + "---:|" * 5
    for name, row in report["results"].items():
        ratio = row["state_bytes"] / report["results"][base]["state_bytes"]
        cells = [_with_floor(row, "state", "bytes"), _mib(row["state_held_bytes"]), f"{ratio:.3f}"]
        cells += [_with_floor(row, "extra_ordinary", "bytes"), _with_floor(row, "extra_worst", "bytes")]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _operations(report: Report) -> Iterator[str]:
    theory = report["newton_schulz_flops"]
    shapes = list(theory)
    yield (
        "Operations of a step for one matrix, in units of the cube of its short side: counted (the least by formula; "
        "ours choose the form of Newton–Schulz, and there it is the cheapest with symmetric products by half), and "
        "what finding a basis adds."
    )
    yield ""
    yield "| optimizer | " + " | ".join(shapes) + " | GFLOP a step of all |"
    yield "|---|" + "---:|" * (len(shapes) + 1)
    for name, rows in report["flops"].items():
        cells = []
        for shape in shapes:
            row, cube = rows[shape], _cube(shape)
            cell = f"{row['counted'] / cube:.2f} ({row['formula'] / cube:.2f})"
            if "refresh_counted" in row:
                cell += f", + {row['refresh_counted'] / cube:.2f} ({row['refresh_formula'] / cube:.2f})"
            cells.append(cell + " ?" * bool(row["uncounted"]))
        total = sum(row["matrices"] * row["counted"] for row in rows.values())
        yield f"| {name} | " + " | ".join(cells) + f" | {total / 1e9:.4g} |"
    for form in next(iter(theory.values())):
        cells = [f"{theory[shape][form] / _cube(shape):.2f}" for shape in shapes]
        yield f"| *Newton–Schulz, 5 steps: {form}* | " + " | ".join(cells) + " | |"
    missed = sorted({op for rows in report["flops"].values() for row in rows.values() for op in row["uncounted"]})
    if missed:
        yield ""
        yield f"?: without a formula and not counted: {', '.join(missed)}."


def _cube(shape: str) -> int:
    return int(min(map(int, shape.split("x")))) ** 3
