"""Adam with stored moments on the hardware that the kernel is written for, against its plain twin on the host."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_optim.storage import STATE_DTYPES

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import adam
from tests.kernels import moments as checks
from tests.kernels.common import DTYPES, LAYOUTS, few, hardware, need_memory, no_waiting, poisoned, second_device
from tests.kernels.moments import NUMBERS

pytestmark = hardware

DEVICE = "cuda"


@pytest.mark.parametrize("shape", [*checks.SHAPES, (512, 300), (1 << 20,)], ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@poisoned(DEVICE)
def test_it_equals_its_twin(state_dtype: str, shape: tuple[int, ...]) -> None:
    checks.assert_twins(shape, state_dtype, device=DEVICE)


@pytest.mark.parametrize(("layout", "dtype"), list(zip(LAYOUTS, DTYPES, strict=True)))
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@poisoned(DEVICE)
def test_many_in_one_launch_equal_their_twins(state_dtype: str, layout: str, dtype: torch.dtype) -> None:
    checks.assert_twins(
        (90, 31), state_dtype, grad_dtype=torch.bfloat16, dtype=dtype, layout=layout, count=5, rounds=2, device=DEVICE
    )


@few
@given(
    shape=st.lists(st.sampled_from([0, 1, 5, 32, 70]), min_size=0, max_size=2).map(tuple),
    count=st.integers(1, 3),
    **checks.HOW,
)
def test_it_equals_its_twin_anywhere(**case: Any) -> None:
    checks.anywhere(**case, device=DEVICE)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_matrix_gets_the_same_bits_alone_and_among_others(state_dtype: str) -> None:
    checks.bits_are_the_same((200, 304), state_dtype, (7, 100, 2), (1, 1 << 31, 16), DEVICE)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8", "int4"])
def test_blocks_of_nan_inf_zero_and_of_the_smallest_numbers(state_dtype: str) -> None:
    checks.blocks_of_any_numbers(state_dtype, DEVICE, 1e-36, 1e-37)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_it_writes_its_own_elements_only_and_needs_no_alignment(state_dtype: str, count: int) -> None:
    checks.its_own_elements_are_written_only(3270, state_dtype, count, DEVICE)


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_programs_may_be_of_other_sizes(state_dtype: str) -> None:
    checks.programs_may_be_of_other_sizes(10007, state_dtype, [(2048, 4), (4096, 8)], DEVICE)


def test_it_addresses_more_elements_than_fit_32_bits() -> None:
    numel = (1 << 31) + 1000
    need_memory(20)
    grad = torch.ones(numel, dtype=torch.bfloat16, device=DEVICE)
    state = {
        "exp_avg": torch.zeros(numel, dtype=torch.int8, device=DEVICE),
        "exp_avg_sq": torch.zeros(numel, dtype=torch.uint8, device=DEVICE),
        "exp_avg_scale": torch.zeros(-(-numel // 256), device=DEVICE),
        "exp_avg_sq_scale": torch.zeros(-(-numel // 256), device=DEVICE),
    }
    how: dict[str, Any] = {"state_dtype": "int8", "steps": [1], "seeds": [3], "dtype": torch.bfloat16, **NUMBERS}
    direction = adam.stored_adam_directions_([grad], [state], **how)[0]
    for part in (slice(0, 10), slice(-10, None), slice((1 << 31) - 5, (1 << 31) + 5)):
        assert direction[part].eq(1).all()
        assert state["exp_avg"][part].eq(127).all()
        assert state["exp_avg_sq"][part].eq(255).all()
    torch.testing.assert_close(state["exp_avg_scale"][-3:].cpu(), torch.full((3,), 0.1))


def test_it_runs_on_the_device_of_its_tensors() -> None:
    with second_device() as device:
        checks.assert_twins((1000,), "int8", count=2, device=device)


@pytest.mark.parametrize("count", [1, 3])
def test_a_step_does_not_wait_for_the_device(count: int) -> None:
    grads = [torch.zeros(1000, device=DEVICE) for _ in range(count)]
    states = checks.fresh((1000,), "int8", count, DEVICE)
    how: dict[str, Any] = {"state_dtype": "int8", "steps": [1] * count, "seeds": [3] * count, **NUMBERS}
    adam.stored_adam_directions_(grads, states, **how)
    with no_waiting():
        directions = adam.stored_adam_directions_(grads, states, **how)
    assert all(direction.eq(0).all() for direction in directions)
