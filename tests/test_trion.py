"""Trion and Dion2 against an independent float64 NumPy reference."""

import pytest
import torch
from torch import nn

from lowrank_optim import Muon, Trion, param_groups, state_bytes
from tests.reference import lowrank_muon_numpy
from tests.trajectory import SHAPES, assert_equals_reference, assert_same_weights, gradients

HYPER = {"lr": 0.02, "weight_decay": 0.1}
BASES = ["dct", "identity"]


def optimizer(**options):
    return lambda params: Trion(params, **{**HYPER, **options})


def reference(**options):
    return lambda w, grads: lowrank_muon_numpy.trion(w, grads, **{**HYPER, **options})


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "rms_to_rms", "none"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula_in_float64(shape, adjust, basis):
    options = {"basis": basis, "rank": 4}
    assert_equals_reference(optimizer(adjust_lr_fn=adjust, **options), reference(adjust=adjust, **options), shape)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("rank", [1, 3, 10, 99])
def test_equals_the_formula_at_every_rank_and_momentum(rank, momentum, basis):
    options = {"basis": basis, "momentum": momentum}
    assert_equals_reference(
        optimizer(rank=rank, **options), reference(rank=min(rank, 10), **options), (24, 10), steps=20
    )


def test_a_fraction_is_of_the_short_side():
    assert_equals_reference(optimizer(), reference(rank=4), (16, 40), steps=5)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_at_full_rank_it_is_muon_with_a_sum_and_without_nesterov(shape, basis):
    """M ← M + G, then P = M Q spans all of it: what is orthogonalized is the sum that Muon would keep."""
    options = {"adjust_lr_fn": "rms_to_rms", **HYPER}
    assert_same_weights(
        optimizer(rank=1.0, basis=basis),
        lambda params: Muon(params, momentum_form="sum", nesterov=False, **options),
        shape,
    )


def test_what_is_not_chosen_waits():
    """A weak direction is chosen at last, because its part of the momentum does not decay."""
    p = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    opt = Trion([p], rank=1, basis="identity", momentum=0.5)
    seen = set()
    for _ in range(60):
        p.grad = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64).expand(6, 4).clone()
        before = p.detach().clone()
        opt.step()
        (column,) = (p - before).abs().sum(0).nonzero().flatten().tolist()
        seen.add(column)
    assert seen == {0, 1, 2, 3}


def test_its_state_is_a_full_momentum():
    p = nn.Parameter(torch.zeros(48, 20))
    for basis in BASES:
        assert state_bytes(Trion([p], basis=basis)).by_name == {"momentum_buffer": 4 * 48 * 20, "step": 4}
    assert state_bytes(Trion([p], state_dtype="int8")).total == 48 * 20 + 4 * -(-48 * 20 // 256) + 4


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_its_flattened_matrix(memory_format, basis):
    start = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    conv = nn.Parameter(start.clone().to(memory_format=memory_format))
    flat = nn.Parameter(start.flatten(1).clone())
    opts = [Trion([p], rank=3, basis=basis) for p in (conv, flat)]
    for _ in range(8):
        grad = torch.randn_like(start)
        conv.grad = grad.to(memory_format=memory_format)
        flat.grad = grad.flatten(1).clone()
        for opt in opts:
            opt.step()
    assert conv.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(conv.flatten(1), flat, rtol=0, atol=1e-13)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_gradients_give_zero_updates_and_gradients_are_left_alone(dtype, basis):
    start = torch.randn(12, 8, dtype=dtype)
    p = nn.Parameter(start.clone())
    opt = Trion([p], basis=basis)
    for _ in range(2):
        p.grad = torch.zeros_like(p)
        opt.step()
    assert torch.equal(p, start)
    grad = torch.randn_like(p)
    p.grad = grad.clone()
    opt.step()
    assert torch.equal(p.grad, grad)
    assert p.isfinite().all()
    assert not torch.equal(p, start)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("size", [1e-12, 1e-20])
def test_tiny_gradients_give_full_size_updates_without_eps(size, basis):
    p = nn.Parameter(torch.zeros(32, 16))
    opt = Trion([p], lr=1.0, basis=basis, eps=0.0, ns_coefficients="you")
    grad = torch.randn(32, 16)
    p.grad = grad * (size / grad.norm())
    opt.step()
    singular = torch.linalg.svdvals(p.detach().double())[:4] / 2**0.5
    assert (singular > 0.8).all()
    assert (singular < 1.2).all()


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (2, 1, 3), (1, 1, 1, 1), (0, 4), (4, 0), (3, 0, 2)])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("rank", [0.25, 1.0, 5])
def test_odd_shapes_step(shape, basis, rank):
    p = nn.Parameter(torch.ones(shape))
    opt = Trion([p], lr=0.1, basis=basis, rank=rank)
    for _ in range(3):
        p.grad = torch.ones(shape)
        opt.step()
    assert p.isfinite().all()
    assert not p.numel() or (p.sum() < p.numel())
    Trion([p], basis=basis, rank=rank).load_state_dict(opt.state_dict())


