"""Symmetric products on the hardware that the kernel is written for, against their plain twin."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_optim import backend, ops, orthogonalize, reference_matrix
from lowrank_optim.coefficients import table

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import symmetric as kernel
from lowrank_optim.kernels._launch import ODD_TILES, TILES, Tiles, architecture
from tests.kernels import symmetric as checks
from tests.kernels.common import DTYPES, few, hardware, need_memory, no_waiting, poisoned, second_device, shapes_seen

pytestmark = hardware

DEVICE = "cuda"
# (matrices, n, k): one element, odd, nothing to add up, whole tiles of either side, a long K of few rows, tiles and a
# rest. Each kind is compiled anew, which takes longer than it runs: all of them are where kernels are interpreted
SHAPES = [(1, 1, 1), (3, 17, 0), (5, 256, 4096), (1, 48, 50257), (2, 511, 4099), (1, 1024, 2048), (1, 1037, 1111)]
CASES = [
    *[(shape, torch.bfloat16, "contiguous") for shape in SHAPES],
    *[((3, 33, 70), torch.bfloat16, layout) for layout in ("contiguous", "transposed", "sliced", "expanded")],
    *[((2, 256, 320), torch.bfloat16, layout) for layout in ("transposed", "expanded")],
    ((3, 33, 70), torch.float32, "transposed"),
    ((3, 33, 70), torch.float16, "sliced"),
    ((3, 1200, 320), torch.float32, "contiguous"),
    ((2, 256, 320), torch.float16, "transposed"),
]


@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES, ids=str)
@poisoned(DEVICE)
def test_it_equals_its_twin(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> None:
    a, c = checks.matrices(shape, dtype, layout, device=DEVICE)
    checks.assert_twins(a, a, c, alpha=-0.7, beta=2.5, gamma=1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@poisoned(DEVICE)
def test_it_equals_its_twin_without_c(dtype: torch.dtype) -> None:
    a, _ = checks.matrices((3, 33, 70), dtype, device=DEVICE)
    checks.assert_twins(a, a, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "parts"), [((2, 192, 704), (1, 2, 7)), ((3, 65, 333), (2,))], ids=str)
@poisoned(DEVICE)
def test_every_tile_computes_every_shape(
    shape: tuple[int, int, int], parts: tuple[int, ...], dtype: torch.dtype
) -> None:
    a, c = checks.matrices(shape, dtype, device=DEVICE)
    for tiles in (*TILES[architecture(a.device)][a.itemsize].values(), ODD_TILES[a.itemsize]):
        for count in parts:
            checks.assert_twins(a, a, c, alpha=0.5, gamma=2.0, tiles=tiles, parts=count)


@few
@given(
    shape=st.sampled_from([(2, 128, 320), (3, 65, 333), (2, 0, 5)]),
    parts=st.none() | st.integers(1, 5),
    numbers=checks.NUMBERS,
    with_c=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed"]),
)
def test_it_equals_its_twin_anywhere(
    shape: tuple[int, int, int], parts: int | None, numbers: dict[str, float], with_c: bool, layout: str
) -> None:
    a, c = checks.matrices(shape, torch.bfloat16, layout, device=DEVICE)
    # the same numbers on other strides
    b = a.clone(memory_format=torch.contiguous_format)
    checks.assert_twins(a, b, c if with_c else None, **numbers, parts=parts)


@pytest.mark.parametrize(
    ("n", "dtype", "parts"),
    [
        (100, torch.bfloat16, 2),
        (100, torch.float32, 1),
        (100, torch.float16, 1),
        (1024, torch.bfloat16, 1),
        (1024, torch.bfloat16, 2),
    ],
    ids=str,
)
def test_of_what_does_not_commute_the_lower_triangle_is_kept_and_mirrored(
    n: int, dtype: torch.dtype, parts: int
) -> None:
    checks.lower_triangle_is_mirrored(n, dtype, DEVICE, parts=parts)


def test_float32_is_not_multiplied_in_tf32() -> None:
    # 1 + 2⁻¹² is 1 there, and float32 holds all sums of it
    a = torch.full((1, 64, 64), 1 + 2.0**-12, device=DEVICE)
    found = kernel.symmetric(a, torch.ones_like(a))
    assert torch.equal(found, torch.full_like(found, 64 * (1 + 2.0**-12)))


def test_bfloat16_is_rounded_to_nearest_and_to_even() -> None:
    checks.bfloat16_is_nearest_and_even(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_to_its_row_and_column_and_what_is_not_read_does_not_matter(dtype: torch.dtype) -> None:
    checks.nan_goes_to_its_row_and_column(200, dtype, DEVICE)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 256, 4096), torch.bfloat16), ((5, 256, 4096), torch.float32), ((4, 1024, 512), torch.float16)],
    ids=str,
)
def test_a_matrix_gets_the_same_bits_each_time_and_in_every_stack(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    checks.bits_are_the_same(shape, dtype, DEVICE, times=5)


def test_it_reads_its_own_elements_only() -> None:
    checks.its_own_elements_are_read_only(333, 695, DEVICE, (1, 3))


@pytest.mark.parametrize("large", ["result", "operand"])
def test_it_addresses_more_elements_than_fit_32_bits(large: str) -> None:
    shape = (1, 46400, 64) if large == "result" else (3, 1024, 1 << 20)
    need_memory(12)
    a = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_()
    last = kernel.symmetric(a, a)[-1, -1]
    expected = a[-1].float() @ a[-1, -1].float()
    # tensor cores cut off what they add to a sum, and a million squares have one sign
    assert (last - expected).abs().max() <= (2.0**-8 if large == "result" else 2.0**-7) * expected.abs().max()


def test_it_runs_on_the_device_of_its_tensors() -> None:
    with second_device() as device:
        a, c = checks.matrices((2, 100, 900), torch.bfloat16, device=device)
        assert checks.assert_twins(a, a, c).device == a.device
        with pytest.raises(ValueError, match="needs c of .* on cuda:1, not .* on cuda:0"):
            kernel.symmetric(a, a, c.to("cuda:0"))


def test_a_product_does_not_wait_for_the_device() -> None:
    for shape in ((2, 100, 900), (1, 1024, 64)):
        a, c = checks.matrices(shape, torch.bfloat16, device=DEVICE)
        kernel.symmetric(a, a, c)
        with no_waiting():
            found = kernel.symmetric(a, a, c)
        assert found.isfinite().all()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that the kernel was given."""
    return shapes_seen(monkeypatch, kernel, "symmetric")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *[((4, 256, 1024), dtype) for dtype in DTYPES],
        ((1, 1500, 1100), torch.bfloat16),
        ((3, 77, 300), torch.bfloat16),
        ((3, 77, 300), torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize(("method", "products"), [("newton_schulz", 10), ("gram", 12)])
def test_orthogonalizing_on_the_kernel_is_no_farther_from_the_truth(
    method: Any, products: int, shape: tuple[int, int, int], dtype: torch.dtype, seen: list[tuple[int, ...]]
) -> None:
    x = torch.randn(shape, device=DEVICE).to(dtype)
    exact = orthogonalize(x.double(), method="newton_schulz")
    with backend("torch"):
        plain = orthogonalize(x, method=method)
    assert seen == []
    # auto takes the kernel for some products
    quick = orthogonalize(x, method=method)
    seen.clear()
    with backend("triton"):
        found = orthogonalize(x, method=method)
    # where the Gram form has nothing to save in half precision it begins anew at each step
    oblong = max(shape[1:]) >= 1.75 * min(shape[1:])
    assert len(seen) == (products if oblong or dtype == torch.float32 else 10)
    error, quick_error, plain_error = ((y.double() - exact).norm() / exact.norm() for y in (found, quick, plain))
    assert max(error, quick_error) <= 2 * plain_error + 1e-6


@pytest.mark.parametrize(("name", "restarts", "factor"), checks.RESTARTS)
def test_small_singular_values_survive_the_gram_form(name: str, restarts: tuple[int, ...], factor: float) -> None:
    checks.small_singular_values_survive(name, restarts, factor, DEVICE)


def test_a_step_equals_that_of_a_cpu() -> None:
    """But for the order of sums."""
    r = reference_matrix.normalized(torch.randn(2, 96, 200), eps=0.0, dtype=torch.float32)
    a, b, c = table("you")[0]
    expected = reference_matrix.newton_schulz(r, [(a, b, c)], reference_matrix.Whole())
    with backend("triton"):
        found = ops.newton_schulz(r.to(DEVICE), [(a, b, c)], ops.Whole()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_tiles_can_be_swept() -> None:
    a, _ = checks.matrices((1, 300, 300), torch.float16, device=DEVICE)
    for side, depth, warps in ((64, 32, 4), (128, 32, 8), (128, 64, 4)):
        checks.assert_twins(a, a, None, tiles=Tiles(side, depth, warps, 2))
