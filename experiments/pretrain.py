"""Pretrains a LLaMA: one loop, read from top to bottom. `python -m experiments.pretrain --help` lists every option.

A run leaves a directory with the resolved `config.yaml`, `environment.json`, `metrics.jsonl`, `summary.json`, the plots
`loss.png`, `memory.png` and, of an optimizer with bases, `basis.png`, and its last checkpoints. Killed at any moment,
it goes on with the same command and `--run_dir`, and its metrics are those of a run that was never killed, to the bit
(see `tracking.deterministic`).
"""

import os

# before torch loads OpenMP: threads that spin at barriers make a busy machine many times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import dataclasses
import gc
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments import checkpoint
from experiments.checkpoint import CheckpointError
from experiments.config import Config, ConfigError, as_dict, as_yaml, parse
from experiments.corpus import DataError
from experiments.curves import draw
from experiments.data import Corpus, load_corpus
from experiments.diagnosing import Diagnosis
from experiments.llama import Llama, Objective
from experiments.optimizer import build_optimizer, lr_factor
from experiments.report import final_table, matrix_state_bytes, plan, progress, progress_bar, speaker, summarize
from experiments.run_dir import environment_file, find_start, open_directory
from experiments.same_run import check_same_run
from experiments.stopping import StopRequest
from experiments.tracking import Tracker, environment, without_nan
from lowrank_optim import MemoryMeter, adamw_state_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The device of this process: its own GPU under torchrun, and for `auto` a GPU only where there is one."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "meta":
            raise ConfigError("train.device=meta holds no numbers: --dry_run is what needs none")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"train.device={name}: torch finds no CUDA device")
        if device.type == "cuda":
            torch.cuda.set_device(device if device.index is not None else int(os.environ.get("LOCAL_RANK", "0")))
        torch.empty(0, device=device)
    # torch raises the others for devices that it was built without
    except (RuntimeError, AssertionError, NotImplementedError) as error:
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


def gathered(cursor: dict[str, Any], world: int) -> list[Any]:
    """The data cursors of all processes, in the order of their ranks."""
    cursors: list[Any] = [cursor] * world
    if world > 1:
        dist.all_gather_object(cursors, cursor)
    return cursors


