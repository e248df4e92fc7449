"""What a pretraining run is: dataclasses, filled from YAML files and `--section.key value` by jsonargparse."""

import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from experiments.data import DataConfig
from experiments.llama import LlamaConfig
from experiments.optim_config import OptimConfig as OptimConfig

SECTIONS = ("model", "data", "optim", "train", "track")


class ConfigError(ValueError):
    """A configuration that cannot run; one line for the user."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        steps: Optimizer steps.
        batch_size: Sequences in one forward pass of one process.
        seq_len: Tokens in a sequence.
        accumulate: Forward passes in one optimizer step.
        clip: Largest norm of all gradients together; 0 for no clipping.
        warmup: Steps over which the learning rate rises from 0.
        min_lr_ratio: Where the cosine ends, as a fraction of the learning rate; 1 keeps it constant.
        init_from: Checkpoint file, or run directory (its newest), whose weights the run starts from; nothing else of it
            is used.
        seed: Seeds the weights, and is added to `data.seed`, which seeds the order of the text.
        dtype: Of weights, gradients and activations.
        compile: Run the model through torch.compile.
        device: auto takes a GPU where there is one.
        threads: CPU threads of torch; 0 leaves torch's own choice.
        eval_every: Steps between two evaluations; there is always one after the last.
        eval_first: Evaluate before the first step too.
        eval_batches: Validation batches in one evaluation, always the same ones.
        log_every: Steps between two rows of metrics.
        save_every: Steps between two checkpoints; 0 for none but the last.
        save_last: Save after the last step; a finished run without it has nothing to go on from.
        plots: Draw loss.png, memory.png and, of an optimizer with bases, basis.png at the end.
        keep: How many checkpoints stay.
    """

    steps: int = 700
    batch_size: int = 16
    seq_len: int = 128
    accumulate: int = 1
    clip: float = 1.0
    warmup: int = 30
    min_lr_ratio: float = 0.1
    init_from: str | None = None
    seed: int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    device: str = "auto"
    threads: int = 0
    eval_every: int = 100
    eval_first: bool = True
    eval_batches: int = 16
    log_every: int = 10
    save_every: int = 100
    save_last: bool = True
    plots: bool = True
    keep: int = 2

    def __post_init__(self) -> None:
        """Refuses what no run can mean."""
        for name in ("steps", "batch_size", "seq_len", "accumulate", "eval_every", "eval_batches", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("clip", "warmup", "threads", "save_every"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"train.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"train.min_lr_ratio must lie in [0, 1], got {self.min_lr_ratio}")


@dataclass(frozen=True)
class TrackConfig:
    """Where curves go besides metrics.jsonl.

    Args:
        wandb: auto uses Weights & Biases where it is installed, offline without a login; on says so when it is not
            installed; off never.
        project: wandb project.
        name: Name of the run, also the end of the default run directory (the optimizer's name if null).
        group: wandb group.
        tags: wandb tags.
        diagnostics: Log how well bases fit and how large updates are, for optimizers of this package; a step that gets
            no row costs nothing.
    """

    wandb: Literal["auto", "on", "off"] = "auto"
    project: str = "lowrank_optim"
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    diagnostics: bool = True


@dataclass(frozen=True)
class Config:
    """One run.

    Args:
        model: The model's sizes.
        data: The text.
        optim: The optimizer.
        train: The loop.
        track: Where curves go.
        run_dir: Directory of the run; runs/<date-time>-<name> if null.
        resume: auto continues the newest good checkpoint of `run_dir`; never refuses a directory that holds a run; a
            checkpoint file or a run directory continues that one.
        dry_run: Print the parameter groups and the predicted memory, and stop.
    """

    model: LlamaConfig = field(default_factory=LlamaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    run_dir: str | None = None
    resume: str = "auto"
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Refuses sections that do not fit each other."""
        if self.train.seq_len > self.model.max_len:
            raise ConfigError(f"train.seq_len={self.train.seq_len} is longer than model.max_len={self.model.max_len}")


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints one line and leaves with 2; an unknown key comes with the nearest known one."""
        line = " ".join(message.split())
        known = [action.dest for action in self._actions]
        unknown = re.search(
            r"unrecognized arguments: --(\S+?)[= ]|Group '(\S+)' does not accept option '(\S+)'"
            r"|Option '(\S+)' is not accepted",
            line + " ",
        )
        if unknown:
            key = unknown[1] or (unknown[4] or "").partition(".")[0] or f"{unknown[2]}.{unknown[3]}"
            near = difflib.get_close_matches(key, known, n=1)
            line = f"unknown key {key}" + (f", did you mean {near[0]}?" if near else "")
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2)


def parse(argv: Sequence[str] | None = None) -> Config:
    """Reads the command line; `--print_config`, `--help` and a mistake leave the program here.

    Raises:
        ConfigError: If a value is one that no run can have.
    """
    usage = "python -m experiments.pretrain [--config FILE] [--data PATH] [--section.key VALUE ...]"
    # a shortened key would be taken for the first one that begins like it
    parser = _Parser(prog="pretrain", usage=usage, description="Pretrains a LLaMA.", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; later options win")
    parser.add_class_arguments(Config)
    _explain(parser)
    given = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(given):
        # a switch alone reads as true, and `--data PATH` is short for its most used key
        if word == "--dry_run" and (i + 1 == len(given) or given[i + 1].startswith("--")):
            given[i] = "--dry_run=true"
        elif word == "--data" or word.startswith("--data="):
            given[i] = word.replace("--data", "--data.path", 1)
        elif word == "--config" or word.startswith("--config="):
            _check_file(word.partition("=")[2] or next(iter(given[i + 1 :]), ""))
    parsed = parser.parse_args(given)
    _check_values(parsed)
    try:
        values = parser.instantiate(parsed)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Config(**{f.name: values[f.name] for f in dataclasses.fields(Config)})


def _check_file(name: str) -> None:
    # jsonargparse's words for these do not name the file; all other mistakes are left to it
    try:
        content = yaml.safe_load(Path(name).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return
    if content is None:
        raise ConfigError(f"{name} is empty")
    if not isinstance(content, dict):
        raise ConfigError(f"{name} must hold sections such as `train: {{steps: 100}}`, not a {type(content).__name__}")


def _check_values(parsed: Any) -> None:
    # jsonargparse takes a null in a file for any value, and anything for a section
    for name in SECTIONS:
        section, default = getattr(parsed, name), getattr(Config(), name)
        if not hasattr(section, "__dict__"):
            raise ConfigError(f"{name} must be a section of options, got {section!r}")
        for key, value in vars(section).items():
            kinds = get_type_hints(type(default))
            if value is None and key in kinds and type(None) not in get_args(kinds[key]):
                raise ConfigError(f"{name}.{key} must not be null")
    for key in ("resume", "dry_run"):
        if getattr(parsed, key) is None:
            raise ConfigError(f"{key} must not be null")


def _explain(parser: ArgumentParser) -> None:
    """Gives each option its line of the dataclasses' docstrings, so that they are written once."""
    texts: dict[str, str] = {}
    for prefix, section in [("", Config()), *((f"{name}.", getattr(Config(), name)) for name in SECTIONS)]:
        described = inspect.cleandoc(section.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", described, re.MULTILINE):
            texts[prefix + name] = " ".join(text.split()).replace("%", "%%")
    for group in parser._action_groups:
        if group.title and group.title.startswith("<class"):
            owner = group._group_actions[0].dest.partition(".")[0]
            group.title = owner if owner in SECTIONS else "the run"
    texts |= dict.fromkeys(SECTIONS, "YAML file with this section") | {"data": "short for --data.path"}
    for action in parser._actions:
        if action.dest in texts:
            action.help = texts[action.dest]


def as_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists, which YAML, JSON, wandb and a checkpoint can hold."""
    return {k: _plain(v) for k, v in dataclasses.asdict(config).items()}


def as_yaml(config: Config) -> str:
    """The configuration as a file that `--config` reads."""
    return yaml.safe_dump(as_dict(config), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value
