"""GaLoreAdamW with a carry, a residual and adaptive periods; and what every projected AdamW keeps and survives."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_optim import APOLLOAdamW, DCTAdamW, FiraAdamW, GaLoreAdamW, LDAdamW, bases, state_bytes
from tests.reference import projected_numpy
from tests.trajectory import SHAPES, assert_equals_reference, assert_same_weights, gradients, run

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
CARRIES = ["keep", "reset", "rotate"]
RESIDUALS: list[dict[str, str]] = [{}, {"error_feedback": "float32"}, {"residual": "fira"}, {"residual": "sign"}]
ALL = [
    (GaLoreAdamW, {}),
    (GaLoreAdamW, {"basis": "rsvd", "carry": "rotate", "residual": "fira"}),
    (GaLoreAdamW, {"basis": "subspace", "carry": "rotate", "error_feedback": "float32"}),
    (GaLoreAdamW, {"basis": "random", "carry": "reset", "residual": "sign"}),
    (GaLoreAdamW, {"basis": "dct", "carry": "rotate", "adaptive_overlap": 0.5}),
    (GaLoreAdamW, {"basis": "identity", "carry": "reset", "error_feedback": "float32"}),
    (GaLoreAdamW, {"proj_type": "full", "carry": "rotate", "state_dtype": "int8"}),
    (DCTAdamW, {}),
    (DCTAdamW, {"column_ages": True, "error_feedback": "float32", "ranking": "l1"}),
    (DCTAdamW, {"carry": "reset", "error_feedback": "int8", "state_dtype": "int8"}),
    (DCTAdamW, {"column_ages": True, "error_feedback": "int4", "state_dtype": "bfloat16"}),
    (APOLLOAdamW, {}),
    (APOLLOAdamW, {"scale_type": "tensor", "scale": 128.0, "norm_growth": None}),
    (APOLLOAdamW, {"basis": "svd", "state_dtype": "int4"}),
    (FiraAdamW, {}),
    (FiraAdamW, {"published_code": True, "norm_growth": None, "basis": "dct", "carry": "rotate"}),
    (LDAdamW, {}),
    (LDAdamW, {"error_feedback": None, "proj_type": "full"}),
    (LDAdamW, {"error_feedback": "int8", "state_dtype": "bfloat16"}),
]
IDS = ["-".join([cls.__name__, *(f"{key}={value}" for key, value in options.items())]) for cls, options in ALL]
every = pytest.mark.parametrize(("cls", "options"), ALL, ids=IDS)
CHANGED = pytest.mark.filterwarnings(
    "ignore:a gradient held NaN:RuntimeWarning", "ignore:a basis could not:RuntimeWarning"
)


def optimizer(cls=GaLoreAdamW, **options):
    return lambda params: cls(params, **{**HYPER, **options})


def often(cls):
    """Refresh often, where that is an option."""
    return {} if cls is LDAdamW else {"update_proj_gap": 2}


def svd(matrix):
    return tuple(x.numpy() for x in torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False))


def transposed_svd(matrix):
    u, s, vh = svd(matrix.T.copy())
    return vh.T, s, u.T


def reference(shape, **options):
    sketch = torch.randn(max(shape), options["rank"], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    decompose = svd if shape[0] >= shape[1] else transposed_svd
    residual = options.pop("residual", None)
    options["error_feedback"] = options.get("error_feedback") is not None
    options = {**HYPER, **options, "sketch": sketch.numpy(), "svd": decompose, "residual": residual}
    return lambda w, grads: projected_numpy.projected_adamw(w, grads, **options)


@pytest.mark.parametrize("gap", [1, 7])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("basis", ["svd", "subspace"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula_in_float64(shape, basis, carry, residual, gap, monkeypatch):
    """Within 1e-9: a carry that rotates has |·| in it, whose kink magnifies rounding.

    The limiter of "fira" measures a norm without the bias correction of all steps, also where a reset starts another.
    """
    if residual.get("residual") == "fira" and carry == "reset":
        limited, taken = projected_numpy.limited, itertools.count(1)
        monkeypatch.setattr(projected_numpy, "limited", lambda s, p, b, _, g: limited(s, p, b, next(taken), g))
    options = {"rank": 4, "basis": basis, "carry": carry, "scale": 0.5, **residual}
    assert_equals_reference(
        optimizer(update_proj_gap=gap, stagger=False, **options), reference(shape, gap=gap, **options), shape, atol=1e-9
    )


@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("residual", ["fira", "sign"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_factor_on_the_rest_is_its_own(shape, residual, share):
    options = {"rank": 4, "residual": residual, "residual_scale": share, "scale": 0.5}
    assert_equals_reference(
        optimizer(update_proj_gap=20, stagger=False, **options), reference(shape, gap=20, **options), shape
    )
    if not share:
        assert_same_weights(
            optimizer(update_proj_gap=20, **options),
            optimizer(update_proj_gap=20, rank=4, scale=0.5),
            shape,
            atol=1e-12,
        )


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("feedback", [None, "float32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_with_columns_of_the_dct_it_is_dct_adamw(shape, feedback, carry):
    options = {"rank": 4, "carry": carry, "update_proj_gap": 3}
    assert_same_weights(
        optimizer(basis="dct", scale=1.0, error_feedback=feedback, **options),
        optimizer(DCTAdamW, error_feedback=feedback, **options),
        shape,
        atol=0,
    )
    assert_equals_reference(
        optimizer(basis="dct", scale=0.5, error_feedback=feedback, stagger=False, **options),
        lambda w, grads: projected_numpy.dct_adamw(
            w, grads, rank=4, gap=3, carry=carry, error_feedback=feedback is not None, scale=0.5, **HYPER
        ),
        shape,
    )


@pytest.mark.parametrize("basis", [name for name in bases.NAMES if name != "hadamard"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_reset_starts_an_adam_anew(shape, basis):
    """In the basis at hand: its first update is that of a first step, its bias correction too."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = GaLoreAdamW([p], lr=1.0, eps=0.0, rank=3, basis=basis, scale=1.0, carry="reset", update_proj_gap=5)
    state, counts = opt.state[p], []
    for grad in gradients(shape, 15):
        before = p.detach().clone()
        p.grad = grad.clone()
        opt.step()
        (count,) = set(state["column_step"].tolist())
        counts.append(count)
        if count == 1 and "basis" in state:
            lifts = state["basis"]
            moved = (before - p) @ lifts.T if shape[0] >= shape[1] else lifts.T @ (before - p)
            torch.testing.assert_close(moved.detach().abs(), torch.ones_like(moved), rtol=0, atol=1e-9)
    # one matrix: its turn is in the middle of the period
    assert counts == [1, 2, *([1, 2, 3, 4, 5] * 2), 1, 2, 3]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_feedback_telescopes(shape):
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = optimizer(rank=3, error_feedback="float32", update_proj_gap=4, scale=0.5)([p])
    state, tall = opt.state[p], shape[0] >= shape[1]
    total, gone, error = (torch.zeros_like(p) for _ in range(3))
    for grad, _ in zip(gradients(shape), run(opt, p, gradients(shape)), strict=True):
        seen, basis = grad + error, state["basis"]
        total += grad
        gone += seen @ basis.T @ basis if tall else basis @ (basis.T @ seen)
        error = state["error"].clone()
        torch.testing.assert_close(gone + error, total, rtol=0, atol=1e-12)