def test_a_nan_gradient_does_not_reach_the_other_matrices():
    params = [nn.Parameter(torch.ones(6, 4)) for _ in range(3)]
    opt = Trion(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(6, 4)
        params[1].grad[0, 0] = float("nan")
        opt.step()
    assert params[0].isfinite().all()
    assert params[2].isfinite().all()


def test_one_bucket_equals_one_matrix_at_a_time():
    start = torch.randn(3, 12, 8, dtype=torch.float64)
    together = [nn.Parameter(x.clone()) for x in start]
    alone = [nn.Parameter(x.clone()) for x in start]
    opts = [Trion(together), *[Trion([p]) for p in alone]]
    for grad in gradients((12, 8), 5):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad, q.grad = grad * (i + 1), grad * (i + 1)
        for opt in opts:
            opt.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


def test_a_model_is_routed_by_role():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 12), nn.Linear(12, 16))
    opt = Trion(param_groups(model), fallback_lr=3e-4)
    assert {g["role"]: g["lr"] for g in opt.param_groups} == {"matrix": 0.02, "embedding": 3e-4, "vector": 3e-4}
    model(torch.tensor([1, 2])).square().mean().backward()
    opt.step()
    assert set(opt.state[model[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(opt.state[model[1].weight]) == {"step", "momentum_buffer"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: 0, must be an int >= 1 or a float in"),
        ({"rank": 1.5}, "rank: 1.5"),
        ({"rank": None}, "rank: None"),
        ({"basis": "svd"}, "basis: 'svd', must be one of dct, identity"),
        ({"momentum": 1.0}, "momentum: 1.0"),
        ({"ns_steps": 0}, "ns_steps: 0"),
        ({"ns_coefficients": (4.0098, -7.0585, 2.4635)}, "coefficients"),
        ({"adjust_lr_fn": "kj"}, "adjust_lr_fn: 'kj', must be one of original"),
        ({"method": "svd"}, "method: 'svd'"),
        ({"fallback_betas": (0.9,)}, "fallback_betas"),
        ({"lr": -1}, "learning rate: -1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    p = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=message):
        Trion([p], **options)
    with pytest.raises(ValueError, match=message):
        Trion([{"params": [p], **options}])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"momentums": 0.5}, "did you mean 'momentum'"),
        ({"split": 2}, "split: 2, must be None"),
        ({"flatten": False}, "flatten: False, must be True"),
        ({"role": "matrices"}, "role: 'matrices'"),
    ],
)
def test_bad_groups_are_named(group, message):
    with pytest.raises(ValueError, match=message):
        Trion([{"params": [nn.Parameter(torch.zeros(8, 8))], **group}])


def test_vectors_and_complex_matrices_are_refused():
    with pytest.raises(ValueError, match="Trion: a parameter of shape \\(8,\\) is in a group with the role 'matrix'"):
        Trion([{"params": [nn.Parameter(torch.zeros(8))], "role": "matrix"}])
    with pytest.raises(RuntimeError, match="Trion does not support complex parameters"):
        Trion([nn.Parameter(torch.zeros(8, 8, dtype=torch.complex64))])
