"""The Gram recursion on the hardware that the kernel is written for, against its plain twin."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_optim import reference_matrix, reference_recursion
from lowrank_optim.coefficients import table

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import recursion as kernel
from lowrank_optim.kernels._launch import RECURSIONS, Tiles
from tests.kernels import recursion as checks
from tests.kernels.common import READABLE, few, hardware, no_waiting, poisoned, second_device

pytestmark = hardware

DEVICE = "cuda"
# (matrices, n): one element, each padded side exactly, one less and one more, and more programs than run at once
SHAPES = [(1, 1), (5, 2), (5, 15), (1, 16), (5, 17), (3, 32), (1, 48), (7, 64), (2, 65), (1, 100), (300, 128)]
# the others are compiled anew, which takes longer than it runs: all of them are where kernels are interpreted
CASES = [
    *[(shape, torch.float32) for shape in SHAPES],
    *[(shape, dtype) for shape in ((5, 17), (7, 64), (300, 128)) for dtype in (torch.bfloat16, torch.float16)],
]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@poisoned(DEVICE)
def test_it_equals_its_twin(shape: tuple[int, int], dtype: torch.dtype) -> None:
    checks.assert_twins(checks.gram(*shape, device=DEVICE), dtype=dtype)


@pytest.mark.parametrize("layout", READABLE)
@pytest.mark.parametrize("n", [33, 64, 128])
@poisoned(DEVICE)
def test_it_equals_its_twin_on_any_strides(n: int, layout: str) -> None:
    checks.assert_twins(checks.gram(3, n, layout, device=DEVICE))


@few
@given(
    shape=st.tuples(st.integers(0, 3), st.sampled_from([0, 13, 33, 48])),
    **checks.HOW
    | {
        "steps": st.sampled_from([None, 2]),
        "layout": st.sampled_from(["contiguous", "transposed"]),
        "dtype": st.just(torch.float32),
    },
)
def test_it_equals_its_twin_anywhere(**case: Any) -> None:
    checks.anywhere(**case, device=DEVICE)


@pytest.mark.parametrize("name", checks.ONCE)
@pytest.mark.parametrize("n", [24, 64, 100, 128])
def test_it_makes_polynomials_of_singular_values(n: int, name: str) -> None:
    checks.is_a_polynomial_of_singular_values(n, name, DEVICE)


@pytest.mark.parametrize("name", checks.ONCE)
@pytest.mark.parametrize("n", [16, 48, 100, 128])
def test_it_needs_no_restart(n: int, name: str) -> None:
    """In tf32, without the other two products, errors would be up to 1."""
    for kind, x in checks.spectra(n, DEVICE).items():
        exact = reference_matrix.newton_schulz(x.double(), table(name), reference_matrix.Whole())
        q = kernel.gram_recursion(checks.exact_gram(x), table(name))
        error = float((q.double() @ x.double() - exact).norm() / exact.norm())
        assert error <= 1e-2, (kind, error)


@pytest.mark.parametrize("n", [5, 16, 33, 64, 128])
def test_zeros_give_the_product_of_the_slopes(n: int) -> None:
    checks.zeros_give_the_product_of_the_slopes(n, DEVICE)


@pytest.mark.parametrize("n", [20, 64, 128])
def test_nan_stays_in_its_matrix(n: int) -> None:
    checks.nan_stays_in_its_matrix(n, DEVICE)


@pytest.mark.parametrize("n", [20, 64, 128])
def test_a_matrix_gets_the_same_bits_each_time_and_in_every_stack(n: int) -> None:
    """A barrier that is missing would be seen here."""
    checks.bits_are_the_same(500, n, DEVICE, (0, 123, 499), times=10)


def test_it_reads_its_own_elements_only() -> None:
    for n in (33, 100):
        checks.its_own_elements_are_read_only(n, DEVICE)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("tiles", [*RECURSIONS[:3], Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 2)], ids=str)
def test_tiles_and_precision_can_be_swept(tiles: Tiles, precision: kernel.Precision) -> None:
    if precision == "ieee" and tiles.side * tiles.depth > 1024:
        pytest.skip("takes long to compile")
    r = checks.gram(3, tiles.side, device=DEVICE)
    expected = reference_recursion.gram_recursion(r.double(), table("you"))
    found = kernel.gram_recursion(r, table("you"), tiles=tiles, precision=precision)
    assert (found - expected).abs().max() <= 3e-5 * expected.abs().max()


def test_it_runs_on_the_device_of_its_tensors() -> None:
    with second_device() as device:
        r = checks.gram(2, 40, device=device)
        assert checks.assert_twins(r).device == r.device


def test_a_second_call_does_not_wait_for_the_device() -> None:
    r = checks.gram(2, 64, device=DEVICE)
    kernel.gram_recursion(r, table("you"))
    with no_waiting():
        found = kernel.gram_recursion(r, table("you"))
    assert found.isfinite().all()
