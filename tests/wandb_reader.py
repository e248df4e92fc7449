"""Reads what wandb wrote without a server: the offline transaction log is a LevelDB log of protobuf records."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as protobuf

HEADER = struct.Struct("<4sHB")  # ":W&B", magic, version
CHUNK = struct.Struct("<IHB")  # checksum, length, type
BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    run_id: str = ""
    project: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    # name -> (step metric, the summaries that are kept)
    metrics: dict[str, tuple[str, set[str]]] = field(default_factory=dict)

    def curve(self, name: str) -> list[tuple[float, float]]:
        """The points of a metric over the step metric that it was defined with."""
        axis = self.metrics[name][0]
        return [(row[axis], row[name]) for row in self.history if name in row]


def records(path: Path) -> Iterator[Any]:
    log = path.read_bytes()
    assert HEADER.unpack_from(log) == (b":W&B", 0xBEE1, 0), f"{path} is no wandb log that this reader knows"
    at, message = HEADER.size, b""
    while at + CHUNK.size <= len(log):
        room = BLOCK - at % BLOCK
        if room < CHUNK.size:
            # the end of a block that no chunk header fits in is padding
            at += room
            continue
        _, length, kind = CHUNK.unpack_from(log, at)
        start = at + CHUNK.size
        if kind == 0 or start + length > len(log):
            return
        message = log[start : start + length] if kind in (FULL, FIRST) else message + log[start : start + length]
        at = start + length
        if kind in (FULL, LAST):
            record = protobuf.Record()
            record.ParseFromString(message)
            yield record


def read_run(path: Path) -> OfflineRun:
    run = OfflineRun()
    for record in records(path):
        match record.WhichOneof("record_type"):
            case "run":
                run.run_id, run.project, run.tags = record.run.run_id, record.run.project, list(record.run.tags)
                run.config |= _items(record.run.config.update)
            case "config":
                run.config |= _items(record.config.update)
            case "summary":
                run.summary |= _items(record.summary.update)
            case "history":
                run.history.append(_items(record.history.item))
            case "metric":
                kept = {
                    name for name in ("min", "max", "mean", "last", "first") if getattr(record.metric.summary, name)
                }
                run.metrics[record.metric.name] = (record.metric.step_metric, kept)
    return run


def read_runs(directory: Path) -> list[OfflineRun]:
    """Every offline run below a directory, oldest first."""
    logs = sorted(directory.glob("wandb/offline-run-*/run-*.wandb"), key=lambda log: log.stat().st_ctime_ns)
    return [read_run(log) for log in logs]


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
