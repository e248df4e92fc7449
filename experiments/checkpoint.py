"""Checkpoints that survive a kill at any moment: written beside, synced, renamed; read with `weights_only=True`.

A checkpoint is one dictionary of tensors, numbers, strings, lists and dictionaries, so that nothing of this project has
to be importable to read it.
"""

import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
_NAME = re.compile(r"step-(\d+)\.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what could be used instead."""


def write_atomic(path: Path, write: Callable[[Any], None]) -> None:
    """Lets `write(file)` fill a neighbour of `path`, then puts it in place: readers see the old file or the new one.

    Args:
        path: Where the file is to be.
        write: Called with the binary file object.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name != "posix":
        return
    # the new name itself must survive a power cut
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text(path: Path, text: str) -> None:
    """Puts a text file in place as a whole, or not at all."""
    write_atomic(path, lambda file: file.write(text.encode()))


def found(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, newest first."""
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if _NAME.fullmatch(p.name)), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step a checkpoint was written after, from its name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def save(directory: Path, state: dict[str, Any], keep: int) -> Path:
    """Writes `state` as `step-<step>.pt` and removes all but the newest `keep` checkpoints.

    Args:
        directory: Made when it is missing.
        state: Must hold "step"; everything else is the caller's.
        keep: How many checkpoints stay, at least 1.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{state['step']:08d}.pt"
    write_atomic(path, lambda file: torch.save({"format": FORMAT, **state}, file))
    # what a kill left half written goes with the old ones
    for old in [*found(directory)[keep:], *directory.glob(".step-*.pt.tmp")]:
        old.unlink()
    return path


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads one checkpoint, or raises `CheckpointError` with one line about the file.

    The checksums inside the file are compared first: `torch.load` alone does not notice a flipped bit.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"checkpoint {path} is damaged ({damaged} fails its checksum)")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} was not written by this program (format {FORMAT} expected)")
    return state


def newest(directory: Path, device: torch.device | str = "cpu") -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest checkpoint that can be read, its state, and a line about each newer one that cannot.

    Returns None when there is no checkpoint at all; raises `CheckpointError` when there are some and none can be read.
    """
    complaints: list[str] = []
    paths = found(directory)
    for path in paths:
        try:
            return path, load(path, device), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    if paths:
        raise CheckpointError(
            f"{complaints[0]}; no older checkpoint in {directory} can be read; --resume never starts over"
        )
    return None


def explicit(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads the checkpoint the user named; when it cannot be read the error names the newest older one that can."""
    try:
        return load(path, device)
    except CheckpointError as error:
        for other in found(path.parent):
            if step_of(other) < step_of(path) or not path.exists():
                try:
                    load(other, device)
                except CheckpointError:
                    continue
                raise CheckpointError(f"{error}; an older one is good: --resume {other}") from error
        raise


def set_aside(directory: Path, after: int) -> list[Path]:
    """Renames checkpoints newer than step `after` to `*.aside`, so that a later `--resume auto` cannot pick them.

    They belong to a history that is being left: damaged files, or a run continued from an older point.
    """
    moved = []
    for path in found(directory):
        if step_of(path) > after:
            moved.append(path.rename(path.with_name(f"{path.name}.aside")))
    return moved


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Args:
        directory: The run directory that was asked for or is continued; None for a new one.
        state: The checkpoint's content; None at step 0.
        source: The run directory that the checkpoint lies in; None where it lies elsewhere.
        notes: Lines for the user, such as a damaged checkpoint that was passed over.
    """

    directory: Path | None = None
    state: dict[str, Any] | None = None
    source: Path | None = None
    notes: list[str] = field(default_factory=list)


def find_start(run_dir: str | None, resume: str, device: torch.device | str = "cpu") -> Start:
    """Decides where to begin; only reads, so that an error leaves everything as it was.

    Args:
        run_dir: The run directory, or None.
        resume: auto, never, a checkpoint file, or a run directory.
        device: Where the tensors go.

    Raises:
        CheckpointError: If there is nothing to resume where there should be, or something where there should not.
    """
    directory = Path(run_dir) if run_dir else None
    if directory is not None and directory.exists() and not directory.is_dir():
        raise CheckpointError(f"run_dir {directory} is a file")
    taken = directory is not None and ((directory / "metrics.jsonl").exists() or bool(found(directory / "checkpoints")))
    if resume == "never" and taken:
        raise CheckpointError(
            f"{directory} holds a run: --resume auto continues it, another --run_dir starts a new one"
        )
    if resume == "never" or (resume == "auto" and directory is None):
        return Start(directory)
    named = directory if resume == "auto" and directory is not None else Path(resume)
    if named.is_file() or not (resume == "auto" or named.is_dir()):
        state, notes, home = explicit(named, device), [], named.resolve().parent
        source = home.parent if home.name == "checkpoints" else None
        if source is None and directory is None:
            raise CheckpointError(f"--resume {resume} lies in no run directory: name one with --run_dir")
    else:
        best = newest(named / "checkpoints", device)
        if best is None and resume == "auto":
            return Start(directory)
        if best is None:
            raise CheckpointError(f"--resume {resume}: no checkpoint in {named / 'checkpoints'}")
        path, state, complaints = best
        source, notes = named.resolve(), [f"{line}; resuming from the older {path}" for line in complaints]
    if directory is not None and directory.resolve() != source:
        if taken:
            raise CheckpointError(f"{directory} holds another run than {resume}; name a new --run_dir or none")
        # a branch is a run of its own, with curves of its own
        state = {**state, "run_id": None}
    return Start(directory or source, state, source, notes)


def open_directory(start: Start, name: str) -> Path:
    """Makes the run directory, or readies the one that is continued. Nothing is lost that cannot be made again.

    Args:
        start: Where the run begins.
        name: End of the name of a new directory in `runs/`.
    """
    directory = start.directory
    if directory is None:
        stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
        directory = next(p for n in range(1000) if not (p := Path("runs", stamp + (f"-{n}" if n else ""))).exists())
    directory.mkdir(parents=True, exist_ok=True)
    metrics = directory / "metrics.jsonl"
    if start.state is None and metrics.exists() and metrics.stat().st_size:
        # rows from before the first checkpoint: the run begins again, and they stay readable
        metrics.replace(directory / "metrics.jsonl.aside")
    if start.state is not None:
        history = start.source / "metrics.jsonl" if start.source is not None else metrics
        if start.source != directory.resolve() and history.exists():
            # a branch gets the history up to here
            metrics.write_bytes(history.read_bytes()[: start.state["position"]])
        set_aside(directory / "checkpoints", after=start.state["step"])
    return directory


def rng_state() -> dict[str, Any]:
    """The random states that training may read: torch on the CPU and on every CUDA device, and Python's."""
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
    }


def restore(state: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts a checkpoint's weights, optimizer state and random states where they belong.

    Raises:
        CheckpointError: If they do not fit.
    """
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint does not fit this model: {' '.join(str(error).split())}") from error
    rng = state["rng"]
    torch.set_rng_state(rng["torch"].cpu())
    if rng["cuda"] and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in rng["cuda"]])
    version, words, gauss = rng["python"]
    random.setstate((version, tuple(words), gauss))