def test_a_period_grows_where_the_subspace_stays_and_shrinks_where_it_does_not():
    def refreshes(grads, **options):
        p = nn.Parameter(torch.zeros(24, 10, dtype=torch.float64))
        opt = optimizer(rank=3, update_proj_gap=4, stagger=False, **options)([p])
        found, before = [], None
        for t, grad in enumerate(grads):
            p.grad = grad.clone()
            opt.step()
            if before is None or int(opt.state[p]["basis_due"][0]) != before:
                found.append(t)
            before = int(opt.state[p]["basis_due"][0])
        return found

    still = [gradients((24, 10), 1)[0] * (1 + t) for t in range(400)]
    new = gradients((24, 10), 60)
    for options in ({}, {"basis": "subspace"}, {"basis": "dct"}):
        # 4, 8, 16, 32, 64 steps, and no more than that
        assert refreshes(still, adaptive_overlap=0.9, **options) == [0, 4, 12, 28, 60, 124, 188, 252, 316, 380]
        assert refreshes(new, adaptive_overlap=1.0, **options)[:10] == list(range(0, 40, 4))
    assert refreshes([*still[:130], *new], adaptive_overlap=0.9) == [0, 4, 12, 28, 60, 124, 188]
    assert refreshes([*still[:120], *new], adaptive_overlap=0.9) == [0, *[4, 12, 28, 60, 124], *range(128, 180, 4)]


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_where_no_overlap_is_enough_periods_are_fixed(shape, carry):
    options = {"rank": 3, "update_proj_gap": 4, "carry": carry, "stagger": False}
    assert_same_weights(optimizer(**options), optimizer(adaptive_overlap=1.0, **options), shape, atol=0)


