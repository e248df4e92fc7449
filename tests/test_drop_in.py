"""Each class where a torch.optim optimizer was: closures, gradients, layouts, learning rates, mixed precision."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.small_model import NAMED, PATHS, WAYS, Way, backward, mlp, same, snapshot, train

# one way is AdamW alone, which the optimizer remarks on
pytestmark = pytest.mark.filterwarnings("ignore:GaLoreAdamW. no parameter group has a rank:RuntimeWarning")


@pytest.mark.parametrize("way", WAYS)
def test_a_closure_runs_with_gradients_even_under_no_grad(way: Way) -> None:
    model = mlp()
    opt = way(model.parameters())

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        opt.zero_grad()
        return backward(model)

    with torch.no_grad():
        loss = opt.step(closure)
        assert not torch.is_grad_enabled()
    assert isinstance(loss, Tensor)
    assert opt.step() is None


@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_without_a_gradient_is_left_alone(way: Way) -> None:
    model = mlp()
    opt = way(model.parameters(), weight_decay=0.1)
    train(model, opt, 2)
    opt.zero_grad()
    before = snapshot(model, opt)
    opt.step()
    assert same(before, snapshot(model, opt))
    backward(model)
    model[0].weight.grad = None
    opt.step()
    after = snapshot(model, opt)
    assert same(before[0][0], after[0][0])
    own = {name for name in before[1][0] if not (way.joint and name.startswith(("window", "gram")))}
    assert all(same(before[1][0][name], after[1][0][name]) for name in own)
    assert not same(before[0][1], after[0][1])


@pytest.mark.parametrize("way", WAYS)
def test_zero_gradients_move_nothing(way: Way) -> None:
    model = mlp()
    opt = way(model.parameters())
    before = copy.deepcopy(list(model.parameters()))
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
    after, state = snapshot(model, opt)
    assert same(before, after)
    assert all(v.isfinite().all() for values in state.values() for v in values.values())
    # and the first gradient that says something is learned from
    train(model, opt, 1)
    assert not any(same(p, q) for p, q in zip(before, model.parameters(), strict=True))
    if way.adam and not way.guarded:
        # whose basis asks nothing of a gradient counts zeros as AdamW does
        assert opt.state[model[0].weight]["step"] == 6
    elif not way.counts:
        # by a matrix as if it were the first of all
        fresh = mlp()
        train(fresh, way(fresh.parameters()), 1)
        tolerance = {"rtol": 0.0, "atol": 0.0} if way.adam else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(fresh[0].weight, model[0].weight, **tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_frozen_empty_and_scalar_parameters(way: Way) -> None:
    frozen = nn.Parameter(torch.randn(8, 12), requires_grad=False)
    odd = [nn.Parameter(torch.randn(shape)) for shape in [(), (1,), (1, 1), (0,), (0, 5), (5, 0), (4, 3, 0), (7, 1)]]
    before = copy.deepcopy([frozen, *odd])
    opt = way([frozen, *odd])
    for _ in range(4):
        for p in odd:
            p.grad = torch.ones_like(p)
        opt.step()
    assert frozen not in opt.state
    assert same(before[0], frozen)
    for old, new in zip(before[1:], odd, strict=True):
        assert new.isfinite().all()
        assert new.numel() == 0 or not same(old, new)
    # thawed in the middle of training: it gets its state then
    frozen.requires_grad_(True)
    frozen.grad = torch.randn(8, 12)
    opt.step()
    assert opt.state[frozen]["step"] == 1
    assert not same(before[0], frozen)


# parameter and gradient in the strides they were made with, each equal to its contiguous copy
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every other row": lambda x: torch.repeat_interleave(x, 2, 0)[::2],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", PATHS)
def test_strides_do_not_matter(way: Way, layout: str, dtype: torch.dtype) -> None:
    lay = LAYOUTS[layout]
    shapes = [(12, 8), (8, 12), (6, 4, 3, 3)]
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    plain = [nn.Parameter(w.clone()) for w in weights]
    strided = [nn.Parameter(lay(w)) for w in weights]
    gradient_only = [nn.Parameter(w.clone()) for w in weights]
    opts = [way(params, weight_decay=0.1, lr=0.1) for params in (plain, strided, gradient_only)]
    for _ in range(4):
        for p, q, r in zip(plain, strided, gradient_only, strict=True):
            p.grad = torch.randn(p.shape).to(dtype)
            q.grad, r.grad = lay(p.grad), lay(p.grad)
        for opt in opts:
            opt.step()
    for p, q, r in zip(plain, strided, gradient_only, strict=True):
        torch.testing.assert_close(q, p)
        torch.testing.assert_close(r, p)


@pytest.mark.parametrize("way", WAYS)
def test_an_expanded_gradient_is_only_read(way: Way) -> None:
    model = mlp()
    opt = way(model.parameters())
    before = snapshot(model, opt)[0]
    for _ in range(4):
        grads = [torch.ones(()).expand(p.shape) for p in model.parameters()]
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad
        opt.step()
        for p, grad in zip(model.parameters(), grads, strict=True):
            assert p.grad is grad
            assert grad.eq(1).all()
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.isfinite().all()
        assert not same(old, new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_lr_may_have_one_element_in_any_shape(way: Way, dtype: torch.dtype) -> None:
    weights = [torch.randn(shape).to(dtype) for shape in [(), (1,), (8,), (12, 8), (6, 4, 3, 3)]]
    found = []
    for lr in (torch.tensor(0.1), torch.tensor([0.1]), torch.tensor([[0.1]])):
        params = [nn.Parameter(w.clone()) for w in weights]
        opt = way(params, weight_decay=0.1, **way.rates(lr))
        for p in params:
            p.grad = torch.ones_like(p).cumsum(-1) if p.dim() else torch.ones_like(p)
        opt.step()
        assert [p.shape for p in params] == [w.shape for w in weights]
        found.append(params)
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_lr_zero_leaves_every_bit(way: Way, dtype: torch.dtype, lr: float | Tensor) -> None:
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in [(12, 8), (8,), (6, 4, 3, 3)]]
    before = copy.deepcopy(params)
    opt = way(params, weight_decay=0.1, **way.rates(lr))
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
    assert same(before, params)
    assert opt.state[params[0]]["step"] == 3


@pytest.mark.parametrize("way", WAYS)
def test_grad_scaler_skips_a_step_whose_gradients_overflowed(way: Way) -> None:
    scaled, plain = mlp(), mlp()
    opt = way(scaled.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    other = way(plain.parameters(), lr=0.01)
    x = torch.randn(6, 12)
    for step in range(5):
        opt.zero_grad()
        loss = scaler.scale(scaled(x).square().mean())
        loss.backward()
        if step == 2:
            scaled[0].weight.grad[0, 0] = float("inf")
            before = snapshot(scaled, opt)
        scaler.step(opt)
        scaler.update()
        if step == 2:
            assert same(before, snapshot(scaled, opt))
            continue
        other.zero_grad()
        plain(x).square().mean().backward()
        other.step()
    assert scaler.get_scale() == 512.0
    # powers of two come off a gradient without a trace
    assert same(list(scaled.parameters()), list(plain.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_trains_under_autocast(way: Way, dtype: torch.dtype) -> None:
    model = mlp()
    opt = way(model.parameters(), lr=0.02)
    x = torch.randn(6, 12)

    def closure() -> Tensor:
        opt.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = model(x).float().square().mean()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(8):
        opt.step(closure)
    assert closure().item() < first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_a_step_inside_autocast_is_the_same_step(way: Way, dtype: torch.dtype) -> None:
    """The mathematics runs in float32, whatever matrix products are cast to around it."""
    inside, outside = mlp(), mlp()
    for model in (inside, outside):
        opt = way(model.parameters())
        for seed in range(4):
            opt.zero_grad()
            backward(model, seed)
            with torch.autocast("cpu", dtype=dtype, enabled=model is inside):
                opt.step()
    assert same(list(inside.parameters()), list(outside.parameters()))


@pytest.mark.parametrize("way", WAYS)
def test_a_bfloat16_weight_is_rounded_once(way: Way) -> None:
    rough = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in [(24, 16), (16,), (6, 4, 3, 3)]]
    exact = [nn.Parameter(p.detach().float()) for p in rough]
    opts = [way(rough, lr=0.01, weight_decay=0.1), way(exact, lr=0.01, weight_decay=0.1)]
    for p, q in zip(rough, exact, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.float()
    for opt in opts:
        opt.step()
    for p, q in zip(rough, exact, strict=True):
        # half a unit in the last of bfloat16's 8 binary places
        assert ((p.float() - q).abs() <= q.abs() * 2**-8 + 1e-7).all()
        assert not torch.equal(p.float(), q)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=8, deadline=None)
@given(lr=st.floats(1e-4, 0.1), weight_decay=st.floats(0, 0.5), steps=st.integers(1, 5))
def test_maximizing_is_minimizing_the_negated_loss(way: Way, lr: float, weight_decay: float, steps: int) -> None:
    up, down = mlp(), mlp()
    train(up, way(up.parameters(), lr=lr, weight_decay=weight_decay, maximize=True), steps)
    train(down, way(down.parameters(), lr=lr, weight_decay=weight_decay), steps, sign=-1)
    assert same(list(up.parameters()), list(down.parameters()))
    # and the gradients are as backward left them
    for p, q in zip(up.parameters(), down.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, -q.grad)


@pytest.mark.parametrize("name", ["svd", "dct", "muon-int8"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_compiled_step_is_the_step(name: str) -> None:
    """Counts of steps and turns of refreshes are numbers of Python, which a compiler takes for constants if it may."""

    def after(wrap: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(5))]
        step = wrap(NAMED[name](params, lr=0.01).step)
        # more often than torch compiles one function anew
        for _ in range(10):
            for p in params:
                p.grad = torch.randn_like(p)
            step()
        return params

    torch.compiler.reset()
    compiled = after(lambda step: torch.compile(step, backend="eager"))
    torch.testing.assert_close(compiled, after(lambda step: step), rtol=1e-6, atol=1e-6)
    torch.compiler.reset()
