"""Every optimizer on a CUDA device: the steps of a float32 run on a CPU, and no waiting for the device in between."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import MFAC, DCTAdamW, GaLoreAdamW, LDAdamW, Muon, ops, random_bases, reference
from lowrank_optim._types import HOST
from lowrank_optim.rules import Projected
from tests.small_model import CLASSES, WAYS, Way

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # one way is AdamW alone, which the optimizer remarks on
    pytest.mark.filterwarnings("ignore:GaLoreAdamW. no parameter group has a rank:RuntimeWarning"),
]

# tall, wide, one of two alike that are stepped as one stack, a convolution, a vector
SHAPES = [(96, 64), (64, 96), (96, 64), (24, 16, 3, 3), (64,)]
STEPS = 6


def gradients(step: int) -> list[Tensor]:
    """Of few large singular values, as gradients are, so that the leading ones are well apart."""
    source = torch.Generator().manual_seed(step)
    found = []
    for shape in SHAPES:
        x = torch.randn(shape, generator=source)
        if x.dim() > 1:
            u, s, vh = torch.linalg.svd(x.flatten(1), full_matrices=False)
            x = ((u * s * 0.7 ** torch.arange(len(s))) @ vh).view(shape)
        # both runs get the numbers that bfloat16 can hold
        found.append(x.bfloat16())
    return found


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each device has random numbers of its own; here both get those of the CPU."""

    def normal(shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
        return reference.normal(shape, seed, like.cpu()).to(like.device)

    def signs(count: int, seed: int, like: Tensor) -> Tensor:
        return reference.signs(count, seed, like.cpu()).to(like.device)

    shared = (random_bases._normal_columns, random_bases._signs)
    for made in shared:
        made.cache_clear()
    monkeypatch.setattr(ops, "normal", normal)
    monkeypatch.setattr(ops, "signs", signs)
    yield
    for made in shared:
        made.cache_clear()


def moved(way: Way, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return how far each parameter has gone in a few steps, on the CPU in float32."""
    torch.manual_seed(0)
    # small, so that rounding a weight is small beside a step
    start = [(torch.randn(shape) * 0.02).bfloat16() for shape in SHAPES]
    params = [nn.Parameter(x.to(device, dtype, copy=True)) for x in start]
    # the signs of singular vectors are each device's own
    options = way.seldom(100 if way.adam else 3)
    if options:
        options["basis"] = "svd"
    # M-FAC's steps are as small as its gradients, and bfloat16 would lose them
    rates = way.rates(10.0 if way.kind is MFAC else 0.1)
    opt = way(params, weight_decay=0.1, **rates, **options)
    for step in range(STEPS):
        for p, grad in zip(params, gradients(step), strict=True):
            p.grad = grad.to(device, dtype)
        opt.step()
        for p in params:
            where = {name: "cpu" if name in HOST else device for name in opt.state[p]}
            assert {name: value.device.type for name, value in opt.state[p].items()} == where
    return [p.detach().cpu().float() - x.float() for p, x in zip(params, start, strict=True)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def tolerance(way: Way, dtype: torch.dtype) -> float:
    """Return how far apart two runs may be, as a part of how far they went."""
    if way.options.get("ns_dtype") == "bfloat16":
        # so much the two are from what they are in float64
        return 0.15
    if {"int4", "int8", "bfloat16"} & {way.options.get("state_dtype"), way.options.get("error_feedback")}:
        # a number that falls on the other side of a boundary is another by a whole step of its grid
        return 0.1
    # the basis and the directions are rounded to 16 bits, and Adam's first steps are signs
    return 0.1 if dtype == torch.bfloat16 else 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("same_draws")
@pytest.mark.parametrize("way", WAYS)
def test_steps_equal_those_of_a_cpu_in_float32(way: Way, dtype: torch.dtype) -> None:
    found, expected = moved(way, "cuda", dtype), moved(way, "cpu", torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        assert error(ours, theirs) < tolerance(way, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# M-FAC asks of each gradient whether it may enter the window, and an eigendecomposition waits inside torch
@pytest.mark.parametrize(
    "way", [way for way in WAYS if way.values[0].kind is not MFAC and way.values[0].options.get("method") != "eigh"]
)
def test_a_step_does_not_wait_for_the_device(way: Way, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.randn(shape).to("cuda", dtype)) for shape in SHAPES]
    # a basis of singular vectors asks at its refreshes whether the gradient is finite
    options = way.seldom(100)
    opt = way(params, weight_decay=0.1, **way.rates(0.02), **options)
    if "stochastic_rounding" in opt.defaults:
        opt = way(params, weight_decay=0.1, stochastic_rounding=True, **way.rates(0.02), **options)
    for p in params:
        p.grad = torch.randn_like(p)
    # the first makes what all later ones use
    opt.step()
    if way.kind is LDAdamW:
        # whose every step is a refresh, and waits for this and nothing else
        monkeypatch.setattr(Projected, "_sizes", lambda _, grads: [1.0] * len(grads))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("way", [way for way in CLASSES if not way.values[0].adam])
def test_bfloat16_weights_learn_from_steps_that_are_too_small_for_them(way: Way) -> None:
    """Weights of 1 and steps well below their grid: rounded to nearest they stay, by chance they follow."""
    moved = {}
    for chance in (False, True):
        p = nn.Parameter(torch.ones(64, 64, device="cuda", dtype=torch.bfloat16))
        opt = way([p], stochastic_rounding=chance, **way.rates(1e-3))
        random = torch.cuda.get_rng_state()
        for step in range(40):
            p.grad = gradients(step)[0][:64].to("cuda")
            opt.step()
        assert torch.equal(random, torch.cuda.get_rng_state())
        moved[chance] = p.detach().ne(1)
    assert not moved[False].any()
    assert moved[True].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Muon, GaLoreAdamW, DCTAdamW])
def test_a_learning_rate_may_be_a_tensor_anywhere(kind: Any, dtype: torch.dtype) -> None:
    moved = []
    for lr in (0.02, torch.tensor(0.02), torch.tensor(0.02, device="cuda")):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for shape in ((256, 96), (32,))]
        opt = kind(params, lr=lr, **({} if kind is Muon else {"rank": 8}))
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
        moved.append([p.detach().clone() for p in params])
    for ours in moved[1:]:
        # a tensor goes by way of a kernel, a number to cuBLAS
        torch.testing.assert_close(ours, moved[0], rtol=1.6e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Muon, GaLoreAdamW])
def test_a_convolution_in_channels_last_is_stepped(kind: Any, dtype: torch.dtype) -> None:
    moved = []
    for form in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(72, 9, 3, 3, device="cuda").to(dtype).to(memory_format=form))
        opt = kind([p], lr=0.02, **({} if kind is Muon else {"rank": 8, "basis": "random"}))
        p.grad = torch.randn_like(p, memory_format=torch.contiguous_format).contiguous(memory_format=form)
        opt.step()
        moved.append(p.detach().clone())
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-2, atol=1e-3)
