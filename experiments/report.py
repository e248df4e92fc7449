"""What a run says about itself: the plan before it, the table after it."""

import math
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tqdm import tqdm

from lowrank_optim import ParamGroups, adamw_state_bytes, state_bytes


def human(size: float) -> str:
    """A number of bytes in the unit that people would choose."""
    unit = min(4, int(math.log(max(1.0, size), 1024)))
    return f"{size / 1024**unit:.{2 if unit else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def progress_bar(steps: int, done: int, rank: int) -> "tqdm[Any]":
    """A bar for a person who watches; disabled where nobody can."""
    watched = rank == 0 and sys.stderr.isatty()
    # a terminal may claim to have no columns, and tqdm would then show nothing
    columns = shutil.get_terminal_size().columns
    return tqdm(total=steps, initial=done, unit="step", ncols=columns, disable=not watched)


def speaker(bar: "tqdm[Any]", rank: int) -> Callable[[str], None]:
    """Prints a line on stderr: above the progress bar where there is one, and from the first process only."""
    if rank:
        return lambda line: None
    return lambda line: (
        bar.write(line, file=sys.stderr) if not bar.disable else print(line, file=sys.stderr, flush=True)
    )


def progress(row: Mapping[str, float], step: int, steps: int, tokens_a_step: int) -> str:
    """The line that stands for the progress bar where nobody watches."""
    speed = row["time/tokens_per_second"]
    left = round(tokens_a_step * (steps - step) / speed)
    return (
        f"step {step}/{steps}: loss {row['train/loss']:.4f}, lr {row['train/lr']:.2e}, "
        f"norm {row['train/grad_norm']:.2f}, {speed:,.0f} tok/s, eta {left // 60}:{left % 60:02}"
    )


def matrix_state_bytes(optimizer: torch.optim.Optimizer, groups: ParamGroups) -> int:
    """What an optimizer keeps for the matrices that its method is about, without their step counters.

    Everything else is the same AdamW in every optimizer, and would hide what a method keeps.
    """
    matrices = {name for group in groups if group["name"].startswith("matrices") for name, _ in group["params"]}
    kept = state_bytes(optimizer).by_parameter
    return sum(size for name in matrices for key, size in kept.get(name, {}).items() if key != "step")


def plan(model: torch.nn.Module, optimizer: torch.optim.Optimizer, groups: ParamGroups) -> str:
    """Who goes where, and what a run would keep in memory; the model may be on the meta device."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    adamw = adamw_state_bytes(model.parameters())
    # torch's own optimizers make their state in the first step
    state = state_bytes(optimizer).total or adamw
    rows = (
        ("weights", weights),
        ("gradients", weights),
        ("optimizer state", state),
        ("sum, without activations", 2 * weights + state),
        ("AdamW's state, to compare", adamw),
    )
    return "\n".join([groups.describe(), "", *(f"{name:<28}{size:>18,} bytes{human(size):>13}" for name, size in rows)])


def summarize(
    optimizer: str,
    steps: int,
    tokens: int,
    totals: Mapping[str, Any],
    memory: Mapping[str, float],
    adamw_bytes: int,
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """What a finished run is known by.

    Args:
        optimizer: Its name.
        steps: Optimizer steps taken.
        tokens: Tokens trained on, over all processes.
        totals: What the loop added up, the last evaluation included.
        memory: A reading of the memory meter.
        adamw_bytes: What AdamW would keep for the same weights.
        sizes: Number of parameters in each group.
    """
    return {
        "val_loss": totals["eval/loss"],
        "perplexity": totals["eval/perplexity"],
        "bits_per_byte": totals.get("eval/bits_per_byte"),
        "best_val_loss": totals["best_val_loss"],
        # no number where every step since the last row but one was skipped
        "train_loss": totals.get("train_loss", math.nan),
        "tokens": tokens,
        "steps": steps,
        "skipped_steps": totals["skipped"],
        "seconds": totals["seconds"],
        "tokens_per_second": tokens / totals["busy"],
        "optimizer": optimizer,
        "opt_state_bytes": memory["mem/opt_state_bytes"],
        "basis_bytes": memory["mem/basis_bytes"],
        "adamw_state_bytes": adamw_bytes,
        "params_bytes": memory["mem/params_bytes"],
        "params": sum(sizes.values()),
    }


def final_table(s: dict[str, Any]) -> str:
    """The summary of a run as a table, its optimizer's memory beside AdamW's."""
    bits = "unknown" if s["bits_per_byte"] is None else f"{s['bits_per_byte']:.4f}"
    skipped = [("steps skipped, no number", f"{s['skipped_steps']:,} of {s['steps']:,}", "")]
    ratio = s["opt_state_bytes"] / s["adamw_state_bytes"]
    rows = (
        ("", s["optimizer"], "AdamW"),
        ("optimizer state", f"{s['opt_state_bytes']:,} bytes", f"{s['adamw_state_bytes']:,} bytes"),
        ("", human(s["opt_state_bytes"]), human(s["adamw_state_bytes"])),
        ("", f"{ratio:.1%}", "100.0%"),
        ("weights", f"{s['params_bytes']:,} bytes", f"{s['params_bytes']:,} bytes"),
        ("validation loss, nats/token", f"{s['val_loss']:.4f}", ""),
        ("perplexity", f"{s['perplexity']:.3f}", ""),
        ("bits per byte", bits, ""),
        *(skipped if s["skipped_steps"] else ()),
        ("tokens", f"{s['tokens']:,}", ""),
        ("tokens per second", f"{s['tokens_per_second']:,.0f}", ""),
        ("seconds", f"{s['seconds']:.1f}", ""),
    )
    return "\n".join(f"{name:<28}{ours:>20}{adamw:>20}".rstrip() for name, ours, adamw in rows)
