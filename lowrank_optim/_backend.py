"""Who computes: plain torch or a kernel."""

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lowrank_optim._half import multiplies
from lowrank_optim._warn import warn_once

Backend = Literal["auto", "torch", "triton"]

F = TypeVar("F", bound=Callable[..., Any])
_backend: ContextVar[Backend] = ContextVar("lowrank_optim_backend", default="auto")


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose who computes within the block.

    Args:
        name: "auto" takes a kernel where one was measured to be faster, which is on a CUDA device of capability 8.0 or
            more, and torch elsewhere, with a warning where Triton is installed and no kernel compiles (it needs a C
            compiler); "torch" and "triton" take that one, or raise where it cannot run.

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
    # a fake tensor stands for a plain one
    plain, chosen = type(x) is Tensor or isinstance(x, FakeTensor), _chosen()
    if chosen != "triton":
        return faster and chosen == "auto" and plain and x.is_cuda and _ready(x.device)
    if plain and (x.is_cuda or _interprets()):
        return True
    raise RuntimeError(
        f"backend('triton'): a {type(x).__name__} on {x.device} needs a CUDA device, "
        "or TRITON_INTERPRET=1 set before Triton is imported"
    )


def called(function: F, x: Tensor) -> F:
    """Return a kernel's function; where torch traces, or `x` is not there, the registered operation that does the same.

    The operation is beside the function: this file knows no kernel.
    """
    if not torch.compiler.is_compiling() and type(x) is Tensor and not is_in_torch_dispatch_mode():
        return function
    operation: F = getattr(sys.modules[_registered(function.__module__)], function.__name__)
    return operation


def _constant(function: F) -> F:
    """Do as `torch.compiler.assume_constant_result`, which imports a compiler for two seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _registered(kernel: str) -> str:
    """Import the operations that are beside a kernel, and return the name of their module."""
    return importlib.import_module(kernel.rpartition(".")[0] + ".registered").__name__


@_constant
def _chosen() -> Backend:
    return _backend.get()


@_constant
def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@_constant
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# devices, and whether kernels run there
_tried: dict[torch.device, bool] = {}


@_constant
def _ready(device: torch.device) -> bool:
    """Return whether kernels run on a CUDA device, which is tried once; a warning says why they do not."""
    if device not in _tried:
        if not _has_triton() or _device(device)[1] < 80:
            _tried[device] = False
            return False
        some = torch.zeros(16, dtype=torch.bfloat16, device=device) if torch.cuda.is_available() else None
        if type(some) is not Tensor:
            # what only stands for a tensor can not be tried, and need not be
            return True
        _tried[device] = _runs(some)
    return _tried[device]


def _runs(some: Tensor) -> bool:
    """Return whether the smallest kernel compiles and runs."""
    try:
        importlib.import_module("lowrank_optim.kernels.cast").cast(some, torch.float16)
    except torch.OutOfMemoryError:
        # not for good
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        warn_once(
            f"plain torch computes on {some.device}, several times slower, because no Triton kernel compiles or runs "
            f"there ({why}); backend('torch') chooses that without a warning (said once)"
        )
        return False
    return True


def fills(x: Tensor, *, more: bool = False) -> bool:
    """Return whether one triangle of (b, n, n) is better computed by a kernel, where that was measured.

    On an H200 half of the tiles takes .58 to .72 of torch's time from two tiles of 128 for each multiprocessor on, and
    more than torch's with fewer. Where there is `more` to a result than a product, torch makes several passes, and the
    kernel takes .3 to .6 of their time down to single small matrices.
    """
    if not multiplies(x):
        return False
    n, (processors, capability) = x.size(1), _device(x.device)
    sides = -(-n // 128)
    enough = n >= 512 and len(x) * sides * (sides + 1) // 2 >= 2 * processors
    return capability == 90 and (enough or (more and n % 16 == 0))


@functools.cache
@_constant
def _device(device: torch.device) -> tuple[int, int]:
    """Return how many multiprocessors a CUDA device has, and ten times its compute capability.

    A number, as torch's compiler does not compare tuples.
    """
    if not torch.cuda.is_available():
        # that of a tensor which is not there
        return 0, 80
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def near(lr: float | Tensor, x: Tensor) -> float | Tensor:
    """Return a learning rate where a kernel can read it that works on `x`."""
    if not isinstance(lr, Tensor) or lr.device == x.device or not x.is_cuda:
        return lr
    # one on the CPU is read without waiting
    return float(lr) if lr.device.type == "cpu" else lr.to(x.device, non_blocking=True)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Keep the products of a step in the dtype of the mathematics when a step is made inside autocast."""
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext()
