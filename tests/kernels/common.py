"""What the checks of all kernels share: dtypes, layouts, what a test needs, and the state that a device is put in."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
}
# also the first again and again, for what is only read
READABLE = LAYOUTS | {"expanded": lambda x: x[:1].expand(x.shape)}

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the CPU with TRITON_INTERPRET=1 only"
)
hardware = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]
# of hypothesis on hardware, where each new kind of argument is compiled first
few = settings(max_examples=15, deadline=None)


@contextmanager
def poisoned(device: str) -> Iterator[None]:
    """Fill what torch.empty returns with NaN, as torch does for whoever asks for determinism."""
    # not all that torch has on CUDA is deterministic
    torch.use_deterministic_algorithms(True, warn_only=device != "cpu")
    try:
        assert torch.empty(3, device=device).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make it an error that the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def second_device() -> Iterator[str]:
    """Hand out a device that is not the current one, and see that it does not become so."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert torch.cuda.current_device() == 0
    yield "cuda:1"
    assert torch.cuda.current_device() == 0


def need_memory(gib: int) -> None:
    """Skip the test where less memory of the device is free."""
    free, _ = torch.cuda.mem_get_info()
    if free < gib << 30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the error, relative."""
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def shapes_seen(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[tuple[int, ...]]:
    """Return a list that gets the shapes of what a function is handed first, a tensor or some, at each call."""
    seen: list[tuple[int, ...]] = []
    real = getattr(module, name)

    def watched(first: Tensor | list[Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.extend(tuple(x.shape) for x in ([first] if isinstance(first, Tensor) else first))
        return real(first, *args, **kwargs)

    monkeypatch.setattr(module, name, watched)
    return seen
