"""Pretrains a LLaMA: one loop, read from top to bottom. `python -m experiments.pretrain --help` lists every option.

A run leaves a directory with the resolved `config.yaml`, `environment.json`, `metrics.jsonl`, `summary.json`, the plots
`loss.png` and `memory.png`, and its last checkpoints. Killed at any moment, it goes on with the same command and
`--run_dir`, and its metrics are those of a run that was never killed, to the bit (see `tracking.deterministic`).
"""

import os

# before torch loads OpenMP: threads that spin at barriers make a busy machine many times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments import checkpoint
from experiments.checkpoint import CheckpointError
from experiments.config import Config, ConfigError, OptimConfig, as_dict, as_yaml, check_same_run, parse
from experiments.corpus import DataError
from experiments.data import load_corpus
from experiments.llama import Llama
from experiments.report import final_table, plan, progress, progress_bar, speaker
from experiments.stopping import StopRequest
from experiments.tracking import Tracker, environment, without_nan
from lowrank_optim import GaLoreAdamW, MemoryMeter, ParamGroups, adamw_state_bytes, param_groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_optimizer(model: nn.Module, c: OptimConfig) -> tuple[torch.optim.Optimizer, ParamGroups]:
    """The optimizer and the groups it was given; `lr` goes to the matrices, `other_lr` to everything else."""
    projection: dict[str, Any] = {key: getattr(c, key) for key in ("update_proj_gap", "scale", "proj_type", "basis")}
    try:
        groups = param_groups(model, rank=c.rank, weight_decay=c.weight_decay, other_lr=c.other_lr, **projection)
        shared: dict[str, Any] = {"lr": c.lr, "betas": c.betas, "eps": c.eps}
        if c.name == "adamw":
            for group in groups:
                for key in ("rank", *projection):
                    group.pop(key, None)
            fused = not next(model.parameters()).is_meta
            # copies, because torch takes the names out of the groups it is given
            return torch.optim.AdamW([dict(group) for group in groups], **shared, fused=fused), groups
        return GaLoreAdamW(groups, **shared, stagger=c.stagger), groups
    except ValueError as error:
        raise ConfigError(f"optim: {error}") from error


def lr_factor(step: int, steps: int, warmup: int, floor: float) -> float:
    """Factor on every learning rate at `step` (from 1): linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Objective(nn.Module):
    """The loss as a module's forward, which is what DistributedDataParallel and torch.compile wrap."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Nats per token of `targets` (B, T) given `tokens` (B, T)."""
        return self.model.loss(tokens, targets)


