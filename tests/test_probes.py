"""What a step says of itself to whoever listens, against the same computed by hand; and that silence is free."""

import contextlib

import pytest
import torch
from torch import nn

from lowrank_optim import DCTAdamW, GaLoreAdamW, LDAdamW, LowRankMuon, Muon, probes
from lowrank_optim._types import Factored, Scaled, dense
from lowrank_optim.probes import Probe, listen
from tests.reference import dct_numpy

READINGS = {"captured_energy", "effective_rank", "subspace_overlap", "update_rms"}
SHAPES = {"tall": (24, 10), "wide": (10, 24)}
RANK = 3
KINDS = {
    "svd": (GaLoreAdamW, {"update_proj_gap": 3}),
    "svd-both": (GaLoreAdamW, {"update_proj_gap": 3, "proj_type": "full"}),
    "staggered": (GaLoreAdamW, {"update_proj_gap": 3, "stagger": True}),
    "rotated": (GaLoreAdamW, {"update_proj_gap": 2, "basis": "subspace", "carry": "rotate"}),
    "random": (GaLoreAdamW, {"update_proj_gap": 2, "basis": "random", "carry": "reset"}),
    "feedback": (GaLoreAdamW, {"update_proj_gap": 2, "error_feedback": "float32"}),
    "fira": (GaLoreAdamW, {"update_proj_gap": 2, "residual": "fira"}),
    "sign": (GaLoreAdamW, {"update_proj_gap": 2, "residual": "sign"}),
    "identity": (GaLoreAdamW, {"update_proj_gap": 2, "basis": "identity"}),
    "adaptive": (GaLoreAdamW, {"update_proj_gap": 2, "adaptive_overlap": 0.3}),
    "int8": (GaLoreAdamW, {"update_proj_gap": 2, "state_dtype": "int8"}),
    "dct": (DCTAdamW, {}),
    "dct-feedback": (DCTAdamW, {"error_feedback": "float32", "update_proj_gap": 2}),
    "ldadam": (LDAdamW, {}),
}
FED = ("feedback", "dct-feedback", "ldadam")


def optimizer(kind, params, lr=1.0, **options):
    cls, own = KINDS[kind]
    fixed = {} if kind in ("staggered", "ldadam") else {"stagger": False}
    return cls([{"params": params, "rank": RANK, **options}], lr=lr, **fixed, **own)


def gradients(shape, count, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(count)]


def readings(opt):
    """Step, and return what each parameter has said, by its id."""
    probe = Probe()
    with listen(probe):
        opt.step()
    return probe.readings


def coordinates(state, grad, rank=RANK):
    """Of this gradient in the basis that is kept."""
    tall = grad.size(0) >= grad.size(1)
    if "basis_index" in state:
        columns = torch.from_numpy(dct_numpy.matrix(min(grad.shape)))[:, state["basis_index"].long()]
        return grad @ columns if tall else columns.T @ grad
    if "basis_right" in state:
        return state["basis"].T @ grad @ state["basis_right"].T
    return grad @ state["basis"].T if tall else state["basis"].T @ grad


def effective_rank(coords):
    energies = torch.linalg.svdvals(coords).square()
    return energies.sum().square() / energies.square().sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_each_parameter_says_these_things_in_their_range(shape, kind):
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(2)]
    vector = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    opt = optimizer(kind, [*params, vector])
    said = set()
    for step, grads in enumerate(zip(gradients(shape, 7), gradients(shape, 7, seed=1), strict=True)):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        vector.grad = grads[0].flatten()[:5].clone()
        found = readings(opt)
        assert found.keys() == {id(p) for p in (*params, vector)}
        assert found[id(vector)].keys() == {"update_rms"}
        for p in params:
            own = found[id(p)]
            said |= own.keys()
            assert READINGS - {"subspace_overlap"} <= own.keys() <= READINGS
            assert all(len(values) == 1 and values[0].dim() == 0 for values in own.values())
            assert 0 <= own["captured_energy"][0] <= 1 + 1e-12
            assert 1 - 1e-12 <= own["effective_rank"][0] <= RANK + 1e-12
            if "subspace_overlap" in own:
                assert step > 0
                assert 0 <= own["subspace_overlap"][0] <= 1 + 1e-12
    assert said == READINGS


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FED and kind != "identity"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_energy_rank_and_overlap_are_those_computed_by_hand(shape, kind):
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt, before = optimizer(kind, [p]), None
    for done, grad in enumerate(gradients(shape, 7)):
        p.grad = grad.clone()
        own, state = readings(opt)[id(p)], opt.state[p]
        coords = coordinates(state, grad)
        energy = coords.square().sum() / grad.square().sum()
        torch.testing.assert_close(own["captured_energy"][0], energy, rtol=1e-10, atol=0)
        torch.testing.assert_close(own["effective_rank"][0], effective_rank(coords), rtol=1e-9, atol=0)
        bases = {
            name: value.clone() for name, value in state.items() if name in ("basis", "basis_right", "basis_index")
        }
        moved = before is not None and any(not torch.equal(value, before[name]) for name, value in bases.items())
        if done == 0:
            assert "subspace_overlap" not in own
        if moved:
            if "basis_index" in bases:
                share = len({*bases["basis_index"].tolist()} & {*before["basis_index"].tolist()}) / RANK
            else:
                sides = [x if x.size(0) < x.size(1) else x.T for x in bases.values()]
                others = [x if x.size(0) < x.size(1) else x.T for x in before.values()]
                shares = [(a @ b.T).square().sum() / RANK for a, b in zip(sides, others, strict=True)]
                share = float(sum(shares) / len(shares))
            # shares of columns are counts, in float32
            assert own["subspace_overlap"][0].item() == pytest.approx(share, rel=1e-6 if kind == "dct" else 1e-9)
        # nobody compares where nothing is found again
        assert kind == "dct" or moved == ("subspace_overlap" in own)
        before = bases


