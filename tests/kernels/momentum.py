"""Momentum and its normalized update in two passes, against the plain twin on the host."""

from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference_moments
from lowrank_optim.kernels import momentum as kernel
from lowrank_optim.kernels._launch import MOMENTUM_PARTS
from lowrank_optim.momentum import FORMS
from lowrank_optim.storage import STATE_DTYPES
from tests.kernels import moments
from tests.kernels.common import DTYPES
from tests.kernels.moments import HALF, assert_kept, gradient, on, steps_of, within

SHAPES = [(1, 1), (3, 5), (16, 16), (7, 101), (33, 65)]
NUMBERS: dict[str, Any] = {"momentum": 0.95, "nesterov": True, "form": "ema", "eps": 1e-7}
HOW = {
    "state_dtype": st.sampled_from(STATE_DTYPES),
    "momentum": st.floats(0, 0.99),
    "nesterov": st.booleans(),
    "form": st.sampled_from(FORMS),
    "scale": st.sampled_from([1e-25, 1e-15, 1.0, 1e15, 1e25]),
}
# momenta that are zero
fresh = partial(moments.fresh, signed={"momentum_buffer": True})


def assert_twins(
    shape: tuple[int, ...],
    state_dtype: str,
    *,
    grad_dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    scale: float = 1.0,
    count: int = 1,
    rounds: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str,
    launch: tuple[int, int] | None = None,
    parts: int = MOMENTUM_PARTS,
    **numbers: Any,
) -> None:
    """Compare some steps with the twin's on the host."""
    twins = fresh(shape, state_dtype, count)
    drawn: dict[str, Any] = {"grad_dtype": grad_dtype, "layout": layout, "scale": scale}
    for _, ours, grads, seeds in steps_of(shape, state_dtype, twins, rounds, device, **drawn):
        how: dict[str, Any] = {"state_dtype": state_dtype, "seeds": seeds, **NUMBERS, **numbers}
        found = kernel.normalized_momenta_(grads, ours, **how, dtype=dtype, launch=launch, parts=parts)
        own = [grad.cpu() for grad in grads]
        expected = reference_moments.normalized_momenta_(own, twins, **how, dtype=torch.float32)
        assert found.dtype == dtype
        assert found.shape == (count, *shape)
        assert found.is_contiguous()
        # float16 has fewer small numbers
        torch.testing.assert_close(found.float().cpu(), expected, rtol=1e-5 + HALF[dtype], atol=1e-6)


def anywhere(device: str, **case: Any) -> None:
    """It equals its twin for any of `HOW`."""
    assert_twins(**case, eps=0.0, device=device)


def squares_neither_vanish_nor_overflow(scale: float, state_dtype: str, n: int, device: str) -> None:
    for dtype in DTYPES:
        grad = (scale * torch.randn(n, n, dtype=torch.float64).clamp(-3, 3)).float()
        how: dict[str, Any] = {"state_dtype": state_dtype, "seeds": [1], **NUMBERS, "eps": 0.0, "form": "sum"}
        state = fresh((n, n), state_dtype, device=device)
        found = kernel.normalized_momenta_([grad.to(device)], state, dtype=dtype, **how)[0].cpu()
        exact = grad.double() / grad.double().norm()
        atol = 1e-3 if scale < 1e-40 else 1e-7
        torch.testing.assert_close(found.double(), exact, rtol=1e-5 + HALF[dtype], atol=atol)


def zeros_small_norms_nan_and_inf(device: str) -> None:
    how: dict[str, Any] = {"state_dtype": "float32", "seeds": [1], **NUMBERS, "form": "sum", "dtype": torch.float32}

    def found(grad: Tensor, **other: Any) -> Tensor:
        state = fresh((20, 20), "float32", device=device)
        return kernel.normalized_momenta_([grad.to(device)], state, **how | other)[0].cpu()

    grad = torch.zeros(20, 20)
    for eps in (0.0, 1e-7):
        assert found(grad, eps=eps).eq(0).all()
    grad[3, 4] = 1e-9
    torch.testing.assert_close(found(grad)[3, 4], torch.tensor(1.95e-2))
    grad[5, 6] = float("nan")
    assert found(grad).isnan().all()
    grad[5, 6] = float("inf")
    assert found(grad).isnan().nonzero().tolist() == [[5, 6]]
    assert found(grad).nan_to_num(0).eq(0).all()


def bits_are_the_same(shape: tuple[int, int], state_dtype: str, device: str, times: int = 1, **how: Any) -> None:
    """They are, each time and in every stack."""
    grads, seeds = [gradient(shape).to(device) for _ in range(3)], [1, 1 << 31, 7]
    how = {"state_dtype": state_dtype, **NUMBERS, "dtype": torch.bfloat16, **how}
    together = fresh(shape, state_dtype, 3, device)
    found = kernel.normalized_momenta_(grads, together, seeds=seeds, **how)
    for _ in range(times):
        alone = fresh(shape, state_dtype, 3, device)
        for i in range(3):
            one = slice(i, i + 1)
            assert torch.equal(kernel.normalized_momenta_(grads[one], alone[one], seeds=seeds[one], **how)[0], found[i])
            assert all(torch.equal(alone[i][key], together[i][key]) for key in alone[i])


def its_own_elements_are_written_only(numel: int, state_dtype: str, device: str) -> None:
    """Of memory that is not aligned, too."""
    whole, parts = within(fresh((1, numel), state_dtype, 2), device)
    twins = on("cpu", parts)
    grads = gradient((2, 1, numel + 2))[..., 1:-1]
    how: dict[str, Any] = {"state_dtype": state_dtype, "seeds": [3, 4], **NUMBERS, "dtype": torch.float32}
    found = kernel.normalized_momenta_(list(grads.to(device).unbind()), parts, **how).cpu()
    expected = reference_moments.normalized_momenta_(list(grads.unbind()), twins, **how)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_kept(parts, twins, state_dtype)
    assert all(x[0] == 77 and x[-1] == 77 for x in whole)