def pick_device(name: str) -> torch.device:
    """The device of this process: its own GPU under torchrun, and for `auto` a GPU only where there is one."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device if device.index is not None else int(os.environ.get("LOCAL_RANK", "0")))
        torch.empty(0, device=device)
    # torch raises AssertionError where it was built without CUDA
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"train.device={name}: {str(error).splitlines()[0]}") from error
    return device


@torch.no_grad()
def evaluate(
    objective: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, bytes_per_token: float | None
) -> dict[str, float]:
    """The validation metrics: the mean loss over `batches` in evaluation mode, and what follows from it."""
    objective.eval()
    loss = torch.stack([objective(x.to(device), y.to(device)) for x, y in batches]).double().mean().item()
    objective.train()
    row = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
    if bytes_per_token is not None:
        row["eval/bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return row


def run(c: Config, argv: Sequence[str], stop: StopRequest) -> None:
    """One run, from its configuration to its summary."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = pick_device(c.train.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_num_threads(c.train.threads or torch.get_num_threads())

    # whatever can be wrong with the input shows before the run directory is touched
    torch.manual_seed(c.train.seed)
    random.seed(c.train.seed)
    text = dataclasses.replace(c.data, seed=c.data.seed + c.train.seed)
    corpus = load_corpus(text, seq_len=c.train.seq_len, vocab_size=c.model.vocab_size)
    batches = corpus.batches(c.train.batch_size, rank=rank, world_size=world)
    held_out = corpus.validation(c.train.batch_size, c.train.eval_batches * c.train.batch_size * c.train.seq_len)
    model = Llama(c.model).to(device, DTYPES[c.train.dtype])
    optimizer, groups = build_optimizer(model, c.optim)
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    start = checkpoint.find_start(c.run_dir, c.resume, device)
    notes = list(start.notes)

    step, position, run_id = 0, 0, None
    loss_sum, loss_count = torch.zeros((), device=device), 0
    totals = {"seconds": 0.0, "busy": 0.0, "skipped": 0, "best_val_loss": math.inf}
    if (saved := start.state) is not None:
        notes += check_same_run(saved, as_dict(c), corpus.fingerprint, world)
        step, position, run_id, totals = saved["step"], saved["position"], saved["run_id"], saved["totals"]
        loss_sum, loss_count = saved["loss_sum"], saved["loss_count"]
        checkpoint.restore(saved, model, optimizer)
        batches.load_state_dict(saved["batches"][rank])
    objective: Any = Objective(model)
    if world > 1:
        # no process may change the directory while another still reads it
        dist.barrier()
        objective = nn.parallel.DistributedDataParallel(objective)
    if c.train.compile:
        objective = torch.compile(objective)

    directory = checkpoint.open_directory(start, c.track.name or c.optim.name) if rank == 0 else None
    bar = progress_bar(c.train.steps, step, rank)
    say = speaker(bar, rank)
    for note in notes:
        say(note)
    sizes = {group["name"]: sum(p.numel() for _, p in group["params"]) for group in groups}
    about = {"environment": environment(argv, str(device)), "corpus": corpus.fingerprint, "parameters": sizes}
    say(f"{sum(sizes.values()):,} parameters on {device}; run directory {directory}, from step {step}")
    if directory is not None:
        checkpoint.write_text(directory / "config.yaml", as_yaml(c))
        checkpoint.write_text(directory / "environment.json", json.dumps(about, indent=2) + "\n")
    config = {**as_dict(c), **about}
    tracker = Tracker(directory, position, device=device.type, say=say, run_id=run_id, config=config, track=c.track)
    meter = MemoryMeter(model, optimizer)
    adamw_bytes = adamw_state_bytes(model.parameters())
    tokens_a_step = c.train.batch_size * c.train.seq_len * c.train.accumulate * world
    began = time.perf_counter() - totals["seconds"]
    logged_step, logged_busy = step, totals["busy"]

    with bar, contextlib.closing(tracker):
        if step == 0:
            row = evaluate(objective, held_out, device, corpus.bytes_per_token)
            say(f"step 0: validation loss {row['eval/loss']:.4f}")
            tracker.log({"step": 0, "tokens": 0, **row, "time/seconds": time.perf_counter() - began})
        while step < c.train.steps:
            step += 1
            last = step == c.train.steps
            entered = time.perf_counter()
            factor = lr_factor(step, c.train.steps, c.train.warmup, c.train.min_lr_ratio)
            for group, peak in zip(optimizer.param_groups, peak_lrs, strict=True):
                group["lr"] = peak * factor
            optimizer.zero_grad()
            step_loss = torch.zeros((), device=device)
            for _ in range(c.train.accumulate):
                tokens, targets = next(batches)
                with meter.phase("forward"):
                    loss = objective(tokens.to(device), targets.to(device)) / c.train.accumulate
                with meter.phase("backward"):
                    loss.backward()
                step_loss += loss.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), c.train.clip or math.inf)
            if norm.isfinite():
                with meter.phase("step"):
                    optimizer.step()
                loss_sum, loss_count = loss_sum + step_loss, loss_count + 1
            else:
                # clipping has spread one NaN over every gradient
                if not totals["skipped"]:
                    say(f"step {step}: loss {step_loss:.4g}, norm {norm:.4g}: steps like this are skipped (said once)")
                totals["skipped"] += 1

            row = {}
            if last or step % c.train.log_every == 0:
                if world > 1:
                    dist.all_reduce(loss_sum)
                row["train/loss"] = loss_sum.item() / world / loss_count if loss_count else math.nan
                row |= {"train/lr": c.optim.lr * factor, "train/grad_norm": norm.item()}
                row |= {"train/skipped": totals["skipped"], **meter.read(), "mem/adamw_state_bytes": adamw_bytes}
                loss_sum, loss_count = torch.zeros((), device=device), 0
            # `item` has waited for the device by now
            totals["busy"] += time.perf_counter() - entered
            bar.update()
            if row:
                speed = tokens_a_step * (step - logged_step) / (totals["busy"] - logged_busy)
                row["time/tokens_per_second"] = speed
                logged_step, logged_busy = step, totals["busy"]
                bar.set_postfix_str(f"loss {row['train/loss']:.3f}, {speed / 1000:.1f}k tok/s")
                if bar.disable:
                    say(progress(row, step, c.train.steps, tokens_a_step))
            if last or step % c.train.eval_every == 0:
                row |= evaluate(objective, held_out, device, corpus.bytes_per_token)
                totals["best_val_loss"] = min(totals["best_val_loss"], row["eval/loss"])
                totals |= {key: value for key, value in row.items() if key.startswith("eval/")}
                say(f"step {step}: validation loss {row['eval/loss']:.4f}")
            if row:
                row["time/seconds"] = time.perf_counter() - began
                tracker.log({"step": step, "tokens": step * tokens_a_step, **row})

            stopping = stop.agreed(device)
            if last or stopping or (c.train.save_every and step % c.train.save_every == 0):
                totals["seconds"] = time.perf_counter() - began
                cursors: list[Any] = [batches.state_dict()] * world
                if world > 1:
                    dist.all_gather_object(cursors, batches.state_dict())
                state = {
                    "step": step,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "batches": cursors,
                    "rng": checkpoint.rng_state(),
                    "loss_sum": loss_sum,
                    "loss_count": loss_count,
                    "totals": totals,
                    "position": tracker.position,
                    "run_id": tracker.run_id,
                    "config": as_dict(c),
                    "data": corpus.fingerprint,
                }
                if directory is not None:
                    checkpoint.save(directory / "checkpoints", state, c.train.keep)
            if stopping and not last:
                say(f"{stop.signal}: saved after step {step}; --run_dir {directory} goes on from there")
                return

        memory = meter.read()
        summary = {
            "val_loss": totals["eval/loss"],
            "perplexity": totals["eval/perplexity"],
            "bits_per_byte": totals.get("eval/bits_per_byte"),
            "best_val_loss": totals["best_val_loss"],
            "tokens": step * tokens_a_step,
            "steps": step,
            "skipped_steps": totals["skipped"],
            "seconds": totals["seconds"],
            "tokens_per_second": step * tokens_a_step / totals["busy"],
            "optimizer": c.optim.name,
            "opt_state_bytes": memory["mem/opt_state_bytes"],
            "basis_bytes": memory["mem/basis_bytes"],
            "adamw_state_bytes": adamw_bytes,
            "params_bytes": memory["mem/params_bytes"],
            "params": sum(sizes.values()),
        }
        tracker.summarize(summary)
    if directory is not None:
        finite = without_nan({**summary, "config": as_dict(c)})
        checkpoint.write_text(directory / "summary.json", json.dumps(finite, indent=2) + "\n")
        print(f"{final_table(summary)}\n\nsummary, metrics and plots: {directory}", flush=True)
        # slow to import, and not needed until here
        from experiments.curves import draw

        draw(directory)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line says; a mistake in the input is one line on stderr and 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    stop = StopRequest()
    try:
        config = parse(argv)
        if config.dry_run:
            with torch.device("meta"):
                model = Llama(config.model).to(DTYPES[config.train.dtype])
            print(plan(model, *build_optimizer(model, config.optim)))
            return 0
        with stop.listening():
            run(config, argv, stop)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
