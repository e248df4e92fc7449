"""Momentum and its normalized update on the hardware that the kernels are written for, against the plain twin."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_optim.momentum import FORMS
from lowrank_optim.storage import STATE_DTYPES

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import momentum as kernel
from lowrank_optim.kernels._launch import MOMENTUM_PARTS
from tests.kernels import momentum as checks
from tests.kernels.common import DTYPES, LAYOUTS, few, hardware, need_memory, no_waiting, poisoned, second_device
from tests.kernels.momentum import NUMBERS

pytestmark = hardware

DEVICE = "cuda"


@pytest.mark.parametrize("shape", [*checks.SHAPES, (1024, 1031), (2048, 1024)], ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@poisoned(DEVICE)
def test_it_equals_its_twin(state_dtype: str, shape: tuple[int, ...]) -> None:
    checks.assert_twins(shape, state_dtype, device=DEVICE)


@pytest.mark.parametrize(("layout", "dtype"), list(zip(LAYOUTS, DTYPES, strict=True)))
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@poisoned(DEVICE)
def test_many_in_two_launches_equal_their_twins(state_dtype: str, layout: str, dtype: torch.dtype) -> None:
    checks.assert_twins(
        (90, 310), state_dtype, grad_dtype=torch.bfloat16, dtype=dtype, layout=layout, count=5, device=DEVICE
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nesterov", [True, False])
def test_every_form_of_momentum(nesterov: bool, form: str) -> None:
    checks.assert_twins((200, 300), "int8", nesterov=nesterov, form=form, momentum=0.8, rounds=3, device=DEVICE)


@pytest.mark.parametrize("parts", [1, 7, MOMENTUM_PARTS])
@pytest.mark.parametrize("launch", [(2048, 4), (2048, 8)], ids=str)
def test_launches_may_be_of_other_sizes(launch: tuple[int, int], parts: int) -> None:
    for state_dtype in ("float32", "int8"):
        checks.assert_twins((333, 350), state_dtype, launch=launch, parts=parts, count=2, rounds=1, device=DEVICE)


@few
@given(shape=st.tuples(*[st.sampled_from([1, 5, 32, 100])] * 2), count=st.integers(1, 3), **checks.HOW)
def test_it_equals_its_twin_anywhere(**case: Any) -> None:
    checks.anywhere(**case, device=DEVICE)


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e25, 1e37])
def test_squares_neither_vanish_nor_overflow(scale: float) -> None:
    checks.squares_neither_vanish_nor_overflow(scale, "float32", 200, DEVICE)


def test_zeros_small_norms_nan_and_inf() -> None:
    checks.zeros_small_norms_nan_and_inf(DEVICE)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_matrix_gets_the_same_bits_each_time_and_in_every_stack(state_dtype: str) -> None:
    checks.bits_are_the_same((1000, 2008), state_dtype, DEVICE, times=3)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_it_writes_its_own_elements_only_and_needs_no_alignment(state_dtype: str) -> None:
    checks.its_own_elements_are_written_only(3270, state_dtype, DEVICE)


def test_it_addresses_more_elements_than_fit_32_bits() -> None:
    numel = (1 << 31) + 1000
    need_memory(20)
    grad = torch.ones(1, numel, dtype=torch.bfloat16, device=DEVICE)
    codes = torch.zeros(1, numel, dtype=torch.int8, device=DEVICE)
    state = {"momentum_buffer": codes, "momentum_buffer_scale": torch.zeros(-(-numel // 256), device=DEVICE)}
    how: dict[str, Any] = {"state_dtype": "int8", "seeds": [3], **NUMBERS, "dtype": torch.bfloat16}
    found = kernel.normalized_momenta_([grad], [state], **how)[0, 0]
    for part in (slice(0, 10), slice(-10, None), slice((1 << 31) - 5, (1 << 31) + 5)):
        torch.testing.assert_close(found[part].float().cpu(), torch.full((10,), numel**-0.5), rtol=2.0**-8, atol=0.0)
        assert codes[0, part].eq(127).all()


def test_it_runs_on_the_device_of_its_tensors() -> None:
    with second_device() as device:
        checks.assert_twins((100, 30), "int8", count=2, device=device)


def test_a_step_does_not_wait_for_the_device() -> None:
    grads = [torch.zeros(100, 30, device=DEVICE) for _ in range(3)]
    states = checks.fresh((100, 30), "int8", 3, DEVICE)
    how: dict[str, Any] = {"state_dtype": "int8", "seeds": [3] * 3, **NUMBERS, "dtype": torch.bfloat16}
    kernel.normalized_momenta_(grads, states, **how)
    with no_waiting():
        found = kernel.normalized_momenta_(grads, states, **how)
    assert found.eq(0).all()
