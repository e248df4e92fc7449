"""When a basis is found again: every gap, each matrix in its turn, and less often where the subspace stays."""

import io
import itertools

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW
from lowrank_optim._types import Tick
from lowrank_optim.bases import make
from lowrank_optim.schedule import Adaptive, Schedule
from tests.trajectory import run

SHAPES = [(24, 10), (10, 24)]
RANK = 3


def new(shape, dtype=None, *, host=False):
    return torch.zeros(tuple(shape), dtype=dtype)


def due(schedule, turn, steps, overlaps=()):
    """The numbers of steps done at which it is due; each refresh finds the next of these overlaps."""
    state, overlaps, found = schedule.init(new), list(overlaps), []
    for step in range(1, steps + 1):
        tick = Tick(step, turn)
        if schedule.due(state, tick):
            found.append(step - 1)
            overlap = overlaps.pop(0) if overlaps and step > 1 else None
            schedule.moved_(state, tick, None if overlap is None else torch.tensor(overlap))
    return found


def stream(shape, count, *, noise=0.0, seed=0):
    """Gradients of rank 3 in one subspace on each side, of whose coordinates a part is new at each step, and noise."""
    source = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, RANK, generator=source, dtype=torch.float64))[0] for n in shape)
    for _ in range(count):
        core = torch.diag(torch.tensor([3.0, 2.0, 1.0]).double())
        core += 0.3 * torch.randn(RANK, RANK, generator=source, dtype=torch.float64)
        yield left @ core @ right.T + noise * torch.randn(shape, generator=source, dtype=torch.float64)


def adaptive(p, gap=2, overlap=0.9, **options):
    options = {"rank": RANK, "update_proj_gap": gap, "adaptive_overlap": overlap} | options
    return GaLoreAdamW([{"params": [p], **options}], lr=1e-3)


def refreshes(opt, p, grads):
    """The numbers of steps done at which the basis has changed, and the period after each step."""
    found, periods, before = [], [], opt.state[p]["basis"].clone()
    for done, _ in enumerate(run(opt, p, grads)):
        if not torch.equal(before, opt.state[p]["basis"]):
            found.append(done)
        before = opt.state[p]["basis"].clone()
        periods.append(int(opt.state[p]["basis_due"][1]))
    return found, periods


# --- fixed


@pytest.mark.parametrize("gap", [1, 2, 7, 200])
@pytest.mark.parametrize("turn", [0.0, 0.3, 0.999])
def test_without_stagger_it_is_due_at_zero_and_at_every_gap(gap, turn):
    assert due(Schedule(gap, stagger=False), turn, 3 * gap + 1) == [0, gap, 2 * gap, 3 * gap]
    assert Schedule(gap).init(new) == {}
    assert not Schedule(gap).compares


@pytest.mark.parametrize(("gap", "count"), [(1, 1), (7, 7), (200, 200), (200, 13), (64, 5)])
def test_with_stagger_each_has_a_turn_of_its_own(gap, count):
    turns = [(i + 0.5) / count for i in range(count)]
    found = [due(Schedule(gap), turn, 3 * gap) for turn in turns]
    own = [[step for step in one if step >= gap] for one in found]
    assert all(one[0] == 0 for one in found)
    # each once in a period, at the same place, and no two at once
    assert all(len(one) == 2 and one[1] - one[0] == gap for one in own)
    assert len({one[0] for one in own}) == count
    # and evenly: no two periods of work closer than their share
    starts = sorted(one[0] for one in own)
    assert all(b - a >= gap // count for a, b in itertools.pairwise(starts))


# --- adaptive


@pytest.mark.parametrize("gap", [1, 4])
def test_each_overlap_that_is_found_again_doubles_the_period_up_to_sixteen_gaps(gap):
    schedule = Adaptive(gap, stagger=False)
    assert schedule.compares
    steps = due(schedule, 0.0, 60 * gap, [0.95] * 9)
    assert [b - a for a, b in itertools.pairwise(steps)] == [gap * k for k in (1, 2, 4, 8, 16, 16)]
    # at the threshold too
    assert due(Adaptive(gap, stagger=False, overlap=0.5), 0.0, 4 * gap, [0.5] * 9) == [0, gap, 3 * gap]


@pytest.mark.parametrize("basis", ["svd", "dct"])
def test_rounding_is_not_held_against_a_subspace(basis):
    """In float32 9 of 10 columns are less than 0.9, and a subspace that is the same is so to six digits."""
    schedule = Adaptive(3, stagger=False, overlap=1.0 if basis == "svd" else 0.9)
    made = make(basis, 10, "right", (64, 32))
    old = made.init((64, 32), new)
    made.refresh_(old, torch.randn(64, 32), 0)
    state = {name: value.clone() for name, value in old.items()}
    if basis == "dct":
        state["basis_index"] = torch.tensor([*range(9), 20], dtype=torch.int32)
        old["basis_index"] = torch.tensor(range(10), dtype=torch.int32)
    else:
        turn, _ = torch.linalg.qr(torch.randn(10, 10))
        state["basis"] = turn @ state["basis"]
    due_at = schedule.init(new)
    for step, overlap in ((1, None), (4, made.overlap(old, state))):
        schedule.moved_(due_at, Tick(step, 0.0), overlap)
    assert due_at["basis_due"].tolist() == [10, 6]


@pytest.mark.parametrize("missing", [0.899, None, float("nan")])
def test_one_that_is_not_found_again_or_not_known_ends_it_at_once(missing):
    """A failed decomposition is one that is not known."""
    steps = due(Adaptive(2, stagger=False), 0.0, 60, [0.95, 0.95, 0.95, missing, 0.95, 0.1, 0.95])
    assert [b - a for a, b in itertools.pairwise(steps)][:7] == [2, 4, 8, 16, 2, 4, 2]


@pytest.mark.parametrize("turn", [0.0, 0.1, 0.5, 0.99])
def test_a_sketch_is_no_evidence(turn):
    """With stagger the first basis is one, so its successor, at this matrix's own turn, is not compared with it."""
    steps = due(Adaptive(10), turn, 80, [1.0] * 9)
    first = max(1, int(turn * 10))
    assert steps[:4] == [0, first, first + 10, first + 30]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stagger", [True, False])
@pytest.mark.parametrize("basis", ["svd", "rsvd", "subspace"])
def test_a_subspace_that_stays_is_looked_for_less_often(shape, basis, stagger):
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = adaptive(p, basis=basis, stagger=stagger)
    kept = opt.state[p]["basis_due"]
    assert (kept.dtype, tuple(kept.shape), kept.device.type) == (torch.int64, (2,), "cpu")
    steps, periods = refreshes(opt, p, stream(shape, 140, noise=1e-3))
    # the turn of the only matrix is in the middle of the period
    expected = [0, 1, 3, 7, 15, 31, 63, 95, 127] if stagger else [0, 2, 6, 14, 30, 62, 94, 126]
    assert steps == expected
    assert periods[-1] == 32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("basis", ["svd", "subspace", "random"])
def test_noise_is_looked_at_as_often_as_ever(shape, basis):
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    source = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(40)]
    opt = adaptive(p, gap=3, basis=basis, stagger=False)
    steps, periods = refreshes(opt, p, grads)
    assert steps == list(range(0, 40, 3))
    assert set(periods) == {3}


