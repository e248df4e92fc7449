"""What a figure depends on besides the code: processor, threads, versions, and the command that made it."""

import datetime
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_PEERS = ("galore-torch", "transformers", "bitsandbytes", "heavyball", "pytorch-optimizer", "muon-optimizer")
_PACKAGES = ("torch", "triton", "numpy", *_PEERS)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")


def cpu_model() -> str:
    """The processor's name as the kernel tells it, or the architecture where it tells none."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Installed versions; a package that is not installed says so, because its absence changes what was measured."""
    found = {"python": platform.python_version()}
    for package in (*packages, "lowrank_optim"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if found["lowrank_optim"] == "not installed":
        found["lowrank_optim"] = "source tree"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def machine(device: str = "cpu") -> dict[str, Any]:
    """Everything about this machine that a time depends on; no host name, user or path."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def command(module: str, argv: Sequence[str]) -> str:
    """The line to type again; `sys.argv[0]` would be a path of this machine."""
    return shlex.join(["python", "-m", module, *argv])
