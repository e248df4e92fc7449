"""AuON against an independent float64 NumPy reference, and what its cosh factor is at practical sizes."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_optim import AuON, Muon, param_groups, state_bytes
from tests.reference import auon_numpy, galore_numpy
from tests.trajectory import SHAPES, assert_equals_reference, gradients, run

HYPER = {"lr": 0.24, "weight_decay": 0.1}


def optimizer(**options):
    return lambda params: AuON(params, **{**HYPER, **options})


def reference(**options):
    return lambda w, grads: auon_numpy.auon(w, grads, **{**HYPER, **options})


FORMS = {
    "paper": {},
    "hybrid": {"ns_steps": 1},
    "hybrid of five steps": {"ns_steps": 5},
    "authors' code": {"normalize": False, "gamma": 1.5},
    "authors' hybrid": {"normalize": False, "gamma": 1.5, "ns_steps": 5},
    "steep": {"gamma": 8.0},
    "flat": {"gamma": 0.0},
}


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula_in_float64(shape, form, nesterov):
    assert_equals_reference(
        optimizer(nesterov=nesterov, **form), reference(nesterov=nesterov, **form), shape, atol=1e-12
    )


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "rms_to_rms", "none"])
def test_the_factor_of_the_shape_is_a_choice(adjust):
    assert_equals_reference(optimizer(adjust_lr_fn=adjust), reference(adjust=adjust), (24, 10), atol=1e-12)


def spread(name, m, n):
    """A matrix of one kind, in float64."""
    x = torch.zeros(m, n, dtype=torch.float64)
    if name == "gaussian":
        return torch.randn(m, n, dtype=torch.float64)
    if name == "heavy-tailed":
        return torch.randn(m, n, dtype=torch.float64) / torch.rand(m, n, dtype=torch.float64)
    if name == "rank one":
        return torch.randn(m, 1, dtype=torch.float64) @ torch.randn(1, n, dtype=torch.float64)
    if name == "one row":
        x[m // 2] = torch.randn(n, dtype=torch.float64)
    elif name == "one-hot":
        x[m // 2, n // 3] = -3.0
    else:
        x.fill_(0.7)
    return x


KINDS = ["gaussian", "heavy-tailed", "rank one", "one row", "one-hot", "constant"]
# what research found for the largest value that the factor can have, less 1
LARGEST = {
    (1.0, 64): 1.7e-4,
    (1.5, 64): 5.5e-4,
    (1.0, 256): 1.1e-5,
    (1.5, 256): 3.5e-5,
    (1.0, 1024): 6.6e-7,
    (1.5, 1024): 2.2e-6,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [1.0, 1.5])
@pytest.mark.parametrize("side", [64, 256, 1024])
def test_the_cosh_factor_is_one_to_five_digits(side, gamma, kind):
    """ρ lies in [1, √(1 + sinh(γ)²/N)], the bound is reached by a one-hot matrix, and it is tiny at practical sizes.

    Read from the update itself, which is X/ρ with ‖X‖ = 1: its norm is 1/ρ.
    """
    u = spread(kind, side, side)
    rho = auon_numpy.cosh_rms(u.numpy() / np.linalg.norm(u.numpy()), gamma)
    bound = math.sqrt(1 + math.sinh(gamma) ** 2 / side**2)
    assert 1 <= rho <= bound * (1 + 1e-15)
    assert bound - 1 == pytest.approx(LARGEST[gamma, side], rel=0.05)
    if kind == "one-hot":
        assert rho == pytest.approx(bound, rel=1e-12)
    elif kind in ("gaussian", "constant"):
        # far below the bound: mean(sinh²) is about γ²/N where nothing sticks out
        assert rho - 1 == pytest.approx(gamma**2 / 2 / side**2, rel=1e-2)
    p = nn.Parameter(torch.zeros(side, side, dtype=torch.float64))
    opt = AuON([p], lr=1.0, momentum=0.0, gamma=gamma)
    p.grad = u.clone()
    opt.step()
    assert float(p.detach().norm()) == pytest.approx(1 / rho, abs=2e-7 / float(u.norm()) + 2e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_at_practical_sizes_it_is_momentum_over_its_norm(kind):
    """256×256 over 10 steps: leaving the cosh out moves no weight by more than 2e-5 of what it has moved."""
    start = torch.randn(256, 256, dtype=torch.float64)
    with_cosh, without = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    opts = [AuON([with_cosh]), AuON([without], gamma=0.0)]
    for _ in range(10):
        with_cosh.grad = spread(kind, 256, 256)
        without.grad = with_cosh.grad.clone()
        for opt in opts:
            opt.step()
    moved = (without - start).norm()
    assert (with_cosh - without).norm() < 2e-5 * moved
    # ρ = 1 everywhere: gamma = 0 is the normalized momentum
    assert moved > 0.24


def test_the_authors_code_is_gradient_descent_with_momentum():
    start = torch.randn(256, 64, dtype=torch.float64)
    ours, plain = nn.Parameter(start.clone()), start.clone()
    opt = AuON([ours], lr=0.08, normalize=False, gamma=1.5)
    moment = torch.zeros_like(plain)
    for _ in range(50):
        grad = torch.randn_like(plain)
        ours.grad = grad.clone()
        opt.step()
        moment = 0.95 * moment + 0.05 * grad
        plain -= 0.08 * (0.95 * moment + 0.05 * grad)
    assert (ours - plain).norm() < 1e-4 * (plain - start).norm()


def test_its_step_has_norm_one_where_muon_s_has_the_root_of_the_short_side():
    p, q = (nn.Parameter(torch.zeros(64, 64, dtype=torch.float64)) for _ in range(2))
    for opt in (AuON([p], lr=1.0), Muon([q], lr=1.0, method="eigh")):
        p.grad = q.grad = torch.randn(64, 64, dtype=torch.float64)
        opt.step()
    assert float(p.detach().norm()) == pytest.approx(1, abs=1e-3)
    assert torch.linalg.svdvals(p.detach())[0] < 1
    assert float(q.detach().norm()) == pytest.approx(8, rel=1e-2)


def test_the_paper_s_form_does_not_see_the_size_of_gradients_and_the_authors_code_does():
    def last(scale, **options):
        torch.manual_seed(1)
        p = nn.Parameter(torch.zeros(12, 8, dtype=torch.float64))
        return list(run(AuON([p], **options), p, [g * scale for g in gradients((12, 8), 5)]))[-1]

    # the norm of the momentum is far above the 1e-7 that is added to it
    assert (last(1.0) - last(100.0)).norm() < 2e-6 * last(1.0).norm()
    torch.testing.assert_close(last(1.0, ns_steps=1), last(100.0, ns_steps=1), rtol=1e-10, atol=0)
    torch.testing.assert_close(100 * last(1.0, normalize=False), last(100.0, normalize=False), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_gradients_give_zero_updates_and_gradients_are_left_alone(dtype, form):
    start = torch.randn(12, 8, dtype=dtype)
    p = nn.Parameter(start.clone())
    opt = AuON([p], **form)
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


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (2, 1, 3), (1, 1, 1, 1), (0, 4), (4, 0), (3, 0, 2)])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_odd_shapes_step(shape, form):
    p = nn.Parameter(torch.ones(shape))
    opt = AuON([p], **form)
    for _ in range(3):
        p.grad = torch.ones(shape)
        opt.step()
    assert p.isfinite().all()
    assert not p.numel() or (p < 1).all()


@pytest.mark.parametrize("options", [{"split": 2}, {"split": (4, 2, 6)}])
def test_a_split_equals_separate_parameters(options):
    sizes = [6, 6] if options["split"] == 2 else list(options["split"])
    start = torch.randn(12, 8, dtype=torch.float64)
    fused = nn.Parameter(start.clone())
    parts = [nn.Parameter(part.clone()) for part in start.split(sizes)]
    opts = [AuON([{"params": [fused], **options}]), *[AuON([p]) for p in parts]]
    for grad in gradients((12, 8), 5):
        fused.grad = grad.clone()
        for p, part in zip(parts, grad.split(sizes), strict=True):
            p.grad = part.clone()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(fused, torch.cat(parts), rtol=0, atol=1e-13)


def test_stacked_matrices_equal_separate_ones():
    start = torch.randn(3, 12, 8, dtype=torch.float64)
    stack = nn.Parameter(start.clone())
    parts = [nn.Parameter(part.clone()) for part in start]
    # alone, so that nothing is averaged over a bucket
    opts = [AuON([{"params": [stack], "flatten": False}]), *[AuON([p]) for p in parts]]
    for _ in range(5):
        stack.grad = torch.randn_like(stack)
        for p, part in zip(parts, stack.grad, strict=True):
            p.grad = part.clone()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(stack, torch.stack(list(parts)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_its_flattened_matrix(memory_format):
    start = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    conv = nn.Parameter(start.clone().to(memory_format=memory_format))
    flat = nn.Parameter(start.flatten(1).clone())
    opts = [AuON([p]) for p in (conv, flat)]
    for _ in range(5):
        grad = torch.randn_like(start)
        conv.grad = grad.to(memory_format=memory_format)
        flat.grad = grad.flatten(1).clone()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(conv.flatten(1), flat, rtol=0, atol=1e-13)


def test_what_is_no_matrix_is_adamw_with_a_learning_rate_of_its_own():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 12), nn.Linear(12, 16))
    opt = AuON(param_groups(model))
    assert {g["role"]: g["lr"] for g in opt.param_groups} == {"matrix": 0.24, "embedding": 1e-3, "vector": 1e-3}
    model(torch.tensor([1, 2])).square().mean().backward()
    opt.step()
    start = torch.randn(7, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    grads = [torch.randn(7, dtype=torch.float64) for _ in range(10)]
    expected = galore_numpy.adamw(
        start.numpy(), [g.numpy() for g in grads], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    for ours, theirs in zip(run(AuON([p]), p, grads), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-12)


def test_state_bytes_equal_the_formula():
    p = nn.Parameter(torch.zeros(48, 20))
    for form in FORMS.values():
        assert state_bytes(AuON([p], **form)).by_name == {"momentum_buffer": 4 * 48 * 20, "step": 4}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_bucket_equals_one_matrix_at_a_time(form):
    start = torch.randn(3, 12, 8, dtype=torch.float64)
    together, alone = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    opts = [AuON(together, **form), *[AuON([p], **form) for p in alone]]
    for grad in gradients((12, 8), 5):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad, q.grad = grad * (i + 1) ** i, grad * (i + 1) ** i
        for opt in opts:
            opt.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, "gamma: -1.0"),
        ({"gamma": float("inf")}, "gamma: inf"),
        ({"gamma": 1e3}, "gamma: 1000.0"),
        ({"normalize": 1}, "normalize: 1, must be a bool"),
        ({"ns_steps": -1}, "ns_steps: -1, must be an int in \\[0, 100\\)"),
        ({"ns_steps": 1, "ns_coefficients": (4.0098, -7.0585, 2.4635)}, "coefficients"),
        ({"momentum": 1.0}, "momentum: 1.0"),
        ({"nesterov": None}, "nesterov: None"),
        ({"adjust_lr_fn": "muon"}, "adjust_lr_fn: 'muon'"),
        ({"fallback_lr": -1.0}, "-1.0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    p = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=message):
        AuON([p], **options)
    with pytest.raises(ValueError, match=message):
        AuON([{"params": [p], **options}])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"gama": 1.5}, "did you mean 'gamma'"),
        ({"normalise": False}, "did you mean 'normalize'"),
        ({"split": 3}, "split: 3"),
    ],
)
def test_bad_groups_are_named(group, message):
    with pytest.raises(ValueError, match=message):
        AuON([{"params": [nn.Parameter(torch.zeros(8, 8))], **group}])


def test_vectors_and_complex_matrices_are_refused():
    with pytest.raises(ValueError, match="AuON: a parameter of shape \\(8,\\) is in a group with the role 'matrix'"):
        AuON([{"params": [nn.Parameter(torch.zeros(8))], "role": "matrix"}])
    with pytest.raises(RuntimeError, match="AuON does not support complex parameters"):
        AuON([nn.Parameter(torch.zeros(8, 8, dtype=torch.complex64))])
