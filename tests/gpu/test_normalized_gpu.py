"""The kernels that normalize on the hardware that they are written for, against their plain twin."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import normalized as kernel
from lowrank_optim.kernels._launch import MOMENTUM_PARTS
from tests.kernels import normalized as checks
from tests.kernels.common import DTYPES, LAYOUTS, few, hardware, need_memory, no_waiting, poisoned, second_device

pytestmark = hardware

DEVICE = "cuda"


@pytest.mark.parametrize(("layout", "dtype"), list(zip(LAYOUTS, DTYPES, strict=True)), ids=str)
@pytest.mark.parametrize("shape", [*checks.SHAPES, (5, 1024, 1031), (2, 4096, 2048)], ids=str)
@poisoned(DEVICE)
def test_it_equals_its_twin(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> None:
    checks.equals_its_twin(shape, dtype, layout, DTYPES, DEVICE)


@few
@given(shape=st.tuples(st.integers(0, 4), st.sampled_from([0, 1, 7, 300]), st.sampled_from([1, 16, 513])), **checks.HOW)
def test_it_equals_its_twin_anywhere(**case: Any) -> None:
    checks.anywhere(**case, device=DEVICE)


@pytest.mark.parametrize("shape", [(3, 1000, 2008), (5, 333, 35)], ids=str)
def test_a_matrix_gets_the_same_bits_each_time_and_in_every_stack(shape: tuple[int, int, int]) -> None:
    checks.bits_are_the_same(shape, DEVICE, times=5)


def test_zeros_stay_and_what_is_not_finite_says_so() -> None:
    checks.zeros_stay_and_what_is_not_finite_says_so(160, 200, DEVICE)


def test_it_reads_its_own_elements_only() -> None:
    checks.its_own_elements_are_read_only(333, 400, DEVICE)


@pytest.mark.parametrize("parts", [1, 7, MOMENTUM_PARTS])
@pytest.mark.parametrize("launch", [(1024, 4), (4096, 8)], ids=str)
def test_launches_may_be_of_other_sizes(launch: tuple[int, int], parts: int) -> None:
    checks.assert_twins(torch.randn(2, 333, 350, device=DEVICE), torch.bfloat16, launch=launch, parts=parts)


def test_it_addresses_more_elements_than_fit_32_bits() -> None:
    need_memory(10)
    x = torch.ones(1, (1 << 16) + 16, 1 << 15, dtype=torch.bfloat16, device=DEVICE)
    found = kernel.normalized(x, eps=0.0, dtype=torch.bfloat16)[0]
    for row in (found[0], found[-1]):
        torch.testing.assert_close(row, torch.full_like(row, x.numel() ** -0.5), rtol=2.0**-8, atol=0.0)


def test_it_runs_on_the_device_of_its_tensors() -> None:
    with second_device() as device:
        x = torch.randn(2, 100, 30, device=device)
        assert checks.assert_twins(x, torch.bfloat16).device == x.device


def test_it_does_not_wait_for_the_device() -> None:
    x = torch.randn(3, 200, 300, device=DEVICE)
    kernel.normalized(x, eps=1e-7, dtype=torch.bfloat16)
    with no_waiting():
        found = kernel.normalized(x, eps=1e-7, dtype=torch.bfloat16)
    assert found.isfinite().all()
