"""AdamW on many tensors in one launch, on the hardware that it is written for, against its plain twin and torch's."""

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference_apply

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import adamw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]

# each pair is compiled anew, which takes longer than it runs: all of them are where kernels are interpreted
DTYPES = [torch.float32, torch.bfloat16]
# nothing, one element, odd, a block exactly, blocks and a rest, all of them in one call
SHAPES = [(0,), (), (1,), (3, 5), (4096,), (7, 700), (2, 3, 64), (1024, 1024), (333, 1001)]
HOW: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
# of a weight, in units of its own size: one place where sums are rounded in another order, or chance has two of them
PLACES = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


class Tensors:
    """Weights, gradients and moments after some steps, of which each tensor has made its own number."""

    def __init__(self, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], grads: list[torch.dtype]) -> None:
        self.params = [torch.randn(shape, device="cuda").to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        self.grads = [torch.randn(shape, device="cuda").to(dtype) for shape, dtype in zip(shapes, grads, strict=True)]
        self.exp_avgs = [torch.randn(shape, device="cuda") for shape in shapes]
        self.exp_avg_sqs = [torch.rand(shape, device="cuda") for shape in shapes]
        self.steps = [1 + 10 * i for i in range(len(shapes))]

    @property
    def arguments(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int]]:
        return self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps

    def twin(self) -> "Tensors":
        other = Tensors([], [], [])
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
            setattr(other, name, [x.clone() for x in getattr(self, name)])
        other.steps = list(self.steps)
        return other


def assert_twins(ours: Tensors, **how: Any) -> None:
    twins = ours.twin()
    reference_apply.adamw_(*twins.arguments, **how)
    adamw.adamw_(*ours.arguments, **how)
    assert all(torch.equal(x, y) for x, y in zip(ours.grads, twins.grads, strict=True))
    torch.testing.assert_close(ours.exp_avgs, twins.exp_avgs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.exp_avg_sqs, twins.exp_avg_sqs, rtol=1e-6, atol=1e-6)
    for ours_param, twins_param in zip(ours.params, twins.params, strict=True):
        assert ours_param.dtype == twins_param.dtype
        place = PLACES[ours_param.dtype]
        torch.testing.assert_close(ours_param.float(), twins_param.float(), rtol=place, atol=max(place * 2**-4, 2**-20))
        # where the last bits of float32 decide is rare
        differ = (ours_param != twins_param).sum()
        assert ours_param.dtype == torch.float32 or differ <= 2 + ours_param.numel() // 100


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
    count = len(SHAPES)
    seeds = None if rounding == "nearest" else [1000003 * i for i in range(count)]
    assert_twins(Tensors(SHAPES, [dtype] * count, [grads] * count), seeds=seeds, **HOW)


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 90), max_size=3).map(tuple), min_size=0, max_size=5),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    betas=st.tuples(st.sampled_from([0.0, 0.9]), st.sampled_from([0.5, 0.999])),
    rates=st.tuples(st.sampled_from([0.0, 0.01]), st.sampled_from([0.0, 0.1])),
)
def test_it_equals_its_twin_anywhere(
    shapes: list[tuple[int, ...]],
    dtypes: list[torch.dtype],
    betas: tuple[float, float],
    rates: tuple[float, float],
) -> None:
    some = dtypes[: len(shapes)]
    seeds = list(range(len(shapes)))
    assert_twins(Tensors(shapes, some, some), lr=rates[0], betas=betas, eps=1e-3, weight_decay=rates[1], seeds=seeds)


def test_of_float32_it_does_as_torch() -> None:
    shapes = [(300, 200), (7,), (4096,)]
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    ours = Tensors(shapes, [torch.float32] * 3, [torch.float32] * 3)
    ours.params = [p.detach().clone() for p in params]
    for moment in (*ours.exp_avgs, *ours.exp_avg_sqs):
        moment.zero_()
    opt = torch.optim.AdamW(params, **HOW)
    for step in range(1, 6):
        ours.grads = [torch.randn(shape, device="cuda") for shape in shapes]
        for p, grad in zip(params, ours.grads, strict=True):
            p.grad = grad.clone()
        opt.step()
        ours.steps = [step] * 3
        adamw.adamw_(*ours.arguments, **HOW)
    torch.testing.assert_close(ours.params, [p.detach() for p in params], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", [0, 1, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_writes_its_own_elements_only(start: int, dtype: torch.dtype) -> None:
    """Also from addresses that allow no wide access, which have a launch of their own."""
    ours = Tensors([(900,), (640,)], [dtype] * 2, [dtype] * 2)
    memory: dict[str, list[Tensor]] = {}
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        tensors = getattr(ours, name)
        memory[name] = [torch.full((3, 1000), float("nan"), dtype=x.dtype, device="cuda") for x in tensors]
        views = [m[1, start : start + len(x)].copy_(x) for m, x in zip(memory[name], tensors, strict=True)]
        setattr(ours, name, views)
    assert_twins(ours, seeds=[1, 2], **HOW)
    for name, tensors in memory.items():
        for m, x in zip(tensors, getattr(ours, name), strict=True):
            assert x.isfinite().all()
            assert m.isfinite().sum() == x.numel()


@pytest.mark.parametrize("shape", [(1024, 4), (4096, 8), (2048, 4)], ids=str)
def test_launch_shapes_can_be_swept(shape: tuple[int, int]) -> None:
    ours = Tensors([(333, 64), (5008,)], [torch.bfloat16] * 2, [torch.bfloat16] * 2)
    twins = ours.twin()
    adamw.adamw_(*ours.arguments, **HOW, seeds=[1, 2], shape=shape)
    adamw.adamw_(*twins.arguments, **HOW, seeds=[1, 2])
    for x, y in zip(ours.params, twins.params, strict=True):
        assert torch.equal(x, y)


def test_a_step_does_not_wait_for_the_device() -> None:
    ours = Tensors([(512, 512), (77,)], [torch.bfloat16] * 2, [torch.bfloat16] * 2)
    how = HOW | {"lr": torch.tensor(0.01, device="cuda")}
    # of new sizes a table is kept on the device
    adamw.adamw_(*ours.arguments, **how)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adamw.adamw_(*ours.arguments, **how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in ours.params)


def test_it_runs_on_the_device_of_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    ours = Tensors([(64, 64)], [torch.bfloat16], [torch.bfloat16])
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs"):
        setattr(ours, name, [x.to("cuda:1") for x in getattr(ours, name)])
    assert_twins(ours, **HOW)
    assert torch.cuda.current_device() == 0
