"""GaLoreAdamW against an independent float64 NumPy reference, torch.optim.AdamW and galore-torch."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_optim import GaLoreAdamW, state_bytes
from tests.reference import galore_numpy

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (16, 16)}
HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def gradients(shape, count, seed=0, dtype=torch.float64):
    """Gradients with a decaying spectrum and separated singular values, so that their vectors are well defined."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    short = min(m, n)
    spectrum = 0.7 ** torch.arange(short, dtype=torch.float64)
    for _ in range(count):
        u, _ = torch.linalg.qr(torch.randn(m, short, generator=generator, dtype=torch.float64))
        v, _ = torch.linalg.qr(torch.randn(n, short, generator=generator, dtype=torch.float64))
        yield ((u * spectrum) @ v.T).to(dtype)


def run(optimizer, p, grads):
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        yield p.detach().clone()


def svd(matrix):
    return tuple(x.numpy() for x in torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False))


def peer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("galore_torch", reason="needs the `peers` extra")


def group(p, **options):
    return [{"params": [p], **options}]


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula_in_float64(shape, proj_type):
    start = torch.randn(shape, dtype=torch.float64)
    grads = list(gradients(shape, 50))
    options = {"rank": 4, "scale": 0.5, "proj_type": proj_type}
    p = nn.Parameter(start.clone())
    opt = GaLoreAdamW(group(p, **options, update_proj_gap=20), stagger=False, **HYPER)
    expected = galore_numpy.galore(start.numpy(), [g.numpy() for g in grads], gap=20, svd=svd, **options, **HYPER)
    for ours, theirs in zip(run(opt, p, grads), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(7,), (), (5, 3), (2, 3, 4), (0, 3)])
