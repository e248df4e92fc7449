"""How weights are written, against plain twins."""

from typing import Any

import torch
import triton
import triton.language as tl
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference, reference_apply
from lowrank_optim.kernels import _rounding, apply, factored_add
from tests.kernels.common import LAYOUTS

# of how weights are rounded
ROUNDING_SEEDS = [0, 1, -5, 2**31 - 3, 2**40 + 7]
RATES = {"lr": st.sampled_from([0.0, 0.5, 1.0]), "weight_decay": st.sampled_from([0.0, 0.25, 1.0])}


@triton.jit(do_not_specialize=["seed"])
def rounding_kernel(x_ptr, near_ptr, chance_ptr, bits_ptr, n, seed, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    index = tl.arange(0, BLOCK).to(tl.int64)
    mask = index < n
    x = tl.load(x_ptr + index, mask=mask)
    dtype: tl.constexpr = near_ptr.dtype.element_ty
    tl.store(near_ptr + index, _rounding.nearest(x, dtype, INTERPRETED), mask=mask)
    tl.store(chance_ptr + index, _rounding.stochastic(x, dtype, seed, index), mask=mask)
    tl.store(bits_ptr + index, _rounding.noise(seed, index), mask=mask)


def special() -> Tensor:
    """Return numbers of all sizes: subnormal ones of each format, such as overflow in one of them, Inf and NaN."""
    powers = torch.randint(-149, 128, (4000,)).to(torch.float64)
    numbers = (torch.randn(4000, dtype=torch.float64) * 2.0**powers).float()
    halves = torch.randn(2000) * 2.0 ** torch.randint(-26, 17, (2000,)).float()
    inf, nan = float("inf"), float("nan")
    edges = torch.tensor(
        [0.0, -0.0, inf, -inf, nan, 65504, 65519.99, 65520, 65536, 3.4e38, -3.4e38, 2.0**-14, 2.0**-25]
    )
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    anything = torch.randint(-(2**31), 2**31, (1000,), dtype=torch.int64).int().view(torch.float32)
    return torch.cat([numbers, halves, edges, payloads, anything])


def assert_same(found: Tensor, expected: Tensor) -> None:
    """All bits are the same, but for those of NaN."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))


def rounds_to_the_bits_of_the_reference(x: Tensor, dtype: torch.dtype, seed: int) -> None:
    """To nearest, by chance, and chance itself."""
    near, chance = (torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(2))
    bits = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    constants = {"BLOCK": 8192, "INTERPRETED": not x.is_cuda}
    rounding_kernel[(1,)](x, near, chance, bits, len(x), _rounding.wrapped(seed), **constants)
    assert torch.equal(bits, reference.noise(len(x), [seed], x.device)[0])
    assert_same(near, x.to(dtype))
    assert_same(chance, reference.rounded_(x.clone(), dtype, [seed]).to(dtype))


def whole(*shape: int, device: str) -> Tensor:
    """Return small whole numbers, whose products and sums are exact."""
    return torch.randint(-4, 5, shape, device=device).float()


def weight(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", *, device: str) -> Tensor:
    """Return a weight of few bits: what is added to it leaves no rounding of float32 before that of the weight."""
    return LAYOUTS[layout](torch.randint(-127, 128, shape, device=device).div(64).to(dtype))


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


def a_scaled_matrix_is_added(
    shape: tuple[int, int, int], dtype: torch.dtype, which: str, layout: str, device: str, **how: Any
) -> None:
    """By rows, columns or one number, or alone, without a product."""
    m, n, r = shape
    sides = {"rows": (m, 1), "columns": (1, n), "one": (1, 1), "alone": (1, n)}[which]
    product = whole(m, r, device=device).to(dtype), whole(r, n, device=device).to(dtype)
    scaled = LAYOUTS[layout](whole(m, n, device=device).to(dtype)), whole(*sides, device=device)
    param = weight((m, n), dtype, device=device)
    assert_sum(param, None if which == "alone" else product, scaled, lr=0.25, weight_decay=0.5, seed=3, **how)


def a_sum_keeps_to_its_own_elements(
    shape: tuple[int, int, int], device: str, transposed: bool = False, **how: Any
) -> None:
    """All operands are parts of larger memories, and what is beside them is NaN."""
    m, n, r = shape
    memory = [torch.full((3, m + 20, max(n, r) + 20), float("nan"), device=device) for _ in range(3)]
    memory.insert(2, torch.full((3, r + 20, n + 20), float("nan"), device=device))
    param, left, right, matrix = (
        x[1, 3 : 3 + rows, 5 : 5 + columns] for x, rows, columns in zip(memory, (m, m, r, m), (n, r, n, n), strict=True)
    )
    for x in (param, left, right, matrix):
        x.copy_(whole(*x.shape, device=device))
    if transposed:
        param, left, right, matrix = param.mT, right.mT, left.mT, matrix.mT
    assert_sum(param, (left, right), (matrix, whole(1, 1, device=device)), lr=0.5, weight_decay=0.0, **how)
    assert param.isfinite().all()
    assert memory[0].isnan().sum() == memory[0].numel() - param.numel()


def assert_applied(param: Tensor, update: Tensor, **how: Any) -> None:
    before, twin_update = update.clone(), update.float().clone()
    expected = param.clone(memory_format=torch.contiguous_format)
    numbers = {name: value for name, value in how.items() if name != "shape"}
    reference_apply.apply_(expected, twin_update, **numbers)
    apply.apply_(param, update, **how)
    assert torch.equal(param, expected)
    assert torch.equal(update, before)