@given(
    place=st.integers(0, 4),
    shape=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    rank=st.one_of(st.integers(1, 50), st.floats(0.05, 0.95)),
    kind=st.sampled_from(["float32", "bfloat16", "int8", "int4"]),
    double=st.booleans(),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_state_bytes_equal_the_formula(place, shape, rank, kind, double, data):
    cls = [GaLoreAdamW, DCTAdamW, APOLLOAdamW, FiraAdamW, LDAdamW][place]
    item = 8 if double else 4
    short, long = min(shape), max(shape)

    def moment(k, kind):
        return {
            "float32": item * k,
            "bfloat16": 2 * k,
            "int8": k + 4 * -(-k // 256),
            "int4": -(-k // 2) + 4 * -(-k // 64),
        }[kind]

    def draw(*choices):
        return data.draw(st.sampled_from(choices))

    r = max(1, round(rank * short)) if isinstance(rank, float) else min(rank, short)
    kept, rest, numbers, options = item * r * short, 0, r * short, {}
    if cls in (GaLoreAdamW, FiraAdamW):
        options = {"basis": draw("svd", "subspace", "random", "rsvd", "dct", "identity"), "carry": draw(*CARRIES)}
        if options["basis"] in bases.COLUMNS:
            kept, numbers = 4 * r, r
        rest += 4 * r * (options["carry"] == "reset")
    if cls is GaLoreAdamW:
        options |= {"residual": draw(None, "fira", "sign"), "adaptive_overlap": draw(None, 0.9)}
        rest += item * (options["residual"] == "fira")
        rest += 16 * (options["adaptive_overlap"] is not None)
    elif cls is DCTAdamW:
        kept, numbers = 4 * r, r
        options = {"carry": draw(*CARRIES), "column_ages": draw(False, True)}
        rest += 4 * r * (options["carry"] == "reset" or options["column_ages"])
    elif cls is APOLLOAdamW:
        options = {"basis": draw("gaussian", "svd"), "scale_type": draw("channel", "tensor")}
        if options["basis"] == "gaussian":
            kept, numbers = 8, 2
    if cls in (APOLLOAdamW, FiraAdamW):
        options["norm_growth"] = draw(None, 1.01)
        rest += item * (options["norm_growth"] is not None)
    if cls in (DCTAdamW, LDAdamW) or options.get("residual", "") is None:
        options["error_feedback"] = draw(None, "float32", "bfloat16", "int8", "int4")
        rest += moment(short * long, options["error_feedback"]) if options["error_feedback"] else 0
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64 if double else torch.float32))
    total = state_bytes(cls([{"params": [p], "rank": rank}], state_dtype=kind, **options)).total
    if numbers + 2 * r * long < 2 * short * long:
        assert total == 2 * moment(r * long, kind) + kept + rest + 4
    else:
        assert total == 2 * moment(short * long, kind) + 4


@every
def test_a_rank_beyond_the_short_side_is_that_side(cls, options):
    shape = (40, 6)
    one, two = (optimizer(cls, rank=rank, **often(cls), **options) for rank in (6, 99))
    assert_same_weights(one, two, shape, steps=6, atol=0)
    p = nn.Parameter(torch.zeros(shape))
    assert state_bytes(one([p])).by_name == state_bytes(two([p])).by_name


@CHANGED
@every
def test_gradients_that_say_nothing_or_too_much_leave_finite_weights(cls, options):
    def train(sizes):
        p = nn.Parameter(torch.ones(24, 10))
        opt = optimizer(cls, rank=3, **often(cls), **options)([p])
        for size, grad in zip(sizes, gradients((24, 10), len(sizes), dtype=torch.float32), strict=True):
            p.grad = grad * size
            opt.step()
            assert p.isfinite().all(), (size, sizes)
        return p.detach()

    # the second moment of 1e30 is infinite, which no code stands for; a basis that looks at norms sits it out
    largest = 1e15 if cls is DCTAdamW and options.get("state_dtype") == "int8" else 1e30
    for odd in (0.0, 1e-30, 1e-20, 1e15, min(1e20, largest), largest):
        train([odd] * 6)
        train([odd, odd, 1.0, 1.0, 1.0, 1.0])
        train([1.0, 1.0, 1.0, odd, odd, odd, 1.0, 1.0])
    # a start without gradients is no start; and what follows is not lost
    assert not torch.equal(train([0.0, 0.0, 0.0, 1.0, 1.0]), train([0.0] * 5))


@every
def test_vectors_and_groups_without_a_rank_are_adamw(cls, options):
    """Groups without a rank, one-dimensional parameters in groups with one, and what would not be smaller."""
    options = {key: value for key, value in options.items() if key != "state_dtype"}
    shapes = {(7,): 3, (): 3, (12, 9): None, (3, 3): 3, (0, 4): 2}
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    ours = cls(
        [{"params": [p], "rank": rank} for p, rank in zip(params, shapes.values(), strict=True)], **HYPER, **options
    )
    theirs = torch.optim.AdamW(others, **HYPER)
    for _ in range(20):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@every
@pytest.mark.parametrize("rounding", [False, True])
def test_bfloat16_parameters_train(cls, options, rounding):
    goal = torch.randn(24, 10)
    p = nn.Parameter(torch.zeros(24, 10, dtype=torch.bfloat16))
    opt = cls([p], lr=0.03, rank=4, stochastic_rounding=rounding, **often(cls), **options)
    losses = []
    for _ in range(120):
        opt.zero_grad()
        loss = (p.float() - goal).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]
    for name, value in opt.state[p].items():
        if value.dtype == torch.bfloat16:
            assert "bfloat16" in options.values(), name


