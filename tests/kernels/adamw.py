"""AdamW on many tensors in one launch, against its plain twin and torch's own."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference_apply
from lowrank_optim.kernels import adamw

# nothing, one element, odd, a block exactly, blocks and a rest
SHAPES = [(0,), (), (1,), (3, 5), (4096,), (7, 700), (2, 3, 64)]
HOW: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
NAMES = ("params", "grads", "exp_avgs", "exp_avg_sqs")
# of a weight, in units of its own size: one place where sums are rounded in another order, or chance has two of them
HALF = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
PLACES = {"cpu": HALF | {torch.float32: 2.0**-21}, "cuda": HALF | {torch.float32: 2.0**-20}}
# of a weight that is about the size of the step: a device contracts products and sums in its own way
LEAST = {"cpu": 0.0, "cuda": 2.0**-20}
# one weight in so many may be another
RARE = {"cpu": 200, "cuda": 100}
NUMBERS = {
    "betas": st.tuples(st.sampled_from([0.0, 0.9]), st.sampled_from([0.5, 0.999])),
    "lr": st.sampled_from([0.0, 0.01]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
}


class Tensors:
    """Weights, gradients and moments after some steps, of which each tensor has made its own number."""

    def __init__(
        self, shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], grads: list[torch.dtype], device: str
    ) -> None:
        self.params = [torch.randn(shape, device=device).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        self.grads = [torch.randn(shape, device=device).to(dtype) for shape, dtype in zip(shapes, grads, strict=True)]
        self.exp_avgs = [torch.randn(shape, device=device) for shape in shapes]
        self.exp_avg_sqs = [torch.rand(shape, device=device) for shape in shapes]
        self.steps = [1 + 10 * i for i in range(len(shapes))]

    @property
    def arguments(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[int]]:
        return self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps

    def twin(self) -> "Tensors":
        other = Tensors([], [], [], "cpu")
        for name in NAMES:
            setattr(other, name, [x.clone() for x in getattr(self, name)])
        other.steps = list(self.steps)
        return other


def assert_twins(ours: Tensors, **how: Any) -> None:
    twins = ours.twin()
    reference_apply.adamw_(*twins.arguments, **{name: value for name, value in how.items() if name != "shape"})
    adamw.adamw_(*ours.arguments, **how)
    assert all(torch.equal(x, y) for x, y in zip(ours.grads, twins.grads, strict=True))
    torch.testing.assert_close(ours.exp_avgs, twins.exp_avgs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.exp_avg_sqs, twins.exp_avg_sqs, rtol=1e-6, atol=1e-6)
    for ours_param, twins_param in zip(ours.params, twins.params, strict=True):
        assert ours_param.dtype == twins_param.dtype
        device = ours_param.device.type
        place = PLACES[device][ours_param.dtype]
        least = max(place * 2**-4, LEAST[device])
        torch.testing.assert_close(ours_param.float(), twins_param.float(), rtol=place, atol=least)
        # where the last bits of float32 decide is rare
        differ = (ours_param != twins_param).sum()
        assert ours_param.dtype == torch.float32 or differ <= 2 + ours_param.numel() // RARE[device]


def equals_its_twin(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, grads: torch.dtype, rounding: str, device: str
) -> None:
    """All shapes are in one call."""
    count = len(shapes)
    seeds = None if rounding == "nearest" else [1000003 * i for i in range(count)]
    assert_twins(Tensors(shapes, [dtype] * count, [grads] * count, device), seeds=seeds, **HOW)


def of_float32_it_does_as_torch(shapes: list[tuple[int, ...]], device: str) -> None:
    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    ours = Tensors(shapes, [torch.float32] * 3, [torch.float32] * 3, device)
    ours.params = [p.detach().clone() for p in params]
    for moment in (*ours.exp_avgs, *ours.exp_avg_sqs):
        moment.zero_()
    opt = torch.optim.AdamW(params, **HOW)
    for step in range(1, 6):
        ours.grads = [torch.randn(shape, device=device) for shape in shapes]
        for p, grad in zip(params, ours.grads, strict=True):
            p.grad = grad.clone()
        opt.step()
        ours.steps = [step] * 3
        adamw.adamw_(*ours.arguments, **HOW)
    torch.testing.assert_close(ours.params, [p.detach() for p in params], rtol=1e-5, atol=1e-6)
    moments = [[opt.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq")]
    torch.testing.assert_close([ours.exp_avgs, ours.exp_avg_sqs], moments, rtol=1e-5, atol=1e-6)


def its_own_elements_are_written_only(start: int, dtype: torch.dtype, device: str) -> None:
    """Also from addresses that allow no wide access, which have a launch of their own."""
    ours = Tensors([(900,), (640,)], [dtype] * 2, [dtype] * 2, device)
    memory: dict[str, list[Tensor]] = {}
    for name in NAMES:
        tensors = getattr(ours, name)
        memory[name] = [torch.full((3, 1000), float("nan"), dtype=x.dtype, device=device) for x in tensors]
        views = [m[1, start : start + len(x)].copy_(x) for m, x in zip(memory[name], tensors, strict=True)]
        setattr(ours, name, views)
    assert_twins(ours, seeds=[1, 2], **HOW)
    for name, tensors in memory.items():
        for m, x in zip(tensors, getattr(ours, name), strict=True):
            assert x.isfinite().all()
            assert m.isfinite().sum() == x.numel()
