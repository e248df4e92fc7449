"""Ranks by the spectra of gradients: within the budget, the best that it buys, and what `param_groups` takes."""

import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_optim import GaLoreAdamW, Ranks, allocate_ranks, param_groups


def planted(m, n, values, seed=0):
    """Return an m×n matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(m, len(values), dtype=torch.float64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64, generator=generator))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


def holding(*grads):
    """Return a model whose matrices have these gradients."""
    model = nn.Sequential(*(nn.Linear(g.shape[1], g.shape[0], bias=False) for g in grads))
    for layer, grad in zip(model, grads, strict=True):
        layer.weight.grad = grad.to(layer.weight.dtype)
    return model


def ranks_of(ranks):
    return [row.rank for row in ranks.rows]


def oracle(model):
    """Return the shares of energy in float64 by NumPy's SVD, and what a vector costs, for each matrix."""
    values = [np.linalg.svd(layer.weight.grad.double().numpy(), compute_uv=False) ** 2 for layer in model]
    return [v / v.sum() for v in values], [2 * max(layer.weight.shape) for layer in model]


def captured(shares, ranks):
    return sum(s[:r].sum() for s, r in zip(shares, ranks, strict=True))


def spent(costs, ranks):
    return sum(c * r for c, r in zip(costs, ranks, strict=True))


def test_each_gets_what_its_spectrum_asks_for():
    model = holding(planted(24, 16, [2.0, 1.0], seed=1), planted(24, 16, [1.0] * 16, seed=2))
    ranks = allocate_ranks(model, 8)
    assert ranks == {"^0$": 2, "^1$": 14}
    first, second = ranks.rows
    assert (first.name, first.shape, first.rank, first.uniform) == ("0.weight", (24, 16), 2, 8)
    assert first.share == pytest.approx(1.0)
    assert (second.share, second.uniform_share) == pytest.approx((14 / 16, 8 / 16))


def test_the_scale_of_a_gradient_does_not_matter():
    grads = [planted(12, 8, [1.0 / k for k in range(1, 9)], seed=1), planted(8, 20, [1.0] * 8, seed=2)]
    # gradients of float32 whose squares are none
    scaled = [1e-30 * grads[0], 1e30 * grads[1]]
    assert ranks_of(allocate_ranks(holding(*grads), 3)) == ranks_of(allocate_ranks(holding(*scaled), 3))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_that_float64_cannot_hold(scale):
    model = nn.Sequential(nn.Linear(6, 4, bias=False, dtype=torch.float64))
    model[0].weight.grad = scale * planted(4, 6, [3.0, 1.0])
    assert allocate_ranks(model, 1).rows[0].share == pytest.approx(0.9)


def test_a_long_matrix_pays_more_for_a_vector():
    model = holding(planted(8, 8, [1.0] * 8, seed=1), planted(80, 8, [1.0] * 8, seed=2))
    # a moment has 4·(8 + 80) coordinates: all 8 of 8, and then 3 of 80
    assert ranks_of(allocate_ranks(model, 4)) == [8, 3]


SHAPES = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4)
RANKS = st.one_of(st.integers(1, 8), st.floats(0.05, 1.0))


@settings(max_examples=150, deadline=None)
@given(SHAPES, RANKS, st.integers(0, 10_000), st.floats(0, 4))
def test_never_above_the_budget_nor_below_the_uniform_rank(shapes, rank, seed, decay):
    model = holding(
        *(
            planted(m, n, [(k + 1.0) ** (-decay * (i % 2)) for k in range(min(m, n))], seed=seed + i)
            for i, (m, n) in enumerate(shapes)
        )
    )
    ranks = allocate_ranks(model, rank)
    shares, costs = oracle(model)
    uniform = [row.uniform for row in ranks.rows]
    assert spent(costs, ranks_of(ranks)) <= spent(costs, uniform)
    assert captured(shares, ranks_of(ranks)) >= captured(shares, uniform) - 1e-9
    for row, (m, n), share in zip(ranks.rows, shapes, shares, strict=True):
        assert 1 <= row.rank <= min(m, n)
        assert row.share == pytest.approx(share[: row.rank].sum(), abs=1e-9)
    groups = param_groups(model, rank=ranks)
    given_ranks = {name: g["rank"] for g in groups for name, _ in g["params"]}
    assert given_ranks == {row.name: row.rank for row in ranks.rows}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3), RANKS, st.integers(0, 10_000))
