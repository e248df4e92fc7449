"""The Adam kernel on the hardware it is written for, against its plain twin."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import adam
from tests.kernels import adam as checks
from tests.kernels.common import DTYPES, few, hardware, need_memory, no_waiting, poisoned, second_device, shapes_seen

pytestmark = hardware

DEVICE = "cuda"


@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*checks.SHAPES, (4096, 128), (1 << 20,)], ids=str)
@poisoned(DEVICE)
def test_adam_equals_its_twin(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    checks.assert_twins(shape, dtype, layout, (0.9, 0.999), device=DEVICE)


@few
@given(shape=st.lists(st.sampled_from([0, 1, 5, 32, 70]), min_size=1, max_size=3).map(tuple), **checks.NUMBERS)
def test_adam_equals_its_twin_anywhere(**case: Any) -> None:
    checks.anywhere(**case, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (1 << 20,)], ids=str)
@poisoned(DEVICE)
def test_a_direction_is_rounded_once_to_the_dtype_that_is_asked_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    checks.is_rounded_once(shape, dtype, DEVICE)


def test_adam_addresses_more_elements_than_fit_32_bits() -> None:
    numel = (1 << 31) + 1000
    need_memory(40)
    grad = torch.ones(1, device=DEVICE).bfloat16().expand(numel).contiguous()
    exp_avg, exp_avg_sq = torch.zeros(numel, device=DEVICE), torch.zeros(numel, device=DEVICE)
    direction = adam.adam_direction_(grad, exp_avg, exp_avg_sq, betas=(0.9, 0.999), eps=1e-8, step=1)
    for part in (direction[:10], direction[-10:], direction[(1 << 31) - 5 : (1 << 31) + 5]):
        torch.testing.assert_close(part, torch.ones_like(part), rtol=1e-5, atol=1e-5)


def test_adam_runs_on_the_device_of_its_tensors() -> None:
    with second_device() as device:
        checks.assert_twins((1000,), torch.float32, "contiguous", (0.9, 0.999), device=device)


def test_a_step_does_not_wait_for_the_device() -> None:
    grad, exp_avg, exp_avg_sq = (torch.zeros(1000, device=DEVICE) for _ in range(3))
    adam.adam_direction_(grad, exp_avg, exp_avg_sq, betas=(0.9, 0.999), eps=1e-8, step=1)
    with no_waiting():
        direction = adam.adam_direction_(grad, exp_avg, exp_avg_sq, betas=(0.9, 0.999), eps=1e-8, step=2)
    assert direction.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_optimizer_on_the_kernel_equals_one_on_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = shapes_seen(monkeypatch, adam, "stored_adam_directions_")
    how: dict[str, Any] = {"rank": 8, "basis": "subspace", "device": DEVICE, "dtype": dtype}
    expected, _ = checks.trained("torch", (96, 64, 200), **how)
    assert seen == []
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    for name in ("auto", "triton"):
        weights, _ = checks.trained(name, (96, 64, 200), **how)
        # the kernel did run: the coordinates of two matrices, each step; a bias is another one's
        assert seen == [(8, 96), (200, 8)] * 7
        torch.testing.assert_close(weights, expected, **tolerance)
        seen.clear()
