"""Symmetric products, against their plain twin."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import backend, ops, reference_matrix
from lowrank_optim.coefficients import table
from lowrank_optim.kernels import symmetric as kernel
from tests.kernels.common import READABLE

HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
# of a result, in units of its largest number; tensor cores make float32 of three products
TOLERANCES = {"cpu": HALF | {torch.float32: 1e-6}, "cuda": HALF | {torch.float32: 1e-5}}
NUMBERS = st.fixed_dictionaries(dict.fromkeys(("alpha", "beta", "gamma"), st.sampled_from([0.0, 1.0, -1.25, 3.0])))
# table, restarts, and how many times the error of torch's own products is allowed
RESTARTS = [("you", (1, 3), 1.12), ("you", (1,), 2.0), ("polar_express", (1, 3, 4), 2.0)]


def matrices(
    shape: tuple[int, int, int], dtype: torch.dtype, layout: str = "contiguous", *, device: str
) -> tuple[Tensor, Tensor]:
    """Return A (b, n, k) and a symmetric C (b, n, n)."""
    a, c = torch.randn(shape, device=device), torch.randn(shape[0], shape[1], shape[1], device=device)
    return READABLE[layout](a.to(dtype)), READABLE[layout]((c + c.mT).to(dtype))


def assert_twins(a: Tensor, b: Tensor, c: Tensor | None, **how: Any) -> Tensor:
    """Compare with the twin in float64; what is handed in stays as it is."""
    given = [x for x in (a, b, c) if x is not None]
    before = [x.clone() for x in given]
    found = kernel.symmetric(a, b, c, **how)
    numbers = {name: how[name] for name in ("alpha", "beta", "gamma") if name in how}
    expected = reference_matrix.symmetric(a.double(), b.double(), None if c is None else c.double(), **numbers)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    assert found.dtype == a.dtype
    assert found.shape == (len(a), a.size(1), a.size(1))
    assert found.is_contiguous()
    assert torch.equal(found, found.mT)
    if found.numel():
        bound = TOLERANCES[a.device.type][a.dtype] * max(1.0, float(expected.abs().max()))
        assert (found - expected).abs().max() <= bound
    return found


def lower_triangle_is_mirrored(n: int, dtype: torch.dtype, device: str, **how: Any) -> None:
    """It is so of a product that is not symmetric."""
    a, b, c = (torch.randn(2, n, n, device=device).to(dtype) for _ in range(3))
    found = kernel.symmetric(a, b, c, **how)
    expected = a.double() @ b.mT.double() + c.double()
    expected = expected.tril() + expected.tril(-1).mT
    assert torch.equal(found, found.mT)
    assert (found - expected).abs().max() <= TOLERANCES[a.device.type][dtype] * expected.abs().max()


def bfloat16_is_nearest_and_even(device: str) -> None:
    # halfway between two numbers, up and down; just past it; the largest; negative
    for value in (1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 3.3895314e38, -1 - 3 * 2.0**-8):
        c = torch.zeros(1, 1, 1, dtype=torch.bfloat16, device=device)
        expected = torch.tensor(value).to(device, torch.bfloat16).view(1, 1, 1)
        assert torch.equal(kernel.symmetric(c, c, c, gamma=value), expected), value


def nan_goes_to_its_row_and_column(n: int, dtype: torch.dtype, device: str, **how: Any) -> None:
    """And what alpha or beta multiply by 0 is not read."""
    a, c = matrices((1, n, n), dtype, device=device)
    a[0, n - 2, 3] = float("nan")
    found = kernel.symmetric(a, a, **how).isnan()[0]
    assert found[n - 2].all()
    assert found[:, n - 2].all()
    assert found.sum() == 2 * n - 1
    bad = torch.full_like(c, float("nan"))
    assert torch.equal(kernel.symmetric(bad, bad, c, alpha=0.0), c)
    assert kernel.symmetric(c, c, bad, beta=0.0).isfinite().all()
    # above the diagonal C is not looked at
    above = torch.where(torch.ones_like(c).tril() == 1, c, bad)
    assert torch.equal(kernel.symmetric(a, a, above, alpha=0.0, **how), c)


def bits_are_the_same(shape: tuple[int, int, int], dtype: torch.dtype, device: str, times: int = 1, **how: Any) -> None:
    """They are, each time and in every stack."""
    a, c = matrices(shape, dtype, device=device)
    together = kernel.symmetric(a, a, c, **how)
    for _ in range(times):
        assert torch.equal(kernel.symmetric(a, a, c, **how), together)
    for i in range(len(a)):
        alone = kernel.symmetric(a[i : i + 1], a[i : i + 1], c[i : i + 1], **how)
        assert torch.equal(alone[0], together[i])


def its_own_elements_are_read_only(n: int, k: int, device: str, parts: tuple[int, ...], **how: Any) -> None:
    """All three are parts of larger memories, and what is beside them is NaN."""
    a = torch.full((3, n + 7, k + 15), float("nan"), device=device)[1:2, 3 : n + 3, 5 : k + 5]
    c = torch.full((3, n + 7, n + 7), float("nan"), device=device)[1:2, 3 : n + 3, 5 : n + 5]
    a.copy_(torch.randn(a.shape))
    c.copy_(torch.eye(n))
    for count in parts:
        assert_twins(a, a, c, parts=count, **how)
    assert_twins(a.mT, a.mT, None, **how)


def small_singular_values_survive(name: str, restarts: tuple[int, ...], factor: float, device: str) -> None:
    """With R W² in the place of W R W the errors would be 1.2 times those of whole matrices, 5 times and up to 35."""
    u, v = (torch.linalg.qr(torch.randn(3, m, 48, dtype=torch.float64)).Q for m in (48, 96))
    x = (u * 10 ** -torch.linspace(0, 5, 48)) @ v.mT
    x = reference_matrix.normalized(x, eps=0.0, dtype=torch.bfloat16).to(device)
    triples = table(name)
    exact = ops.newton_schulz(x.double(), triples, ops.Whole())
    plain = ops.gram_newton_schulz(x, triples, restarts, ops.Whole())
    with backend("triton"):
        found = ops.gram_newton_schulz(x, triples, restarts, ops.Whole())
    error, plain_error = ((y - exact).norm() / exact.norm() for y in (found, plain))
    assert error <= factor * plain_error