@pytest.mark.parametrize("kind", FED)
def test_with_error_feedback_it_is_the_gradient_and_the_error_that_is_looked_at(kind):
    shape = SHAPES["tall"]
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = optimizer(kind, [p])
    for grad in gradients(shape, 5):
        seen = grad + opt.state[p]["error"]
        p.grad = grad.clone()
        own = readings(opt)[id(p)]
        coords = coordinates(opt.state[p], seen)
        energy = coords.square().sum() / seen.square().sum()
        torch.testing.assert_close(own["captured_energy"][0], energy, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_rms_is_that_of_what_is_subtracted(shape, kind):
    """Before the learning rate: a step of lr 1 from a weight is the update, whatever form it has."""
    p, b = (nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in (shape, (6,)))
    opt = optimizer(kind, [p, b], lr=1.0)
    for grad in gradients(shape, 5):
        before = p.detach().clone(), b.detach().clone()
        p.grad, b.grad = grad.clone(), grad.flatten()[:6].clone()
        found = readings(opt)
        for q, old in zip((p, b), before, strict=True):
            rms = (q.detach() - old).square().mean().sqrt()
            torch.testing.assert_close(found[id(q)]["update_rms"][0], rms, rtol=1e-9, atol=0)
    opt.param_groups[0]["lr"] = 1e-3
    p.grad, b.grad, before = gradients(shape, 1)[0], None, p.detach().clone()
    found = readings(opt)
    assert id(b) not in found
    rms = (p.detach() - before).square().mean().sqrt() / 1e-3
    torch.testing.assert_close(found[id(p)]["update_rms"][0], rms, rtol=1e-9, atol=0)


@pytest.mark.parametrize("m", [1, 7])
@pytest.mark.parametrize("n", [1, 5])
def test_the_rms_of_every_form_of_update_is_that_of_the_matrix(m, n):
    p = nn.Parameter(torch.zeros(m, n))
    left, right = torch.randn(m, 2, dtype=torch.float64), torch.randn(2, n, dtype=torch.float64)
    matrix, rows = torch.randn(m, n, dtype=torch.float64), torch.rand(m, 1, dtype=torch.float64)
    product = Factored(left, right)
    for update in (matrix, product, Scaled(matrix, rows), Scaled(matrix, rows, product)):
        probe, kept = Probe(), dense(update).clone()
        with listen(probe):
            probes.chunk([p])
            probes.updated(0, update)
        torch.testing.assert_close(probe.readings[id(p)]["update_rms"][0], kept.square().mean().sqrt())
        assert torch.equal(dense(update), kept)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (3, 3)])
def test_the_effective_rank_knows_nothing_of_how_a_basis_is_turned(shape):
    p, r = nn.Parameter(torch.zeros(shape)), shape[1]
    coords = torch.randn(shape, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))
    one = torch.outer(torch.randn(shape[0]), torch.randn(r)).double()
    alike = torch.linalg.qr(torch.randn(max(shape), min(shape)))[0].double()
    cases = [(coords, None), (coords @ turn, None), (1e-9 * coords, None), (one, 1.0), (alike, float(min(shape)))]
    found = []
    for some, expected in cases:
        probe = Probe()
        with listen(probe):
            probes.chunk([p])
            probes.captured(0, some, some)
        found.append(probe.readings[id(p)]["effective_rank"][0].item())
        assert found[-1] == pytest.approx(effective_rank(some).item(), rel=1e-9)
        assert expected is None or found[-1] == pytest.approx(expected, rel=1e-6)
        assert probe.readings[id(p)]["captured_energy"][0].item() == pytest.approx(1)
    assert found[1:3] == pytest.approx(found[:1] * 2, rel=1e-9)


