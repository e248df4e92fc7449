"""SteepestDescent against an independent float64 NumPy reference, norm by norm and role by role."""

import pytest
import torch
from torch import nn

from lowrank_optim import SteepestDescent, param_groups, state_bytes
from tests.reference import steepest_numpy
from tests.trajectory import SHAPES, assert_equals_reference, gradients

HYPER = {"lr": 0.02, "weight_decay": 0.1}
NORMS = ["spectral", "row", "column", "sign", "rms"]
NORM_OF_ROLE = {"matrix": "spectral", "embedding": "row", "head": "sign", "other": "rms", "vector": "rms"}


def reference(norm, **options):
    return lambda w, grads: steepest_numpy.steepest_descent(w, grads, norm=norm, **{**HYPER, **options})


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_norm_equals_its_formula_in_float64(shape, norm, nesterov):
    options = {"nesterov": nesterov, "momentum": 0.9}
    assert_equals_reference(
        lambda params: SteepestDescent(params, norm=norm, **HYPER, **options),
        # a sum of momenta that cancels has no sign to agree on
        reference(norm, **options),
        shape,
    )


@pytest.mark.parametrize(("role", "norm"), NORM_OF_ROLE.items())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_role_has_its_norm(shape, role, norm):
    assert_equals_reference(
        lambda params: SteepestDescent([{"params": params, "role": role}], **HYPER), reference(norm), shape
    )


