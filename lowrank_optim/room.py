"""Whether there is memory for what is about to be allocated."""

import os
from pathlib import Path

import torch


def check_room(nbytes: int, device: torch.device, what: str) -> None:
    """Raise MemoryError, naming the bytes, where `device` has not so many free; torch's own error would come later.

    On Linux untouched memory is handed out without being there, and the process is killed when it is written to.
    """
    free = free_bytes(device)
    if free is not None and nbytes > free:
        raise MemoryError(
            f"{what} takes {nbytes:,} bytes, and {device} has {free:,} free: take fewer gradients, bfloat16, blocks or "
            "coordinates of a lower rank"
        )


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that may still be allocated on a device; None where nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type != "cpu":
        return None
    known = [free for free in (_available(), _of_container(), _physical()) if free is not None]
    return min(known) if known else None


def _available() -> int | None:
    """Return what Linux can give without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in lines)
    return int(sizes["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in sizes else None


def _of_container() -> int | None:
    """Return what is left of the limit of a control group, which `/proc` does not know."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    if limit == "max":
        return None
    # pages of files count as used and are given back when they are needed
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(limit) - int(used) + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))


def _physical() -> int | None:
    """Return the machine's memory, used or not."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