def test_all_allocations_are_tried_and_none_is_better_but_for_the_last_vector(shapes, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    model = holding(*(torch.randn(m, n, generator=generator) for m, n in shapes))
    ranks = allocate_ranks(model, rank)
    shares, costs = oracle(model)
    budget = spent(costs, [row.uniform for row in ranks.rows])
    choices = itertools.product(*(range(1, min(shape) + 1) for shape in shapes))
    best = max(captured(shares, choice) for choice in choices if spent(costs, choice) <= budget)
    # fractions of vectors would fill the budget: what the first vector that does not fit would add in what is left
    vectors = sorted(((g / c, c) for s, c in zip(shares, costs, strict=True) for g in s[1:]), reverse=True)
    left, gap = budget - sum(costs), 0.0
    for worth, cost in vectors:
        if cost > left:
            gap = worth * left
            break
        left -= cost
    if len(set(costs)) == 1:
        assert gap == 0
    assert best - gap - 1e-9 <= captured(shares, ranks_of(ranks)) <= best + 1e-9


def test_where_what_is_left_over_matters_the_uniform_rank_is_kept():
    # for their cost the vectors of the second come first; two of them leave too little for the better one of the first
    first, second = planted(5, 2, [0.65**0.5, 0.35**0.5], seed=1), planted(4, 3, [0.4**0.5, 0.3**0.5, 0.3**0.5], seed=2)
    ranks = allocate_ranks(holding(first, second), 2)
    assert ranks_of(ranks) == [2, 2]
    assert sum(row.share for row in ranks.rows) == pytest.approx(1.0 + 0.7)


def test_ties_go_to_the_first():
    grad = planted(8, 8, [1.0, 0.5, 0.25, 0.125], seed=3)
    model = holding(grad, grad, grad)
    # one vector each, then 4 more: the second of the three alike, and one third
    model.append(nn.Linear(8, 8, bias=False))
    model[3].weight.grad = planted(8, 8, [1.0, 1e-3], seed=4).float()
    assert ranks_of(allocate_ranks(model, 2)) == [3, 2, 2, 1]
    assert all(ranks_of(allocate_ranks(model, 2)) == [3, 2, 2, 1] for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32), (1, 9)])
def test_shares_are_those_of_the_svd(shape, dtype):
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)).to(dtype)
    short = min(shape)
    model[0].weight.grad = planted(*shape, [10.0 ** (-8 * k / short) for k in range(short)]).to(dtype)
    shares, _ = oracle(model)
    for r in range(1, short + 1):
        assert allocate_ranks(model, r).rows[0].share == pytest.approx(shares[0][:r].sum(), abs=1e-12)


