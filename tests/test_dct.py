"""DCTAdamW against an independent float64 NumPy reference and torch.optim.AdamW; its carry, ages and error feedback."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_optim import DCTAdamW, FiraAdamW, GaLoreAdamW
from lowrank_optim.columns import DCT
from lowrank_optim.storage import storage
from tests.reference import dct_numpy, projected_numpy
from tests.trajectory import SHAPES, assert_equals_reference, assert_same_weights, gradients, run

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
CARRIES = ["rotate", "keep", "reset"]


def optimizer(cls=DCTAdamW, **options):
    return lambda params: cls(params, **{**HYPER, **options})


def reference(**options):
    return lambda w, grads: projected_numpy.dct_adamw(w, grads, **{**HYPER, **options})


def columns(size):
    return torch.from_numpy(dct_numpy.matrix(size))


def sent(opt, p, matrix):
    """The part of a matrix in the columns that were chosen last."""
    basis = columns(min(p.shape))[:, opt.state[p]["basis_index"].long()].to(matrix.dtype)
    return matrix @ basis @ basis.T if p.size(0) >= p.size(1) else basis @ (basis.T @ matrix)


@pytest.mark.parametrize("gap", [1, 7])
@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("ranking", ["l2", "l1"])
@pytest.mark.parametrize("feedback", [None, "float32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula_in_float64(shape, feedback, ranking, carry, gap):
    options = {"rank": 4, "ranking": ranking, "carry": carry}
    assert_equals_reference(
        optimizer(update_proj_gap=gap, stagger=False, error_feedback=feedback, **options),
        reference(gap=gap, error_feedback=feedback is not None, **options),
        shape,
    )


@pytest.mark.parametrize("gap", [1, 7])
@pytest.mark.parametrize("feedback", [None, "float32"])
@pytest.mark.parametrize(("rank", "count"), [(3, 3), (0.3, {10: 3, 16: 5})])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_column_ages_equal_the_formula_in_float64(shape, rank, count, feedback, gap):
    """Within 1e-9: the reference moves moments by a product of cosines, whose zeros are 1e-17.

    That is seen where the coordinate of a column that enters is 1e-6, and an age of 1 makes all of it.
    """
    count = count[min(shape)] if isinstance(count, dict) else count
    assert_equals_reference(
        optimizer(rank=rank, column_ages=True, error_feedback=feedback, update_proj_gap=gap, stagger=False),
        reference(rank=count, ages=True, error_feedback=feedback is not None, gap=gap),
        shape,
        atol=1e-9,
    )


@pytest.mark.parametrize("carry", ["keep", "reset"])
def test_column_ages_change_nothing_where_moments_do_not_move_by_columns(carry):
    """Moments that are kept in place have all steps in them; and those that begin anew are counted anew as it is."""
    options = {"rank": 4, "carry": carry, "update_proj_gap": 3, "stagger": False}
    one, two = (optimizer(**options, column_ages=ages) for ages in (True, False))
    assert_same_weights(one, two, (24, 10), atol=1e-12)


def test_the_columns_of_these_runs_do_move():
    """What the comparisons above rest on."""
    p = nn.Parameter(torch.zeros(24, 10, dtype=torch.float64))
    opt = optimizer(rank=4)([p])
    seen = [tuple(opt.state[p]["basis_index"].tolist()) for _ in run(opt, p, gradients((24, 10)))]
    assert sum(a != b for a, b in pairwise(seen)) > 25


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_other_side_is_the_transposed_matrix(shape):
    start, grads = torch.randn(shape, dtype=torch.float64), gradients(shape, 10)
    options = {"rank": 3, "error_feedback": "float32"}
    one, two = nn.Parameter(start.clone()), nn.Parameter(start.T.clone())
    left, right = (optimizer(proj_type=side, **options)([p]) for side, p in (("left", one), ("right", two)))
    for a, b in zip(run(left, one, grads), run(right, two, [g.T for g in grads]), strict=True):
        torch.testing.assert_close(a, b.T, rtol=0, atol=1e-12)


FULL = [
    *[(DCTAdamW, {"carry": c, "column_ages": a}) for c in ("rotate", "keep") for a in (False, True)],
    (DCTAdamW, {"error_feedback": "float32", "ranking": "l1"}),
    (FiraAdamW, {"basis": "dct", "carry": "rotate", "scale": 1.0}),
    (FiraAdamW, {"basis": "dct", "scale": 1.0, "published_code": True}),
    (GaLoreAdamW, {"basis": "dct", "carry": "rotate", "scale": 1.0}),
]


@pytest.mark.parametrize(("cls", "options"), FULL)
@pytest.mark.parametrize("gap", [1, 3, 7])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_at_full_rank_it_is_adamw_on_rotated_weights(shape, gap, cls, options):
    start, grads = torch.randn(shape, dtype=torch.float64), gradients(shape)
    turned = columns(min(shape))

    def turn(x):
        return x @ turned if shape[0] >= shape[1] else turned.T @ x

    p, rotated = nn.Parameter(start.clone()), nn.Parameter(turn(start).clone())
    ours = optimizer(cls, rank=1.0, update_proj_gap=gap, **options)([p])
    theirs = torch.optim.AdamW([rotated], **HYPER)
    for a, b in zip(run(ours, p, grads), run(theirs, rotated, [turn(g) for g in grads]), strict=True):
        torch.testing.assert_close(turn(a), b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_feedback_telescopes_and_stays_bounded(shape):
    rank, short = 3, min(shape)
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = optimizer(rank=rank, error_feedback="float32")([p])
    lost = (1 - rank / short) ** 0.5
    total, gone, error = (torch.zeros_like(p) for _ in range(3))
    grads = [g * (1 + i % 5) for i, g in enumerate(gradients(shape, 100))]
    bound = lost / (1 - lost) * max(g.norm() for g in grads)
    for grad, _ in zip(grads, run(opt, p, grads), strict=True):
        total += grad
        gone += sent(opt, p, grad + error)
        error = opt.state[p]["error"].clone()
        torch.testing.assert_close(gone + error, total, rtol=0, atol=1e-12)
        assert error.norm() <= bound
    assert error.norm() > 0


@given(
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    share=st.floats(0.05, 0.9),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
@settings(max_examples=40, deadline=None)
def test_of_any_gradients_the_error_stays_bounded(seed, shape, share, scale):
    """Also where it turns to where it is not looked at: the worst that ‖E‖ can be is q/(1 − q) of the largest ‖G‖."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = optimizer(rank=share, error_feedback="float32")([p])
    if "error" not in opt.state[p]:
        return
    lost = (1 - len(opt.state[p]["basis_index"]) / min(shape)) ** 0.5
    generator, largest = torch.Generator().manual_seed(seed), 0.0
    for step in range(12):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        p.grad = scale * (noise if step % 2 else opt.state[p]["error"] / scale + 1e-3 * noise)
        # the error doubled is as bad as a gradient can be
        p.grad *= min(1.0, scale * 4 / float(p.grad.norm()))
        largest = max(largest, float(p.grad.norm()))
        opt.step()
        assert opt.state[p]["error"].norm() <= lost / (1 - lost) * largest * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_a_quantized_error_is_as_near_as_its_storage_says(kind):
    """The next step sees what is kept, so the difference of one step is that of one rounding."""
    shape = (24, 40)
    p = nn.Parameter(torch.zeros(shape))
    opt = optimizer(rank=6, error_feedback=kind)([p])
    error = torch.zeros(shape)
    for grad in gradients(shape, 30, dtype=torch.float32):
        p.grad = grad.clone()
        opt.step()
        exact = (grad + error).double()
        exact = exact - sent(opt, p, exact)
        error = storage(kind).read([opt.state[p]], "error", shape, torch.float32)[0].clone()
        off = (error.double() - exact).abs().flatten()
        x = exact.abs().flatten()
        if kind == "bfloat16":
            allowed = 2**-7 * x
        else:
            block, largest = {"int8": (256, 127), "int4": (64, 7)}[kind]
            s = torch.cat([part.max().expand(len(part)) for part in x.split(block)])
            allowed = (s * x).sqrt() / largest + s / (2 * largest**2)
        # and what float32 adds
        assert (off <= allowed * (1 + 1e-5) + 1e-6).all()
        assert off.max() > 1e-6


