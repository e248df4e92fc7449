"""Whether a checkpoint and a configuration belong to one run."""

from typing import Any

from experiments.config import ConfigError


def check_same_run(saved: dict[str, Any], config: dict[str, Any], data: dict[str, Any], world_size: int) -> list[str]:
    """Compares a checkpoint with the run that wants to go on from it.

    Sizes, data, optimizer and the shape of a batch decide what the checkpoint's numbers mean and cannot change; the
    rest of the loop may, and then the run is no longer the one that was interrupted.

    Args:
        saved: The checkpoint.
        config: The new run's configuration.
        data: The fingerprint of its data.
        world_size: Its number of processes.

    Returns:
        A line for the user if something changed that may.

    Raises:
        ConfigError: If something changed that cannot.
    """
    batch = ("train.batch_size", "train.seq_len", "train.accumulate")
    fixed = ("model.", "data.", "optim.", "train.seed", "train.init_from", *batch)
    old, new = flat(saved["config"]), flat(config)
    old |= {"data.fingerprint": _short(saved["data"]), "train.processes": len(saved["batches"])}
    new |= {"data.fingerprint": _short(data), "train.processes": world_size}
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and not k.startswith("track.")]
    changed = [k for k in changed if k not in ("run_dir", "resume")]
    fatal = [k for k in changed if k.startswith((*fixed, "train.dtype", "train.processes"))]
    lines = {k: f"{k} {old.get(k)} -> {new.get(k)}" for k in changed}
    steps = config["train"]["steps"]
    if saved["step"] >= steps != saved["config"]["train"]["steps"]:
        raise ConfigError(f"the checkpoint is at step {saved['step']} already, train.steps={steps} ends before")
    if fatal:
        raise ConfigError(f"this run cannot go on with {'; '.join(lines[k] for k in fatal)}: name another --run_dir")
    return [f"going on with other settings than before: {'; '.join(lines.values())}"] if lines else []


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _short(fingerprint: dict[str, Any]) -> str:
    # the rest of a fingerprint is counts, which the checksum covers
    return str(fingerprint["sha256"])