@every
def test_float64_parameters_keep_float64_state(cls, options):
    p = nn.Parameter(torch.randn(24, 10, dtype=torch.float64))
    opt = optimizer(cls, rank=3, **often(cls), **options)([p])
    list(run(opt, p, gradients((24, 10), 5)))
    coded = {"exp_avg", "exp_avg_sq"} if options.get("state_dtype", "float32") != "float32" else set()
    coded |= {"error"} if options.get("error_feedback", "float32") not in ("float32", None) else set()
    for name, value in opt.state[p].items():
        if name != "step" and value.is_floating_point() and name.removesuffix("_scale") not in coded:
            assert value.dtype == torch.float64, name


@every
def test_a_checkpoint_of_another_rank_is_refused_and_one_of_its_own_goes_on_bit_for_bit(cls, options):
    grads = gradients((24, 10), 10, dtype=torch.float32)
    start = torch.randn(24, 10)
    make = optimizer(cls, rank=3, **often(cls), **options)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    whole = list(run(make([p]), p, grads))
    first = make([q])
    list(run(first, q, grads[:5]))
    second = make([q])
    saved = first.state_dict()
    second.load_state_dict(saved)
    assert torch.equal(list(run(second, q, grads[5:]))[-1], whole[-1])
    saved["param_groups"][0]["rank"] = 4
    third = make([nn.Parameter(start.clone())])
    with pytest.raises(ValueError, match="at rank 4 needs"):
        third.load_state_dict(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"carry": "move"}, "carry: 'move', must be one of keep, reset, rotate"),
        ({"residual": "drop"}, "residual: 'drop', must be None or 'fira' or 'sign'"),
        ({"residual": "sign", "error_feedback": "int8"}, "residual: 'sign', must be None with error_feedback"),
        ({"error_feedback": "int3"}, "error_feedback: 'int3', must be one of float32"),
        ({"residual_scale": float("nan")}, "residual_scale: nan, must be None or a finite number"),
        ({"residual_scale": True}, "residual_scale: True"),
        ({"adaptive_overlap": 0.0}, "adaptive_overlap: 0.0, must be None or in \\(0, 1\\]"),
        ({"adaptive_overlap": 1.5}, "adaptive_overlap: 1.5"),
        ({"adaptive_overlap": "0.9"}, "adaptive_overlap: '0.9'"),
        ({"basis": "gaussian"}, "basis: 'gaussian', must be one of svd, rsvd, subspace, random, dct"),
        ({"basis": "hadamard"}, "basis: 'hadamard', which needs a side of 2, 4, 8, ..., not the 10"),
        ({"basis": "dct", "proj_type": "full"}, "proj_type: 'full', must be another than 'full': the columns"),
        ({"residual": "fira", "proj_type": "full"}, "proj_type: 'full', must be another than 'full': Fira"),
    ],
)
def test_bad_arguments_are_named(options, message):
    p = nn.Parameter(torch.zeros(12, 10))
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([p], **{"rank": 2, **options})
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": [p], "rank": 2, **options}])