@given(data=st.data(), size=st.integers(2, 12), side=st.sampled_from(["left", "right"]))
@settings(max_examples=80, deadline=None)
def test_columns_that_stay_keep_their_moments_bit_for_bit_and_those_that_enter_have_none(data, size, side):
    rank = data.draw(st.integers(1, size))
    index = st.permutations(range(size)).map(lambda order: sorted(order[:rank]))
    before, after = data.draw(index), data.draw(index)
    old, new = ({"basis_index": torch.tensor(x, dtype=torch.int32)} for x in (before, after))
    move = DCT(rank, side, size).move(old, new)
    moment = torch.randn((5, rank) if side == "right" else (rank, 5))
    moved = {"first": move.first(moment), "second": move.second(moment.square(), moment, (0.1, 0.01))}
    ages = move.columns(torch.arange(1, rank + 1, dtype=torch.int32))
    dim = 1 if side == "right" else 0
    for place, column in enumerate(after):
        got = {name: x.select(dim, place) for name, x in moved.items()}
        if column in before:
            was = before.index(column)
            assert torch.equal(got["first"], moment.select(dim, was))
            assert torch.equal(got["second"], moment.square().select(dim, was))
            assert ages[place] == was + 1
        else:
            assert not got["first"].any()
            assert not got["second"].any()
            assert ages[place] == 0


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_moments_are_moved_before_the_gradient_enters(shape):
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = optimizer(rank=4)([p])
    tall = shape[0] >= shape[1]
    known = {}
    for grad in gradients(shape, 20):
        p.grad = grad.clone()
        opt.step()
        state, basis = opt.state[p], columns(min(shape))
        rows = (grad @ basis).T if tall else basis.T @ grad
        moments = state["exp_avg"].T if tall else state["exp_avg"]
        for place, column in enumerate(state["basis_index"].tolist()):
            expected = 0.9 * known.get(column, torch.zeros(max(shape))) + 0.1 * rows[column]
            torch.testing.assert_close(moments[place], expected.double(), rtol=0, atol=1e-13)
        known = dict(zip(state["basis_index"].tolist(), moments.clone(), strict=True))


