"""Where a run's numbers go: always `metrics.jsonl`, and Weights & Biases when it is wanted and works.

wandb restarts its own step counter at 0 when an offline run is resumed, so every row carries our "step" and "tokens",
and every metric names one of them as its axis: a resumed run continues the same curves.
"""

import importlib.util
import json
import math
import netrc
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from experiments.config import TrackConfig
from experiments.machine import command, machine

Mode = Literal["online", "offline"]
# where a key may be kept even if wandb's default is another
_WANDB_SERVER = "https://api.wandb.ai"


@dataclass(frozen=True)
class Metric:
    """What a metric is: the axis it is drawn over, the value its summary keeps, and where it exists.

    Args:
        axis: "step" (optimizer steps) or "tokens" (tokens trained on); None for the axes themselves.
        summary: What wandb keeps of the whole curve: last, min, max or mean.
        text: One line of meaning, with the unit.
        device: The device type that has it; None for all.
    """

    axis: Literal["step", "tokens"] | None
    summary: Literal["last", "min", "max", "mean"]
    text: str
    device: Literal["cpu", "cuda"] | None = None


# by name; one that ends with an asterisk stands for all that begin so, as wandb has it, and `*` is a parameter's name
METRICS: dict[str, Metric] = {
    "step": Metric(None, "last", "optimizer steps taken"),
    "tokens": Metric(None, "last", "tokens trained on, over all processes"),
    "train/loss": Metric("tokens", "last", "mean training loss since the last row, nats per token"),
    "train/lr": Metric("step", "last", "learning rate of the matrices"),
    "train/skipped": Metric("step", "max", "steps so far that were skipped because a gradient held NaN or infinity"),
    "train/grad_norm": Metric("step", "last", "norm of all gradients before clipping"),
    "eval/loss": Metric("tokens", "min", "validation loss, nats per token"),
    "eval/perplexity": Metric("tokens", "min", "exp of the validation loss"),
    "eval/bits_per_byte": Metric("tokens", "min", "validation loss in bits per byte of text"),
    "basis/captured_energy": Metric("step", "last", "share of gradient energy in the coordinates, mean of matrices"),
    "basis/effective_rank": Metric("step", "last", "directions that carry the coordinates, mean of matrices"),
    "basis/subspace_overlap": Metric("step", "last", "share of a refreshed basis in the one before, mean of those"),
    "update/rms": Metric("step", "last", "root mean square of updates before the learning rate, mean of matrices"),
    "layers/captured_energy/*": Metric("step", "last", "the first of these for each matrix"),
    "layers/effective_rank/*": Metric("step", "last", "the second"),
    "layers/subspace_overlap/*": Metric("step", "last", "the third, where a basis was found again in that step"),
    "layers/update_rms/*": Metric("step", "last", "the fourth for each parameter"),
    "mem/params_bytes": Metric("step", "max", "bytes of the weights"),
    "mem/grads_bytes": Metric("step", "max", "bytes of the gradients"),
    "mem/opt_state_bytes": Metric("step", "max", "bytes of the optimizer's state, basis included"),
    "mem/basis_bytes": Metric("step", "max", "bytes of the bases alone"),
    "mem/adamw_state_bytes": Metric("step", "max", "bytes AdamW would keep for the same weights"),
    "mem/rss_gib": Metric("step", "max", "resident memory of the process, GiB", "cpu"),
    "mem/rss_peak_gib": Metric("step", "max", "its highest value so far, GiB", "cpu"),
    "mem/allocated_cur_gib": Metric("step", "max", "tensors on the device now, GiB", "cuda"),
    "mem/allocated_peak_gib": Metric("step", "max", "their peak since the last row, GiB", "cuda"),
    "mem/reserved_cur_gib": Metric("step", "max", "held by the caching allocator now, GiB", "cuda"),
    "mem/reserved_peak_gib": Metric("step", "max", "its peak since the last row, GiB", "cuda"),
    "mem/active_cur_gib": Metric("step", "max", "in blocks that are in use now, GiB", "cuda"),
    "mem/active_peak_gib": Metric("step", "max", "their peak since the last row, GiB", "cuda"),
    "mem/peak_in_forward_gib": Metric("step", "max", "allocation peak inside the forward pass, GiB", "cuda"),
    "mem/peak_in_backward_gib": Metric("step", "max", "allocation peak inside the backward pass, GiB", "cuda"),
    "mem/peak_in_step_gib": Metric("step", "max", "allocation peak inside the optimizer step, GiB", "cuda"),
    "time/seconds": Metric("step", "last", "seconds spent training, earlier sessions included"),
    "time/tokens_per_second": Metric("step", "mean", "tokens per second since the last row, evaluation excluded"),
}

# what depends on the clock or the machine; every other key is equal to the bit in two runs of one configuration
VOLATILE = ("time/", "mem/rss", "mem/allocated", "mem/reserved", "mem/active", "mem/peak_in")


def deterministic(row: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a row of `metrics.jsonl` that a repeated or resumed run reproduces bit for bit."""
    return {key: value for key, value in row.items() if not key.startswith(VOLATILE)}


def documented(device: str) -> dict[str, Metric]:
    """The metrics that a run on this device type logs."""
    return {name: metric for name, metric in METRICS.items() if metric.device in (None, device)}


def metric_of(key: str) -> str | None:
    """The name in `METRICS` that documents this key of a row, its own or that of its family; None if there is none."""
    families = (name for name in METRICS if name.endswith("*") and key.startswith(name[:-1]))
    return key if key in METRICS else next(families, None)


def without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """NaN and infinity as None: JSON has no word for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]