def test_what_these_runs_compare_differs():
    """A carry or a residual that did nothing would pass most of the above."""
    found = []
    for carry, residual in itertools.product(CARRIES, RESIDUALS):
        p = nn.Parameter(torch.zeros(24, 10, dtype=torch.float64))
        opt = optimizer(rank=4, carry=carry, update_proj_gap=7, **residual)([p])
        found.append(list(run(opt, p, gradients((24, 10))))[-1].numpy())
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(found, 2))


def test_a_spike_does_not_stay_in_the_error_for_ever():
    p = nn.Parameter(torch.zeros(12, 8))
    opt = GaLoreAdamW([p], lr=0.01, rank=4, error_feedback="float32", update_proj_gap=3, stagger=False)
    for step in range(30):
        p.grad = torch.randn(12, 8)
        if step == 1:
            p.grad[0, 0] = 1e20
        opt.step()
    # one step is lost, that in which the error overflows
    assert opt.state[p]["step"] == 29
    assert opt.state[p]["error"].abs().max() < 100


@pytest.mark.parametrize("basis", ["svd", "dct"])
def test_rounding_has_no_sign(basis):
    p = nn.Parameter(torch.zeros(64, 32))
    rank = 1.0 if basis == "dct" else 8
    opt = GaLoreAdamW(
        [p], lr=1.0, rank=rank, basis=basis, residual="sign", scale=0.0, residual_scale=1.0, stagger=False
    )
    p.grad = torch.randn(64, 4) @ torch.randn(4, 32)
    opt.step()
    assert not p.any()


@pytest.mark.parametrize("cls", [APOLLOAdamW, FiraAdamW])
def test_a_zero_gradient_is_no_evidence_of_a_small_norm(cls):
    def moved(zero):
        p = nn.Parameter(torch.zeros(64, 32))
        opt = cls([p], lr=1.0, rank=4)
        generator = torch.Generator().manual_seed(0)
        for step in range(22):
            p.grad = torch.randn(64, 32, generator=generator) * (100 if step > 20 else 1)
            if step == 20 and zero:
                p.grad.zero_()
            before = p.detach().clone()
            opt.step()
        return (p - before).norm()

    assert moved(zero=True) < 1.3 * moved(zero=False)


def test_a_value_that_is_changed_later_is_checked():
    p = nn.Parameter(torch.zeros(12, 8))
    opt = GaLoreAdamW([p], rank=4)
    p.grad = torch.randn(12, 8)
    opt.step()
    before = p.detach().clone()
    opt.param_groups[0]["carry"] = "Rotate"
    with pytest.raises(ValueError, match="carry: 'Rotate'"):
        opt.step()
    assert torch.equal(p, before)
    opt.param_groups[0] |= {"carry": "keep", "betas": [0.9, 0.999]}
    opt.step()
    before = p.detach().clone()
    # in place, as a schedule of momentum may do
    opt.param_groups[0]["betas"][1] = 2.0
    with pytest.raises(ValueError, match="betas"):
        opt.step()
    assert torch.equal(p, before)


def test_a_group_that_is_added_later_names_its_own_rank():
    p, q = (nn.Parameter(torch.zeros(12, 8)) for _ in range(2))
    opt = GaLoreAdamW([p])
    opt.add_param_group({"params": [q]})
    assert [group["rank"] for group in opt.param_groups] == [128, None]


@pytest.mark.parametrize(("cls", "key"), [(DCTAdamW, "scale"), (LDAdamW, "scale"), (GaLoreAdamW, "seed")])
def test_a_key_of_another_optimizer_is_refused(cls, key):
    p = nn.Parameter(torch.zeros(12, 8))
    with pytest.raises(ValueError, match=f"Invalid key '{key}'"):
        cls([{"params": [p], "rank": 2, key: 1}])