def run(
    c: Config,
    argv: Sequence[str],
    stop: StopRequest,
    held: contextlib.ExitStack,
    load: Callable[..., Corpus] = load_corpus,
) -> None:
    """One run, from its configuration to its summary; `held` keeps the run directory from other processes."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = pick_device(c.train.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_num_threads(c.train.threads or torch.get_num_threads())

    # whatever can be wrong with the input shows before the run directory is touched
    torch.manual_seed(c.train.seed)
    random.seed(c.train.seed)
    text = dataclasses.replace(c.data, seed=c.data.seed + c.train.seed)
    corpus = load(text, seq_len=c.train.seq_len, vocab_size=c.model.vocab_size)
    batches = corpus.batches(c.train.batch_size, rank=rank, world_size=world)
    held_out = corpus.validation(c.train.batch_size, c.train.eval_batches * c.train.batch_size * c.train.seq_len)
    model = Llama(c.model).to(device, DTYPES[c.train.dtype])
    optimizer, groups = build_optimizer(model, c.optim)
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    start, saved = find_start(c.run_dir, c.resume)
    notes = list(start.notes)
    if saved is None and c.train.init_from is not None:
        notes.append(checkpoint.load_weights(Path(c.train.init_from), model))

    step, position, run_id = 0, 0, None
    loss_sum, loss_count = torch.zeros((), device=device), 0
    totals = {"seconds": 0.0, "busy": 0.0, "skipped": 0, "best_val_loss": math.inf}
    unsaved: CheckpointError | None = None
    if saved is not None:
        notes += check_same_run(saved, as_dict(c), corpus.fingerprint, world)
        step, position, run_id, totals = saved["step"], saved["position"], saved["run_id"], saved["totals"]
        loss_sum, loss_count = saved["loss_sum"].to(device), saved["loss_count"]
        checkpoint.restore(saved, model, optimizer)
        batches.load_state_dict(saved["batches"][rank])
        # a second copy of everything, which a run need not carry to its end
        saved = None
    objective: Any = Objective(model)
    without_sync: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    if world > 1:
        # no process may change the directory while another still reads it
        dist.barrier()
        objective = nn.parallel.DistributedDataParallel(objective)
        without_sync = objective.no_sync
    if c.train.compile:
        objective = torch.compile(objective)

    directory = held.enter_context(open_directory(start, c.track.name or c.optim.name)) if rank == 0 else None
    bar = progress_bar(c.train.steps, step, rank)
    say = speaker(bar, rank)
    for note in notes:
        say(note)
    sizes = {group["name"]: sum(p.numel() for _, p in group["params"]) for group in groups}
    about = {"environment": environment(argv, str(device)), "corpus": corpus.fingerprint, "parameters": sizes}
    say(f"{sum(sizes.values()):,} parameters on {device}; run directory {directory}, from step {step}")
    if directory is not None:
        checkpoint.write_text(directory / "config.yaml", as_yaml(c))
        checkpoint.write_text(environment_file(directory, start), json.dumps(about, indent=2) + "\n")
    config = {**as_dict(c), **about}
    tracker = Tracker(directory, position, device=device.type, say=say, run_id=run_id, config=config, track=c.track)
    meter = MemoryMeter(model, optimizer)
    diagnosis = Diagnosis(optimizer, groups, wanted=c.track.diagnostics)
    adamw_bytes = adamw_state_bytes(model.parameters())
    tokens_a_step = c.train.batch_size * c.train.seq_len * c.train.accumulate * world
    began = time.perf_counter() - totals["seconds"]
    logged_step, logged_busy = step, totals["busy"]

    with bar, contextlib.closing(tracker):
        if step == 0 and c.train.eval_first:
            row = evaluate(objective, held_out, device, corpus.bytes_per_token)
            say(f"step 0: validation loss {row['eval/loss']:.4f}")
            tracker.log({"step": 0, "tokens": 0, **row, "time/seconds": time.perf_counter() - began})
        while step < c.train.steps:
            step += 1
            last = step == c.train.steps
            logged = last or step % c.train.log_every == 0
            entered = time.perf_counter()
            factor = lr_factor(step, c.train.steps, c.train.warmup, c.train.min_lr_ratio)
            for group, peak in zip(optimizer.param_groups, peak_lrs, strict=True):
                group["lr"] = peak * factor
            optimizer.zero_grad()
            step_loss = torch.zeros((), device=device)
            for part in range(c.train.accumulate):
                tokens, targets = next(batches)
                # processes exchange gradients once a step
                with contextlib.nullcontext() if part + 1 == c.train.accumulate else without_sync():
                    with meter.phase("forward"):
                        loss = objective(tokens.to(device), targets.to(device)) / c.train.accumulate
                    with meter.phase("backward"):
                        loss.backward()
                step_loss += loss.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), c.train.clip or math.inf)
            if norm.isfinite():
                with meter.phase("step"), diagnosis.listening(logged):
                    optimizer.step()
                loss_sum, loss_count = loss_sum + step_loss, loss_count + 1
            else:
                # clipping has spread one NaN over every gradient
                if not totals["skipped"]:
                    say(f"step {step}: loss {step_loss:.4g}, norm {norm:.4g}: steps like this are skipped (said once)")
                totals["skipped"] += 1

            row = {}
            if logged:
                if world > 1:
                    dist.all_reduce(loss_sum)
                row["train/loss"] = loss_sum.item() / world / loss_count if loss_count else math.nan
                totals["train_loss"] = row["train/loss"]
                row |= {"train/lr": c.optim.lr * factor, "train/grad_norm": norm.item()}
                row |= {"train/skipped": totals["skipped"], **meter.read(), "mem/adamw_state_bytes": adamw_bytes}
                row |= diagnosis.read()
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
            due = c.train.save_last if last else bool(c.train.save_every) and step % c.train.save_every == 0
            if last:
                totals["seconds"] = time.perf_counter() - began
            if due or (stopping and not last):
                totals["seconds"] = time.perf_counter() - began
                cursors = gathered(batches.state_dict(), world)
                if directory is not None:
                    about_run = {"config": as_dict(c), "data": corpus.fingerprint, "run_id": tracker.run_id}
                    numbers = {"step": step, "loss_sum": loss_sum, "loss_count": loss_count, "totals": totals}
                    places = {"position": tracker.position, "batches": cursors}
                    try:
                        # not kept in a variable: it would hold on to bases that the optimizer has replaced
                        checkpoint.save(
                            directory / "checkpoints",
                            checkpoint.snapshot(model, optimizer, **about_run, **numbers, **places),
                            c.train.keep,
                        )
                    except CheckpointError as error:
                        if not last:
                            raise
                        # the training is done: its summary and table come first
                        unsaved = error
            if stopping and not last:
                say(f"{stop.signal}: saved after step {step}; --run_dir {directory} goes on from there")
                return

        summary = summarize(c.optim.name, step, step * tokens_a_step, totals, meter.read(), adamw_bytes, sizes)
        summary["matrix_state_bytes"] = matrix_state_bytes(optimizer, groups)
        tracker.summarize(summary)
    if directory is not None:
        print(final_table(summary), flush=True)
        finite = without_nan({**summary, "config": as_dict(c)})
        checkpoint.write_text(directory / "summary.json", json.dumps(finite, indent=2) + "\n")
        try:
            if c.train.plots:
                draw(directory)
        except ImportError as error:
            say(f"no plots ({error}); where matplotlib is installed: python -m experiments.curves {directory}")
        print(f"\nsummary, metrics{' and plots' if c.train.plots else ''}: {directory}", flush=True)
    if unsaved is not None:
        raise unsaved


def main(argv: Sequence[str] | None = None, load: Callable[..., Corpus] = load_corpus) -> int:
    """Runs what the command line says, on what `load` reads; a mistake in the input is one line on stderr and 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    stop = StopRequest()
    try:
        config = parse(argv)
        if config.dry_run:
            with torch.device("meta"):
                model = Llama(config.model).to(DTYPES[config.train.dtype])
            print(plan(model, *build_optimizer(model, config.optim)))
            return 0
        with stop.listening(), contextlib.ExitStack() as held:
            run(config, argv, stop, held, load)
    # an OSError is a disk that is full or a place that cannot be written to: it names the file where there is one
    except (ConfigError, DataError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            # what of the model and its reducer is in cycles holds the group, whose threads must end before Python does
            gc.collect()
            dist.destroy_process_group()
            gc.collect()
    return 0


def leave(code: int) -> NoReturn:
    """Ends the process; a rank that has nothing to write leaves at once.

    A thread of gloo may still hold tensors when the interpreter is taken down, and then aborts a process whose work is
    done.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
