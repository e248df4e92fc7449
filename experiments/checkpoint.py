"""Checkpoints that survive a kill at any moment: written beside, synced, renamed; read with `weights_only=True`.

A checkpoint is one dictionary of tensors, numbers, strings, lists and dictionaries, so that nothing of this project has
to be importable to read it.
"""

import os
import pickle
import random
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
# what a run needs to go on
KEYS = frozenset(
    [
        *("step", "model", "optimizer", "batches", "rng", "loss_sum", "loss_count"),
        *("totals", "position", "run_id", "config", "data"),
    ]
)
_NAME = re.compile(r"step-(\d+)\.pt")
# what zipfile and torch raise on files that are damaged in one way or another
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError, OSError),
    *(ValueError, KeyError, NotImplementedError, RuntimeError),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and what could be used instead."""


def write_atomic(path: Path, write: Callable[[Any], None]) -> None:
    """Lets `write(file)` fill a neighbour of `path`, then puts it in place: readers see the old file or the new one.

    Args:
        path: Where the file is to be.
        write: Called with the binary file object.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        # on a full disk, half a file is in the way of the next one
        temporary.unlink(missing_ok=True)
        raise
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

    Raises:
        CheckpointError: If it cannot be written.
    """
    path = directory / f"step-{state['step']:08d}.pt"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: torch.save({"format": FORMAT, **state}, file))
    # torch's writer turns a full disk into a RuntimeError
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be written ({_reason(error)})") from error
    # what a kill left half written goes with the old ones
    for old in [*found(directory)[keep:], *directory.glob(".step-*.pt.tmp")]:
        old.unlink()
    return path


def load(path: Path) -> dict[str, Any]:
    """Reads one checkpoint into the CPU's memory, or raises `CheckpointError` with one line about the file.

    The checksums inside the file are compared first: `torch.load` alone does not notice a flipped bit.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"checkpoint {path} is damaged ({damaged} fails its checksum)")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except _UNREADABLE as error:
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({_reason(error)})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} was not written by this program (format {FORMAT} expected)")
    if missing := KEYS - state.keys():
        raise CheckpointError(f"checkpoint {path} lacks {', '.join(sorted(missing))}")
    return state


def _reason(error: Exception) -> str:
    # torch's own advice is long, coloured, and about files that this program did not write
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    if not lines or isinstance(error, KeyError):
        return type(error).__name__
    return lines[0].split(". ")[0].removesuffix(".")


def newest(directory: Path) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest checkpoint that can be read, its state, and a line about each newer one that cannot.

    Returns None when there is no checkpoint at all; raises `CheckpointError` when there are some and none can be read.
    """
    complaints: list[str] = []
    paths = found(directory)
    for path in paths:
        try:
            return path, load(path), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    if paths:
        raise CheckpointError(
            f"{complaints[0]}; no older checkpoint in {directory} can be read; --resume never starts over"
        )
    return None


def explicit(path: Path) -> dict[str, Any]:
    """Reads the checkpoint the user named; when it cannot be read the error names one beside it that can."""
    try:
        return load(path)
    except CheckpointError as error:
        for other in found(path.parent):
            if step_of(other) < step_of(path) or not path.exists():
                try:
                    load(other)
                except CheckpointError:
                    continue
                raise CheckpointError(f"{error}; one that can be read: --resume {other}") from error
        raise


def load_weights(path: Path, model: torch.nn.Module) -> str:
    """Puts the weights of a checkpoint, or of a run directory's newest, into `model`; returns a line that says so."""
    if path.is_dir():
        best = newest(path / "checkpoints")
        if best is None:
            raise CheckpointError(f"no checkpoint in {path / 'checkpoints'}")
        path, state, _ = best
    else:
        state = explicit(path)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(f"the weights of {path} do not fit this model: {' '.join(str(error).split())}") from error
    return f"weights from {path}, step {state['step']}"


def rng_state() -> dict[str, Any]:
    """The random states that training may read: torch on the CPU and on every CUDA device, and Python's."""
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
    }


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer, **rest: Any) -> dict[str, Any]:
    """What `restore` needs, and whatever else a run wants to find again; not copied."""
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng_state(), **rest}


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
