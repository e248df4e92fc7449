"""LowRankMuon against an independent float64 NumPy reference and against Muon, and the bytes of its state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_optim import LowRankMuon, Muon, param_groups, state_bytes
from tests.reference import lowrank_muon_numpy, muon_numpy
from tests.trajectory import SHAPES, assert_equals_reference, assert_same_weights, gradients, run

# little momentum, with which a basis moves often
HYPER = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.5}
BASES = ["dct", "identity", "svd", "subspace"]


def optimizer(**options):
    return lambda params: LowRankMuon(params, **{**HYPER, **options})


def reference(shape, **options):
    if options.get("basis") == "subspace":
        short, rank = min(shape), options["rank"]
        m, n = shape
        # the sketch that starts a basis comes of a generator of its own, so that a run can be repeated
        source = torch.Generator().manual_seed(0)
        sketch = torch.randn(max(m, n), rank, generator=source, dtype=torch.float64)
        options["sketch"] = sketch.numpy()
        assert short >= rank
    return lambda w, grads: lowrank_muon_numpy.low_rank_muon(w, grads, **{**HYPER, **options})


@pytest.mark.parametrize("residual", [None, 0.3])
@pytest.mark.parametrize(
    ("basis", "gap"), [("dct", 1), ("identity", 1), ("dct", 3), ("svd", 3), ("svd", 1), ("subspace", 3)]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula_in_float64(shape, basis, gap, residual):
    """Weights, not bases: the signs of singular vectors are the library's, and the carry takes them along."""
    options = {"basis": basis, "rank": 4, "residual": residual}
    assert_equals_reference(
        optimizer(update_proj_gap=gap, stagger=False, **options), reference(shape, gap=gap, **options), shape, atol=1e-9
    )


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "rms_to_rms", "none", "nuclear"])
@pytest.mark.parametrize("residual", [None, 0.3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_factors_are_of_the_whole_shape_and_nesterov_looks_ahead(shape, residual, adjust, nesterov):
    options = {"rank": 3, "residual": residual, "nesterov": nesterov}
    assert_equals_reference(
        optimizer(adjust_lr_fn=adjust, **options), reference(shape, adjust=adjust, **options), shape, steps=20
    )


@pytest.mark.parametrize("gap", [3, 4])
def test_with_stagger_a_basis_is_chosen_at_the_first_step_and_at_its_own_turn(gap):
    # one matrix: its turn is in the middle of the period
    assert_equals_reference(
        optimizer(update_proj_gap=gap, rank=4), reference((24, 10), gap=gap, offset=gap // 2, rank=4), (24, 10)
    )


@given(
    shape=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    share=st.floats(0.01, 1.0),
    kind=st.sampled_from(["dct", "identity", "svd"]),
    gap=st.integers(1, 3),
    residual=st.sampled_from([None, 0.0, 0.4, 1.0]),
    momentum=st.sampled_from([0.0, 0.5, 0.95]),
    nesterov=st.booleans(),
    adjust=st.sampled_from(["original", "match_rms_adamw", "rms_to_rms", "nuclear"]),
    seed=st.integers(0, 999),
)
@settings(max_examples=150, deadline=None)
def test_equals_the_formula_whatever_the_options(shape, share, kind, gap, residual, momentum, nesterov, adjust, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, round(share * min(shape)))
    start, *grads = torch.randn(5, *shape, generator=generator, dtype=torch.float64)
    options = {"basis": kind, "residual": residual, "momentum": momentum, "nesterov": nesterov}
    p = nn.Parameter(start.clone())
    opt = optimizer(rank=rank, update_proj_gap=gap, stagger=False, adjust_lr_fn=adjust, **options)([p])
    if "basis" not in opt.state[p] and "basis_index" not in opt.state[p]:
        whole = {"momentum": momentum, "nesterov": nesterov, "adjust": adjust}
        expected = muon_numpy.muon(start.numpy(), [g.numpy() for g in grads], lr=0.02, weight_decay=0.1, **whole)
    else:
        expected = reference(shape, rank=rank, gap=gap, adjust=adjust, **options)(
            start.numpy(), [g.numpy() for g in grads]
        )
    for ours, theirs in zip(run(opt, p, grads), expected, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=1e-8)


@pytest.mark.parametrize("basis", BASES)
def test_the_bases_of_these_runs_do_move(basis):
    """What the comparisons above rest on: a basis that stayed would hide a wrong carry, or a wrong turn."""
    key = "basis_index" if basis in ("dct", "identity") else "basis"
    for gap, stagger, turns in ((1, False, range(1, 50)), (3, False, range(3, 50, 3)), (3, True, range(1, 50, 3))):
        p = nn.Parameter(torch.zeros(24, 10, dtype=torch.float64))
        opt = optimizer(basis=basis, rank=4, update_proj_gap=gap, stagger=stagger)([p])
        before, moved = None, []
        for t, grad in enumerate(gradients((24, 10))):
            p.grad = grad
            opt.step()
            if before is not None and not torch.equal(before, opt.state[p][key]):
                moved.append(t)
            before = opt.state[p][key].clone()
        assert set(moved) <= set(turns)
        assert len(moved) > 0.3 * len(turns)


def test_the_default_gap_is_every_step_where_a_choice_is_cheap():
    for basis, gap in (("dct", 1), ("identity", 1), ("svd", 200), ("subspace", 200)):
        assert_same_weights(
            optimizer(basis=basis, rank=3, stagger=False),
            optimizer(basis=basis, rank=3, stagger=False, update_proj_gap=gap),
            (12, 8),
            steps=5,
            atol=0,
        )


@pytest.mark.parametrize("residual", [None, 0.3])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_at_full_rank_it_is_muon(shape, basis, residual):
    assert_same_weights(
        optimizer(rank=1.0, basis=basis, residual=residual, update_proj_gap=3),
        lambda params: Muon(params, **HYPER),
        shape,
        atol=1e-10,
    )


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("basis", BASES)
def test_at_full_rank_it_is_muon_with_other_options_too(basis, nesterov):
    options = {"nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw", "ns_coefficients": "you", "maximize": True}
    assert_same_weights(
        optimizer(rank=1.0, basis=basis, **options),
        lambda params: Muon(params, **HYPER, **options),
        (10, 24),
        atol=1e-10,
    )


def test_a_matrix_whose_coordinates_are_no_smaller_is_muon():
    p = nn.Parameter(torch.zeros(10, 24))
    assert set(LowRankMuon([p], rank=10).state[p]) == {"step", "momentum_buffer"}
    assert set(LowRankMuon([p], rank=8, basis="svd").state[p]) == {"step", "momentum_buffer"}
    assert set(LowRankMuon([p], rank=7, basis="svd").state[p]) == {"step", "momentum_buffer", "basis"}
    assert_same_weights(optimizer(rank=8, basis="svd"), lambda params: Muon(params, **HYPER), (10, 24), atol=0)
    # asked for in full, it is turned
    assert "basis_index" in LowRankMuon([p], rank=1.0).state[p]
    # the int 1 is one vector, not all of them
    row = nn.Parameter(torch.zeros(1, 64))
    assert set(LowRankMuon([row], rank=1).state[row]) == {"step", "momentum_buffer"}
    assert "basis_index" in LowRankMuon([row], rank=1.0).state[row]


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (48, 48), (8, 4, 2, 2)])
def test_its_state_is_a_quarter_of_muon_s_and_an_eighth_of_adamw_s_to_the_byte(shape):
    p = nn.Parameter(torch.zeros(shape))
    m, n = shape[0], p.numel() // shape[0]
    r = min(m, n) // 4
    size = state_bytes(LowRankMuon([p], rank=0.25))
    assert size.total == 4 * r * max(m, n) + 4 * r + 4
    assert size.by_name == {"momentum_buffer": 4 * r * max(m, n), "basis_index": 4 * r, "step": 4}
    muon = state_bytes(Muon([p])).by_name["momentum_buffer"]
    assert 4 * size.by_name["momentum_buffer"] == muon == 4 * m * n
    adamw = torch.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    adamw.step()
    moments = sum(adamw.state[p][name].nbytes for name in ("exp_avg", "exp_avg_sq"))
    assert 8 * size.by_name["momentum_buffer"] == moments


def test_state_bytes_of_the_other_forms():
    m, n, r = 40, 24, 5
    p = nn.Parameter(torch.zeros(m, n))
    for basis in ("svd", "subspace"):
        assert state_bytes(LowRankMuon([p], rank=r, basis=basis)).total == 4 * r * (m + n) + 4
    assert state_bytes(LowRankMuon([p], rank=r, basis="identity")).total == 4 * r * m + 4 * r + 4
    assert state_bytes(LowRankMuon([p], rank=0, residual=1.0)).total == 4
    int8 = state_bytes(LowRankMuon([p], rank=8, state_dtype="int8"))
    assert int8.total == 8 * m + 4 * -(-8 * m // 256) + 4 * 8 + 4


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw", "nuclear"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_without_rank_it_orthogonalizes_the_gradient_and_keeps_nothing(shape, adjust):
    hyper = {"lr": 0.02, "weight_decay": 0.1}
    assert_equals_reference(
        optimizer(rank=0, residual=1.0, adjust_lr_fn=adjust),
        lambda w, grads: muon_numpy.muon(w, grads, momentum=0.0, nesterov=False, adjust=adjust, **hyper),
        shape,
    )
    p = nn.Parameter(torch.zeros(shape))
    opt = LowRankMuon([p], rank=0, residual=1.0)
    p.grad = torch.randn(shape)
    opt.step()
    assert set(opt.state[p]) == {"step"}
    assert opt.state[p]["step"] == 1


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("residual", [None, 0.5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_its_flattened_matrix(memory_format, residual, basis):
    start = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    conv = nn.Parameter(start.clone().to(memory_format=memory_format))
    flat = nn.Parameter(start.flatten(1).clone())
    opts = [LowRankMuon([p], lr=0.02, rank=3, basis=basis, residual=residual, update_proj_gap=4) for p in (conv, flat)]
    for _ in range(10):
        grad = torch.randn_like(start)
        conv.grad = grad.to(memory_format=memory_format)
        flat.grad = grad.flatten(1).clone()
        for opt in opts:
            opt.step()
    assert conv.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(conv.flatten(1), flat, rtol=0, atol=1e-12)


def test_a_stateless_convolution_is_its_flattened_matrix():
    start = torch.randn(8, 3, 3, 3, dtype=torch.float64)
    conv, flat = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    opts = [LowRankMuon([p], lr=0.02, rank=0, residual=1.0) for p in (conv, flat)]
    conv.grad = torch.randn_like(start)
    flat.grad = conv.grad.flatten(1).clone()
    for opt in opts:
        opt.step()
    torch.testing.assert_close(conv.flatten(1), flat, rtol=0, atol=1e-13)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("options", [{"rank": 3}, {"rank": 3, "residual": 0.5}, {"rank": 0, "residual": 1.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_gradients_give_zero_updates(dtype, options, basis):
    start = torch.randn(12, 8, dtype=dtype)
    p = nn.Parameter(start.clone())
    opt = LowRankMuon([p], lr=0.02, weight_decay=0.0, basis=basis, update_proj_gap=2, **options)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        opt.step()
    assert torch.equal(p, start)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        opt.step()
    assert p.isfinite().all()
    assert not torch.equal(p, start)
    # and none again, of a momentum that is left
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        opt.step()
    assert p.isfinite().all()


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("residual", [None, 1.0])
@pytest.mark.parametrize("size", [1e-12, 1e-20])
def test_tiny_gradients_give_full_size_updates_without_eps(basis, residual, size):
    p = nn.Parameter(torch.zeros(32, 16))
    opt = LowRankMuon(
        [p], lr=1.0, rank=4, weight_decay=0.0, eps=0.0, ns_coefficients="you", basis=basis, residual=residual
    )
    grad = torch.randn(32, 16)
    p.grad = grad * (size / grad.norm())
    opt.step()
    count = 4 if residual is None else 16
    singular = torch.linalg.svdvals(p.detach().double())[:count] / 2**0.5
    assert (singular > 0.8).all()
    assert (singular < 1.2).all()


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (2, 1, 3), (1, 1, 1, 1), (0, 4), (4, 0), (3, 0, 2)])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(
    "options", [{}, {"rank": 1.0}, {"rank": 1.0, "residual": 0.5}, {"rank": 0, "residual": 1.0}, {"rank": 5}]
)
def test_odd_shapes_step(shape, basis, options):
    p = nn.Parameter(torch.ones(shape))
    opt = LowRankMuon([p], lr=0.1, basis=basis, update_proj_gap=2, **options)
    for _ in range(4):
        p.grad = torch.ones(shape)
        opt.step()
    assert p.isfinite().all()
    assert not p.numel() or (p < 1).all()
    LowRankMuon([p], **options).load_state_dict(opt.state_dict())


@pytest.mark.filterwarnings("ignore:a gradient held NaN:RuntimeWarning", "ignore:a basis could not be:RuntimeWarning")
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("residual", [None, 0.3])
def test_a_nan_gradient_does_not_reach_the_other_matrices(basis, residual):
    params = [nn.Parameter(torch.ones(12, 8)) for _ in range(3)]
    opt = LowRankMuon(params, basis=basis, rank=2, residual=residual, update_proj_gap=2, stagger=False)
    for step in range(4):
        for p in params:
            p.grad = torch.randn(12, 8)
        if step in (1, 2):
            params[1].grad[0, 0] = float("nan")
        opt.step()
    assert params[0].isfinite().all()
    assert params[2].isfinite().all()
    assert all(opt.state[p]["step"] == 4 for p in (params[0], params[2]))


@pytest.mark.filterwarnings("ignore:a gradient held NaN:RuntimeWarning")
@pytest.mark.parametrize("basis", ["svd", "subspace"])
def test_a_nan_gradient_at_a_refresh_is_sat_out(basis):
    p = nn.Parameter(torch.ones(12, 8))
    opt = LowRankMuon([p], basis=basis, rank=2, update_proj_gap=1)
    p.grad = torch.full((12, 8), float("nan"))
    opt.step()
    assert torch.equal(p, torch.ones(12, 8))
    assert opt.state[p]["step"] == 0
    p.grad = torch.randn(12, 8)
    opt.step()
    assert opt.state[p]["step"] == 1
    assert p.isfinite().all()


def test_a_frozen_matrix_gets_its_state_when_it_thaws():
    p, q = (nn.Parameter(torch.ones(12, 8)) for _ in range(2))
    p.requires_grad_(False)
    opt = LowRankMuon([p, q], rank=2)
    assert p not in opt.state
    q.grad = torch.randn(12, 8)
    opt.step()
    p.requires_grad_(True)
    p.grad = torch.randn(12, 8)
    opt.step()
    assert (opt.state[p]["step"], opt.state[q]["step"]) == (1, 2)


@pytest.mark.parametrize("basis", BASES)
def test_a_model_may_change_its_dtype_after_the_optimizer_is_made(basis):
    model = nn.Linear(8, 12)
    opt = LowRankMuon(model.parameters(), rank=2, basis=basis)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        opt.zero_grad()
        model(torch.randn(2, 8, dtype=dtype)).sum().backward()
        opt.step()
        assert opt.state[model.weight]["momentum_buffer"].dtype == dtype
    assert opt.state[model.weight]["step"] == 2
    if "basis_index" in opt.state[model.weight]:
        assert opt.state[model.weight]["basis_index"].dtype == torch.int32


def test_indices_stay_int32_in_a_reload_and_a_model_of_bfloat16_resumes_bit_for_bit():
    start = torch.randn(12, 8).bfloat16()
    grads = [g.bfloat16() for g in gradients((12, 8), 8, dtype=torch.float32)]
    p = nn.Parameter(start.clone())
    opt = LowRankMuon([p], rank=3)
    whole = list(run(opt, p, grads))
    q = nn.Parameter(start.clone())
    first = LowRankMuon([q], rank=3)
    list(run(first, q, grads[:4]))
    second = LowRankMuon([q], rank=3)
    second.load_state_dict(first.state_dict())
    assert second.state[q]["basis_index"].dtype == torch.int32
    assert second.state[q]["momentum_buffer"].dtype == torch.float32
    assert torch.equal(list(run(second, q, grads[4:]))[-1], whole[-1])


def test_a_rank_is_for_matrices_alone():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 12))
    model.add_module("lm_head", nn.Linear(12, 16))
    opt = LowRankMuon(param_groups(model), fallback_lr=3e-4)
    assert {group["role"]: group["rank"] for group in opt.param_groups} == {
        "matrix": 0.25,
        "embedding": None,
        "head": None,
        "vector": None,
    }
    opt = LowRankMuon(param_groups(model, rank=3))
    assert opt.param_groups[0]["rank"] == 3
    assert opt.state[model[1].weight]["basis_index"].shape == (3,)
    model(torch.tensor([1, 2])).square().mean().backward()
    opt.step()
    bare = LowRankMuon(nn.Linear(8, 12).parameters(), rank=0.5)
    assert [group["role"] for group in bare.param_groups] == ["matrix", "vector"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: 0, which keeps no momentum, needs a residual"),
        ({"rank": 0, "residual": 0.0}, "rank: 0, which keeps no momentum, needs a residual"),
        ({"rank": -3}, "rank: -3, must be an int >= 0 or a float in"),
        ({"rank": 1.5}, "rank: 1.5"),
        ({"rank": 0.0}, "rank: 0.0"),
        ({"rank": 0.0, "residual": 1.0}, "rank: 0.0"),
        ({"rank": True}, "rank: True"),
        ({"rank": None}, "rank: None"),
        ({"basis": "fft"}, "basis: 'fft', must be one of svd, rsvd, subspace, random, dct, identity, hadamard"),
        ({"update_proj_gap": 0}, "update_proj_gap: 0, must be None or an int >= 1"),
        ({"update_proj_gap": 2.0}, "update_proj_gap: 2.0"),
        ({"residual": -0.1}, "residual: -0.1, must be None or a number >= 0"),
        ({"residual": float("nan")}, "residual: nan"),
        ({"stagger": 1}, "stagger: 1, must be a bool"),
        ({"ns_steps": 0}, "ns_steps: 0"),
        ({"ns_coefficients": (4.0098, -7.0585, 2.4635)}, "coefficients"),
        ({"momentum": 1.0}, "momentum: 1.0"),
        ({"method": "svd"}, "method: 'svd'"),
        ({"ns_dtype": "float64"}, "ns_dtype: 'float64'"),
        ({"fallback_lr": -1.0}, "-1.0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    p = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=message):
        LowRankMuon([p], **options)
    with pytest.raises(ValueError, match=message):
        LowRankMuon([{"params": [p], **options}])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"ranks": 4}, "unknown key 'ranks'.*did you mean 'rank'"),
        ({"update_proj_gpa": 4}, "did you mean 'update_proj_gap'"),
        ({"residuals": 0.3}, "did you mean 'residual'"),
        ({"split": 2}, "split: 2, must be None"),
        ({"flatten": False}, "flatten: False, must be True"),
    ],
)
def test_bad_groups_are_named(group, message):
    with pytest.raises(ValueError, match=message):
        LowRankMuon([{"params": [nn.Parameter(torch.zeros(8, 8))], **group}])


def test_a_vector_in_a_group_of_matrices_is_refused():
    with pytest.raises(ValueError, match="LowRankMuon: a parameter of shape \\(8,\\) is in a group with the role"):
        LowRankMuon([{"params": [nn.Parameter(torch.zeros(8))], "role": "matrix"}])
    with pytest.raises(RuntimeError, match="LowRankMuon does not support complex parameters"):
        LowRankMuon([nn.Parameter(torch.zeros(8, 8, dtype=torch.complex64))])


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("rank", [1, 2, 6])
@pytest.mark.parametrize("gap", [1, 50])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_rank_that_changes_is_refused_with_the_reason(steps, gap, rank, basis):
    p = nn.Parameter(torch.ones(60, 8))
    opt = LowRankMuon([p], rank=4, basis=basis, update_proj_gap=gap)
    for _ in range(steps):
        p.grad = torch.randn(60, 8)
        opt.step()
    p.grad = torch.randn(60, 8)
    opt.param_groups[0]["rank"] = rank
    with pytest.raises(RuntimeError, match="has changed since its state was made"):
        opt.step()