@pytest.mark.parametrize("ages", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_where_columns_stay_it_is_carry_keep_bit_for_bit(shape, ages):
    strong = torch.zeros(min(shape))
    strong[[1, 3, 4]] = 50.0
    basis = columns(min(shape)).float()
    grads = []
    for _ in range(15):
        rows = torch.randn(max(shape), min(shape)) * (1 + strong) @ basis.T
        grads.append(rows if shape[0] >= shape[1] else rows.T.contiguous())
    start = torch.randn(shape)
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    opts = [optimizer(rank=3, carry=c, column_ages=ages)([p]) for c, p in zip(("rotate", "keep"), params, strict=True)]
    for one, two in zip(*(run(opt, p, grads) for opt, p in zip(opts, params, strict=True)), strict=True):
        assert torch.equal(one, two)
    assert opts[0].state[params[0]]["basis_index"].tolist() == [1, 3, 4]


@pytest.mark.parametrize(("ages", "size"), [(False, 0.1 / 0.001**0.5), (True, 1.0)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_first_update_of_a_column_that_enters(shape, ages, size):
    """At a late step, with the default betas: 3.16 times that of an Adam of its own, or just that."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = DCTAdamW([p], lr=1.0, eps=0.0, rank=1, column_ages=ages)
    basis, tall = columns(min(shape)), shape[0] >= shape[1]
    signs = torch.randn(max(shape), dtype=torch.float64)
    for column in (2, 2, 5):
        p.grad = torch.outer(signs, basis[:, column]) if tall else torch.outer(basis[:, column], signs)
        opt.state[p]["step"].fill_(100_000)
        before = p.detach().clone()
        opt.step()
    assert opt.state[p]["basis_index"].tolist() == [5]
    moved = (before - p.detach()) @ basis[:, 5] if tall else basis[:, 5] @ (before - p.detach())
    torch.testing.assert_close(moved, size * signs.sign(), rtol=1e-6, atol=0)


def test_l2_holds_its_share_of_any_gradient_and_l1_differs():
    """By l2 the chosen columns hold the most that so many can, and so r/n at least."""
    differ = 0
    for grad in torch.randn(40, 9, 8, dtype=torch.float64) ** 3:
        found = {}
        for ranking in ("l2", "l1"):
            p = nn.Parameter(torch.zeros(9, 8, dtype=torch.float64))
            opt = optimizer(rank=3, ranking=ranking)([p])
            p.grad = grad.clone()
            opt.step()
            found[ranking] = (opt.state[p]["basis_index"].tolist(), sent(opt, p, grad).square().sum())
        assert found["l2"][1] >= grad.square().sum() * 3 / 8
        assert found["l2"][1] >= found["l1"][1] - 1e-12
        differ += found["l2"][0] != found["l1"][0]
    assert differ


def test_a_checkpoint_of_another_rank_is_refused_with_the_reason():
    states = []
    for rank in (3, 4):
        p = nn.Parameter(torch.randn(24, 10))
        opt = DCTAdamW([p], rank=rank)
        p.grad = torch.randn(24, 10)
        opt.step()
        states.append(opt.state_dict())
    saved = {**states[0], "state": {0: {**states[0]["state"][0], "basis_index": states[1]["state"][0]["basis_index"]}}}
    q = nn.Parameter(torch.zeros(24, 10))
    opt = DCTAdamW([q], rank=3)
    with pytest.raises(ValueError, match=r"basis_index of shape \(4,\).* needs \(3,\)"):
        opt.load_state_dict(saved)
    assert opt.state[q]["step"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranking": "linf"}, "ranking: 'linf', must be one of l2, l1"),
        ({"carry": "move"}, "carry: 'move', must be one of keep, reset, rotate"),
        ({"carry": None}, "carry: None"),
        ({"column_ages": 1}, "column_ages: 1, must be a bool"),
        ({"error_feedback": "int3"}, "error_feedback: 'int3', must be one of float32"),
        ({"error_feedback": True}, "error_feedback: True"),
        ({"proj_type": "full"}, "proj_type: 'full', must be another than 'full'"),
        ({"rank": 0}, "rank: 0"),
        ({"rank": 1.5}, "rank: 1.5"),
        ({"update_proj_gap": 0}, "update_proj_gap: 0"),
        ({"stagger": None}, "stagger: None"),
        ({"state_dtype": "int3"}, "state_dtype: 'int3'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    p = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=message):
        DCTAdamW([p], **{"rank": 4, **options})
    with pytest.raises(ValueError, match=message):
        DCTAdamW([{"params": [p], "rank": 4, **options}])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"basis": "svd"}, "basis: 'svd', must be one of dct"),
        ({"colum_ages": True}, "did you mean 'column_ages'"),
        ({"residual": "fira"}, "'residual' in a parameter group: it means nothing"),
    ],
)
def test_bad_groups_are_named(group, message):
    with pytest.raises(ValueError, match=message):
        DCTAdamW([{"params": [nn.Parameter(torch.zeros(8, 8))], "rank": 4, **group}])
