"""How weights are written on the hardware that the kernels are written for, against their plain twins.

Each dtype, alignment and flag is compiled anew, which takes longer than it runs: there are few of each here, and all of
them where kernels are interpreted.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import apply, factored_add
from lowrank_optim.kernels._launch import PRODUCT_TILES, ProductTiles
from tests.kernels import apply as checks
from tests.kernels.common import DTYPES, LAYOUTS, few, hardware, need_memory, no_waiting, second_device

pytestmark = hardware

DEVICE = "cuda"
SEEDS = [None, 2**40 + 12345]
FREE = PRODUCT_TILES[2]._replace(registers=None)


@pytest.mark.parametrize("seed", checks.ROUNDING_SEEDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_rounded_to_the_very_bits_of_the_reference(dtype: torch.dtype, seed: int) -> None:
    checks.rounds_to_the_bits_of_the_reference(checks.special().to(DEVICE), dtype, seed)


@pytest.mark.parametrize(
    ("dtype", "factors", "shape", "turned", "seed"),
    [
        (torch.bfloat16, torch.bfloat16, (512, 768, 128), "", None),
        (torch.bfloat16, torch.bfloat16, (400, 1104, 80), "", 7),
        (torch.bfloat16, torch.bfloat16, (400, 1104, 80), "right", 7),
        (torch.bfloat16, torch.bfloat16, (400, 1104, 80), "both", 7),
        (torch.bfloat16, torch.bfloat16, (333, 130, 19), "", 7),
        (torch.bfloat16, torch.bfloat16, (1, 1, 1), "", 7),
        (torch.bfloat16, torch.bfloat16, (64, 5, 0), "", 7),
        (torch.float32, torch.bfloat16, (400, 1104, 80), "right", None),
        (torch.float16, torch.float16, (400, 1104, 80), "", 7),
        (torch.bfloat16, torch.float32, (400, 1104, 80), "", 7),
        (torch.float32, torch.float32, (333, 130, 19), "right", None),
    ],
    ids=str,
)
def test_a_sum_equals_its_twin(
    dtype: torch.dtype, factors: torch.dtype, shape: tuple[int, int, int], turned: str, seed: int | None
) -> None:
    m, n, r = shape
    left = checks.whole(r, m, device=DEVICE).mT if turned == "both" else checks.whole(m, r, device=DEVICE)
    right = checks.whole(n, r, device=DEVICE).mT if turned else checks.whole(r, n, device=DEVICE)
    product = left.to(factors), right.to(factors)
    checks.assert_sum(checks.weight((m, n), dtype, device=DEVICE), product, None, lr=0.25, weight_decay=0.5, seed=seed)


@pytest.mark.parametrize("shape", [(4096, 1024, 1024), (1376, 4096, 256)], ids=str)
def test_a_sum_of_whole_size_equals_its_twin(shape: tuple[int, int, int]) -> None:
    m, n, r = shape
    product = checks.whole(m, r, device=DEVICE).bfloat16(), checks.whole(n, r, device=DEVICE).bfloat16().mT
    lr = torch.tensor(0.25, device=DEVICE)
    checks.assert_sum(
        checks.weight((m, n), torch.bfloat16, device=DEVICE), product, None, lr=lr, weight_decay=0.5, seed=7
    )


@pytest.mark.parametrize(
    "tiles",
    [
        PRODUCT_TILES[2],
        FREE._replace(columns=256, stages=4),
        FREE._replace(columns=256),
        FREE._replace(rows=64, warps=4),
        FREE._replace(columns=64, warps=4, stages=4),
        FREE._replace(group=3, stages=4),
        ProductTiles(64, 64, 32, 4, 4, 4),
    ],
    ids=lambda tiles: "-".join(map(str, tiles)),
)
def test_every_tile_computes_every_shape(tiles: ProductTiles) -> None:
    for m, n, r in ((320, 688, 144), (640, 1280, 192)):
        product, scaled = (
            (checks.whole(m, r, device=DEVICE).bfloat16(), checks.whole(r, n, device=DEVICE).bfloat16()),
            (checks.whole(m, n, device=DEVICE).bfloat16(), checks.whole(1, n, device=DEVICE)),
        )
        param = checks.weight((m, n), torch.bfloat16, device=DEVICE)
        checks.assert_sum(param, product, scaled, lr=0.25, weight_decay=0.5, seed=3, tiles=tiles)


@pytest.mark.parametrize("which", ["rows", "columns", "one", "alone"])
def test_a_scaled_matrix_is_added_too(which: str) -> None:
    checks.a_scaled_matrix_is_added((200, 272, 48), torch.bfloat16, which, "contiguous", DEVICE)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_a_sum_takes_any_strides(layout: str) -> None:
    product = (
        LAYOUTS[layout](checks.whole(272, 48, device=DEVICE).bfloat16()),
        LAYOUTS[layout](checks.whole(48, 320, device=DEVICE).bfloat16()),
    )
    checks.assert_sum(
        checks.weight((272, 320), torch.bfloat16, layout, device=DEVICE),
        product,
        None,
        lr=0.25,
        weight_decay=0.5,
        seed=3,
    )


@few
@given(
    shape=st.tuples(*[st.sampled_from([32, 208, 640])] * 2, st.sampled_from([32, 80, 320])),
    seed=st.sampled_from(SEEDS),
    **checks.RATES,
)
def test_a_sum_equals_its_twin_anywhere(shape: tuple[int, int, int], **how: Any) -> None:
    # of other sizes the kernel would be compiled for each
    m, n, r = shape
    product = checks.whole(m, r, device=DEVICE).bfloat16(), checks.whole(r, n, device=DEVICE).bfloat16()
    checks.assert_sum(checks.weight((m, n), torch.bfloat16, device=DEVICE), product, None, **how)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_a_sum_of_any_numbers_is_as_near_as_float32_allows(precision: str) -> None:
    left, right = torch.randn(256, 64, device=DEVICE), torch.randn(64, 512, device=DEVICE)
    param = torch.randn(256, 512, device=DEVICE)
    expected = param.double() * (1 - 1e-2 * 0.3) - 1e-2 * (left.double() @ right.double())
    factored_add.apply_sum_(param, (left, right), None, lr=1e-2, weight_decay=0.3, precision=precision)
    # in plain tf32 it is 2⁻¹⁵
    assert (param - expected).abs().max() <= 2.0**-20 * expected.abs().max()


def test_a_sum_reads_and_writes_its_own_elements_only() -> None:
    checks.a_sum_keeps_to_its_own_elements((400, 700, 190), DEVICE)


@pytest.mark.parametrize("updates", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dense_update_equals_its_twin(dtype: torch.dtype, updates: torch.dtype) -> None:
    for shape in ((1024, 512), (5, 336)):
        checks.assert_applied(
            checks.weight(shape, dtype, device=DEVICE),
            checks.whole(*shape, device=DEVICE).to(updates),
            lr=0.25,
            weight_decay=0.5,
            seed=2**40 + 1,
        )


@pytest.mark.parametrize("how", [{}, {"seed": 3}, {"cautious": True}], ids=str)
@pytest.mark.parametrize("shape", [(), (2, 3, 4), (301, 129), (512, 128)], ids=str)
def test_a_dense_update_of_any_shape_equals_its_twin(shape: tuple[int, ...], how: dict[str, Any]) -> None:
    checks.assert_applied(
        checks.weight(shape, torch.bfloat16, device=DEVICE),
        checks.whole(*shape, device=DEVICE),
        lr=0.25,
        weight_decay=0.5,
        **how,
    )


@pytest.mark.parametrize(
    "layouts", [("transposed", "contiguous"), ("transposed", "transposed"), ("sliced", "transposed")], ids="-".join
)
def test_a_dense_update_takes_any_strides(layouts: tuple[str, str]) -> None:
    for shape in ((256, 320), (101, 77)):
        param, update = (
            checks.weight(shape, torch.bfloat16, layouts[0], device=DEVICE),
            LAYOUTS[layouts[1]](checks.whole(*shape, device=DEVICE)),
        )
        checks.assert_applied(param, update, lr=0.25, weight_decay=0.5, seed=3)


def test_it_addresses_more_elements_than_fit_32_bits() -> None:
    need_memory(16)
    m, n = (1 << 16) + 16, 1 << 15
    param = torch.zeros(m, n, dtype=torch.bfloat16, device=DEVICE)
    left, right = (torch.ones(shape, dtype=torch.bfloat16, device=DEVICE) for shape in ((m, 16), (16, n)))
    factored_add.apply_sum_(param, (left, right), None, lr=-1.0, weight_decay=0.0)
    assert param[0].eq(16).all()
    assert param[-1].eq(16).all()
    apply.apply_(param, param, lr=0.5, weight_decay=0.0)
    assert param[0].eq(8).all()
    assert param[-1].eq(8).all()


def test_it_does_not_wait_for_the_device() -> None:
    param, update = torch.zeros(256, 256, device=DEVICE, dtype=torch.bfloat16), torch.ones(256, 256, device=DEVICE)
    lr, product = torch.tensor(0.5, device=DEVICE), (update.bfloat16()[:, :32], update.bfloat16()[:32])

    def both() -> None:
        apply.apply_(param, update, lr=lr, weight_decay=0.1, seed=1)
        factored_add.apply_sum_(param, product, None, lr=lr, weight_decay=0.1, seed=1)

    both()
    with no_waiting():
        both()
    assert param.isfinite().all()


def test_it_runs_on_the_device_of_its_tensors() -> None:
    with second_device() as device:
        param, update = torch.zeros(64, 64, device=device), torch.ones(64, 64, device=device)
        apply.apply_(param, update, lr=1.0, weight_decay=0.0)
        factored_add.apply_sum_(param, (update, update), None, lr=1.0, weight_decay=0.0)
        assert param.eq(-65).all()
        with pytest.raises(ValueError, match="on cuda:1, not .* on cuda:0"):
            apply.apply_(param, update.to("cuda:0"), lr=1.0, weight_decay=0.0)