def test_gradients_are_only_read_and_the_generator_is_not():
    model = holding(torch.randn(6, 4), torch.randn(4, 6))
    before = [layer.weight.grad.clone() for layer in model]
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        inside = allocate_ranks(model, 2)
    assert inside.rows == allocate_ranks(model, 2).rows
    assert all(torch.equal(g, layer.weight.grad) for g, layer in zip(before, model, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_least_holds_for_every_matrix_unless_it_is_smaller():
    steep, flat = planted(16, 16, [1.0] + [1e-4] * 15, seed=1), planted(16, 16, [1.0] * 16, seed=2)
    model = holding(steep, flat, torch.ones(16, 2))
    assert ranks_of(allocate_ranks(model, 8, least=1)) == [1, 16, 1]
    assert ranks_of(allocate_ranks(model, 8, least=4)) == [4, 12, 2]
    # the uniform ranks, 1 and 4, hold more, but the first is less than allowed; what is left over is spent for nothing
    assert ranks_of(allocate_ranks(holding(torch.ones(6, 4), flat), 0.25, least=2)) == [3, 3]
    message = r"Invalid least: 9, whose 640 coordinates must not exceed the 576 of rank=8"
    with pytest.raises(ValueError, match=message):
        allocate_ranks(model, 8, least=9)


class Net(nn.Module):
    """More than ten layers, so that a name is the beginning of another, and every role."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(12))
        self.conv = nn.Conv1d(16, 8, 3, padding=1)
        self.lm_head = nn.Linear(16, 20, bias=False)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x).relu()
        x = x[..., :8] + self.conv(x.mT).mT
        return self.lm_head(torch.cat([x, x], -1))

    def backward(self):
        x = torch.arange(20).reshape(2, 10)
        loss = nn.functional.cross_entropy(self(x).flatten(0, 1), x.flatten())
        loss.backward()
        return loss


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, nn.DataParallel])
@pytest.mark.parametrize("targets", ["all-linear", r"layers|conv$", lambda name, module: "embed" in name])
def test_each_matrix_gets_its_rank_from_param_groups(targets, wrap):
    model = Net()
    model.backward()
    wrapped = wrap(model)
    ranks = allocate_ranks(wrapped, 0.25, targets=targets)
    groups = param_groups(wrapped, rank=ranks, targets=targets)
    assert {n: g["rank"] for g in groups if g["role"] == "matrix" for n, _ in g["params"]} == {
        row.name: row.rank for row in ranks.rows
    }
    assert len(ranks) == len(ranks.rows)
    if targets == r"layers|conv$":
        assert ranks.rows[-1].shape == (8, 48)


def test_a_model_that_is_one_matrix():
    model = nn.Linear(8, 8)
    model.weight.grad = torch.eye(8)
    ranks = allocate_ranks(model, 3)
    assert ranks == {"^$": 3}
    assert param_groups(model, rank=ranks)[0]["rank"] == 3


def test_roles_and_heads_choose_too():
    model = Net()
    model.backward()
    assert "^lm_head$" in allocate_ranks(model, 4, heads="^nothing$")
    ranks = allocate_ranks(model, 4, roles={r"layers\.[2-9]": "other", r"layers\.\d\d": "other", "conv": "matrix"})
    assert list(ranks) == [r"^layers\.0$", r"^layers\.1$", r"^conv$"]


def test_it_trains():
    model = Net()
    model.backward()
    ranks = allocate_ranks(model, 4)
    opt = GaLoreAdamW(param_groups(model, rank=ranks), lr=1e-2)
    opt.zero_grad()
    before = model.backward().item()
    opt.step()
    for row in ranks.rows:
        assert opt.state[model.get_parameter(row.name)]["exp_avg"].shape[-1] == row.rank
    assert model.backward().item() < before


def test_what_it_says_and_that_it_can_be_kept():
    model = holding(planted(4, 4, [3.0, 1.0], seed=1), planted(4, 4, [1.0] * 4, seed=2))
    ranks = allocate_ranks(model, 2)
    lines = [line.split() for line in ranks.describe().splitlines()]
    assert lines == [
        ["shape", "rank", "energy", "uniform", "energy"],
        ["0.weight", "4×4", "1", "90.0%", "2", "100.0%"],
        ["1.weight", "4×4", "3", "75.0%", "2", "50.0%"],
        ["mean", "82.5%", "75.0%"],
        ["32", "coordinates", "of", "32"],
    ]
    assert json.loads(json.dumps(ranks)) == ranks
    again = pickle.loads(pickle.dumps(ranks))
    assert isinstance(again, Ranks)
    assert again.describe() == ranks.describe()


def with_grad(value):
    return holding(torch.eye(4), value)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.eye(4)), nn.Parameter(torch.eye(4))
        self.a.grad, self.b.grad = torch.eye(4), torch.eye(4)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, "0.weight has no gradient: run a backward pass first"),
        (lambda: with_grad(torch.zeros(4, 4)), {}, "the gradient of 1.weight is zero: run a backward"),
        (lambda: with_grad(torch.full((4, 4), math.nan)), {}, "the gradient of 1.weight is not finite"),
        (lambda: with_grad(torch.full((4, 4), math.inf)), {}, "the gradient of 1.weight is not finite"),
        (lambda: with_grad(torch.eye(4)), {"rank": 0}, "Invalid rank: 0, must be an int >= 1 or a float"),
        (lambda: with_grad(torch.eye(4)), {"rank": 1.5}, "Invalid rank: 1.5"),
        (lambda: with_grad(torch.eye(4)), {"rank": True}, "Invalid rank: True"),
        (lambda: with_grad(torch.eye(4)), {"least": 0}, "Invalid least: 0, must be an int >= 1"),
        (lambda: with_grad(torch.eye(4)), {"least": True}, "Invalid least: True"),
        (lambda: with_grad(torch.eye(4)), {"least": 3}, "Invalid least: 3, whose 48 .* the 32 of rank=2"),
        (lambda: with_grad(torch.eye(4)), {"roles": "matrix"}, "Invalid roles: 'matrix', must be 'auto'"),
        (lambda: with_grad(torch.eye(4)), {"targets": "attention"}, "targets='attention' matches no matrix"),
        (lambda: with_grad(torch.eye(4)), {"roles": {"attn": "matrix"}}, "roles: no .* matches 'attn'"),
        (lambda: nn.Sequential(nn.Embedding(4, 4)), {}, "no matrix to give a rank to"),
        (Two, {"targets": ""}, "a and b are in one module, which can have one rank only"),
    ],
)
def test_what_cannot_be_is_named(make, options, message):
    with pytest.raises(ValueError, match=message):
        allocate_ranks(make(), **{"rank": 2, **options})


def test_sparse_and_complex_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True))
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="0.weight: allocate_ranks does not support sparse or complex"):
        allocate_ranks(model, 2, targets="")
    model = nn.Sequential(nn.Linear(4, 4, bias=False, dtype=torch.complex64))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(RuntimeError, match="sparse or complex"):
        allocate_ranks(model, 2)
