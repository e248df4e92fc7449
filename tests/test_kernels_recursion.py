"""The Gram recursion in Triton: against its plain twin where it runs interpreted, and compiled for absent GPUs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference_matrix, reference_recursion
from lowrank_optim.coefficients import REGISTRY, table

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import recursion as kernel
from lowrank_optim.kernels._launch import HOPPER_RECURSIONS, RECURSIONS, Tiles
from tests.ahead import SHARED, Built, Job, assert_fits, compiled
from tests.alone import ROOT
from tests.kernels import recursion as checks
from tests.kernels.common import DTYPES, READABLE, interpreted, poisoned

# (matrices, n): one element, each padded side exactly, one less and one more, and what is far from any
SHAPES = [(1, 1), (5, 2), (5, 15), (1, 16), (5, 17), (1, 48), (1, 64), (2, 65), (1, 128)]


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@poisoned("cpu")
def test_it_equals_its_twin(shape: tuple[int, int], dtype: torch.dtype) -> None:
    checks.assert_twins(checks.gram(*shape, device="cpu"), dtype=dtype)


@interpreted
@pytest.mark.parametrize("layout", READABLE)
@pytest.mark.parametrize("n", [16, 33])
@poisoned("cpu")
def test_it_equals_its_twin_on_any_strides(n: int, layout: str) -> None:
    checks.assert_twins(checks.gram(3, n, layout, device="cpu"))


@interpreted
@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(st.integers(0, 3), st.integers(0, 40)), **checks.HOW)
def test_it_equals_its_twin_anywhere(**case: Any) -> None:
    checks.anywhere(**case, device="cpu")


@pytest.mark.parametrize("name", REGISTRY)
def test_the_twin_is_the_gram_form_without_restarts(name: str) -> None:
    x = checks.normalized(torch.randn(3, 12, 40, dtype=torch.float64))
    expected = reference_matrix.gram_newton_schulz(x, table(name), (), reference_matrix.Whole())
    found = reference_recursion.gram_recursion(x @ x.mT, table(name)) @ x
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(reference_recursion.gram_recursion(x @ x.mT, ()), torch.eye(12).double().expand(3, 12, 12))


@interpreted
@pytest.mark.parametrize("name", checks.ONCE)
@pytest.mark.parametrize("n", [24, 100])
def test_it_makes_polynomials_of_singular_values(n: int, name: str) -> None:
    checks.is_a_polynomial_of_singular_values(n, name, "cpu")


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of 10 bits after the point that tensor cores are given for a float32."""
    high = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return high, ((x - high).view(torch.int32) & ~0x1FFF).view(torch.float32)


def in_three_products(a: Tensor, b: Tensor) -> Tensor:
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    return a_low @ b_high + a_high @ b_low + a_high @ b_high


def recursion_in_three_products(r: Tensor, name: str) -> Tensor:
    """Return what NVIDIA's tensor cores make of the recursion."""
    identity = torch.eye(r.size(-1))
    q = identity.expand_as(r)
    for a, b, c in table(name):
        w = a * identity + b * r + c * in_three_products(r, r)
        q = in_three_products(q, w)
        r = in_three_products(in_three_products(r, w), w)
    return q


@interpreted
@pytest.mark.parametrize("name", checks.ONCE)
@pytest.mark.parametrize("n", [48, 100])
def test_neither_it_nor_what_tensor_cores_make_of_it_needs_a_restart(n: int, name: str) -> None:
    for kind, x in checks.spectra(n, "cpu").items():
        exact = reference_matrix.newton_schulz(x.double(), table(name), reference_matrix.Whole())
        plain = reference_matrix.newton_schulz(x, table(name), reference_matrix.Whole())
        r = x.float() @ x.float().mT
        for q in (kernel.gram_recursion(r, table(name)), recursion_in_three_products(r, name)):
            error, plain_error = (float((y.double() - exact).norm() / exact.norm()) for y in (q @ x.float(), plain))
            # beside the standard form in bfloat16, which is off by up to 0.2
            assert error <= min(2e-3, plain_error / 3), (kind, error, plain_error)


@interpreted
@pytest.mark.parametrize("n", [5, 16, 33])
def test_zeros_give_the_product_of_the_slopes(n: int) -> None:
    checks.zeros_give_the_product_of_the_slopes(n, "cpu")


@interpreted
@pytest.mark.filterwarnings("ignore:.*invalid value encountered.*:RuntimeWarning")
def test_nan_stays_in_its_matrix() -> None:
    checks.nan_stays_in_its_matrix(20, "cpu")


@interpreted
def test_a_matrix_gets_the_same_bits_in_every_stack() -> None:
    checks.bits_are_the_same(3, 20, "cpu", (0, 1, 2))


@interpreted
def test_it_reads_its_own_elements_only() -> None:
    checks.its_own_elements_are_read_only(33, "cpu")


@interpreted
def test_tiles_and_precision_can_be_swept() -> None:
    r = checks.gram(1, 20, device="cpu")
    expected = kernel.gram_recursion(r, table("you"))
    for tiles in (Tiles(32, 16, 1, 1), Tiles(64, 32, 4, 2)):
        for precision in ("ieee", "tf32x3"):
            found = kernel.gram_recursion(r, table("you"), tiles=tiles, precision=precision)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_triples_are_brought_to_a_device_once() -> None:
    device = torch.device("cpu")
    first = kernel._coefficients(table("you"), device)
    assert first is kernel._coefficients(table("you"), device)
    assert torch.equal(first, torch.tensor(table("you")))