@pytest.mark.parametrize(
    ("shape", "layout", "cut"),
    [
        ((3, 12, 8), {"flatten": False}, lambda x: list(x)),
        ((24, 10), {"split": 3}, lambda x: list(x.chunk(3))),
        ((20, 8), {"split": (12, 4, 4)}, lambda x: list(x.split([12, 4, 4]))),
    ],
    ids=["experts", "fused", "grouped"],
)
@pytest.mark.parametrize("kind", ["svd", "dct", "fira"])
def test_several_matrices_say_one_thing_each_in_their_order(kind, shape, layout, cut):
    """And the update of the parameter is one; of two parameters that are stepped together each has its own."""
    start = torch.zeros(shape, dtype=torch.float64)
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    alone = [[nn.Parameter(x.clone()) for x in cut(start)] for _ in params]
    opts = [optimizer(kind, params, **layout), optimizer(kind, alone[0] + alone[1])]
    for grads in zip(gradients(shape, 4), gradients(shape, 4, seed=1), strict=True):
        before = [p.detach().clone() for p in params]
        for p, grad, own in zip(params, grads, alone, strict=True):
            p.grad = grad.clone()
            for q, part in zip(own, cut(grad), strict=True):
                q.grad = part.clone()
        found, apart = (readings(opt) for opt in opts)
        assert found.keys() == {id(p) for p in params}
        for p, matrices, old in zip(params, alone, before, strict=True):
            own = found[id(p)]
            assert own.keys() == apart[id(matrices[0])].keys()
            for name in own.keys() - {"update_rms"}:
                theirs = [value for q in matrices for value in apart[id(q)][name]]
                assert len(own[name]) == len(matrices)
                torch.testing.assert_close(torch.stack(own[name]), torch.stack(theirs), rtol=1e-9, atol=0)
            (rms,) = own["update_rms"]
            torch.testing.assert_close(rms, (p.detach() - old).square().mean().sqrt(), rtol=1e-9, atol=0)


def test_a_matrix_that_sits_out_says_nothing():
    p, q = (nn.Parameter(torch.zeros(12, 8, dtype=torch.float64)) for _ in range(2))
    opt = optimizer("svd", [p, q])
    p.grad, q.grad = torch.zeros_like(p), torch.randn_like(q)
    found = readings(opt)
    assert found.keys() == {id(q)}
    # and what it says later is its own, though the two are stepped together
    p.grad = torch.ones_like(p)
    found = readings(opt)
    assert found[id(p)]["captured_energy"][0].item() == pytest.approx(1)
    assert found[id(q)]["captured_energy"][0] < 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_hears_where_nobody_listens_and_listening_changes_no_bit(kind, monkeypatch):
    shape, runs = SHAPES["tall"], []
    for heard in (True, False):
        params = [nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(4, 12, 8))]
        cls, own = KINDS[kind]
        groups = [{"params": params[:1], "rank": RANK}]
        if kind != "ldadam":
            groups.append({"params": params[1:], "rank": RANK, "flatten": False})
        opt = cls(groups, lr=0.1, **own)
        if not heard:
            # were there a probe, this would be called
            monkeypatch.setattr(Probe, "note", lambda *_: pytest.fail("somebody collects"))
        probe = Probe()
        for step in range(7):
            for i, p in enumerate(params):
                source = torch.Generator().manual_seed(10 * step + i)
                p.grad = torch.randn(p.shape, generator=source)
            with listen(probe if heard else None):
                assert probes.listening() == heard
                opt.step()
        assert not probes.listening()
        assert bool(probe.readings) == heard
        runs.append((params, [opt.state[p] for p in params]))
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(p, q)
    for one, two in zip(runs[0][1], runs[1][1], strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_who_listens_is_who_said_so_last_and_an_error_ends_it():
    outer, inner = Probe(), Probe()
    p = nn.Parameter(torch.zeros(3, 3))

    def say():
        probes.chunk([p])
        probes.updated(0, torch.ones(3, 3))

    with listen(outer):
        with contextlib.suppress(KeyError), listen(inner):
            say()
            raise KeyError
        # the outer one hears again
        assert probes.listening()
        assert len(inner.readings[id(p)]["update_rms"]) == 1
        assert not outer.readings
        with listen(None):
            assert not probes.listening()
            say()
        say()
        # what was said in an earlier step is forgotten
        say()
    assert len(outer.readings[id(p)]["update_rms"]) == 1
    kept = outer.readings[id(p)]["update_rms"][0]
    say()
    assert outer.readings[id(p)]["update_rms"][0] is kept


@pytest.mark.parametrize("cls", [Muon, LowRankMuon])
def test_optimizers_of_momenta_say_how_large_their_updates_are(cls):
    p = nn.Parameter(torch.zeros(12, 8))
    opt = cls([p], lr=1.0, weight_decay=0.0)
    p.grad = torch.randn(12, 8)
    found = readings(opt)[id(p)]
    torch.testing.assert_close(found["update_rms"][0], p.detach().square().mean().sqrt(), rtol=1e-5, atol=0)