def environment(argv: Sequence[str], device: str) -> dict[str, Any]:
    """What a reader needs to judge a number: command, machine, versions, and the commit where there is one."""
    try:
        root = Path(__file__).parent
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
        commit = git.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        **machine(device),
        "command": command("experiments.pretrain", argv),
        "git_commit": commit,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def has_login() -> bool:
    """Whether wandb would find a key without asking: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        keys = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(keys.authenticators(urlsplit(url).netloc) is not None for url in _servers())


def _servers() -> set[str]:
    # where wandb would go: its variable, else its settings files and its default, which only wandb knows
    if url := os.environ.get("WANDB_BASE_URL"):
        return {url}
    try:
        import wandb

        url, default = wandb.setup().settings.base_url, wandb.Settings().base_url
        return {url, _WANDB_SERVER} if url == default else {url}
    # missing, broken, a folder of that name, or settings that it refuses: the start that follows says what it is
    except Exception:
        return {_WANDB_SERVER}


def _installed(package: str) -> bool:
    # a bare folder of that name can be imported too, but comes from no file
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def wandb_mode(choice: Literal["auto", "on", "off"]) -> Mode | None:
    """The wandb mode a run uses, or None for no wandb.

    `auto` uses wandb where it is installed. Without a login the mode is offline whatever was asked for, because going
    online would stop and ask for a key.
    """
    asked = os.environ.get("WANDB_MODE", "")
    if choice == "off" or asked == "disabled" or (choice == "auto" and not _installed("wandb")):
        return None
    return "online" if asked not in ("offline", "dryrun") and has_login() else "offline"


class Tracker:
    """Writes rows to `metrics.jsonl` and, where wanted, to wandb. A wandb failure is said once and never raised.

    Args:
        directory: The run directory; None for a process that logs nothing (rank above 0).
        position: Length in bytes at which `metrics.jsonl` is cut back before it goes on: 0 for a new run, the
            checkpoint's `position` for a resumed one.
        device: Device type, which decides what is documented and so defined in wandb.
        say: Receives the one-line messages.
        run_id: wandb's id from the checkpoint, so that the same run goes on; None for a new one.
        config: What wandb shows as the run's configuration.
        track: Whether wandb is used, and under which names.
    """

    def __init__(
        self,
        directory: Path | None,
        position: int = 0,
        *,
        device: str = "cpu",
        say: Callable[[str], None],
        run_id: str | None = None,
        config: Mapping[str, Any] | None = None,
        track: TrackConfig,
    ) -> None:
        self.run_id = run_id
        self._say = say
        self._run: Any = None
        self._file: Any = None
        if directory is None:
            return
        self._file = open(directory / "metrics.jsonl", "ab")  # noqa: SIM115  # lives as long as the tracker
        if self._file.tell() < position:
            say(f"metrics.jsonl in {directory} is shorter than its checkpoint says: the curves will have a gap")
        else:
            self._file.truncate(position)
            self._file.seek(0, os.SEEK_END)
        mode = wandb_mode(track.wandb)
        if mode is not None:
            self._guard("start", lambda: self._start(directory, mode, device, dict(config or {}), track))

    @property
    def position(self) -> int:
        """Bytes written to `metrics.jsonl`; everything before it is on the disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return int(self._file.tell())

    def log(self, row: Mapping[str, float]) -> None:
        """Adds one row; it must hold "step" and "tokens". NaN and infinity become null, which JSON can hold."""
        if self._file is None:
            return
        self._file.write(json.dumps(without_nan(row)).encode() + b"\n")
        self._file.flush()
        if self._run is not None:
            self._guard("log", lambda: self._run.log(dict(row)))

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Adds final values, as `final/<name>`, to what wandb keeps of the run."""
        if self._run is not None:
            self._guard("summarize", lambda: self._run.summary.update({f"final/{k}": v for k, v in values.items()}))

    def close(self) -> None:
        """Closes the file and the wandb run."""
        if self._file is not None:
            self._file.close()
        if self._run is not None:
            self._guard("finish", lambda: self._run.finish())
        self._run = self._file = None

    def _start(self, directory: Path, mode: Mode, device: str, config: dict[str, Any], track: TrackConfig) -> None:
        import wandb

        def begin(mode: Mode) -> Any:
            return wandb.init(
                mode=mode,
                dir=os.environ.get("WANDB_DIR", str(directory)),
                id=self.run_id,
                resume="allow",
                config=config,
                # our own lines are enough, and nothing may wait for an answer
                settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, init_timeout=30),
                project=track.project,
                name=track.name,
                group=track.group,
                tags=track.tags,
            )

        try:
            run = begin(mode)
        # a server that cannot be reached or refuses the key: the curves are kept here
        except Exception as error:
            if mode == "offline":
                raise
            self._say(f"wandb cannot go online ({_told(error)}); offline instead")
            mode = "offline"
            run = begin(mode)
        for name, metric in documented(device).items():
            run.define_metric(name, step_metric=metric.axis, summary=metric.summary if metric.axis else None)
        self._run, self.run_id = run, run.id
        self._say(
            f"wandb: {mode} run {run.id}" + (f"; later: wandb sync {Path(run.dir).parent}" if mode == "offline" else "")
        )

    def _guard(self, doing: str, action: Callable[[], Any]) -> None:
        try:
            action()
        # whatever a tracker raises, the training is worth more than its curves on a server
        except Exception as error:
            self._run = None
            self._say(f"wandb failed to {doing} ({_told(error)}); training and metrics.jsonl go on")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no reason given'}"