@pytest.mark.parametrize("norm", [None, *NORMS])
@pytest.mark.parametrize("shape", [(7,), ()])
def test_a_vector_has_root_mean_square_one_unless_it_is_to_have_signs(shape, norm):
    assert_equals_reference(
        lambda params: SteepestDescent([{"params": params, "role": "vector", "norm": norm}], **HYPER),
        reference("sign" if norm == "sign" and shape else "rms"),
        shape,
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_step_is_the_steepest_of_its_size(shape, norm):
    """⟨G, D⟩ is the dual norm of G: no other D of that size has more of it."""
    m, n = shape
    grad = gradients(shape, 1)[0]
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = SteepestDescent([p], lr=1.0, momentum=0.0, norm=norm, method="eigh")
    p.grad = grad.clone()
    opt.step()
    found = float((grad * -p.detach()).sum())
    best = {
        "spectral": (m / n) ** 0.5 * torch.linalg.svdvals(grad).sum(),
        "row": n**0.5 * grad.norm(dim=1).sum(),
        "column": m**0.5 * grad.norm(dim=0).sum(),
        "sign": grad.abs().sum() / n,
        "rms": (m * n) ** 0.5 * grad.norm(),
    }[norm]
    assert found == pytest.approx(float(best), rel=1e-6)


def test_the_roles_of_a_model():
    """A whole model, each parameter against NumPy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 12), nn.LayerNorm(12))
    model.add_module("lm_head", nn.Linear(12, 11, bias=False))
    model.double()
    opt = SteepestDescent(param_groups(model, roles="auto"), lr=0.01)
    assert {g["role"] for g in opt.param_groups} == {"matrix", "embedding", "head", "vector"}
    norms = {
        "0.weight": "row",
        "1.weight": "spectral",
        "1.bias": "rms",
        "2.weight": "rms",
        "2.bias": "rms",
        "lm_head.weight": "sign",
    }
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: [] for name in start}
    for _ in range(5):
        opt.zero_grad()
        model(torch.tensor([1, 2, 2, 5])).square().mean().backward()
        for name, p in model.named_parameters():
            grads[name].append(p.grad.numpy().copy())
        opt.step()
    for name, p in model.named_parameters():
        steps = steepest_numpy.steepest_descent(start[name].numpy(), grads[name], norm=norms[name], lr=0.01)
        torch.testing.assert_close(p.detach(), torch.from_numpy(list(steps)[-1]), rtol=0, atol=1e-10)
    # words that were not seen stay where they are
    assert torch.equal(model[0].weight[0], start["0.weight"][0])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_gradients_give_zero_updates_and_gradients_are_left_alone(dtype, norm):
    start = torch.randn(12, 8, dtype=dtype)
    p = nn.Parameter(start.clone())
    opt = SteepestDescent([p], norm=norm)
    for _ in range(2):
        p.grad = torch.zeros_like(p)
        opt.step()
    assert torch.equal(p, start)
    grad = torch.randn_like(p)
    grad[3] = 0
    p.grad = grad.clone()
    opt.step()
    assert torch.equal(p.grad, grad)
    assert p.isfinite().all()
    assert not torch.equal(p, start)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [1e-12, 1e-20, 1e15])
def test_the_size_of_a_gradient_does_not_matter(norm, size):
    grad = torch.randn(12, 8)
    steps = []
    for scale in (1.0, size):
        p = nn.Parameter(torch.zeros(12, 8))
        p.grad = grad * scale
        SteepestDescent([p], lr=1.0, norm=norm).step()
        steps.append(p.detach())
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-2 if norm == "spectral" else 1e-5, atol=1e-2)


@pytest.mark.parametrize(
    "shape", [(1, 7), (7, 1), (1, 1), (2, 1, 3), (1, 1, 1, 1), (0, 4), (4, 0), (3, 0, 2), (0,), ()]
)
@pytest.mark.parametrize("norm", [None, *NORMS])
def test_odd_shapes_step(shape, norm):
    p = nn.Parameter(torch.ones(shape))
    opt = SteepestDescent([p], norm=norm)
    for _ in range(3):
        p.grad = torch.ones(shape)
        opt.step()
    assert p.isfinite().all()
    assert not p.numel() or (p < 1).all()
    SteepestDescent([p], norm=norm).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("norm", ["spectral", "row", "column", "sign", "rms"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_its_flattened_matrix(memory_format, norm):
    start = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    conv = nn.Parameter(start.clone().to(memory_format=memory_format))
    flat = nn.Parameter(start.flatten(1).clone())
    opts = [SteepestDescent([p], norm=norm) for p in (conv, flat)]
    for _ in range(5):
        grad = torch.randn_like(start)
        conv.grad = grad.to(memory_format=memory_format)
        flat.grad = grad.flatten(1).clone()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(conv.flatten(1), flat, rtol=0, atol=1e-13)


@pytest.mark.parametrize("norm", ["spectral", "column", "rms"])
def test_split_and_stacked_matrices_equal_separate_ones(norm):
    start = torch.randn(3, 12, 8, dtype=torch.float64)
    stack, fused = nn.Parameter(start.clone()), nn.Parameter(start.flatten(0, 1).clone())
    parts = [nn.Parameter(part.clone()) for part in start]
    opts = [
        SteepestDescent([{"params": [stack], "flatten": False}], norm=norm),
        SteepestDescent([{"params": [fused], "split": 3}], norm=norm),
        SteepestDescent(parts, norm=norm),
    ]
    for _ in range(5):
        grad = torch.randn_like(start)
        stack.grad, fused.grad = grad.clone(), grad.flatten(0, 1).clone()
        for p, part in zip(parts, grad, strict=True):
            p.grad = part.clone()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(stack, torch.stack(list(parts)), rtol=0, atol=1e-13)
    torch.testing.assert_close(fused, torch.cat(parts), rtol=0, atol=1e-13)


def test_everything_keeps_one_momentum():
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 12))
    opt = SteepestDescent(param_groups(model))
    assert set(state_bytes(opt).by_name) == {"momentum_buffer", "step"}
    assert state_bytes(opt).by_name["momentum_buffer"] == 4 * (66 + 72 + 12)
    bare = SteepestDescent(model.parameters(), lr=0.1, fallback_lr=0.01)
    assert [(g["role"], g["lr"]) for g in bare.param_groups] == [("matrix", 0.1), ("vector", 0.01)]


def test_a_nan_gradient_does_not_reach_the_other_matrices():
    for norm in NORMS:
        params = [nn.Parameter(torch.ones(6, 4)) for _ in range(3)]
        opt = SteepestDescent(params, norm=norm)
        for p in params:
            p.grad = torch.randn(6, 4)
        params[1].grad[0, 0] = float("nan")
        opt.step()
        assert params[0].isfinite().all()
        assert params[2].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "max"}, "norm: 'max', must be one of spectral, row, column, sign, rms"),
        ({"norm": 2}, "norm: 2"),
        ({"momentum": 1.0}, "momentum: 1.0"),
        ({"ns_steps": 0}, "ns_steps: 0"),
        ({"ns_coefficients": (4.0098, -7.0585, 2.4635)}, "coefficients"),
        ({"method": "svd"}, "method: 'svd'"),
        ({"lr": -1.0}, "learning rate: -1.0"),
        ({"fallback_lr": -1.0}, "-1.0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    p = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=message):
        SteepestDescent([p], **options)
    with pytest.raises(ValueError, match=message):
        SteepestDescent([{"params": [p], **options}])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"norms": "row"}, "did you mean 'norm'"),
        ({"role": "bias"}, "role: 'bias'"),
        ({"split": 3}, "split: 3"),
        ({"role": "embedding", "split": 3}, "split: 3"),
    ],
)
def test_bad_groups_are_named(group, message):
    with pytest.raises(ValueError, match=message):
        SteepestDescent([{"params": [nn.Parameter(torch.zeros(8, 8))], **group}])


def test_vectors_among_matrices_and_complex_parameters_are_refused():
    with pytest.raises(ValueError, match="SteepestDescent: a parameter of shape \\(8,\\) is in a group with the role"):
        SteepestDescent([{"params": [nn.Parameter(torch.zeros(8))], "role": "matrix"}])
    with pytest.raises(RuntimeError, match="SteepestDescent does not support complex parameters"):
        SteepestDescent([nn.Parameter(torch.zeros(8, dtype=torch.complex64))])
