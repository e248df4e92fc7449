"""Muon against an independent float64 NumPy reference and torch.optim.Muon, and what its groups mean."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_optim import LowRankMuon, Muon, param_groups, state_bytes
from tests.reference import galore_numpy, muon_numpy
from tests.trajectory import SHAPES, assert_equals_reference, assert_same_weights, gradients, run

HYPER = {"lr": 0.02, "weight_decay": 0.1}


def reference(**options):
    return lambda w, grads: muon_numpy.muon(w, grads, **{**HYPER, **options})


def optimizer(**options):
    return lambda params: Muon(params, **{**HYPER, **options})


def error(ours, theirs):
    return float(((ours - theirs).norm() / theirs.norm()).detach())


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "rms_to_rms", "none", "nuclear"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula_in_float64(shape, adjust, nesterov):
    options = {"nesterov": nesterov, "momentum": 0.9}
    assert_equals_reference(
        optimizer(adjust_lr_fn=adjust, **options), reference(adjust=adjust, **options), shape, atol=1e-10
    )


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"momentum_form": "sum"}, {"form": "sum"}),
        ({"normuon_beta2": 0.95}, {"beta2": 0.95}),
        ({"normuon_beta2": 0.0, "nesterov": False}, {"beta2": 0.0, "nesterov": False}),
        ({"cautious": True, "weight_decay": 2.0}, {"cautious": True, "weight_decay": 2.0}),
        ({"split": 2}, "halves"),
        ({"split": (1, 3, -4)}, "sizes"),
        ({"split": 2, "normuon_beta2": 0.9, "cautious": True}, "halves and rows"),
        ({"ns_coefficients": [(2.0, -1.5, 0.5), (3.0, -3.0, 1.0)]}, "repeats"),
        ({"ns_steps": 2}, {"triples": muon_numpy.JORDAN[:2]}),
        ({"maximize": True}, "ascends"),
        ({"eps": 5.0}, {"eps": 5.0}),
        ({"momentum": 0.0}, {"momentum": 0.0}),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_option_equals_its_formula_in_float64(shape, options, same):
    rows = shape[0]
    if isinstance(options.get("split"), tuple):
        sizes = (1, 3, rows - 4)
        options, same = {"split": sizes}, {"blocks": sizes}
    elif same == "halves":
        same = {"blocks": [rows // 2] * 2}
    elif same == "halves and rows":
        same = {"blocks": [rows // 2] * 2, "beta2": 0.9, "cautious": True}
    elif same == "repeats":
        same = {"triples": [(2.0, -1.5, 0.5), *[(3.0, -3.0, 1.0)] * 4]}
    elif same == "ascends":
        assert_equals_reference(
            optimizer(**options), lambda w, grads: muon_numpy.muon(w, [-g for g in grads], **HYPER), shape
        )
        return
    assert_equals_reference(optimizer(**options), reference(**same), shape)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64)], ids=SHAPES)
def test_equals_torch_step_by_step(shape, nesterov, adjust, weight_decay, tensor_lr):
    """50 steps of float32 parameters: the same buffers, and updates equal to what products in bfloat16 tell apart.

    Both are near the exact iteration, and ours no further from it than torch's.
    """
    options = {"nesterov": nesterov, "adjust_lr_fn": adjust, "weight_decay": weight_decay, "momentum": 0.9}
    ours, theirs = (nn.Parameter(torch.randn(shape)) for _ in range(2))
    opt = Muon([ours], lr=torch.tensor(0.5) if tensor_lr else 0.5, **options)
    base = torch.optim.Muon([theirs], lr=0.5, **options)
    factor = muon_numpy.FACTORS[adjust](*shape)
    distances = []
    for _ in range(50):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        before = ours.detach().clone()
        with torch.no_grad():
            # from the same weights, so that each step is compared for itself
            theirs.copy_(before)
        opt.step()
        base.step()
        moment = base.state[theirs]["momentum_buffer"]
        torch.testing.assert_close(opt.state[ours]["momentum_buffer"], moment, rtol=0, atol=0)
        u = torch.lerp(ours.grad, moment, 0.9) if nesterov else moment
        exact = torch.from_numpy(muon_numpy.newton_schulz(u.double().numpy(), muon_numpy.JORDAN, 1e-7))
        kept = before.double() * (1 - 0.5 * weight_decay)
        updates = [(kept - p.detach().double()) / (0.5 * factor) for p in (ours, theirs)]
        distances.append([error(update, exact) for update in updates])
        assert error(*updates) < 0.025
    mine, torchs = np.mean(distances, axis=0)
    assert mine < 1.1 * torchs
    assert torchs < 0.02


def test_stays_beside_torch_over_50_steps():
    start = torch.randn(64, 32)
    grads = list(torch.randn(50, 64, 32))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    opt, base = Muon([ours], lr=0.02), torch.optim.Muon([theirs], lr=0.02)
    for one, two in zip(run(opt, ours, grads), run(base, theirs, grads), strict=True):
        assert error(one - start, two - start) < 0.025


def test_signature_and_defaults_begin_as_torch_s():
    import inspect

    ours = list(inspect.signature(Muon.__init__).parameters.values())
    theirs = list(inspect.signature(torch.optim.Muon.__init__).parameters.values())
    for one, two in zip(ours, theirs, strict=False):
        assert (one.name, one.default, one.kind) == (two.name, two.default, two.kind)
    assert all(p.kind == p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_keeps_its_buffer_where_torch_overwrites_its_own():
    """bfloat16 parameters without nesterov: torch 2.13 normalizes its momentum in place, and so forgets its size."""
    shape = (96, 64)
    ours, theirs = (nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for _ in range(2))
    options = {"lr": 1.0, "weight_decay": 0.0, "nesterov": False}
    opt, base = Muon([ours], **options), torch.optim.Muon([theirs], **options)
    expected = np.zeros(shape)
    for _ in range(4):
        grad = (10 * torch.randn(shape)).bfloat16()
        expected = 0.95 * expected + 0.05 * grad.double().numpy()
        for p, one in ((ours, opt), (theirs, base)):
            with torch.no_grad():
                # so that what is left is the last update
                p.zero_()
            p.grad = grad.clone()
            one.step()
            assert torch.equal(p.grad, grad)
    kept = opt.state[ours]["momentum_buffer"]
    assert kept.dtype == torch.float32
    np.testing.assert_allclose(kept.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert 60 < kept.norm() < 90
    update = torch.from_numpy(muon_numpy.newton_schulz(expected, muon_numpy.JORDAN, 1e-7)) * 1.5**0.5
    assert error(-ours.double(), update) < 0.05
    if torch.__version__ < "2.14":
        assert float(base.state[theirs]["momentum_buffer"].float().norm()) == pytest.approx(1.0, abs=0.02)
        assert error(-theirs.double(), update) > 0.5


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_two_forms_of_momentum_make_the_same_weights(nesterov):
    assert_same_weights(
        optimizer(nesterov=nesterov), optimizer(nesterov=nesterov, momentum_form="sum"), (20, 12), atol=1e-11
    )


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "rms_to_rms", "nuclear"])
@pytest.mark.parametrize("split", [3, (4, 8, 6)])
@pytest.mark.parametrize("normuon_beta2", [None, 0.9])
def test_a_split_equals_separate_parameters_with_factors_of_their_own(split, adjust, normuon_beta2):
    sizes = [6, 6, 6] if split == 3 else list(split)
    start = torch.randn(18, 10, dtype=torch.float64)
    fused = nn.Parameter(start.clone())
    parts = [nn.Parameter(part.clone()) for part in start.split(sizes)]
    options = {"adjust_lr_fn": adjust, "normuon_beta2": normuon_beta2}
    whole = Muon([fused], split=split, **options)
    separate = Muon(parts, **options)
    for grad in gradients((18, 10), 20):
        fused.grad = grad.clone()
        for p, part in zip(parts, grad.split(sizes), strict=True):
            p.grad = part.clone()
        whole.step()
        separate.step()
        torch.testing.assert_close(fused, torch.cat(parts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 12, 8), (2, 2, 6, 10)])
@pytest.mark.parametrize(
    "options",
    [{}, {"normuon_beta2": 0.9}, {"split": 2, "adjust_lr_fn": "nuclear"}, {"split": [2, 4], "cautious": True}],
)
def test_stacked_matrices_equal_separate_ones(shape, options):
    if options.get("split") == [2, 4]:
        options = {**options, "split": [2, shape[-2] - 2]}
    start = torch.randn(shape, dtype=torch.float64)
    stack = nn.Parameter(start.clone())
    parts = [nn.Parameter(part.clone()) for part in start.flatten(0, -3)]
    together = Muon([stack], flatten=False, **options)
    separate = Muon(parts, **options)
    for _ in range(20):
        stack.grad = torch.randn_like(stack)
        for p, part in zip(parts, stack.grad.flatten(0, -3), strict=True):
            p.grad = part.clone()
        together.step()
        separate.step()
        torch.testing.assert_close(stack.flatten(0, -3), torch.stack(list(parts)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"normuon_beta2": 0.9}, {"split": 2}, {"cautious": True}])
def test_a_convolution_is_its_flattened_matrix(memory_format, options):
    start = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    conv = nn.Parameter(start.clone().to(memory_format=memory_format))
    flat = nn.Parameter(start.flatten(1).clone())
    opts = [Muon([p], lr=0.02, **options) for p in (conv, flat)]
    for _ in range(12):
        grad = torch.randn_like(start)
        conv.grad = grad.to(memory_format=memory_format)
        flat.grad = grad.flatten(1).clone()
        for opt in opts:
            opt.step()
    assert conv.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(conv.flatten(1), flat, rtol=0, atol=1e-13)


def test_a_transposed_parameter_is_its_contiguous_twin():
    start = torch.randn(12, 30, dtype=torch.float64)
    turned = nn.Parameter(start.T.contiguous().T)
    plain = nn.Parameter(start.clone())
    opts = [Muon([p], lr=0.02) for p in (turned, plain)]
    for grad in gradients((12, 30), 12):
        turned.grad, plain.grad = grad.T.contiguous().T, grad.clone()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(turned, plain, rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"normuon_beta2": 0.95}, {"adjust_lr_fn": "nuclear"}, {"method": "gram"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_gradients_give_zero_updates(dtype, options):
    start = torch.randn(12, 8, dtype=dtype)
    p = nn.Parameter(start.clone())
    opt = Muon([p], lr=0.02, weight_decay=0.0, **options)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        opt.step()
    assert torch.equal(p, start)
    p.grad = torch.randn_like(p)
    opt.step()
    assert p.isfinite().all()
    assert not torch.equal(p, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-12, 1e-20])
def test_tiny_gradients_give_full_size_updates_without_eps(dtype, size):
    p = nn.Parameter(torch.zeros(32, 16, dtype=dtype))
    opt = Muon([p], lr=1.0, weight_decay=0.0, eps=0.0, ns_coefficients="you")
    grad = torch.randn(32, 16, dtype=dtype)
    p.grad = grad * (size / grad.norm())
    opt.step()
    singular = torch.linalg.svdvals(p.double()) / 2**0.5
    assert (singular > 0.8).all()
    assert (singular < 1.2).all()
    # and with torch's eps nearly none: U is far below 1e-7
    small = nn.Parameter(torch.zeros(32, 16, dtype=dtype))
    opt = Muon([small], lr=1.0, weight_decay=0.0)
    small.grad = p.grad.clone()
    opt.step()
    assert small.norm() < 0.05


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (2, 1, 3), (1, 1, 1, 1), (0, 4), (4, 0), (3, 0, 2)])
@pytest.mark.parametrize("options", [{}, {"flatten": False}, {"normuon_beta2": 0.9, "cautious": True}, {"split": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_odd_shapes_step(shape, options, dtype):
    p = nn.Parameter(torch.ones(shape, dtype=dtype))
    opt = Muon([p], lr=0.1, **options)
    for _ in range(3):
        p.grad = torch.ones(shape, dtype=dtype)
        opt.step()
    assert p.isfinite().all()
    assert not p.numel() or (p < 1).all()
    Muon([p], **options).load_state_dict(opt.state_dict())


def test_a_nan_gradient_does_not_reach_the_other_matrices():
    params = [nn.Parameter(torch.ones(6, 4)) for _ in range(3)]
    opt = Muon(params, normuon_beta2=0.9)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(6, 4)
        params[1].grad[0, 0] = float("nan")
        opt.step()
    assert params[0].isfinite().all()
    assert params[2].isfinite().all()
    assert params[1].isnan().any()


def test_nothing_given_is_written_and_no_random_number_taken():
    before = torch.get_rng_state()
    p = nn.Parameter(torch.ones(6, 4))
    grad = torch.arange(24.0).view(6, 4)
    p.grad = grad.clone()
    for nesterov in (True, False):
        opt = Muon([p], nesterov=nesterov, momentum=0.0, ns_dtype="float32")
        opt.step()
        assert torch.equal(p.grad, grad)
        # without momentum the buffer is the gradient: nothing has normalized it in place
        assert torch.equal(opt.state[p]["momentum_buffer"], grad)
    assert torch.equal(before, torch.get_rng_state())


def test_lr_zero_leaves_weights_bit_identical():
    start = torch.randn(9, 5)
    p = nn.Parameter(start.clone())
    opt = Muon([p], lr=0.0, cautious=True)
    p.grad = torch.randn(9, 5)
    opt.step()
    assert torch.equal(p, start)


# --- groups


def test_bare_parameters_are_sorted_by_their_dimensions():
    matrix, conv, vector, scalar = (nn.Parameter(torch.zeros(s)) for s in ((4, 3), (4, 3, 2, 2), (5,), ()))
    opt = Muon([vector, matrix, scalar, conv], fallback_lr=3e-4)
    matrices, vectors = opt.param_groups
    assert (matrices["role"], vectors["role"]) == ("matrix", "vector")
    assert [p.shape for p in matrices["params"]] == [(4, 3), (4, 3, 2, 2)]
    assert [p.shape for p in vectors["params"]] == [(5,), ()]
    assert (matrices["lr"], vectors["lr"]) == (1e-3, 3e-4)
    assert set(opt.state[conv]) == {"step", "momentum_buffer"}
    assert set(opt.state[vector]) == {"step", "exp_avg", "exp_avg_sq"}


def test_named_and_single_parameters_are_sorted_too():
    model = nn.Linear(3, 2)
    opt = Muon(model.named_parameters())
    assert [group["param_names"] for group in opt.param_groups] == [["weight"], ["bias"]]
    opt = Muon(
        [
            {"params": model.bias},
            {"params": model.weight, "lr": 0.5},
            {"params": iter([nn.Parameter(torch.zeros(2, 2))])},
        ]
    )
    assert [group["role"] for group in opt.param_groups] == ["vector", "matrix", "matrix"]
    assert [group["lr"] for group in opt.param_groups] == [1e-3, 0.5, 1e-3]


@pytest.mark.parametrize("role", ["embedding", "head", "other", "vector"])
def test_every_other_role_is_adamw(role):
    start = torch.randn(6, 5, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    grads = gradients((6, 5), 20)
    options = {"betas": (0.8, 0.9), "eps": 1e-6}
    opt = Muon(
        [{"params": [p], "role": role}],
        weight_decay=0.1,
        fallback_lr=0.01,
        fallback_betas=options["betas"],
        fallback_eps=options["eps"],
    )
    expected = galore_numpy.adamw(start.numpy(), [g.numpy() for g in grads], lr=0.01, weight_decay=0.1, **options)
    for ours, theirs in zip(run(opt, p, grads), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-12)


def test_groups_by_use_muon_are_understood():
    matrix, embedding, bias = (nn.Parameter(torch.zeros(s)) for s in ((4, 3), (9, 3), (5,)))
    opt = Muon(
        [
            {"params": [matrix], "use_muon": True, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.0},
            {"params": [embedding, bias], "use_muon": False, "lr": 3e-4, "betas": (0.8, 0.95), "eps": 1e-10},
        ]
    )
    first, second = opt.param_groups
    assert (first["role"], second["role"]) == ("matrix", "other")
    assert (first["lr"], first["momentum"], second["lr"]) == (0.02, 0.9, 3e-4)
    assert (second["fallback_betas"], second["fallback_eps"]) == ((0.8, 0.95), 1e-10)
    assert "exp_avg" in opt.state[embedding]
    assert "momentum_buffer" in opt.state[matrix]


def test_groups_of_a_model_are_routed_by_role():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 12), nn.Linear(12, 16))
    opt = Muon(param_groups(model, split={"1": 3}), lr=0.02, fallback_lr=1e-3)
    of = {id(p): group for group in opt.param_groups for p in group["params"]}
    assert of[id(model[1].weight)]["split"] == 3
    assert of[id(model[1].weight)]["role"] == "matrix"
    assert of[id(model[0].weight)]["role"] == "embedding"
    assert of[id(model[1].bias)]["weight_decay"] == 0.0
    assert {group["role"]: group["lr"] for group in opt.param_groups}["embedding"] == 1e-3
    model(torch.tensor([1, 2])).square().mean().backward()
    opt.step()


def test_a_scheduler_drives_both_learning_rates():
    model = nn.Linear(4, 3)
    opt = Muon(model.parameters(), lr=0.02, fallback_lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (t + 1))
    for _ in range(3):
        model(torch.randn(2, 4)).sum().backward()
        opt.step()
        scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.02 / 4, 1e-3 / 4])
    assert [group["initial_lr"] for group in opt.param_groups] == [0.02, 1e-3]
    tensor = Muon(model.parameters(), lr=torch.tensor(0.02), fallback_lr=torch.tensor(1e-3))
    torch.optim.lr_scheduler.LambdaLR(tensor, lambda t: 0.5)
    assert [float(group["lr"]) for group in tensor.param_groups] == pytest.approx([0.01, 5e-4])


def test_a_group_added_later_is_sorted_and_a_bad_one_leaves_nothing():
    matrix = nn.Parameter(torch.zeros(4, 3))
    opt = Muon([matrix], fallback_lr=5e-4)
    late = nn.Linear(3, 3)
    opt.add_param_group({"params": list(late.parameters()), "weight_decay": 0.0})
    assert [(g["role"], g["lr"], g["weight_decay"]) for g in opt.param_groups[1:]] == [
        ("matrix", 1e-3, 0.0),
        ("vector", 5e-4, 0.0),
    ]
    bad = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3))]
    with pytest.raises(ValueError, match="fallback_eps: -1"):
        opt.add_param_group({"params": bad, "fallback_eps": -1})
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [bad[0], late.bias]})
    assert len(opt.param_groups) == 3
    assert len(opt.state) == 3


def test_a_frozen_matrix_gets_its_state_when_it_thaws():
    p, q = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    p.requires_grad_(False)
    opt = Muon([p, q], normuon_beta2=0.9)
    assert p not in opt.state
    q.grad = torch.randn(4, 3)
    opt.step()
    p.requires_grad_(True)
    p.grad = torch.randn(4, 3)
    opt.step()
    assert opt.state[p]["step"] == 1
    assert opt.state[q]["step"] == 2
    assert not torch.equal(p, torch.ones(4, 3))


def test_a_model_may_change_its_dtype_after_the_optimizer_is_made():
    model = nn.Linear(4, 3)
    opt = Muon(model.parameters(), normuon_beta2=0.9)
    model(torch.randn(2, 4)).sum().backward()
    opt.step()
    opt.zero_grad()
    model.double()
    model(torch.randn(2, 4, dtype=torch.float64)).sum().backward()
    opt.step()
    assert opt.state[model.weight]["momentum_buffer"].dtype == torch.float64
    assert opt.state[model.weight]["step"] == 2


# --- states of others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_of_torch_s_muon_loads(dtype):
    start = torch.randn(12, 8, dtype=dtype)
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    base = torch.optim.Muon([theirs], lr=0.05, momentum=0.9)
    for _ in range(3):
        theirs.grad = torch.randn(12, 8, dtype=dtype)
        base.step()
    with torch.no_grad():
        ours.copy_(theirs)
    opt = Muon([ours], ns_dtype="float32")
    opt.load_state_dict(copy.deepcopy(base.state_dict()))
    group = opt.param_groups[0]
    assert (group["lr"], group["momentum"], group["role"], group["ns_dtype"]) == (0.05, 0.9, "matrix", "float32")
    state = opt.state[ours]
    assert state["momentum_buffer"].dtype == torch.float32
    torch.testing.assert_close(state["momentum_buffer"], base.state[theirs]["momentum_buffer"].float(), rtol=0, atol=0)
    assert state["step"] == 0
    theirs.grad = torch.randn(12, 8, dtype=dtype)
    ours.grad = theirs.grad.clone()
    before = ours.detach().float().clone()
    base.step()
    opt.step()
    assert error(ours.float() - before, theirs.float() - before) < (0.03 if dtype == torch.float32 else 0.1)
    # and back again
    base.load_state_dict(opt.state_dict())


def test_a_state_of_torch_s_muon_of_another_shape_does_not_load():
    base = torch.optim.Muon([nn.Parameter(torch.zeros(4, 3))])
    base.param_groups[0]["params"][0].grad = torch.ones(4, 3)
    base.step()
    with pytest.raises(ValueError, match="momentum_buffer of shape \\(4, 3\\)"):
        Muon([nn.Parameter(torch.zeros(3, 4))]).load_state_dict(base.state_dict())


def test_an_adam_state_without_its_step_does_not_load():
    p = nn.Parameter(torch.zeros(3))
    opt = Muon([p])
    saved = opt.state_dict()
    saved["state"] = {0: {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    with pytest.raises(ValueError, match="has no step"):
        Muon([p]).load_state_dict(saved)


# --- bytes and bad input


def test_state_bytes_equal_the_formula():
    m, n = 48, 20
    p = nn.Parameter(torch.zeros(m, n))
    assert state_bytes(Muon([p])).total == 4 * m * n + 4
    assert state_bytes(Muon([p], normuon_beta2=0.95)).total == 4 * m * n + 4 * m + 4
    assert state_bytes(Muon([p], state_dtype="bfloat16")).total == 2 * m * n + 4
    assert state_bytes(Muon([p], state_dtype="int8")).total == m * n + 4 * -(-m * n // 256) + 4
    assert state_bytes(Muon([p], state_dtype="int4")).total == m * n // 2 + 4 * -(-m * n // 64) + 4
    experts = nn.Parameter(torch.zeros(2, 6, 5))
    assert state_bytes(Muon([experts], normuon_beta2=0.9, flatten=False)).by_name["row_avg_sq"] == 4 * 12
    assert state_bytes(Muon([experts], normuon_beta2=0.9)).by_name["row_avg_sq"] == 4 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ns_steps": 0}, "ns_steps: 0, must be an int in \\[1, 100\\)"),
        ({"ns_steps": 100}, "ns_steps: 100"),
        ({"ns_steps": True}, "ns_steps: True"),
        ({"ns_coefficients": (4.0098, -7.0585, 2.4635)}, "coefficients"),
        ({"ns_coefficients": (3.0, 1.0, 1.0)}, "coefficients"),
        ({"ns_coefficients": "no such table"}, "coefficients"),
        ({"ns_coefficients": (1.5, -0.5)}, "coefficients"),
        ({"ns_coefficients": ()}, "coefficients"),
        ({"momentum": 1.0}, "momentum: 1.0, must be a number in"),
        ({"momentum": -0.1}, "momentum: -0.1"),
        ({"nesterov": 1}, "nesterov: 1, must be a bool"),
        ({"cautious": "yes"}, "cautious: 'yes', must be a bool"),
        ({"momentum_form": "mean"}, "momentum_form: 'mean', must be one of ema, sum"),
        ({"adjust_lr_fn": "spectral_norm"}, "adjust_lr_fn: 'spectral_norm', must be one of original"),
        ({"normuon_beta2": 1.0}, "normuon_beta2: 1.0"),
        ({"method": "svd"}, "method: 'svd', must be one of"),
        ({"ns_dtype": "float64"}, "ns_dtype: 'float64', must be one of float32, bfloat16, float16"),
        ({"eps": -1.0}, "eps: -1.0"),
        ({"eps": float("inf")}, "eps: inf"),
        ({"split": 0}, "split: 0"),
        ({"split": []}, "split: \\[\\]"),
        ({"split": "qkv"}, "split: 'qkv'"),
        ({"split": 5}, "split: 5, must divide the 8 rows"),
        ({"split": [4, 5]}, "split: .4, 5., must add up to the 8 rows"),
        ({"fallback_lr": -1.0}, "-1.0"),
        ({"fallback_betas": (0.9, 1.0)}, "fallback_betas"),
        ({"fallback_eps": -1e-8}, "fallback_eps"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": torch.tensor([1e-3, 1e-3])}, "Tensor lr must be 1-element"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1"),
        ({"state_dtype": "int3"}, "state_dtype: 'int3', must be one of float32"),
    ],
)
def test_bad_arguments_are_named(options, message):
    p = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=message):
        Muon([p], **options)
    with pytest.raises(ValueError, match=message):
        Muon([{"params": [p], **options}])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"momentun": 0.9}, "unknown key 'momentun'.*did you mean 'momentum'"),
        ({"fallback_beta": (0.9, 0.9)}, "did you mean 'fallback_betas'"),
        ({"role": "hidden"}, "role: 'hidden', must be one of matrix, embedding, head, other, vector"),
        ({"role": ["matrix"]}, "role"),
        ({"use_muon": "yes"}, "use_muon: 'yes', must be a bool"),
    ],
)
def test_bad_groups_are_named(group, message):
    with pytest.raises(ValueError, match=message):
        Muon([{"params": [nn.Parameter(torch.zeros(8, 8))], **group}])


def test_a_vector_in_a_group_of_matrices_is_refused():
    with pytest.raises(ValueError, match="Muon: a parameter of shape \\(8,\\) is in a group with the role 'matrix'"):
        Muon([{"params": [nn.Parameter(torch.zeros(8))], "role": "matrix"}])
    with pytest.raises(ValueError, match="which needs two dimensions or more"):
        Muon([{"params": [nn.Parameter(torch.zeros(8))], "use_muon": True}])


def test_complex_matrices_are_refused():
    with pytest.raises(RuntimeError, match="Muon does not support complex parameters"):
        Muon([nn.Parameter(torch.zeros(8, 8, dtype=torch.complex64))])


def test_sparse_gradients_are_refused():
    model = nn.Embedding(8, 4, sparse=True)
    opt = Muon([{"params": [model.weight]}])
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="Muon does not support sparse gradients"):
        opt.step()


def test_a_flattened_model_is_refused():
    """As DeepSpeed ZeRO makes it: one huge vector, in which the matrices cannot be seen any more."""
    flat = nn.Parameter(torch.zeros(1 << 20))
    with pytest.raises(RuntimeError, match="Muon: a group that is to hold matrices holds one vector of 1048576"):
        Muon([flat])
    opt = Muon([nn.Parameter(torch.zeros(2, 2))])
    with pytest.raises(RuntimeError, match="looks like a flattened model"):
        opt.add_param_group({"params": [flat]})
    assert len(opt.param_groups) == len(opt.state) == 1
    # said to be a vector, it is one
    Muon([{"params": [flat], "role": "vector"}])


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "make",
    [Muon, partial(LowRankMuon, rank=3), partial(LowRankMuon, rank=3, residual=0.3), partial(Muon, normuon_beta2=0.9)],
    ids=["dense", "factored", "completed", "normuon"],
)
def test_cautious_decay_is_where_update_and_weight_agree(make, dtype, tensor_lr):
    """Against the same step without decay, which tells the update."""
    start = torch.randn(12, 8, dtype=dtype)
    start[0] = 0
    grad = torch.randn(12, 8, dtype=dtype)
    steps = {}
    for name, weight_decay, cautious in (("none", 0.0, False), ("cautious", 3.0, True)):
        # in float32 at least, where the smallest update has a sign
        p = nn.Parameter(start.clone() if cautious or dtype == torch.float64 else start.float().clone())
        lr = torch.tensor(0.05) if tensor_lr else 0.05
        opt = make([{"params": [p], "cautious": cautious}], lr=lr, weight_decay=weight_decay, ns_dtype="float32")
        p.grad = grad.to(p.dtype)
        opt.step()
        steps[name] = p.detach().double()
    start = start.double()
    decay = 0.15 * ((start - steps["none"]) * start >= 0).double()
    exact = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-7 if tensor_lr else 1e-13}[dtype]
    torch.testing.assert_close(steps["cautious"], steps["none"] - decay * start, rtol=0, atol=exact)
    assert 0.3 < float((decay > 0).double().mean()) < 0.8


def test_cautious_decay_reaches_what_is_adamw_too():
    start = torch.randn(50, dtype=torch.float64)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    grad = torch.randn(50, dtype=torch.float64)
    for one, weight_decay, cautious in ((p, 0.0, False), (q, 2.0, True)):
        one.grad = grad.clone()
        Muon([one], lr=0.01, weight_decay=weight_decay, cautious=cautious).step()
    decay = 0.02 * ((start - p.detach()) * start >= 0).double()
    torch.testing.assert_close(q.detach(), p.detach() - decay * start, rtol=0, atol=1e-14)


def test_cautious_decay_is_plain_decay_where_there_is_no_update():
    start = torch.randn(12, 8)
    p = nn.Parameter(start.clone())
    p.grad = torch.zeros(12, 8)
    Muon([p], lr=0.1, weight_decay=0.5, cautious=True).step()
    torch.testing.assert_close(p.detach(), 0.95 * start)


@pytest.mark.parametrize("options", [{}, {"normuon_beta2": 0.9}, {"split": 2}, {"cautious": True}])
@pytest.mark.parametrize("adjust", ["original", "nuclear"])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_one_bucket_equals_one_matrix_at_a_time(chunk_bytes, adjust, options, monkeypatch):
    monkeypatch.setattr(Muon, "chunk_bytes", chunk_bytes)
    start = torch.randn(3, 12, 8, dtype=torch.float64)
    together, alone = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    opts = [Muon(together, adjust_lr_fn=adjust, **options)]
    opts += [Muon([p], adjust_lr_fn=adjust, **options) for p in alone]
    for grad in gradients((12, 8), 5):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad, q.grad = grad * (i + 1) ** i, grad * (i + 1) ** i
        for opt in opts:
            opt.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_learning_rate_that_a_group_names_is_its_own():
    params = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    opt = Muon(
        [{"params": params[:1], "role": "vector", "lr": 0.5}, {"params": params[1:], "role": "vector"}],
        fallback_lr=3e-4,
    )
    assert [group["lr"] for group in opt.param_groups] == [0.5, 3e-4]
    none = Muon([{"params": params[:1], "role": "vector"}], lr=0.02)
    assert none.param_groups[0]["lr"] == 0.02
