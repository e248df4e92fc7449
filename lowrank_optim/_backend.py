"""Who computes: plain torch or a kernel."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

from lowrank_optim._half import multiplies

Backend = Literal["auto", "torch", "triton"]

_backend: ContextVar[Backend] = ContextVar("lowrank_optim_backend", default="auto")


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose who computes within the block.

    Args:
        name: "auto" takes what is known to be fastest, "torch" and "triton" take that one or raise. Nothing has shown
            a kernel to be faster than torch's own fused ones yet, so today "auto" is "torch".

    Raises:
        ValueError: for another name.
        RuntimeError: "triton" where it cannot run; said when the block is entered or when it meets a CPU tensor.
    """
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', not {name!r}")
    if name == "triton" and not _has_triton():
        raise RuntimeError("backend('triton'): Triton is not installed (pip install triton)")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def takes_triton(x: Tensor, *, faster: bool = False) -> bool:
    """Return whether a kernel computes: where it must, or where nobody says who and it was measured to be faster."""
    if _backend.get() != "triton":
        return faster and _backend.get() == "auto" and type(x) is Tensor and x.is_cuda and _once_had_triton()
    if type(x) is Tensor and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return True
    raise RuntimeError(
        f"backend('triton'): a {type(x).__name__} on {x.device} needs a CUDA device, "
        "or TRITON_INTERPRET=1 set before Triton is imported"
    )


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# looking for a package takes longer than a small kernel
_once_had_triton = functools.cache(_has_triton)


def fills(x: Tensor) -> bool:
    """Return whether the tiles of one triangle of (b, n, n) are enough work for a device, where that was measured.

    On an H200 a product of half of the tiles takes .58 to .72 of torch's time from two tiles of 128 for each
    multiprocessor on, and more than torch's with fewer.
    """
    if not multiplies(x) or x.size(1) < 512:
        return False
    sides = -(-x.size(1) // 128)
    processors, capability = _device(x.device)
    return capability == (9, 0) and len(x) * sides * (sides + 1) // 2 >= 2 * processors


@functools.cache
def _device(device: torch.device) -> tuple[int, tuple[int, int]]:
    """Return how many multiprocessors a CUDA device has, and its compute capability."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)
