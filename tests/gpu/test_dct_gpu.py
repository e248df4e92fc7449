"""The fast DCT on the hardware that the kernel is written for, against its plain twin."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import cosine, reference

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import dct as kernel
from lowrank_optim.kernels._launch import DctSplit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
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
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "rows": lambda x: torch.cat([x, x], -1)[:, : x.size(1)],
    "shifted": lambda x: torch.cat([x[:, :1], x], -1)[:, 1:],
    "expanded": lambda x: x[:1].expand(x.shape),
}
# Frobenius norm of the error, relative; of large matrices it is half of that
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, as torch does for whoever asks for determinism."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device="cuda").isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def matrix(m: int, n: int, dim: int, dtype: torch.dtype, layout: str = "contiguous", device: str = "cuda") -> Tensor:
    """Return a matrix with n elements along `dim` and m along the other."""
    return LAYOUTS[layout](torch.randn((m, n) if dim == -1 else (n, m), device=device).to(dtype))


def assert_twins(x: Tensor, dim: int, **how: Any) -> tuple[Tensor, Tensor]:
    """Compare with the twin in float64; what is handed in stays as it is."""
    how = {"out_dtype": x.dtype} | how
    before = x.clone()
    found, energies = kernel.dct_energies(x, dim, **how)
    assert torch.equal(x, before)
    assert found.dtype == how["out_dtype"]
    assert found.shape == x.shape
    assert energies.dtype == torch.float32
    assert energies.shape == (x.size(dim),)
    expected = reference.dct(x.double(), dim) if x.numel() else x.double()
    sums = (expected.abs() if how.get("ranking") == "l1" else expected.square()).sum(-3 - dim)
    tolerance = max(TOLERANCES[x.dtype], TOLERANCES[found.dtype])
    assert distance(found, expected) <= tolerance
    assert distance(energies, sums) <= 2 * tolerance
    return found, energies


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize(("n", "dtype"), CASES, ids=str)
def test_it_equals_its_twin(n: int, dtype: torch.dtype, dim: int) -> None:
    if not kernel.supports(n, dtype, torch.device("cuda")):
        pytest.skip("no room for so large a program on this device")
    for m in (1, 301):
        found, _ = assert_twins(matrix(m, n, dim, dtype), dim)
        assert found.stride(dim) == 1


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [-1, -2])
def test_it_equals_its_twin_on_any_strides(dim: int, dtype: torch.dtype, layout: str) -> None:
    assert_twins(matrix(77, 256, dim, dtype, layout), dim)


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(0, 900),
    rows=st.none() | st.integers(1, 40),
    dim=st.sampled_from([-1, -2]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "rows"]),
    dtypes=st.sampled_from(PAIRS),
    ranking=st.sampled_from(["l2", "l1"]),
)
def test_it_equals_its_twin_anywhere(
    m: int,
    rows: int | None,
    dim: int,
    layout: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    ranking: str,
) -> None:
    dtype, out_dtype = dtypes
    assert_twins(matrix(m, 256, dim, dtype, layout), dim, out_dtype=out_dtype, ranking=ranking, rows=rows)


@pytest.mark.parametrize("n", [256, 1376, 4096])
def test_it_is_about_as_far_from_the_truth_as_a_product_in_bfloat16(n: int) -> None:
    x = torch.randn(400, n, device="cuda").bfloat16()
    expected = reference.dct(x.double(), -1)
    plain = x @ cosine.dct_matrix(n, torch.bfloat16, x.device)
    found, _ = kernel.dct_energies(x, -1, out_dtype=torch.bfloat16)
    assert distance(found, expected) <= min(3e-3, 1.3 * distance(plain, expected))


def test_float32_is_not_multiplied_in_tf32() -> None:
    x = torch.randn(64, 1376, device="cuda")
    found, _ = kernel.dct_energies(x, -1, out_dtype=torch.float32)
    assert distance(found, reference.dct(x.double(), -1)) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_gets_the_same_bits_in_every_matrix_and_sums_the_same_each_time(dtype: torch.dtype) -> None:
    x = matrix(1000, 256, -1, dtype)
    together, energies = kernel.dct_energies(x, -1, out_dtype=torch.float32)
    for _ in range(5):
        again = kernel.dct_energies(x, -1, out_dtype=torch.float32)
        assert torch.equal(together, again[0])
        assert torch.equal(energies, again[1])
    for i, rows in ((0, 1), (999, 3), (500, 100)):
        alone, _ = kernel.dct_energies(x[i : i + 1], -1, out_dtype=torch.float32, rows=rows)
        assert torch.equal(alone[0], together[i])
    columns, sums = kernel.dct_energies(x.mT.contiguous(), -2, out_dtype=torch.float32)
    assert torch.equal(columns.mT, together)
    assert torch.equal(sums, energies)


def test_coefficients_are_rounded_to_nearest_and_sums_are_of_what_was_not() -> None:
    x = matrix(100, 4096, -1, torch.bfloat16)
    exact, energies = kernel.dct_energies(x, -1, out_dtype=torch.float32)
    torch.testing.assert_close(energies, exact.square().sum(0), rtol=1e-5, atol=0)
    found, _ = kernel.dct_energies(x, -1, out_dtype=torch.bfloat16)
    # the compiler may contract the last operations in one of both programs
    assert (found == exact.bfloat16()).float().mean() > 0.999


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_to_its_row_and_all_sums(dtype: torch.dtype) -> None:
    x = matrix(200, 256, -1, dtype)
    x[180, 7] = float("nan")
    found, energies = kernel.dct_energies(x, -1, out_dtype=dtype)
    assert found[180].isnan().all()
    assert found.isnan().sum() == 256
    assert energies.isnan().all()


@pytest.mark.parametrize("dim", [-1, -2])
def test_it_reads_its_own_elements_only(dim: int) -> None:
    memory = torch.full((600, 1100), float("nan"), device="cuda")
    for rows, columns in ((16, 32), (3, 5)):
        x = memory[rows:, columns:][:256, :256]
        x.copy_(torch.randn(256, 256))
        assert_twins(x, dim)
        x.fill_(float("nan"))


def test_it_addresses_more_elements_than_fit_32_bits() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    x = torch.empty((1 << 19) + 100, 4096, dtype=torch.bfloat16, device="cuda").normal_()
    found, _ = kernel.dct_energies(x, -1, out_dtype=torch.bfloat16)
    assert distance(found[-3:], reference.dct(x[-3:].double(), -1)) <= 3e-3


def test_it_runs_on_the_device_of_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for dim in (-1, -2):
        found, _ = assert_twins(matrix(40, 256, dim, torch.bfloat16, device="cuda:1"), dim)
        assert found.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0


def test_it_does_not_wait_for_the_device() -> None:
    for dim in (-1, -2):
        x = matrix(300, 256, dim, torch.bfloat16)
        kernel.dct_energies(x, dim, out_dtype=torch.bfloat16)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found, _ = kernel.dct_energies(x, dim, out_dtype=torch.bfloat16)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found.isfinite().all()


def test_splits_can_be_swept() -> None:
    x = matrix(300, 4096, -1, torch.bfloat16)
    for split in (DctSplit(64, 64, 4, 2), DctSplit(64, 64, 4, 4), DctSplit(128, 32, 8, 3), DctSplit(128, 32, 4, 3)):
        for rows in (1, 16, 43):
            assert_twins(x, -1, split=split, rows=rows)
