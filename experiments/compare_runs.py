"""The runs of a comparison: processes of `experiments.pretrain`, known by their arguments, done by their summary."""

import functools
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from experiments.config import Config, as_dict
from experiments.same_run import flat

# a comparison may be started from anywhere; the runs import from this checkout
ROOT = Path(__file__).resolve().parent.parent


# where a run lies and who watches it does not change its numbers
_NO_MATTER = ("config", "run_dir", "resume", "dry_run", "track.")


@functools.cache
def resolved_defaults() -> dict[str, Any]:
    """What `experiments.pretrain` does without options, by dotted keys: a changed default makes other runs."""
    return flat(as_dict(Config()))


def _file_options(name: Any) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(Path(str(name)).read_text()) if name is not None else None
    # the run itself says best what is wrong with its file
    except (OSError, ValueError, yaml.YAMLError):
        return {"file": str(name)}
    return flat(tree) if isinstance(tree, dict) else {}


def short(value: Any) -> str:
    """A tuned value, a number or several, as it is written in names and tables."""
    return "_".join(f"{number:g}" for number in (value if isinstance(value, list | tuple) else [value]))


@dataclass(frozen=True)
class Run:
    """One training run: an arm at one setting of its tuned arguments, and one seed."""

    arm: str
    settings: dict[str, Any]
    seed: int
    args: dict[str, Any]

    @property
    def words(self) -> list[str]:
        """The options of the run; a configuration file first, because later options win over it."""
        options = sorted(self.args.items(), key=lambda item: (item[0] != "config", item[0]))
        return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options]

    @property
    def key(self) -> str:
        """Name of its directory; the digest makes a run with any other argument another run, defaults included."""
        # the file's options count as they are now, not its name
        base = [*resolved_defaults().items(), *_file_options(self.args.get("config")).items()]
        options = {key: value if isinstance(value, str) else json.dumps(value) for key, value in base}
        options |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.args.items()}
        counted = [f"{key}={value}" for key, value in sorted(options.items()) if not key.startswith(_NO_MATTER)]
        digest = hashlib.sha256("\n".join(counted).encode()).hexdigest()[:8]
        settings = ",".join(f"{key.rpartition('.')[2]}={short(value)}" for key, value in self.settings.items())
        return f"{self.arm}/{settings},seed={self.seed}-{digest}"

    def arguments(self, directory: Path) -> list[str]:
        """What follows `python`."""
        return ["-m", "experiments.pretrain", *self.options(directory)]

    def options(self, directory: Path) -> list[str]:
        """What follows `python -m experiments.pretrain`."""
        return [*self.words, f"--run_dir={directory}", "--resume=auto"]


@dataclass(frozen=True)
class Result:
    """How a run ended: "done", "diverged" (a loss is no number) or "failed" (no summary); `message` says why."""

    run: Run
    status: str
    loss: float = math.inf
    message: str = ""
    summary: dict[str, Any] = field(default_factory=dict)


def read_result(run: Run, out: Path) -> Result | None:
    """The result of a finished run, None where there is no summary."""
    path = out / run.key / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    loss, train_loss = summary["val_loss"], summary.get("train_loss", 0.0)
    if loss is None or not math.isfinite(loss):
        return Result(run, "diverged", message="the loss is no number", summary=summary)
    if train_loss is None or not math.isfinite(train_loss):
        return Result(run, "diverged", message="its last steps were skipped", summary=summary)
    return Result(run, "done", float(loss), summary=summary)


def collect(runs: Iterable[Run], out: Path) -> dict[str, Result]:
    """Results of those of the runs that have finished before, by key."""
    found = ((run.key, read_result(run, out)) for run in runs)
    return {key: result for key, result in found if result is not None}


def log_file(run: Run, out: Path) -> Path:
    """Where a run's output goes: beside its directory, because the run decides what that may hold."""
    return out / f"{run.key}.log"


def _environment(jobs: int) -> dict[str, str]:
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    return env | ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if jobs > 1 else {})


def _start(run: Run, out: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    directory = out / run.key
    directory.mkdir(parents=True, exist_ok=True)
    with log_file(run, out).open("wb") as log:
        # its own session: an interrupt reaches it through us, once
        return subprocess.Popen(
            [sys.executable, *run.arguments(directory)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )


def _finish(run: Run, out: Path, code: int) -> Result:
    result = read_result(run, out)
    if result is not None:
        return result
    lines = [line for line in log_file(run, out).read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no output"
    return Result(run, "failed", message=f"exit status {code} and no summary: {last}")


class Process(Protocol):
    """What `run_all` needs of a process, in the words of `subprocess.Popen`."""

    def poll(self) -> int | None:
        """The exit status, None while it runs."""

    def terminate(self) -> None:
        """Asks it to stop."""

    def wait(self) -> int:
        """The exit status, once it has ended."""


def run_all(
    runs: Sequence[Run], out: Path, jobs: int, start: Callable[[Run], Process] | None = None
) -> dict[str, Result]:
    """Run them, `jobs` at a time; an interrupt stops the processes in a way that they can go on from later.

    Args:
        runs: What to run.
        out: Directory of the runs.
        jobs: How many at a time.
        start: Starts one; by default as a new interpreter.
    """
    env = _environment(jobs)
    start = start or (lambda run: _start(run, out, env))
    waiting = list(runs)
    running: dict[str, tuple[Run, Process, float]] = {}
    results: dict[str, Result] = {}
    # a terminated comparison must not leave its runs behind
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run.key] = (run, start(run), time.monotonic())
            for key, (run, process, began) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[key]
                results[key] = result = _finish(run, out, code)
                outcome = f"{result.loss:.4f}" if result.status == "done" else f"{result.status}, {result.message}"
                took = time.monotonic() - began
                print(f"{key}: {outcome} ({took:.0f} s; {len(waiting) + len(running)} to go now)", file=sys.stderr)
            time.sleep(0.05)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return results