def test_groups_without_a_rank_equal_adamw(shape):
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    opt = GaLoreAdamW(group(ours), **HYPER)
    base = torch.optim.AdamW([theirs], **HYPER)
    for _ in range(100):
        ours.grad = theirs.grad = torch.randn(shape)
        opt.step()
        base.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_group_without_a_rank_equals_the_formula_in_float64():
    start = torch.randn(6, 5, dtype=torch.float64)
    grads = list(gradients((6, 5), 50))
    p = nn.Parameter(start.clone())
    opt = GaLoreAdamW(group(p), **HYPER)
    expected = galore_numpy.adamw(start.numpy(), [g.numpy() for g in grads], **HYPER)
    for ours, theirs in zip(run(opt, p, grads), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("basis", ["svd", "subspace"])
@pytest.mark.parametrize("stagger", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_full_rank_is_adamw_in_rotated_coordinates(shape, stagger, basis):
    """With all of the short side kept, the weights are AdamW's on W·Qᵀ (or Qᵀ·W), to rounding."""
    start = torch.randn(shape, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    options = {"rank": 1.0, "scale": 1.0, "update_proj_gap": 1000, "basis": basis}
    opt = GaLoreAdamW(group(p, **options), stagger=stagger, **HYPER)
    grads = list(gradients(shape, 30))
    got = list(run(opt, p, grads))
    rotation = opt.state[p]["basis"]
    tall = shape[0] >= shape[1]

    def turn(x):
        return x @ rotation.T if tall else rotation.T @ x

    rotated = nn.Parameter(turn(start).clone())
    base = torch.optim.AdamW([rotated], **HYPER)
    for ours, theirs in zip(got, run(base, rotated, [turn(g) for g in grads]), strict=True):
        torch.testing.assert_close(turn(ours), theirs, rtol=0, atol=1e-10)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("proj_type", "equal_in"), [(kind, "effect") for kind in PROJ_TYPES] + [(k, "number") for k in PROJ_TYPES[:-1]]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_galore_torch_over_450_steps_and_two_refreshes(shape, proj_type, equal_in):
    """Within 1e-5, with an eps that is equal as a number, and with one that is equal in effect.

    galore-torch adds eps before bias correction, torch and we after it, so theirs acts as eps/√(1 − β2^t). As numbers
    they may differ for `full` alone: at the first step R = UᵀGV is diagonal, and off the diagonal Adam would divide
    rounding errors by themselves if eps did not hold them down.
    """
    galore_torch = peer()
    options = {"rank": 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": proj_type}
    eps = 1e-6 if equal_in == "effect" else 1e-8
    hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": eps, "weight_decay": 0.0}
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    bias_ours, bias_theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    opt = GaLoreAdamW([{"params": [bias_ours]}, {"params": [ours], **options}], stagger=False, **hyper)
    base = galore_torch.GaLoreAdamW(
        [{"params": [bias_theirs]}, {"params": [theirs], **options}], no_deprecation_warning=True, **hyper
    )
    for t, grad in enumerate(gradients(shape, 450, dtype=torch.float32), start=1):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        bias_ours.grad = bias_theirs.grad = grad.flatten()[:5].clone()
        if equal_in == "effect":
            for g in opt.param_groups:
                g["eps"] = eps / (1 - 0.999**t) ** 0.5
        opt.step()
        base.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        torch.testing.assert_close(bias_ours, bias_theirs, rtol=0, atol=1e-5)


@pytest.mark.peers
def test_trains_a_model_as_galore_torch_does():
    """The closed loop: each optimizer sees the gradients that its own weights give.

    With weight decay, which galore-torch applies after the update and torch before: a difference of lr²·λ·u a step.
    """
    galore_torch = peer()
    options = {"rank": 4, "update_proj_gap": 20, "scale": 0.5, "proj_type": "std"}
    hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    x, y = torch.randn(64, 20), torch.randn(64, 12)
    losses = []
    for make in (
        lambda g: GaLoreAdamW(g, stagger=False, **hyper),
        lambda g: galore_torch.GaLoreAdamW(g, no_deprecation_warning=True, **hyper),
    ):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 12))
        matrices = [p for p in model.parameters() if p.dim() == 2]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        opt = make([{"params": vectors}, {"params": matrices, **options}])
        run_losses = []
        for _ in range(60):
            opt.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            opt.step()
            run_losses.append(loss.item())
        losses.append(run_losses)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@given(
    m=st.integers(2, 40),
    n=st.integers(2, 40),
    rank=st.one_of(st.integers(1, 50), st.floats(0.05, 0.95)),
    proj_type=st.sampled_from(PROJ_TYPES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_state_bytes_equal_the_formula(m, n, rank, proj_type, dtype):
    p = nn.Parameter(torch.zeros(m, n, dtype=dtype))
    size = state_bytes(GaLoreAdamW(group(p, rank=rank, proj_type=proj_type)))
    short, long = min(m, n), max(m, n)
    r = max(1, round(rank * short)) if isinstance(rank, float) else min(rank, short)
    kept, seen = {"std": (long, short), "reverse_std": (short, long), "left": (n, m), "right": (m, n)}.get(
        proj_type, (r, m + n)
    )
    projected = 2 * r * kept + r * seen
    item = 8 if dtype == torch.float64 else 4
    assert size.total == item * min(projected, 2 * m * n) + 4
    if projected < 2 * m * n:
        assert size.by_name == {"basis": size.by_name["basis"], "exp_avg": item * r * kept} | {
            k: v for k, v in size.by_name.items() if k in ("exp_avg_sq", "step", "basis_right")
        }
    else:
        assert "basis" not in size.by_name


def test_state_bytes_of_std_are_two_long_and_one_short():
    r, m, n = 8, 96, 40
    p = nn.Parameter(torch.zeros(m, n))
    size = state_bytes(GaLoreAdamW([p], rank=r))
    assert size.by_parameter["0.0"] == {"exp_avg": 4 * r * m, "exp_avg_sq": 4 * r * m, "basis": 4 * r * n, "step": 4}
    assert size.total - 4 == 4 * (r * max(m, n) * 2 + r * min(m, n))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("basis", ["svd", "subspace"])
def test_a_convolution_is_its_flattened_matrix(memory_format, basis):
    start = torch.randn(8, 3, 3, 3)
    conv = nn.Parameter(start.clone().to(memory_format=memory_format))
    flat = nn.Parameter(start.flatten(1).clone())
    options = {"rank": 4, "update_proj_gap": 5, "basis": basis}
    opts = [GaLoreAdamW(group(p, **options), **HYPER) for p in (conv, flat)]
    for _ in range(12):
        grad = torch.randn_like(start)
        conv.grad = grad.to(memory_format=memory_format)
        flat.grad = grad.flatten(1).clone()
        for opt in opts:
            opt.step()
    assert conv.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(conv.flatten(1), flat, rtol=0, atol=1e-6)


def test_a_transposed_parameter_is_its_contiguous_twin():
    start = torch.randn(12, 30)
    turned = nn.Parameter(start.T.contiguous().T)
    plain = nn.Parameter(start.clone())
    opts = [GaLoreAdamW(group(p, rank=4, update_proj_gap=5), **HYPER) for p in (turned, plain)]
    for grad in gradients((12, 30), 12, dtype=torch.float32):
        turned.grad, plain.grad = grad.T.contiguous().T, grad.clone()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(turned, plain, rtol=0, atol=1e-6)


def test_bare_parameters_are_projected_at_rank_128():
    big, small, vector = (nn.Parameter(torch.zeros(s)) for s in ((300, 400), (60, 60), (500,)))
    opt = GaLoreAdamW([big, small, vector])
    assert opt.state[big]["exp_avg"].shape == (128, 400)
    assert opt.state[small]["exp_avg"].shape == (60, 60)
    assert "basis" not in opt.state[small]
    assert opt.state[vector]["exp_avg"].shape == (500,)


@pytest.mark.parametrize("lr_kind", [float, torch.tensor])
def test_a_low_precision_weight_is_rounded_once(lr_kind):
    """A bf16 weight follows the float32 update of the same step to half a unit in the last place."""
    start = torch.randn(40, 24).bfloat16()
    low, high = nn.Parameter(start.clone()), nn.Parameter(start.float())
    hyper = {**HYPER, "lr": 1e-2}
    opts = [GaLoreAdamW(group(p, rank=4), **{**hyper, "lr": lr_kind(hyper["lr"])}) for p in (low, high)]
    low.grad = torch.randn(40, 24).bfloat16()
    high.grad = low.grad.float()
    for opt in opts:
        opt.step()
    torch.testing.assert_close(low, high.bfloat16(), rtol=2**-8, atol=1e-6)
    assert opts[0].state[low]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("shape", [(20, 12), (9,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_lr_equals_a_number(shape, dtype):
    start = torch.randn(shape, dtype=dtype)
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    opts = [GaLoreAdamW(group(params[0], rank=3), **HYPER)]
    opts.append(GaLoreAdamW(group(params[1], rank=3), **{**HYPER, "lr": torch.tensor(HYPER["lr"])}))
    for _ in range(5):
        params[0].grad = params[1].grad = torch.randn(shape, dtype=dtype)
        for opt in opts:
            opt.step()
    torch.testing.assert_close(params[0], params[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: 0, must be an int >= 1 or a float in"),
        ({"rank": -3}, "rank: -3"),
        ({"rank": 1.5}, "rank: 1.5"),
        ({"rank": 0.0}, "rank: 0.0"),
        ({"rank": True}, "rank: True"),
        ({"rank": 4, "proj_type": "diagonal"}, "proj_type: 'diagonal', must be one of std, reverse_std, left"),
        (
            {"rank": 4, "basis": "fft"},
            "basis: 'fft', must be one of svd, rsvd, subspace, random, dct, identity, hadamard",
        ),
        ({"rank": 4, "update_proj_gap": 0}, "update_proj_gap: 0, must be an int >= 1"),
        ({"rank": 4, "scale": float("nan")}, "scale: nan"),
        ({"rank": 4, "update_proj_gpa": 10}, "unknown key 'update_proj_gpa'.*did you mean 'update_proj_gap'"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": torch.tensor([1e-3, 1e-3])}, "Tensor lr must be 1-element"),
        ({"betas": (0.9, 1.0)}, "betas: \\(0.9, 1.0\\), must be two numbers in"),
        ({"eps": -1e-8}, "eps: -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1"),
        ({"capturable": True}, "capturable: True, must be False"),
        ({"state_dtype": "int3"}, "state_dtype: 'int3', must be one of float32"),
    ],
)
def test_bad_arguments_are_named(options, message):
    p = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW(group(p, **options))
    if options.keys() <= {"rank", "proj_type", "basis", "update_proj_gap", "scale", "lr", "betas", "eps"} and (
        "update_proj_gpa" not in options
    ):
        with pytest.raises(ValueError, match=message):
            GaLoreAdamW([p], **options)
