"""The directory of a run: where a run begins, and that only one process at a time writes there."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.checkpoint import CheckpointError, explicit, found, newest, step_of

LOCK = ".lock"
_WRITTEN = ("config.yaml", "environment.json", "summary.json")


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
        source: The run directory that the checkpoint lies in; None where it lies elsewhere.
        notes: Lines for the user, such as a damaged checkpoint that was passed over.
        step: The checkpoint's step; None where there is none.
        position: The checkpoint's length of `metrics.jsonl`.
    """

    directory: Path | None = None
    source: Path | None = None
    notes: list[str] = field(default_factory=list)
    step: int | None = None
    position: int = 0


def find_start(run_dir: str | None, resume: str) -> tuple[Start, dict[str, Any] | None]:
    """Decides where to begin; only reads, so that an error leaves everything as it was.

    Args:
        run_dir: The run directory, or None.
        resume: auto, never, a checkpoint file, or a run directory.

    Returns:
        Where to begin, and the checkpoint on the CPU, which whoever restores it can then let go.

    Raises:
        CheckpointError: If there is nothing to resume where there should be, or something where there should not.
    """
    directory = Path(run_dir) if run_dir else None
    if directory is not None and directory.exists() and not directory.is_dir():
        raise CheckpointError(f"run_dir {directory} is a file")
    taken = directory is not None and ((directory / "metrics.jsonl").exists() or bool(found(directory / "checkpoints")))
    if directory is not None and not taken and not (directory / LOCK).exists():
        foreign = [name for name in _WRITTEN if (directory / name).exists()]
        if foreign:
            raise CheckpointError(f"{directory} is no run but has a {foreign[0]}, which a run would overwrite")
    if resume == "never" and taken:
        raise CheckpointError(
            f"{directory} holds a run: --resume auto continues it, another --run_dir starts a new one"
        )
    if resume == "never" or (resume == "auto" and directory is None):
        return Start(directory), None
    named = directory if resume == "auto" and directory is not None else Path(resume)
    if named.is_file() or not (resume == "auto" or named.is_dir()):
        state, notes, home = explicit(named), [], named.resolve().parent
        source = home.parent if home.name == "checkpoints" else None
        if source is None and directory is None:
            raise CheckpointError(f"--resume {resume} lies in no run directory: name one with --run_dir")
    else:
        best = newest(named / "checkpoints")
        if best is None and resume == "auto":
            return Start(directory), None
        if best is None:
            raise CheckpointError(f"--resume {resume}: no checkpoint in {named / 'checkpoints'}")
        path, state, complaints = best
        source, notes = named.resolve(), [f"{line}; resuming from the older {path}" for line in complaints]
    if directory is not None and directory.resolve() != source:
        if taken:
            raise CheckpointError(f"{directory} holds another run than {resume}; name a new --run_dir or none")
        # a branch is a run of its own, with curves of its own
        state = {**state, "run_id": None}
    return Start(directory or source, source, notes, state["step"], state["position"]), state


@contextlib.contextmanager
def open_directory(start: Start, name: str) -> Iterator[Path]:
    """Makes the run directory, or readies the one that is continued, and holds it against other processes.

    Nothing is lost that cannot be made again.

    Args:
        start: Where the run begins.
        name: End of the name of a new directory in `runs/`.

    Raises:
        CheckpointError: If another process holds the directory.
    """
    directory = start.directory or _new_directory(name)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        # a disk that takes nothing shows now, not at the first save
        (directory / "checkpoints").mkdir(exist_ok=True)
        metrics = directory / "metrics.jsonl"
        if start.step is None and metrics.exists() and metrics.stat().st_size:
            # rows from before the first checkpoint: the run begins again, and they stay readable
            metrics.replace(directory / "metrics.jsonl.aside")
        if start.step is not None:
            history = start.source / "metrics.jsonl" if start.source is not None else metrics
            if start.source != directory.resolve() and history.exists():
                # a branch gets the history up to here
                metrics.write_bytes(history.read_bytes()[: start.position])
            set_aside(directory / "checkpoints", after=start.step)
        yield directory


def environment_file(directory: Path, start: Start) -> Path:
    """Where this session describes itself: a resumed one leaves what earlier ones wrote."""
    path, session = directory / "environment.json", 1
    while start.step is not None and path.exists():
        session += 1
        path = directory / f"environment-{session}.json"
    return path


def _new_directory(name: str) -> Path:
    # a name may hold anything; the directory is one component
    end = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{end}"
    for n in range(1000):
        path = Path("runs", stamp + (f"-{n}" if n else ""))
        # made here, so that of two runs in one second each has its own
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise CheckpointError(f"runs/ is full of directories named {stamp}")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / LOCK).open("ab") as file:
        if os.name == "posix":
            import fcntl

            try:
                # the system drops the lock with the process, however it ends
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"{directory} is in use by a run that has not ended") from None
        yield
