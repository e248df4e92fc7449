"""The fast DCT in Triton: against its plain twin where it runs interpreted, and compiled for absent GPUs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import cosine, reference

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import dct as kernel
from lowrank_optim.kernels._launch import DCT_SIDES, DCT_WARPS, DctSplit, dct_rows, dct_split
from tests.ahead import Built, Job, assert_fits, compiled
from tests.alone import ROOT
from tests.kernels import dct as checks
from tests.kernels.common import DTYPES, distance, interpreted, poisoned

CPU = torch.device("cpu")
# the least, no padding, padding of the first side, of both
SIZES = [16, 512, 384, 272]


@interpreted
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@poisoned("cpu")
def test_it_equals_its_twin(n: int, dtype: torch.dtype, dim: int) -> None:
    for m in (1, 7):
        found, _ = checks.assert_twins(checks.matrix(m, n, dim, dtype, device="cpu"), dim)
        assert found.stride(dim) == 1
        checks.assert_twins(checks.matrix(m, n, dim, dtype, device="cpu"), dim, ranking="l1")


@interpreted
@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [-1, -2])
@poisoned("cpu")
def test_it_equals_its_twin_on_any_strides(dim: int, dtype: torch.dtype, layout: str) -> None:
    checks.assert_twins(checks.matrix(5, 80, dim, dtype, layout, device="cpu"), dim)


@interpreted
@pytest.mark.parametrize("n", [1376, 2048, 4096, 5120, 8192])
def test_it_equals_its_twin_on_the_sizes_of_models(n: int) -> None:
    checks.assert_twins(checks.matrix(2, n, -1, torch.bfloat16, device="cpu"), -1)


@interpreted
@settings(max_examples=20, deadline=None)
@given(
    first=st.integers(1, 20),
    second=st.integers(1, 5).map(lambda i: 8 * i),
    m=st.integers(0, 9),
    rows=st.integers(1, 4),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    **checks.HOW,
)
def test_it_equals_its_twin_anywhere(
    first: int, second: int, m: int, dtypes: tuple[torch.dtype, torch.dtype], dim: int, layout: str, **how: Any
) -> None:
    dtype, out_dtype = dtypes
    x = checks.matrix(m, first * second, dim, dtype, layout, device="cpu")
    checks.assert_twins(x, dim, out_dtype=out_dtype, split=DctSplit(first, second, 1, 1), **how)


@interpreted
@pytest.mark.parametrize("n", [512, 1376, 4096])
def test_it_is_about_as_far_from_the_truth_as_a_product_in_bfloat16(n: int) -> None:
    checks.is_near(n, 4, "cpu", {torch.bfloat16: 1.3, torch.float32: 1.6})


@interpreted
def test_a_cosine_is_one_coefficient() -> None:
    for n in (48, 112):
        waves = cosine.dct_matrix(n, torch.float32, CPU)
        found, energies = kernel.dct_energies(waves.mT.contiguous(), -1, out_dtype=torch.float32)
        torch.testing.assert_close(found, torch.eye(n), rtol=0, atol=1e-6)
        torch.testing.assert_close(energies, torch.ones(n))


@interpreted
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_in_one_launch_equal_each_alone(dtype: torch.dtype, dim: int) -> None:
    checks.many_equal_each_alone(dim, dtype, "cpu")


@interpreted
def test_a_row_gets_the_same_bits_in_every_matrix_and_sums_the_same_each_time() -> None:
    checks.bits_are_the_same(9, 96, torch.bfloat16, "cpu", ((0, 1), (8, 3), (4, 100)))


@interpreted
def test_coefficients_are_rounded_to_nearest_and_sums_are_of_what_was_not() -> None:
    x = checks.matrix(4, 96, -1, torch.bfloat16, device="cpu")
    exact, energies = kernel.dct_energies(x, -1, out_dtype=torch.float32)
    torch.testing.assert_close(energies, exact.square().sum(0), rtol=1e-6, atol=0)
    for dtype in (torch.bfloat16, torch.float16):
        found, sums = kernel.dct_energies(x, -1, out_dtype=dtype)
        assert torch.equal(found, exact.to(dtype))
        assert torch.equal(sums, energies)


@interpreted
@pytest.mark.filterwarnings("ignore:.*invalid value encountered.*:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_to_its_row_and_all_sums(dtype: torch.dtype) -> None:
    checks.nan_goes_to_its_row_and_all_sums(6, 48, dtype, "cpu", rows=3)


@interpreted
@pytest.mark.parametrize("dim", [-1, -2])
def test_it_reads_its_own_elements_only(dim: int) -> None:
    checks.its_own_elements_are_read_only(16, ((4, 16), (3, 5)), dim, "cpu")


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_and_small_numbers_survive(dtype: torch.dtype) -> None:
    for scale in (1e-3, 2e3) if dtype == torch.float16 else (1e-30, 1e15):
        x = (torch.randn(4, 512) * scale).to(dtype)
        found, _ = kernel.dct_energies(x, -1, out_dtype=torch.float32)
        assert distance(found, reference.dct(x.double(), -1)) <= 3e-3


@pytest.mark.parametrize(
    ("x", "dim", "out_dtype", "message"),
    [
        (torch.ones(1, 4, 16), -1, torch.float32, r"needs matrices .* not torch.float32 of shape \(1, 4, 16\)"),
        (torch.ones(4, 16).double(), -1, torch.float32, r"float32, bfloat16 or float16.*not torch.float64 of"),
        (torch.ones(4, 16), -1, torch.float64, r"out_dtype of .*, torch.float64 and -1"),
        (torch.ones(4, 16), 1, torch.float32, r"dim -1 or -2, not .* and 1"),
        (torch.ones(4, 24), -1, torch.float32, r"needs a size .*, not 24 of torch.float32"),
        (torch.ones(10007, 4).half(), -2, torch.half, r"needs a size .*, not 10007 of torch.float16"),
    ],
)
def test_it_refuses_what_it_would_misread(x: Tensor, dim: int, out_dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.dct_energies(x, dim, out_dtype=out_dtype)


def test_it_refuses_an_unknown_ranking_and_a_split_of_another_size() -> None:
    with pytest.raises(ValueError, match="ranking 'l2' or 'l1', not 'l3'"):
        kernel.dct_energies(torch.ones(4, 16), -1, out_dtype=torch.float32, ranking="l3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"split of 32 elements, not DctSplit\(first=2, second=8"):
        kernel.dct_energies(torch.ones(4, 32), -1, out_dtype=torch.float32, split=DctSplit(2, 8, 1, 1))


def test_sizes_of_models_are_supported() -> None:
    for n in (256, 512, 768, 1024, 1376, 2048, 4096, 5120, 8192):
        assert kernel.supports(n, torch.bfloat16, CPU), n
    # a program of float32 has room for half of both sides
    for n in (256, 512, 768, 1024, 1376, 2048):
        assert kernel.supports(n, torch.float32, CPU), n
    for n in (0, 1, 8, 24, 4100, 16384):
        assert not kernel.supports(n, torch.bfloat16, CPU), n
    assert not kernel.supports(256, torch.float64, CPU)


def test_the_table_wastes_no_more_than_it_must() -> None:
    found = {n: dct_split(n, 2, CPU) for n in (16, 256, 768, 1376, 2048, 4096, 8192)}
    assert {n: split and split[:3] for n, split in found.items()} == {
        16: (2, 8, 1),
        256: (16, 16, 1),
        768: (32, 24, 2),
        1376: (43, 32, 4),
        2048: (64, 32, 4),
        4096: (64, 64, 4),
        8192: (128, 64, 8),
    }
    assert DctSplit(43, 40, 1, 1).sides == (64, 64)
    assert DctSplit(1, 8, 1, 1).sides == (16, 32)
    assert [dct_rows(m, 4) for m in (0, 1, 1024, 4096, 11008)] == [4, 4, 4, 16, 43]
    assert all(-(-m // dct_rows(m, 8)) * 8 <= DCT_WARPS for m in (1, 1000, 50257, 1 << 30))


def job(
    target: str,
    dtype: str,
    out_dtype: str,
    first: int,
    second: int,
    warps: int,
    stages: int,
    squares: bool = True,
    table: bool = False,
) -> Job:
    types = {"x_ptr": dtype, "out_ptr": out_dtype, "partial_ptr": "fp32", "first_ptr": dtype}
    types |= {"turns_ptr": "fp32", "second_ptr": dtype, "table_ptr": "i64" if table else dtype}
    side2, side1 = DctSplit(first, second, 1, 1).sides
    constants = {"N1": second, "N2": first, "SIDE1": side1, "SIDE2": side2, "SQUARES": squares, "INTERPRETED": False}
    constants["TABLE"] = table
    constants["PRECISION"] = "tf32x3" if dtype == "fp32" and target != "gfx942" else "ieee"
    return Job(
        module="dct",
        kernel="dct_kernel",
        types={name: "*" + kind for name, kind in types.items()}
        | {"m": "i32", "rows": "i32", "stride": "i32", "scale": "fp32"},
        constants=constants,
        unaligned=("m", "rows"),
        options={"num_warps": warps, "num_stages": stages},
        targets=(target,),
    )


# the largest sides of each table, and of one also with padding and as small as can be
JOBS: dict[str, Job] = {}
for target, tables in DCT_SIDES.items():
    for size, (most, other, part, stages) in tables.items():
        shapes = {"whole": (most, other), "padded": (most - 9, other - 8), "least": (2, 8)}
        if (target, size) != ("sm_90a", 2):
            shapes = {"whole": (most, other)}
        for name, (first, second) in shapes.items():
            warps = max(1, DctSplit(first, second, 1, 1).sides[0] // part)
            dtype = {2: "bf16", 4: "fp32"}[size]
            JOBS[f"{dtype} {name} {target}"] = job(target, dtype, dtype, first, second, warps, stages)
JOBS["fp16 2048 sm_90a"] = job("sm_90a", "fp16", "fp16", 64, 32, 4, 3)
JOBS["bf16 4096 sm_90a"] = job("sm_90a", "bf16", "bf16", 64, 64, 4, 3)
JOBS["bf16 many sm_90a"] = job("sm_90a", "bf16", "bf16", 64, 64, 4, 3, table=True)
JOBS["bf16 to-fp32 sm_90a"] = job("sm_90a", "bf16", "fp32", 64, 64, 4, 3, squares=False)
for dtype in ("bf16", "fp32"):
    types = {"x_ptr": "*" + dtype, "out_ptr": "*" + dtype, "table_ptr": "*i64"}
    types |= {"m": "i32", "n": "i32", "stride": "i32"}
    for kind, many in (("transpose", False), ("transposes", True)):
        constants = {"TILE": kernel._TILE, "TABLE": many}
        JOBS[f"{dtype} {kind} all"] = Job("dct", "transpose_kernel", types, constants)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    return compiled(JOBS, tmp_path_factory.mktemp("ahead"))


def test_every_shipped_configuration_compiles_without_spills_and_fits(built: dict[str, Built]) -> None:
    # those of all targets are three
    assert len(built) == len(JOBS) + 2 * sum(name.endswith(" all") for name in JOBS)
    for name, numbers in built.items():
        assert_fits(name, numbers, scalars=True)


def test_every_product_is_one_of_matrix_instructions(built: dict[str, Built]) -> None:
    for name, numbers in built.items():
        target, dtype, kind, of = name.split()
        if of == "all":
            continue
        if target == "gfx942":
            assert re.search(rf"v_mfma_f32_\w+_?{ {'fp32': 'f32', 'fp16': 'f16'}.get(dtype, dtype) }", numbers.text), (
                name
            )
            continue
        operand = {"fp32": "tf32", "fp16": "f16"}.get(dtype, dtype)
        warpgroups = target == "sm_90a" and kind != "least"
        form = r"wgmma\.mma_async\S+\.f32\.{0}\.{0}" if warpgroups else r"mma\.sync\.\S+\.f32\.{0}\.{0}\.f32"
        assert re.search(form.format(operand), numbers.text), name
        # one of each product would be of no use without the others
        assert ("mma.sync" in numbers.text) != warpgroups, name


def test_rows_are_read_and_half_of_the_coefficients_written_in_whole_vectors(built: dict[str, Built]) -> None:
    ptx = built["sm_90a bf16 4096 sm_90a"].text
    # 2 · 4096 bytes by 128 threads, once before each stage but the last and once in the loop
    assert len(re.findall(r"cp\.async\.cg\.shared\.global .+, 0x10", ptx)) == 3 * 4
    assert "ld.global.b16" not in ptx
    # and the sums
    assert ptx.count("st.global.v4.b32") == 2 + 4
    for dtype in ("bf16", "fp32"):
        assert "ld.global.v4.b32" in built[f"sm_90a {dtype} transpose all"].text
        assert "st.global.v4.b32" in built[f"sm_90a {dtype} transpose all"].text
        assert re.search("(?:global|buffer)_store_dwordx4", built[f"gfx942 {dtype} transpose all"].text)


def test_a_row_goes_through_registers_between_its_two_transforms(built: dict[str, Built]) -> None:
    """Both second operands come from registers; only coefficients go through shared memory, in their own dtype."""
    text = built["sm_90a bf16 4096 sm_90a"].text
    loop = text[text.index("wgmma.mma_async") : text.rindex("wgmma.mma_async")]
    assert not re.search(r"\b(?:st|ld)\.shared|stmatrix|ldmatrix", loop)


def test_what_ships_is_what_is_imported() -> None:
    assert Path(kernel.__file__).resolve() == ROOT / "kernels" / "dct.py"
