"""LDAdamW against an independent float64 NumPy reference; what its error feedback holds together."""

import pytest
import torch
from torch import nn

from lowrank_optim import LDAdamW, param_groups
from lowrank_optim.storage import storage
from tests.reference import projected_numpy
from tests.trajectory import SHAPES, assert_equals_reference, gradients, run

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def optimizer(**options):
    return lambda params: LDAdamW(params, **{**HYPER, **options})


def lifted(state, coords, tall):
    return coords @ state["basis"] if tall else state["basis"] @ coords


@pytest.mark.parametrize(("rank", "count"), [(4, 4), (1, 1), (0.5, None)])
@pytest.mark.parametrize("rho", [0.908, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula_in_float64(shape, rho, rank, count):
    """Within 1e-9: |·| in the second moment has a kink, and what rounds to either side of it is magnified by 1/√v̂."""
    options = {"rank": count or min(shape) // 2, "rho": rho}
    assert_equals_reference(
        optimizer(rank=rank, rho=rho),
        lambda w, grads: projected_numpy.ldadamw(w, grads, **options, **HYPER),
        shape,
        atol=1e-9,
    )


@pytest.mark.parametrize("rho", [0.908, 0.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_without_error_feedback_it_equals_the_formula_too(shape, rho):
    """The reference starts from a sketch; that of the leading left vectors gives the leading right ones."""
    first = gradients(shape, 1)[0]
    leading = torch.linalg.svd(first if shape[0] >= shape[1] else first.T, full_matrices=False).U[:, :4].numpy()
    options = {"rank": 4, "basis": "subspace", "sketch": leading, "carry": "rotate", "follow": rho}
    assert_equals_reference(
        optimizer(rank=4, rho=rho, error_feedback=None),
        lambda w, grads: projected_numpy.projected_adamw(w, grads, **options, **HYPER),
        shape,
        atol=1e-9,
    )


def test_the_authors_betas_equal_the_formula_too():
    hyper = {**HYPER, "betas": (0.908, 0.99)}
    assert_equals_reference(
        lambda params: LDAdamW(params, lr=1e-2, weight_decay=0.1, rank=4),
        lambda w, grads: projected_numpy.ldadamw(w, grads, rank=4, rho=0.908, **hyper),
        (24, 10),
        atol=1e-9,
    )


@pytest.mark.parametrize("feedback", ["float32", None])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_where_gradients_grow_a_variance_is_less_than_none_and_the_formula_takes_its_magnitude(shape, feedback):
    hyper = {**HYPER, "betas": (0.5, 0.99)}
    grads = [g * 1.5**t for t, g in enumerate(gradients(shape, 30))]
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    leading = torch.linalg.svd(grads[0] if shape[0] >= shape[1] else grads[0].T, full_matrices=False).U[:, :4].numpy()
    start, arrays = p.detach().numpy().copy(), [g.numpy() for g in grads]
    if feedback is None:
        options = {"basis": "subspace", "sketch": leading, "carry": "rotate", "follow": 0.9}
        expected = projected_numpy.projected_adamw(start, arrays, rank=4, **options, **hyper)
    else:
        expected = projected_numpy.ldadamw(start, arrays, rank=4, rho=0.9, **hyper)
    opt = LDAdamW([p], rank=4, rho=0.9, error_feedback=feedback, **hyper)
    for ours, theirs in zip(run(opt, p, grads), expected, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_other_side_is_the_transposed_matrix(shape):
    start, grads = torch.randn(shape, dtype=torch.float64), gradients(shape, 12)
    one, two = nn.Parameter(start.clone()), nn.Parameter(start.T.clone())
    left, right = (optimizer(proj_type=side, rank=3)([p]) for side, p in (("left", one), ("right", two)))
    for a, b in zip(run(left, one, grads), run(right, two, [g.T for g in grads]), strict=True):
        torch.testing.assert_close(a, b.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_nothing_of_the_gradients_is_lost(shape, beta1):
    """However the basis turns, M Qᵀ is the moving average of G + E_old - E, and sums of these telescope."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = optimizer(rank=3, betas=(beta1, 0.99))([p])
    tall, state = shape[0] >= shape[1], opt.state[p]
    mean, total, gone, error = (torch.zeros_like(p) for _ in range(4))
    for grad in gradients(shape, 80):
        p.grad = grad.clone()
        opt.step()
        taken = grad + error - state["error"]
        error = state["error"].clone()
        mean = beta1 * mean + (1 - beta1) * taken
        torch.testing.assert_close(lifted(state, state["exp_avg"], tall), mean, rtol=0, atol=1e-12)
        total += grad
        gone += taken
        torch.testing.assert_close(gone + error, total, rtol=0, atol=1e-12)
        basis = state["basis"] if tall else state["basis"].T
        torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert error.norm() > 0


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_a_quantized_error_is_as_near_as_its_storage_says(kind):
    """Without momentum no moment is lost, and E is A without what lies in the basis; a step keeps it once rounded."""
    shape = (24, 40)
    p = nn.Parameter(torch.zeros(shape))
    opt = optimizer(rank=6, betas=(0.0, 0.99), error_feedback=kind)([p])
    error = torch.zeros(shape)
    for grad in gradients(shape, 30, dtype=torch.float32):
        p.grad = grad.clone()
        opt.step()
        basis = opt.state[p]["basis"].double()
        exact = (grad + error).double()
        exact = exact - basis @ (basis.T @ exact)
        error = storage(kind).read([opt.state[p]], "error", shape, torch.float32)[0].clone()
        off, x = (error.double() - exact).abs().flatten(), exact.abs().flatten()
        if kind == "bfloat16":
            allowed = 2**-7 * x
        else:
            block, largest = {"int8": (256, 127), "int4": (64, 7)}[kind]
            s = torch.cat([part.max().expand(len(part)) for part in x.split(block)])
            allowed = (s * x).sqrt() / largest + s / (2 * largest**2)
        # and what float32 adds
        assert (off <= allowed * (1 + 1e-5) + 1e-6).all()
        assert off.max() > 1e-6


def test_gradients_are_left_as_they_are_and_can_be_none():
    """The authors keep E in `p.grad`; here it is state, and a step without a gradient changes nothing."""
    p = nn.Parameter(torch.randn(24, 10))
    opt = optimizer(rank=3)([p])
    list(run(opt, p, gradients((24, 10), 3, dtype=torch.float32)))
    before, kept = p.detach().clone(), opt.state[p]["error"].clone()
    opt.zero_grad()
    opt.step()
    assert torch.equal(p, before)
    assert torch.equal(opt.state[p]["error"], kept)


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit():
    grads = gradients((24, 10), 12, dtype=torch.float32)
    start = torch.randn(24, 10)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"rank": 3, "error_feedback": "int8", "state_dtype": "bfloat16"}
    whole = list(run(optimizer(**options)([p]), p, grads))
    first = optimizer(**options)([q])
    list(run(first, q, grads[:6]))
    second = optimizer(**options)([q])
    second.load_state_dict(first.state_dict())
    assert torch.equal(list(run(second, q, grads[6:]))[-1], whole[-1])


def test_enable_lowrank_of_the_authors_groups():
    p, q, r, s = (nn.Parameter(torch.zeros(40, 30)) for _ in range(4))
    opt = LDAdamW(
        [
            {"params": [p], "enable_lowrank": True, "rank": 4},
            {"params": [q], "enable_lowrank": False},
            {"params": [r], "enable_lowrank": False, "rank": 4},
            {"params": [s], "enable_lowrank": True},
        ]
    )
    assert [group["rank"] for group in opt.param_groups] == [4, None, None, 16]
    assert [("basis" in opt.state[x]) for x in (p, q, r, s)] == [True, False, False, True]
    assert "enable_lowrank" not in opt.param_groups[0]
    model = nn.Sequential(nn.Linear(40, 30))
    assert LDAdamW(param_groups(model)).param_groups[0]["rank"] == 16
    assert (
        LDAdamW([{"params": [nn.Parameter(torch.zeros(9, 9))], "enable_lowrank": True}], rank=3).param_groups[0]["rank"]
        == 3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "rho: -0.1, must be a number in \\[0, 1\\]"),
        ({"rho": 1.1}, "rho: 1.1"),
        ({"rho": None}, "rho: None"),
        ({"error_feedback": "int3"}, "error_feedback: 'int3', must be one of float32"),
        ({"error_feedback": True}, "error_feedback: True"),
        ({"proj_type": "diagonal"}, "proj_type: 'diagonal'"),
        ({"rank": 0}, "rank: 0"),
        ({"rank": 1.5}, "rank: 1.5"),
        ({"betas": (1.0, 0.9)}, "betas: \\(1.0, 0.9\\)"),
        ({"state_dtype": "int3"}, "state_dtype: 'int3'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    p = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=message):
        LDAdamW([p], **{"rank": 2, **options})
    with pytest.raises(ValueError, match=message):
        LDAdamW([{"params": [p], "rank": 2, **options}])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"basis": "svd"}, "basis: 'svd', must be one of subspace"),
        ({"error_feedbac": "int8"}, "did you mean 'error_feedback'"),
        ({"carry": "keep"}, "'carry' in a parameter group: it means nothing"),
    ],
)
def test_bad_groups_are_named(group, message):
    with pytest.raises(ValueError, match=message):
        LDAdamW([{"params": [nn.Parameter(torch.zeros(8, 8))], "rank": 2, **group}])
