"""The fast DCT on the hardware that the kernel is written for, against its plain twin."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_optim import reference

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import dct as kernel
from lowrank_optim.kernels._launch import DctSplit
from tests.kernels import dct as checks
from tests.kernels.common import DTYPES, distance, few, hardware, need_memory, no_waiting, poisoned, second_device

pytestmark = hardware

DEVICE = "cuda"
# few, as each is a program to compile: padded and not, of one warp, four and eight
CASES = [
    *[(256, torch.bfloat16), (1376, torch.bfloat16), (4096, torch.bfloat16), (5120, torch.bfloat16)],
    *[(8192, torch.bfloat16), (4096, torch.float16), (1376, torch.float32), (16, torch.float32)],
]
# of operands and of what is written
PAIRS = [
    *[(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    (torch.float16, torch.float16),
]


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize(("n", "dtype"), CASES, ids=str)
@poisoned(DEVICE)
def test_it_equals_its_twin(n: int, dtype: torch.dtype, dim: int) -> None:
    if not kernel.supports(n, dtype, torch.device(DEVICE)):
        pytest.skip("no room for so large a program on this device")
    for m in (1, 301):
        found, _ = checks.assert_twins(checks.matrix(m, n, dim, dtype, device=DEVICE), dim)
        assert found.stride(dim) == 1


@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [-1, -2])
@poisoned(DEVICE)
def test_it_equals_its_twin_on_any_strides(dim: int, dtype: torch.dtype, layout: str) -> None:
    checks.assert_twins(checks.matrix(77, 256, dim, dtype, layout, device=DEVICE), dim)


@few
@given(
    m=st.sampled_from([0, 1, 77, 300, 896]),
    rows=st.none() | st.integers(1, 40),
    dtypes=st.sampled_from(PAIRS),
    **checks.HOW,
)
def test_it_equals_its_twin_anywhere(
    m: int, dtypes: tuple[torch.dtype, torch.dtype], dim: int, layout: str, **how: Any
) -> None:
    dtype, out_dtype = dtypes
    checks.assert_twins(checks.matrix(m, 256, dim, dtype, layout, device=DEVICE), dim, out_dtype=out_dtype, **how)


@pytest.mark.parametrize("n", [256, 1376, 4096])
def test_it_is_about_as_far_from_the_truth_as_a_product_in_bfloat16(n: int) -> None:
    checks.is_near(n, 400, DEVICE, {torch.bfloat16: 1.3})


def test_float32_is_not_multiplied_in_tf32() -> None:
    x = torch.randn(64, 1376, device=DEVICE)
    found, _ = kernel.dct_energies(x, -1, out_dtype=torch.float32)
    assert distance(found, reference.dct(x.double(), -1)) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_gets_the_same_bits_in_every_matrix_and_sums_the_same_each_time(dtype: torch.dtype) -> None:
    checks.bits_are_the_same(1000, 256, dtype, DEVICE, ((0, 1), (999, 3), (500, 100)), times=5)


def test_coefficients_are_rounded_to_nearest_and_sums_are_of_what_was_not() -> None:
    x = checks.matrix(100, 4096, -1, torch.bfloat16, device=DEVICE)
    exact, energies = kernel.dct_energies(x, -1, out_dtype=torch.float32)
    torch.testing.assert_close(energies, exact.square().sum(0), rtol=1e-5, atol=0)
    found, _ = kernel.dct_energies(x, -1, out_dtype=torch.bfloat16)
    # the compiler may contract the last operations in one of both programs
    assert (found == exact.bfloat16()).float().mean() > 0.999


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_to_its_row_and_all_sums(dtype: torch.dtype) -> None:
    checks.nan_goes_to_its_row_and_all_sums(200, 256, dtype, DEVICE)


@pytest.mark.parametrize("dim", [-1, -2])
def test_it_reads_its_own_elements_only(dim: int) -> None:
    checks.its_own_elements_are_read_only(256, ((16, 32), (3, 5)), dim, DEVICE)


def test_it_addresses_more_elements_than_fit_32_bits() -> None:
    need_memory(20)
    x = torch.empty((1 << 19) + 100, 4096, dtype=torch.bfloat16, device=DEVICE).normal_()
    found, _ = kernel.dct_energies(x, -1, out_dtype=torch.bfloat16)
    assert distance(found[-3:], reference.dct(x[-3:].double(), -1)) <= 3e-3


def test_it_runs_on_the_device_of_its_tensors() -> None:
    with second_device() as device:
        for dim in (-1, -2):
            found, _ = checks.assert_twins(checks.matrix(40, 256, dim, torch.bfloat16, device=device), dim)
            assert found.device == torch.device(device)


def test_it_does_not_wait_for_the_device() -> None:
    for dim in (-1, -2):
        x = checks.matrix(300, 256, dim, torch.bfloat16, device=DEVICE)
        kernel.dct_energies(x, dim, out_dtype=torch.bfloat16)
        with no_waiting():
            found, _ = kernel.dct_energies(x, dim, out_dtype=torch.bfloat16)
        assert found.isfinite().all()


def test_splits_can_be_swept() -> None:
    x = checks.matrix(300, 4096, -1, torch.bfloat16, device=DEVICE)
    for split in (DctSplit(64, 64, 4, 2), DctSplit(64, 64, 4, 4), DctSplit(128, 32, 8, 3), DctSplit(128, 32, 4, 3)):
        for rows in (1, 16, 43):
            checks.assert_twins(x, -1, split=split, rows=rows)


@pytest.mark.parametrize("dim", [-1, -2])
def test_many_in_one_launch_equal_each_alone(dim: int) -> None:
    checks.many_equal_each_alone(dim, torch.bfloat16, DEVICE)