def test_a_subspace_that_turns_is_looked_for_often_again():
    shape = SHAPES[0]
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    grads = [*stream(shape, 31), *stream(shape, 60, seed=1)]
    steps, _ = refreshes(adaptive(p, stagger=False), p, grads)
    assert steps == [0, 2, 6, 14, 30, 62, 64, 68, 76]


@pytest.mark.filterwarnings("ignore:a basis could not be refreshed:RuntimeWarning")
def test_a_decomposition_that_fails_leaves_the_basis_and_ends_the_period(monkeypatch):
    shape = SHAPES[0]
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt, svd, grads = adaptive(p, stagger=False), torch.linalg.svd, stream(shape, 60)
    assert refreshes(opt, p, [next(grads) for _ in range(14)])[0] == [0, 2, 6]

    def fails(*_, **__):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    assert refreshes(opt, p, [next(grads)]) == ([], [2])
    monkeypatch.setattr(torch.linalg, "svd", svd)
    # looked for after one gap, compared with the one that has served, and from there on as before
    steps, periods = refreshes(opt, p, [next(grads) for _ in range(10)])
    assert steps == [1, 5]
    assert periods[-1] == 8


@pytest.mark.filterwarnings("ignore:a gradient held NaN:RuntimeWarning")
def test_a_gradient_that_is_not_finite_is_waited_out():
    shape = SHAPES[0]
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt, grads = adaptive(p, stagger=False), list(stream(shape, 20))
    list(run(opt, p, grads[:2]))
    kept = opt.state[p]["basis_due"].clone()
    for _ in range(3):
        p.grad = torch.full_like(p, torch.nan)
        opt.step()
    assert torch.equal(opt.state[p]["basis_due"], kept)
    assert kept.tolist() == [3, 2]
    list(run(opt, p, grads[2:3]))
    assert opt.state[p]["basis_due"].tolist() == [7, 4]


@pytest.mark.parametrize("basis", ["svd", "subspace", "dct"])
@pytest.mark.parametrize("stop", [1, 3, 20])
def test_a_run_that_is_resumed_is_the_run(basis, stop):
    grads = [list(stream(shape, 40, noise=0.1, seed=i)) for i, shape in enumerate(SHAPES)]

    def fresh():
        params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
        options = {"rank": RANK, "update_proj_gap": 2, "adaptive_overlap": 0.8, "basis": basis}
        return params, GaLoreAdamW([{"params": params, **options}], lr=1e-2)

    def advance(params, opt, start, count):
        for step in range(start, start + count):
            for p, some in zip(params, grads, strict=True):
                p.grad = some[step].clone()
            opt.step()

    whole, opt = fresh()
    advance(whole, opt, 0, stop)
    buffer = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "weights": [p.detach().clone() for p in whole]}, buffer)
    advance(whole, opt, stop, 40 - stop)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed, other = fresh()
    with torch.no_grad():
        for p, value in zip(resumed, saved["weights"], strict=True):
            p.copy_(value)
    other.load_state_dict(saved["opt"])
    for q in resumed:
        assert other.state[q]["basis_due"].dtype == torch.int64
        assert other.state[q]["basis_due"].device.type == "cpu"
    advance(resumed, other, stop, 40 - stop)
    for p, q in zip(whole, resumed, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, other.state[q][key]) for key, value in opt.state[p].items())
    if basis != "dct":
        assert max(int(opt.state[p]["basis_due"][1]) for p in whole) > 2


@pytest.mark.parametrize("overlap", [0.0, -0.1, 1.1, True, "0.9", float("nan")])
def test_a_threshold_that_is_no_share_is_refused(overlap):
    with pytest.raises(ValueError, match="adaptive_overlap: .*, must be None or in"):
        adaptive(nn.Parameter(torch.zeros(8, 8)), overlap=overlap)
