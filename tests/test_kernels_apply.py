"""How weights are written in Triton: against plain twins where kernels run interpreted, and compiled for no GPU."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import _rounding, apply, factored_add
from lowrank_optim.kernels._launch import (
    ELEMENTWISE,
    ODD_PRODUCT_TILES,
    PRODUCT_TILES,
    STRIDED_TILE,
    ProductTiles,
    product_tiles_for,
)
from tests.ahead import Built, Job, assert_fits, compiled
from tests.alone import ROOT
from tests.kernels import apply as checks
from tests.kernels.common import DTYPES, LAYOUTS, interpreted

SMALL = ProductTiles(16, 32, 16, 2, 1, 1)
# the halves of its tiles are written one after the other
HALVED = ProductTiles(32, 128, 32, 2, 1, 1)
SEEDS = [None, 0, 2**31 - 3, 2**40 + 12345]
# of a weight, in units of its largest number: half a place, or a whole one where chance decides, and sums in float32
PLACES = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("seed", checks.ROUNDING_SEEDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_rounded_to_the_very_bits_of_the_reference(dtype: torch.dtype, seed: int) -> None:
    checks.rounds_to_the_bits_of_the_reference(checks.special(), dtype, seed)


@interpreted
@pytest.mark.parametrize("tiles", [SMALL, HALVED], ids=["small", "halved"])
@pytest.mark.parametrize("factors", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 130, 19), (5, 64, 0)], ids=str)
def test_a_sum_equals_its_twin(
    shape: tuple[int, int, int], dtype: torch.dtype, factors: torch.dtype, tiles: ProductTiles
) -> None:
    m, n, r = shape
    product = checks.whole(m, r, device="cpu").to(factors), checks.whole(r, n, device="cpu").to(factors)
    for seed in SEEDS[::2]:
        checks.assert_sum(
            checks.weight((m, n), dtype, device="cpu"), product, None, lr=0.25, weight_decay=0.5, seed=seed, tiles=tiles
        )


@interpreted
@pytest.mark.parametrize("which", ["rows", "columns", "one", "alone"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scaled_matrix_is_added_too(dtype: torch.dtype, which: str) -> None:
    for tiles in (SMALL, HALVED):
        for layout in LAYOUTS:
            checks.a_scaled_matrix_is_added((20, 70, 5), dtype, which, layout, "cpu", tiles=tiles)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_takes_any_strides_and_its_noise_goes_by_rows(dtype: torch.dtype, layout: str) -> None:
    for left in LAYOUTS:
        product = (
            LAYOUTS[left](checks.whole(40, 21, device="cpu").to(dtype)),
            LAYOUTS[layout](checks.whole(21, 37, device="cpu").to(dtype)),
        )
        param = checks.weight((40, 37), dtype, layout, device="cpu")
        checks.assert_sum(param, product, None, lr=0.125, weight_decay=1.0, seed=11, tiles=SMALL)


@interpreted
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(160, 144, 80), (70, 131, 67)], ids=str)
def test_a_sum_equals_its_twin_as_shipped(shape: tuple[int, int, int], factors: torch.dtype) -> None:
    m, n, r = shape
    product = checks.whole(m, r, device="cpu").to(factors), checks.whole(n, r, device="cpu").to(factors).mT
    for precision in ("ieee", "tf32x3"):
        param = checks.weight((m, n), torch.bfloat16, device="cpu")
        checks.assert_sum(param, product, None, lr=0.25, weight_decay=0.5, seed=1, precision=precision)


@interpreted
@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(0, 80), st.integers(0, 40)),
    dtype=st.sampled_from(DTYPES),
    factors=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    seed=st.sampled_from(SEEDS),
    on_device=st.booleans(),
    group=st.integers(1, 4),
    **checks.RATES,
)
def test_a_sum_equals_its_twin_anywhere(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    factors: torch.dtype,
    layouts: tuple[str, str, str],
    seed: int | None,
    lr: float,
    weight_decay: float,
    on_device: bool,
    group: int,
) -> None:
    m, n, r = shape
    param = checks.weight((m, n), dtype, layouts[0], device="cpu")
    product = (
        LAYOUTS[layouts[1]](checks.whole(m, r, device="cpu").to(factors)),
        LAYOUTS[layouts[2]](checks.whole(r, n, device="cpu").to(factors)),
    )
    rate = torch.tensor(lr) if on_device else lr
    tiles = SMALL._replace(group=group)
    checks.assert_sum(param, product, None, lr=rate, weight_decay=weight_decay, seed=seed, tiles=tiles)


@interpreted
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_of_any_numbers_is_as_near_as_its_dtype_allows(dtype: torch.dtype, seed: int | None) -> None:
    left, right, matrix, factors = torch.randn(50, 33), torch.randn(33, 70), torch.randn(50, 70), torch.randn(50, 1)
    param = torch.randn(50, 70).to(dtype)
    expected = param.double() * (1 - 1e-2 * 0.3) - 1e-2 * (left.double() @ right.double() + matrix * factors.double())
    for lr in (1e-2, torch.tensor(1e-2)):
        found = param.clone()
        factored_add.apply_sum_(
            found, (left, right), (matrix, factors), lr=lr, weight_decay=0.3, seed=seed, tiles=HALVED
        )
        assert (found - expected).abs().max() <= PLACES[dtype] * (1 if seed is None else 2) * expected.abs().max()


@interpreted
@pytest.mark.parametrize("transposed", [False, True])
def test_a_sum_reads_and_writes_its_own_elements_only(transposed: bool) -> None:
    checks.a_sum_keeps_to_its_own_elements((40, 70, 19), "cpu", transposed, tiles=SMALL)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_go_where_they_belong(dtype: torch.dtype, seed: int | None) -> None:
    left, right = torch.ones(20, 4), torch.ones(4, 40)
    left[7], right[0, 9] = float("nan"), float("inf")
    param = torch.zeros(20, 40, dtype=dtype)
    factored_add.apply_sum_(param, (left, right), None, lr=1.0, weight_decay=0.0, seed=seed, tiles=SMALL)
    assert torch.equal(param.isnan().nonzero()[:, 0], torch.full((40,), 7))
    assert torch.equal(param.isinf().nonzero()[:, 1], torch.full((19,), 9))


@interpreted
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("updates", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1000,), (3, 5), (1, 1), (2, 3, 4), (100, 129)], ids=str)
def test_a_dense_update_equals_its_twin(
    shape: tuple[int, ...], dtype: torch.dtype, updates: torch.dtype, cautious: bool
) -> None:
    for seed in SEEDS[::2]:
        update = checks.whole(*shape, device="cpu").to(updates)
        checks.assert_applied(
            checks.weight(shape, dtype, device="cpu"), update, lr=0.25, weight_decay=0.5, seed=seed, cautious=cautious
        )


@interpreted
@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 90), min_size=2, max_size=2).map(tuple),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
    seed=st.sampled_from(SEEDS),
    on_device=st.booleans(),
    cautious=st.booleans(),
    **checks.RATES,
)
def test_a_dense_update_equals_its_twin_anywhere(
    shape: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    layouts: tuple[str, str],
    seed: int | None,
    lr: float,
    weight_decay: float,
    on_device: bool,
    cautious: bool,
) -> None:
    param, update = (
        checks.weight(shape, dtypes[0], layouts[0], device="cpu"),
        LAYOUTS[layouts[1]](checks.whole(*shape, device="cpu").to(dtypes[1])),
    )
    rate = torch.tensor(lr) if on_device else lr
    checks.assert_applied(
        param, update, lr=rate, weight_decay=weight_decay, seed=seed, cautious=cautious, shape=(256, 1)
    )


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dense_update_writes_its_own_elements_only(dtype: torch.dtype) -> None:
    memory = torch.full((3, 1000), float("nan"), dtype=dtype)
    for param in (memory[1], memory[1, 3:900], memory[1, 1:901:2], memory[:, 500:900:3].mT[1:130]):
        param.copy_(checks.weight(tuple(param.shape), dtype, device="cpu"))
        checks.assert_applied(param, checks.whole(*param.shape, device="cpu"), lr=0.5, weight_decay=0.25, seed=9)
        assert memory.isfinite().sum() == param.numel()
        param.fill_(float("nan"))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_four_dimensions_are_written_in_their_own_order(dtype: torch.dtype) -> None:
    param = checks.weight((4, 3, 5, 5), dtype, device="cpu")
    # channels first in memory: rows of a view of two dimensions still follow one another in the weight
    param = param.transpose(0, 1).contiguous().transpose(0, 1).reshape(4, 3, 25)[..., :1].unsqueeze(-1)
    checks.assert_applied(param, checks.whole(*param.shape, device="cpu"), lr=0.5, weight_decay=0.25, seed=9)


GOOD: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        pytest.param(torch.ones(5, 2), torch.ones(2, 6), r"needs left of shape \(4, 2\), .*not .* \(5, 2\)", id="left"),
        pytest.param(torch.ones(4, 2), torch.ones(3, 6), r"needs right of shape \(2, 6\), .*\(3, 6\)", id="right"),
        pytest.param(torch.ones(4, 2), torch.ones(2, 6).half(), "float32 and on cpu, not torch.float16", id="dtypes"),
        pytest.param(torch.ones(4, 2).double(), torch.ones(2, 6).double(), "not torch.float64", id="double"),
    ],
)
def test_a_sum_refuses_factors_that_it_would_misread(left: Tensor, right: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factored_add.apply_sum_(torch.ones(4, 6), (left, right), None, **GOOD)


def test_a_sum_refuses_what_it_would_misread() -> None:
    param, product = torch.ones(4, 6), (torch.ones(4, 2), torch.ones(2, 6))
    with pytest.raises(ValueError, match="needs a product or a scaled matrix"):
        factored_add.apply_sum_(param, None, None, **GOOD)
    with pytest.raises(ValueError, match="needs a weight of two dimensions, not of shape"):
        factored_add.apply_sum_(torch.ones(4), product, None, **GOOD)
    with pytest.raises(ValueError, match="precision must be 'ieee' or 'tf32x3', not 'tf32'"):
        factored_add.apply_sum_(param, product, None, precision="tf32", **GOOD)
    with pytest.raises(ValueError, match=r"needs matrix of shape \(4, 6\)"):
        factored_add.apply_sum_(param, product, (param.mT, torch.ones(4, 1)), **GOOD)
    for factors in (torch.ones(6, 1), torch.ones(1, 4), torch.ones(4)):
        with pytest.raises(ValueError, match=r"needs factors of shape"):
            factored_add.apply_sum_(param, product, (param, factors), **GOOD)


@pytest.mark.parametrize(
    ("param", "lr", "message"),
    [
        pytest.param(torch.ones(4, 6).double(), 0.1, "not of torch.float64", id="double"),
        pytest.param(
            torch.ones(1, 6).expand(4, 6), 0.1, r"a place for each element, .* strides \(0, 1\)", id="expanded"
        ),
        pytest.param(torch.ones(4, 6), torch.ones(1), r"lr as a number .*not torch.float32 of shape \(1,\)", id="lr"),
        pytest.param(torch.ones(4, 6), torch.tensor(1), r"lr as a number .*not torch.int64", id="whole"),
    ],
)
def test_weights_and_rates_that_would_be_misread_are_refused(param: Tensor, lr: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factored_add.apply_sum_(param, (torch.ones(4, 2), torch.ones(2, 6)), None, lr=lr, weight_decay=0.0)
    with pytest.raises(ValueError, match=message):
        apply.apply_(param, torch.ones(4, 6), lr=lr, weight_decay=0.0)


def test_a_dense_update_refuses_what_it_would_misread() -> None:
    for update in (torch.ones(6, 4), torch.ones(4, 6).double(), torch.ones(24)):
        with pytest.raises(ValueError, match=r"needs an update of shape \(4, 6\) and float32"):
            apply.apply_(torch.ones(4, 6), update, **GOOD)
    with pytest.raises(ValueError, match="can be viewed as a matrix, not one of shape"):
        apply.apply_(torch.ones(4, 5, 6, 7).permute(0, 2, 1, 3), torch.ones(4, 6, 5, 7), **GOOD)


def test_the_table_goes_by_how_operands_are_read() -> None:
    for itemsize in (2, 4):
        assert product_tiles_for(itemsize, aligned=True) == PRODUCT_TILES[itemsize]
        assert product_tiles_for(itemsize, aligned=False) == ODD_PRODUCT_TILES[itemsize]


SUM_SIZES = [
    "m",
    "n",
    "r",
    "param_row",
    "param_column",
    "left_row",
    "left_column",
    "right_row",
    "right_column",
    "matrix_row",
    "matrix_column",
]
ROWS_FIRST = ("param_column", "left_column", "right_column", "matrix_column", "factors_stride")


def sum_job(
    dtype: str,
    factors: str,
    tiles: ProductTiles,
    ones: tuple[str, ...] = ROWS_FIRST,
    *,
    matrix: bool = False,
    precision: str = "ieee",
    odd: bool = False,
    **how: Any,
) -> Job:
    """Return what a launch compiles, with lr on the device and rounding by chance, as both need most registers."""
    sizes = (*SUM_SIZES, "factors_stride")
    types = dict.fromkeys(sizes, "i32") | {"lr": "*fp32", "decay": "fp32", "seed": "i32"}
    types |= {"param_ptr": "*" + dtype, "left_ptr": "*" + factors, "right_ptr": "*" + factors}
    types |= {"matrix_ptr": "*" + factors, "factors_ptr": "*fp32"}
    constants = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "GROUP": tiles.group}
    constants |= {"HAS_MATRIX": matrix, "BY_ROW": False, "LR_ON_DEVICE": True, "STOCHASTIC": True}
    constants |= {"PRECISION": precision, "INTERPRETED": False} | dict.fromkeys(ones, 1)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if tiles.registers is not None:
        options["maxnreg"] = tiles.registers
    unaligned = ("seed", *sizes) if odd else ("seed",)
    return Job("factored_add", "factored_add_kernel", types, constants, unaligned, options, **how)


def dense_job(dtype: str, updates: str, *, flat: bool = True) -> Job:
    """Return what a launch compiles, on contiguous tensors or a transposed weight."""
    sizes = ("m", "n", "param_row", "param_column", "update_row", "update_column")
    types = dict.fromkeys(sizes, "i32") | {"lr": "fp32", "decay": "fp32", "seed": "i32"}
    types |= {"param_ptr": "*" + dtype, "update_ptr": "*" + updates}
    rows, columns, warps = (1, *ELEMENTWISE) if flat else STRIDED_TILE
    ones = ("m", "param_column", "update_column") if flat else ("param_row", "update_column")
    constants = {"ROWS": rows, "COLUMNS": columns, "CAUTIOUS": True, "LR_ON_DEVICE": False, "STOCHASTIC": True}
    constants |= {"INTERPRETED": False} | dict.fromkeys(ones, 1)
    return Job("apply", "apply_kernel", types, constants, ("seed",), {"num_warps": warps})


SHORT, LONG = PRODUCT_TILES[2], PRODUCT_TILES[4]
FREE = SHORT._replace(registers=None)
HOPPER: dict[str, Any] = {"targets": ("sm_90a",)}
JOBS = {
    # for Hopper with its limit of registers; the others have none
    "bf16 limited": sum_job("bf16", "bf16", SHORT, **HOPPER),
    "bf16 limited matrix": sum_job("bf16", "bf16", SHORT, matrix=True, **HOPPER),
    "bf16 limited transposed": sum_job("bf16", "bf16", SHORT, ("param_column", "left_column", "right_row"), **HOPPER),
    "bf16 free": sum_job("bf16", "bf16", FREE, targets=("sm_80", "gfx942")),
    "fp32 free": sum_job("fp32", "bf16", FREE, **HOPPER),
    "bf16 wide": sum_job("bf16", "bf16", FREE._replace(columns=256, stages=4), **HOPPER),
    "bf16 of float32": sum_job("bf16", "fp32", LONG),
    "bf16 of float32 in three": sum_job("bf16", "fp32", LONG, precision="tf32x3", **HOPPER),
    "bf16 odd": sum_job("bf16", "bf16", ODD_PRODUCT_TILES[2], odd=True),
    "bf16 odd of float32": sum_job("bf16", "fp32", ODD_PRODUCT_TILES[4], odd=True, targets=("sm_80", "gfx942")),
    "bf16 dense": dense_job("bf16", "fp32"),
    "fp32 dense": dense_job("fp32", "fp32"),
    "bf16 dense transposed": dense_job("bf16", "fp32", flat=False),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """Both kernels as shipped, compiled for three GPUs in one process that has none of them."""
    return compiled(JOBS, tmp_path_factory.mktemp("ahead"))


def test_every_shipped_configuration_compiles_without_spills_and_fits(built: dict[str, Built]) -> None:
    assert {name.split(" ", 1)[1] for name in built} == set(JOBS)
    for name, one in built.items():
        # AMD's scalars go to lanes of vector registers, and nothing to memory
        assert_fits(name, one, scalars="odd" in name)


def test_short_weights_leave_room_for_two_programs_on_hopper(built: dict[str, Built]) -> None:
    for name, one in built.items():
        if "limited" in name:
            assert one.registers is not None
            assert one.registers * SHORT.warps * 32 <= 65536 // 2, name
            # of 228 KiB, of which each program takes one more
            assert one.shared + 1024 <= 114 << 10, name


def test_every_product_is_one_of_matrix_instructions(built: dict[str, Built]) -> None:
    kinds = {
        "sm_80": r"mma\.sync\.\S+\.f32\.{0}\.{0}\.f32",
        "sm_90a": r"wgmma\.mma_async\S+\.f32\.{0}\.{0}",
        "gfx942": r"v_mfma_f32_\w+_?{0}",
    }
    for name, one in built.items():
        target, _, rest = name.split(" ", 2)
        if "dense" in rest:
            continue
        if rest.endswith("of float32") and target != "gfx942":
            # NVIDIA's have no float32: only the ordinary ones keep its precision
            assert "mma" not in one.text.replace("comma", ""), name
        elif "float32" in rest:
            assert re.search(kinds[target].format("f32" if target == "gfx942" else "tf32"), one.text), name
        else:
            assert re.search(kinds[target].format("bf16"), one.text), name


def test_what_is_aligned_is_read_and_written_in_whole_vectors(built: dict[str, Built]) -> None:
    for name, one in built.items():
        target, _, rest = name.split(" ", 2)
        if "odd" in rest:
            continue
        if target == "gfx942":
            assert "dense" in rest or len(re.findall("(?:global|buffer)_load_dwordx4", one.text)) >= 6, name
            continue
        for access in ("ld", "st"):
            # lr is a number of its own
            single = 1 if access == "ld" and "dense" not in rest else 0
            wide = len(re.findall(access + r"\.global\S*\.v4\.b32", one.text))
            assert wide, name
            assert len(re.findall(access + r"\.global", one.text)) == wide + single, name
        assert "dense" in rest or len(re.findall(r"cp\.async\.c[ag]", one.text)) >= 12, name


def test_what_ships_is_what_is_imported() -> None:
    folder = ROOT / "kernels"
    assert {Path(module.__file__ or "").resolve() for module in (apply, factored_add, _rounding)} == {
        folder / "apply.py",
        folder / "factored_add.py",
        folder / "_rounding.py",
    }