@pytest.mark.parametrize(
    ("r", "triples", "how", "message"),
    [
        (torch.ones(4, 4), [(1, 1, 1)], {}, r"needs r of shape \(b, n, n\).*not torch.float32 of shape \(4, 4\)"),
        (torch.ones(1, 4, 5), [(1, 1, 1)], {}, r"not torch.float32 of shape \(1, 4, 5\)"),
        (torch.ones(1, 129, 129), [(1, 1, 1)], {}, r"n <= 128, and float32, not torch.float32 of shape \(1, 129, 129"),
        (torch.ones(1, 4, 4).half(), [(1, 1, 1)], {}, r"and float32, not torch.float16 of shape"),
        (torch.ones(1, 4, 4), [], {}, r"needs at least one triple \(a, b, c\), not \[\]"),
        (torch.ones(1, 4, 4), [(1, 1)], {}, r"needs at least one triple \(a, b, c\), not \[\(1, 1\)\]"),
        (torch.ones(1, 4, 4), [(1, 1, 1)], {"dtype": torch.float64}, r"float32, bfloat16 or float16, not torch.float6"),
        (torch.ones(1, 20, 20), [(1, 1, 1)], {"tiles": RECURSIONS[0]}, r"needs tiles of a side >= 20, not Tiles\(side"),
    ],
)
def test_it_refuses_what_it_would_misread(r: Tensor, triples: list, how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.gram_recursion(r, triples, **how)


def test_the_table_is_whole() -> None:
    assert [tiles.side for tiles in RECURSIONS] == [16, 32, 64, 128]
    assert all(tiles.side % tiles.depth == 0 and tiles.depth >= 16 for tiles in RECURSIONS)
    assert all(tiles.side == side for side, tiles in HOPPER_RECURSIONS.items())
    assert kernel.LARGEST == 128


NVIDIA = ("sm_80", "sm_90a")


def jobs() -> dict[str, Job]:
    """The kernel as launched for R from torch's allocator, for odd strides, and for one element."""
    types = {"r_ptr": "*fp32", "triples_ptr": "*fp32", "kept_ptr": "*fp32"}
    types |= dict.fromkeys(("n", "r_batch", "r_row", "r_column"), "i32")
    work = {}
    shipped = [(tiles, *how) for tiles in RECURSIONS for how in ((NVIDIA, "tf32x3"), (("gfx942",), "ieee"))]
    shipped += [(tiles, ("sm_90a",), "tf32x3") for tiles in HOPPER_RECURSIONS.values()]
    for tiles, targets, precision in shipped:
        for kind, out in (("aligned", "*fp32"), ("odd", "*bf16")):
            constants = {"SIDE": tiles.side, "DEPTH": tiles.depth, "PRECISION": precision}
            constants |= {"STEPS": 5, "INTERPRETED": False} | ({"r_column": 1} if kind == "aligned" else {})
            odd = ("n", "r_batch", "r_row", "r_column") if kind == "odd" else ()
            options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
            name = f"{tiles.side} {kind} {out} {precision} by {tiles.depth}"
            work[name] = Job(
                "recursion", "recursion_kernel", types | {"out_ptr": out}, constants, odd, options, targets
            )
    ones = constants | dict.fromkeys(("n", "r_batch", "r_row", "r_column"), 1) | {"STEPS": 1, "SIDE": 16, "DEPTH": 16}
    work["one element"] = Job("recursion", "recursion_kernel", types | {"out_ptr": "*fp32"}, ones, targets=("sm_90a",))
    return work


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    return compiled(jobs(), tmp_path_factory.mktemp("ahead"))


def test_every_shipped_configuration_compiles_without_spills_and_fits(built: dict[str, Built]) -> None:
    assert len(built) == len(RECURSIONS) * len(SHARED) * 2 + len(HOPPER_RECURSIONS) * 2 + 1
    for name, numbers in built.items():
        # AMD's scalars go to lanes of vector registers, and nothing to memory
        assert_fits(name, numbers, scalars=True)


def test_every_product_is_one_of_matrix_instructions(built: dict[str, Built]) -> None:
    for name, numbers in built.items():
        target, side, *_ = name.split()
        if side == "one":
            continue
        if target == "gfx942":
            assert re.search(r"v_mfma_f32_\w+f32", numbers.text), name
            continue
        # four products, three times each; the rows of a warp group's own instruction are 64
        wide = target == "sm_90a" and int(side) >= 64
        kind = r"wgmma\.mma_async\S+\.tf32\.tf32" if wide else r"mma\.sync\S+\.tf32\.tf32"
        assert len(re.findall(kind, numbers.text)) >= 12, name


def test_matrices_are_read_in_whole_vectors(built: dict[str, Built]) -> None:
    for name, numbers in built.items():
        target, side, *_ = name.split()
        # of smaller ones some threads have less than a vector
        if side in ("64", "128"):
            # two of each product, whatever the strides of R; not by way of a pipeline where there is one piece only
            copied = r"cp\.async\.cg\.\S+ \[.+\], \[.+\], 0x10|ld\.global\.v4\.b32"
            wide = r"(?:buffer|global)_load_dwordx4" if target == "gfx942" else copied
            assert len(re.findall(wide, numbers.text)) >= 8, name


def test_what_ships_is_what_is_imported() -> None:
    assert Path(kernel.__file__).resolve() == ROOT / "kernels" / "recursion.py"
