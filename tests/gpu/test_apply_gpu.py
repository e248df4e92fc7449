"""How weights are written on the hardware that the kernels are written for, against their plain twins.

Each dtype, alignment and flag is compiled anew, which takes longer than it runs: there are few of each here, and all of
them where kernels are interpreted.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference, reference_apply

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from lowrank_optim.kernels import _rounding, apply, factored_add
from lowrank_optim.kernels._launch import PRODUCT_TILES, ProductTiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = [None, 2**40 + 12345]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
}
FREE = PRODUCT_TILES[2]._replace(registers=None)


@triton.jit(do_not_specialize=["seed"])
def rounding_kernel(x_ptr, near_ptr, chance_ptr, bits_ptr, n, seed, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK).to(tl.int64)
    mask = index < n
    x = tl.load(x_ptr + index, mask=mask)
    dtype: tl.constexpr = near_ptr.dtype.element_ty
    tl.store(near_ptr + index, _rounding.nearest(x, dtype, False), mask=mask)
    tl.store(chance_ptr + index, _rounding.stochastic(x, dtype, seed, index), mask=mask)
    tl.store(bits_ptr + index, _rounding.noise(seed, index), mask=mask)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """All bits are the same, but for those of NaN."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("seed", [0, 1, -5, 2**31 - 3, 2**40 + 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_rounded_to_the_very_bits_of_the_reference(dtype: torch.dtype, seed: int) -> None:
    # of any size, subnormal ones too, and Inf and NaN
    x = torch.randint(-(2**31), 2**31, (4000,), dtype=torch.int64).int().view(torch.float32)
    x = torch.cat([x, torch.randn(4000) * 2.0 ** torch.randint(-26, 17, (4000,)).float()]).cuda()
    near, chance = (torch.empty(x.shape, dtype=dtype, device="cuda") for _ in range(2))
    bits = torch.empty(x.shape, dtype=torch.int32, device="cuda")
    rounding_kernel[(1,)](x, near, chance, bits, len(x), _rounding.wrapped(seed), BLOCK=8192)
    assert torch.equal(bits, reference.noise(len(x), [seed], x.device)[0])
    assert_same(near, x.to(dtype))
    assert_same(chance, reference.rounded_(x.clone(), dtype, [seed]).to(dtype))


def whole(*shape: int) -> Tensor:
    """Return small whole numbers, whose products and sums are exact."""
    return torch.randint(-4, 5, shape, device="cuda").float()


