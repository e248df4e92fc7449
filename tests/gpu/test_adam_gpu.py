"""The Adam kernel on the hardware it is written for, against its plain twin."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW, backend, reference

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import adam

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]

SHAPES = [(), (1,), (3, 5), (64,), (1000,), (1024,), (128, 129), (4096, 128), (1 << 20,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x.flatten()[0].expand(x.shape),
}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, as torch does for whoever asks for determinism."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device="cuda").isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_twins(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: Callable[[Tensor], Tensor],
    betas: tuple[float, float],
    eps: float = 1e-8,
    steps: int = 4,
    device: str = "cuda",
) -> None:
    ours, twins = ([torch.zeros(shape, device=device), torch.zeros(shape, device=device)] for _ in range(2))
    for step in range(1, steps + 1):
        grad = layout(torch.randn(shape, device=device).to(dtype))
        before = grad.clone()
        direction = adam.adam_direction_(grad, *ours, betas=betas, eps=eps, step=step)
        expected = reference.adam_direction_(grad.float(), *twins, betas=betas, eps=eps, step=step)
        assert torch.equal(grad, before)
        assert direction.dtype == torch.float32
        torch.testing.assert_close(direction, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, twins, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adam_equals_its_twin(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    assert_twins(shape, dtype, LAYOUTS[layout], (0.9, 0.999))


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(0, 70), min_size=1, max_size=3).map(tuple),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0.5, 0.9999),
    eps=st.sampled_from([1e-8, 1e-3]),
)
def test_adam_equals_its_twin_anywhere(shape: tuple[int, ...], beta1: float, beta2: float, eps: float) -> None:
    assert_twins(shape, torch.float32, LAYOUTS["contiguous"], (beta1, beta2), eps, steps=3)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (1 << 20,)], ids=str)
def test_a_direction_is_rounded_once_to_the_dtype_that_is_asked_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grad = torch.randn(shape, device="cuda")
    moments = [torch.rand(shape, device="cuda") for _ in range(2)]
    numbers: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "step": 3}
    whole = adam.adam_direction_(grad, *(m.clone() for m in moments), **numbers)
    direction = adam.adam_direction_(grad, *moments, **numbers, dtype=dtype)
    assert torch.equal(direction, whole.to(dtype))


def test_adam_addresses_more_elements_than_fit_32_bits() -> None:
    numel = (1 << 31) + 1000
    free, _ = torch.cuda.mem_get_info()
    if free < 5 * 4 * numel:
        pytest.skip("needs 40 GB of free GPU memory")
    grad = torch.ones(1, device="cuda").bfloat16().expand(numel).contiguous()
    exp_avg, exp_avg_sq = torch.zeros(numel, device="cuda"), torch.zeros(numel, device="cuda")
    direction = adam.adam_direction_(grad, exp_avg, exp_avg_sq, betas=(0.9, 0.999), eps=1e-8, step=1)
    for part in (direction[:10], direction[-10:], direction[(1 << 31) - 5 : (1 << 31) + 5]):
        torch.testing.assert_close(part, torch.ones_like(part), rtol=1e-5, atol=1e-5)


def test_adam_runs_on_the_device_of_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert torch.cuda.current_device() == 0
    assert_twins((1000,), torch.float32, LAYOUTS["contiguous"], (0.9, 0.999), device="cuda:1")
    assert torch.cuda.current_device() == 0


def test_a_step_does_not_wait_for_the_device() -> None:
    grad, exp_avg, exp_avg_sq = (torch.zeros(1000, device="cuda") for _ in range(3))
    adam.adam_direction_(grad, exp_avg, exp_avg_sq, betas=(0.9, 0.999), eps=1e-8, step=1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        direction = adam.adam_direction_(grad, exp_avg, exp_avg_sq, betas=(0.9, 0.999), eps=1e-8, step=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert direction.eq(0).all()


def _train(name: Any, dtype: torch.dtype, steps: int = 7) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 200, bias=False)).to("cuda", dtype)
    opt = GaLoreAdamW(model.parameters(), rank=8, update_proj_gap=3, scale=1.0, basis="subspace")
    with backend(name):
        for _ in range(steps):
            opt.zero_grad()
            model(torch.randn(32, 96, device="cuda", dtype=dtype)).square().mean().backward()
            opt.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_optimizer_on_the_kernel_equals_one_on_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    real = adam.stored_adam_directions_

    def watched(grads: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
        seen.extend(tuple(grad.shape) for grad in grads)
        return real(grads, *args, **kwargs)

    monkeypatch.setattr(adam, "stored_adam_directions_", watched)
    expected = _train("torch", dtype)
    assert seen == []
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    for name in ("auto", "triton"):
        weights = _train(name, dtype)
        # the kernel did run: the coordinates of two matrices and a bias, each step
        assert seen == [(8, 96), (64,), (200, 8)] * 7
        torch.testing.assert_close(weights, expected, **tolerance)
        seen.clear()
