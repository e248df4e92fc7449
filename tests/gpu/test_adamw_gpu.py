"""AdamW on many tensors in one launch, on the hardware that it is written for, against its plain twin and torch's."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import adamw
from tests.kernels import adamw as checks
from tests.kernels.adamw import HOW
from tests.kernels.common import few, hardware, no_waiting, second_device

pytestmark = hardware

DEVICE = "cuda"
# each pair is compiled anew, which takes longer than it runs: all of them are where kernels are interpreted
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "grads", "rounding"),
    [
        (torch.bfloat16, torch.bfloat16, "nearest"),
        (torch.bfloat16, torch.bfloat16, "chance"),
        (torch.bfloat16, torch.float32, "chance"),
        (torch.float16, torch.float16, "chance"),
        (torch.float32, torch.float32, "nearest"),
        (torch.float32, torch.bfloat16, "nearest"),
    ],
    ids=str,
)
def test_it_equals_its_twin(dtype: torch.dtype, grads: torch.dtype, rounding: str) -> None:
    shapes = [*checks.SHAPES, (1024, 1024), (333, 1001)]
    checks.equals_its_twin(shapes, dtype, grads, rounding, DEVICE)


@few
@given(
    shapes=st.lists(st.lists(st.sampled_from([0, 1, 5, 32, 90]), max_size=3).map(tuple), min_size=0, max_size=5),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    **checks.NUMBERS,
)
def test_it_equals_its_twin_anywhere(shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], **numbers: Any) -> None:
    some = dtypes[: len(shapes)]
    tensors = checks.Tensors(shapes, some, some, DEVICE)
    checks.assert_twins(tensors, eps=1e-3, seeds=list(range(len(shapes))), **numbers)


def test_of_float32_it_does_as_torch() -> None:
    checks.of_float32_it_does_as_torch([(300, 200), (7,), (4096,)], DEVICE)


@pytest.mark.parametrize("start", [0, 1, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_writes_its_own_elements_only(start: int, dtype: torch.dtype) -> None:
    checks.its_own_elements_are_written_only(start, dtype, DEVICE)


@pytest.mark.parametrize("shape", [(1024, 4), (4096, 8), (2048, 4)], ids=str)
def test_launch_shapes_can_be_swept(shape: tuple[int, int]) -> None:
    ours = checks.Tensors([(333, 64), (5008,)], [torch.bfloat16] * 2, [torch.bfloat16] * 2, DEVICE)
    twins = ours.twin()
    adamw.adamw_(*ours.arguments, **HOW, seeds=[1, 2], shape=shape)
    adamw.adamw_(*twins.arguments, **HOW, seeds=[1, 2])
    for x, y in zip(ours.params, twins.params, strict=True):
        assert torch.equal(x, y)


def test_a_step_does_not_wait_for_the_device() -> None:
    ours = checks.Tensors([(512, 512), (77,)], [torch.bfloat16] * 2, [torch.bfloat16] * 2, DEVICE)
    how = HOW | {"lr": torch.tensor(0.01, device=DEVICE)}
    # of new sizes a table is kept on the device
    adamw.adamw_(*ours.arguments, **how)
    with no_waiting():
        adamw.adamw_(*ours.arguments, **how)
    assert all(p.isfinite().all() for p in ours.params)


def test_it_runs_on_the_device_of_its_tensors() -> None:
    with second_device() as device:
        checks.assert_twins(checks.Tensors([(64, 64)], [torch.bfloat16], [torch.bfloat16], device), **HOW)