def weight(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Return a weight of few bits: what is added to it leaves no rounding of float32 before that of the weight."""
    return LAYOUTS[layout](torch.randint(-127, 128, shape, device="cuda").div(64).to(dtype))


def assert_sum(param: Tensor, product: Any, scaled: Any, **how: Any) -> None:
    """The kernel does as the twin in float32, to the last bit where float32 has no rounding of its own."""
    operands = [x for pair in (product, scaled) if pair is not None for x in pair]
    before = [x.clone() for x in operands]
    expected = param.clone(memory_format=torch.contiguous_format)
    twins = [None if pair is None else tuple(x.float() for x in pair) for pair in (product, scaled)]
    numbers = {name: how[name] for name in ("lr", "weight_decay", "seed") if name in how}
    reference_apply.apply_sum_(expected, *twins, **numbers)  # type: ignore[arg-type]
    factored_add.apply_sum_(param, product, scaled, **how)
    assert torch.equal(param, expected)
    assert all(torch.equal(x, y) for x, y in zip(operands, before, strict=True))


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
    left = whole(r, m).mT if turned == "both" else whole(m, r)
    right = whole(n, r).mT if turned else whole(r, n)
    product = left.to(factors), right.to(factors)
    assert_sum(weight((m, n), dtype), product, None, lr=0.25, weight_decay=0.5, seed=seed)


@pytest.mark.parametrize("shape", [(4096, 1024, 1024), (1376, 4096, 256)], ids=str)
def test_a_sum_of_whole_size_equals_its_twin(shape: tuple[int, int, int]) -> None:
    m, n, r = shape
    product = whole(m, r).bfloat16(), whole(n, r).bfloat16().mT
    lr = torch.tensor(0.25, device="cuda")
    assert_sum(weight((m, n), torch.bfloat16), product, None, lr=lr, weight_decay=0.5, seed=7)


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
        product, scaled = (whole(m, r).bfloat16(), whole(r, n).bfloat16()), (whole(m, n).bfloat16(), whole(1, n))
        param = weight((m, n), torch.bfloat16)
        assert_sum(param, product, scaled, lr=0.25, weight_decay=0.5, seed=3, tiles=tiles)


@pytest.mark.parametrize("which", ["rows", "columns", "one", "alone"])
def test_a_scaled_matrix_is_added_too(which: str) -> None:
    m, n, r = 200, 272, 48
    factors = whole(*{"rows": (m, 1), "columns": (1, n), "one": (1, 1), "alone": (1, n)}[which])
    product = None if which == "alone" else (whole(m, r).bfloat16(), whole(r, n).bfloat16())
    scaled = whole(m, n).bfloat16(), factors
    assert_sum(weight((m, n), torch.bfloat16), product, scaled, lr=0.25, weight_decay=0.5, seed=3)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_a_sum_takes_any_strides(layout: str) -> None:
    product = LAYOUTS[layout](whole(272, 48).bfloat16()), LAYOUTS[layout](whole(48, 320).bfloat16())
    assert_sum(weight((272, 320), torch.bfloat16, layout), product, None, lr=0.25, weight_decay=0.5, seed=3)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 40), st.integers(2, 40), st.integers(2, 20)),
    seed=st.sampled_from(SEEDS),
    rates=st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.25, 1.0])),
)
def test_a_sum_equals_its_twin_anywhere(
    shape: tuple[int, int, int], seed: int | None, rates: tuple[float, float]
) -> None:
    # of other sizes the kernel would be compiled for each
    m, n, r = (16 * x for x in shape)
    product = whole(m, r).bfloat16(), whole(r, n).bfloat16()
    assert_sum(weight((m, n), torch.bfloat16), product, None, lr=rates[0], weight_decay=rates[1], seed=seed)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_a_sum_of_any_numbers_is_as_near_as_float32_allows(precision: str) -> None:
    left, right = torch.randn(256, 64, device="cuda"), torch.randn(64, 512, device="cuda")
    param = torch.randn(256, 512, device="cuda")
    expected = param.double() * (1 - 1e-2 * 0.3) - 1e-2 * (left.double() @ right.double())
    factored_add.apply_sum_(param, (left, right), None, lr=1e-2, weight_decay=0.3, precision=precision)
    # in plain tf32 it is 2⁻¹⁵
    assert (param - expected).abs().max() <= 2.0**-20 * expected.abs().max()


def test_a_sum_reads_and_writes_its_own_elements_only() -> None:
    memory = [torch.full((3, 600, 900), float("nan"), device="cuda") for _ in range(3)]
    sides = ((400, 700), (400, 190), (190, 700))
    param, left, right = (m[1, 3 : 3 + rows, 5 : 5 + cols] for m, (rows, cols) in zip(memory, sides, strict=True))
    for x in (param, left, right):
        x.copy_(whole(*x.shape))
    assert_sum(param, (left, right), None, lr=0.5, weight_decay=0.0)
    assert memory[0].isnan().sum() == memory[0].numel() - param.numel()


def assert_applied(param: Tensor, update: Tensor, **how: Any) -> None:
    before, twin_update = update.clone(), update.float().clone()
    expected = param.clone(memory_format=torch.contiguous_format)
    reference_apply.apply_(expected, twin_update, **how)
    apply.apply_(param, update, **how)
    assert torch.equal(param, expected)
    assert torch.equal(update, before)


@pytest.mark.parametrize("updates", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dense_update_equals_its_twin(dtype: torch.dtype, updates: torch.dtype) -> None:
    for shape in ((1024, 512), (5, 336)):
        assert_applied(weight(shape, dtype), whole(*shape).to(updates), lr=0.25, weight_decay=0.5, seed=2**40 + 1)


@pytest.mark.parametrize("how", [{}, {"seed": 3}, {"cautious": True}], ids=str)
@pytest.mark.parametrize("shape", [(), (2, 3, 4), (301, 129), (512, 128)], ids=str)
def test_a_dense_update_of_any_shape_equals_its_twin(shape: tuple[int, ...], how: dict[str, Any]) -> None:
    assert_applied(weight(shape, torch.bfloat16), whole(*shape), lr=0.25, weight_decay=0.5, **how)


@pytest.mark.parametrize(
    "layouts", [("transposed", "contiguous"), ("transposed", "transposed"), ("sliced", "transposed")], ids="-".join
)
def test_a_dense_update_takes_any_strides(layouts: tuple[str, str]) -> None:
    for shape in ((256, 320), (101, 77)):
        param, update = weight(shape, torch.bfloat16, layouts[0]), LAYOUTS[layouts[1]](whole(*shape))
        assert_applied(param, update, lr=0.25, weight_decay=0.5, seed=3)


def test_it_addresses_more_elements_than_fit_32_bits() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    m, n = (1 << 16) + 16, 1 << 15
    param = torch.zeros(m, n, dtype=torch.bfloat16, device="cuda")
    left, right = (torch.ones(shape, dtype=torch.bfloat16, device="cuda") for shape in ((m, 16), (16, n)))
    factored_add.apply_sum_(param, (left, right), None, lr=-1.0, weight_decay=0.0)
    assert param[0].eq(16).all()
    assert param[-1].eq(16).all()
    apply.apply_(param, param, lr=0.5, weight_decay=0.0)
    assert param[0].eq(8).all()
    assert param[-1].eq(8).all()


def test_it_does_not_wait_for_the_device() -> None:
    param, update = torch.zeros(256, 256, device="cuda", dtype=torch.bfloat16), torch.ones(256, 256, device="cuda")
    lr, product = torch.tensor(0.5, device="cuda"), (update.bfloat16()[:, :32], update.bfloat16()[:32])

    def both() -> None:
        apply.apply_(param, update, lr=lr, weight_decay=0.1, seed=1)
        factored_add.apply_sum_(param, product, None, lr=lr, weight_decay=0.1, seed=1)

    both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert param.isfinite().all()


def test_it_runs_on_the_device_of_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    param, update = torch.zeros(64, 64, device="cuda:1"), torch.ones(64, 64, device="cuda:1")
    apply.apply_(param, update, lr=1.0, weight_decay=0.0)
    factored_add.apply_sum_(param, (update, update), None, lr=1.0, weight_decay=0.0)
    assert param.eq(-65).all()
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="on cuda:1, not .* on cuda:0"):
        apply.apply_(param, update.to("cuda:0"), lr=1.0, weight_decay=0.0)
