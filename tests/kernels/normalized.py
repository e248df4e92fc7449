"""Matrices over their norms, against their plain twin."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference_matrix
from lowrank_optim.kernels import normalized as kernel
from tests.kernels.common import LAYOUTS

# one element, odd, a block of ours exactly, blocks and a rest
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 32, 32), (2, 100, 30), (1, 300, 513)]
# squares of some of these numbers are 0 or infinite in float32
HOW = {
    "size": st.sampled_from([1e-30, 1e-25, 1e-6, 1.0, 1e20, 1e30]),
    "eps": st.sampled_from([0.0, 1e-7, 10.0]),
    "parts": st.integers(1, 5),
}


def assert_twins(x: Tensor, dtype: torch.dtype, eps: float = 0.0, **how: Any) -> Tensor:
    """Compare with the twin in float64, rounded once."""
    before = x.clone()
    found = kernel.normalized(x, eps=eps, dtype=dtype, **how)
    assert torch.equal(x, before)
    assert found.dtype == dtype
    assert found.shape == x.shape
    if not x.numel():
        return found
    expected = reference_matrix.normalized(x.double(), eps=eps, dtype=torch.float64)
    # a neighbour, where float32 has fallen on the other side
    bounds = {"rtol": 1.01 * torch.finfo(dtype).eps, "atol": 1e-44 if dtype == torch.float32 else 1e-7}
    torch.testing.assert_close(found.double(), expected, **bounds)
    return found


def equals_its_twin(
    shape: tuple[int, int, int], dtype: torch.dtype, layout: str, outs: list[torch.dtype], device: str
) -> None:
    """It does in each dtype of the result."""
    x = LAYOUTS[layout](torch.randn(shape, device=device).to(dtype))
    for out in outs:
        assert_twins(x, out)


def anywhere(shape: tuple[int, int, int], size: float, eps: float, parts: int, device: str) -> None:
    """It equals its twin for any of `HOW`."""
    assert_twins(torch.randn(shape, device=device) * size, torch.float32, eps, parts=parts)


def bits_are_the_same(shape: tuple[int, int, int], device: str, times: int = 1) -> None:
    """They are, each time and in every stack."""
    x = torch.randn(shape, device=device)
    together = kernel.normalized(x, eps=0.0, dtype=torch.bfloat16)
    for _ in range(times):
        assert torch.equal(kernel.normalized(x, eps=0.0, dtype=torch.bfloat16), together)
    for i in range(len(x)):
        assert torch.equal(kernel.normalized(x[i : i + 1], eps=0.0, dtype=torch.bfloat16)[0], together[i])


def zeros_stay_and_what_is_not_finite_says_so(m: int, n: int, device: str) -> None:
    x = torch.randn(4, m, n, device=device)
    x[0] = 0
    x[1, 2, 3] = float("nan")
    x[2, 2, 3] = float("inf")
    found = kernel.normalized(x, eps=1e-7, dtype=torch.float32)
    assert found[0].eq(0).all()
    assert found[1].isnan().all()
    assert found[2, 2, 3].isnan()
    torch.testing.assert_close(found[3].norm().cpu(), torch.tensor(1.0))


def its_own_elements_are_read_only(m: int, n: int, device: str) -> None:
    """What is beside both matrices in their memory is NaN, and a first element that 16 bytes do not divide is one."""
    rows = torch.full((4, m + 3, n + 5), float("nan"), device=device)[1:3, 2 : m + 2, 3 : n + 3]
    whole = torch.full((2 * m * n + 6,), float("nan"), device=device)[1 : 2 * m * n + 1].view(2, m, n)
    for x in (rows, whole):
        assert_twins(x.normal_(), torch.bfloat16)
