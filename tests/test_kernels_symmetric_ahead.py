"""The kernels of symmetric products, compiled for GPUs that are not here."""

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import symmetric as kernel
from lowrank_optim.kernels._launch import BAND, ODD_TILES, TILES, Tiles
from tests.ahead import Built, Job, assert_fits, compiled

# what arrives as 1, by the product: X X^T, X^T X in parts, b R + c R^2, their sum, one 1x1 matrix, an odd n and k
ONES = {
    "gram": {"a_column", "b_column"},
    "tall": {"a_row", "b_row"},
    "polynomial": {"a_column", "b_row", "c_column"},
    "sum": {"c_column"},
    "one": {"n", "k", *(f"{x}_{y}" for x in "ab" for y in ("batch", "row", "column"))},
    "sum of one": {"n", "c_column"},
    "odd": {"a_column", "b_row", "c_column"},
}
PRODUCTS = ("gram", "tall", "polynomial")


def job(dtype: str, tiles: Tiles, product: str, *targets: str, even: bool = False) -> Job:
    """Return one of the kernels as a launch of this product specializes it."""
    of_parts, split = product.startswith("sum"), product == "tall"
    name = "sum_parts_kernel" if of_parts else "symmetric_kernel"
    constants = {"SIDE": tiles.side, "BAND": BAND, "INTERPRETED": False, "DEPTH": tiles.depth, "SPLIT": split}
    constants |= {"HAS_C": product in ("polynomial", "odd") or of_parts, "EVEN": even, "NEAR": True} | dict.fromkeys(
        ONES[product], 1
    )
    arguments = getattr(kernel, name).arg_names
    constants = {name: value for name, value in constants.items() if name in arguments}
    types = {}
    for argument in arguments:
        pointer = "*fp32" if argument == "parts_ptr" or (argument == "out_ptr" and split) else "*" + dtype
        number = "fp32" if argument in ("alpha", "scale", "gamma") else "i32"
        types[argument] = pointer if argument.endswith("_ptr") else number
    # counts of what there is are not aligned, and of an odd n and k nor are the strides
    plain = {"count", "tiles", "parts", "steps"}
    plain |= {argument for argument, kind in types.items() if kind == "i32" and product == "odd"}
    options = {"num_warps": tiles.warps} | ({} if of_parts else {"num_stages": tiles.stages})
    return Job("symmetric", name, types, constants, tuple(sorted(plain)), options, targets or tuple(TILES))


def jobs() -> dict[str, Job]:
    """Return what the launch tables ask for, and each kernel with numbers that arrive as constants."""
    named = {}
    for target, of in TILES.items():
        for dtype, size in (("bf16", 2), ("fp32", 4)):
            for side, tiles in of[size].items():
                for product in PRODUCTS:
                    named[f"{dtype} {product} from {side} on, {target}"] = job(dtype, tiles, product, target, even=True)
    newest = TILES["sm_90a"]
    named["fp16 polynomial"] = job("fp16", newest[2][512], "polynomial", even=True)
    # sides that tiles do not divide, though 16 does
    named["bf16 polynomial with masks"] = job("bf16", newest[2][512], "polynomial", "sm_90a")
    named["bf16 sum"] = job("bf16", newest[2][1], "sum")
    for product in ("one", "sum of one"):
        # that constants have no type is a matter of the language, not of the target
        named[f"fp32 {product}"] = job("fp32", newest[4][1], product, "sm_90a")
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        named[f"{dtype} odd"] = job(dtype, ODD_TILES[size], "odd")
    return named


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """Both kernels as shipped."""
    return compiled(jobs(), tmp_path_factory.mktemp("ahead"))


def test_every_shipped_configuration_compiles_without_spills_and_fits(built: dict[str, Built]) -> None:
    assert len(built) >= sum(3 * len(sides) for of in TILES.values() for sides in of.values())
    for name, made in built.items():
        # of odd sizes AMD's scalars go to lanes of vector registers, and nothing to memory
        assert_fits(name, made, scalars=name.endswith("odd"))


def test_every_product_is_one_of_matrix_instructions(built: dict[str, Built]) -> None:
    kinds = {"sm_80": r"mma\.sync\.\S+\.f32\.{0}\.{0}\.f32", "sm_90a": r"wgmma\.mma_async\S+\.f32\.{0}\.{0}"}
    for name, made in built.items():
        target, dtype, product = name.split(" ", 2)
        if product.startswith("sum"):
            continue
        short = {"fp32": "f32", "fp16": "f16"}.get(dtype, dtype)
        if target == "gfx942":
            assert re.search(rf"v_mfma_f32_\w+_?{short}", made.text), name
        elif dtype != "fp32":
            assert re.search(kinds[target].format(short), made.text), name
        else:
            # NVIDIA's have no float32: only the ordinary ones keep its precision
            assert not re.search("mma\\.|tf32", made.text), name


def test_tiles_of_aligned_matrices_are_copied_in_whole_vectors(built: dict[str, Built]) -> None:
    for name, made in built.items():
        target, _, product = name.split(" ", 2)
        if any(kind in product for kind in PRODUCTS):
            assert len(re.findall(r"dwordx4|v4\.b32", made.text)) >= 4, name
            assert (
                target == "gfx942"
                or len(re.findall(r"cp\.async\.c[ag]\.\S+ \[[^\]]*\], \[[^\]]*\], 0x10", made.text)) >= 4
            ), name
