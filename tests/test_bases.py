"""One property suite for every basis; a new one is a line in BASES."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_optim._types import dense
from lowrank_optim.bases import NAMES, make, resolve
from lowrank_optim.columns import DCT
from lowrank_optim.orthonormal import SVD, Rotation, SubspaceIteration
from lowrank_optim.random_bases import Gaussian
from lowrank_optim.rules import Forget

STORED = [(name, side) for name in ("svd", "rsvd", "subspace", "random") for side in ("left", "right", "both")]
SELECTED = [(name, side) for name in ("dct", "identity", "hadamard") for side in ("left", "right")]
BASES = STORED + SELECTED
ONE_SIDE = [(name, side) for name, side in BASES if side != "both"]
SIDES = ["left", "right", "both"]
SEEDED = {"gaussian": Gaussian}

dims = st.integers(1, 24)


def allocate(dtype):
    def new(shape, dtype_=None, *, host=False):
        return torch.zeros(tuple(shape), dtype=dtype_ or dtype)

    return new


def random(m, n, seed=0, dtype=torch.float64):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fitting(name, side, m, n):
    """The shape, or the largest below it whose compressed side is a power of two where it has to be."""
    if name != "hadamard":
        return m, n
    return (1 << m.bit_length() - 1, n) if side == "left" else (m, 1 << n.bit_length() - 1)


def made(name, m, n, rank, side, dtype=torch.float64, scale=1.0, seed=0):
    m, n = fitting(name, side, m, n)
    grad = random(m, n, seed, dtype) * scale
    basis = make(name, rank, "full" if side == "both" else side, (m, n))
    state = basis.init((m, n), allocate(dtype))
    basis.start_(state, grad, seed)
    return basis, state, grad


def vectors(basis, state, side, dtype=torch.float64):
    """Each basis with its vectors as columns: what it lifts the unit vectors to."""
    if side == "both":
        return [state["basis"], state["basis_right"].mT]
    found = dense(basis.lift(state, torch.eye(basis.rank, dtype=dtype)))
    return [found if side == "left" else found.mT]


def cloned(state):
    return {key: value.clone() for key, value in state.items()}


def orthogonal(m, n, seed=0):
    return torch.linalg.qr(random(m, n, seed))[0]


def stored(m, n, rank, side, seed=0):
    """A random orthonormal basis."""
    left, right = orthogonal(m, rank, seed), orthogonal(n, rank, seed + 1000).mT
    return {"basis": right if side == "right" else left} | ({"basis_right": right} if side == "both" else {})


def test_every_basis_is_here():
    assert {name for name, _ in BASES} == set(NAMES)


@pytest.mark.parametrize(("name", "side"), BASES)
@given(m=dims, n=dims, rank=dims, power=st.integers(-20, 10))
@settings(max_examples=40, deadline=None)
def test_vectors_are_orthonormal_whatever_the_shape_and_scale(name, side, m, n, rank, power):
    dtype = torch.float32
    basis, state, grad = made(name, m, n, rank, side, dtype, scale=10.0**power)
    for seed in range(2):
        for v in vectors(basis, state, side, dtype):
            gram = v.mT @ v
            torch.testing.assert_close(gram, torch.eye(v.size(1), dtype=dtype), rtol=0, atol=1e-5)
        basis.refresh_(state, grad, seed)


@pytest.mark.parametrize(("name", "side"), BASES)
@given(m=dims, n=dims, rank=dims)
@settings(max_examples=25, deadline=None)
def test_shapes_sizes_and_the_projection(name, side, m, n, rank):
    basis, state, grad = made(name, m, n, rank, side)
    shape = tuple(grad.shape)
    coords = basis.project(state, grad)
    assert basis.side == side
    assert coords.shape == basis.coords_shape(shape)
    assert all(key.startswith("basis") for key in state)
    assert sum(t.numel() for t in state.values()) == basis.numel(shape)
    # lifting is a projector: applied twice it is itself, and it never lengthens
    once = dense(basis.lift(state, coords))
    twice = dense(basis.lift(state, basis.project(state, once)))
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-9)
    assert once.norm() <= grad.norm() * (1 + 1e-9)
    if side != "both":
        (q,) = vectors(basis, state, side)
        expected = q @ q.mT @ grad if side == "left" else grad @ q @ q.mT
        torch.testing.assert_close(once, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "side"), BASES)
@given(m=dims, n=dims, rank=dims, seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_coordinates_that_come_with_a_basis_are_those_of_the_gradient(name, side, m, n, rank, seed):
    basis, state, grad = made(name, m, n, rank, side)
    other = random(*grad.shape, seed + 1)
    calls = [
        lambda: basis.start_(state, other, seed),
        lambda: basis.refresh_(state, other, seed),
        lambda: basis.follow_(state, other, torch.ones(basis.coords_shape(grad.shape)).double(), (0.9, 0.1), seed),
    ]
    for call in calls:
        kept = other.clone()
        coords = call()
        assert torch.equal(other, kept)
        assert (coords is None) == ((name, side) in STORED)
        if coords is not None:
            torch.testing.assert_close(coords, basis.project(state, other), rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["svd", "rsvd", "subspace"])
@pytest.mark.parametrize("shape", [(20, 9), (9, 20), (12, 12)])
def test_a_refresh_captures_what_the_svd_does(name, side, shape):
    m, n = shape
    u, _, vh = torch.linalg.svd(torch.randn(m, n, dtype=torch.float64), full_matrices=False)
    spectrum = 0.5 ** torch.arange(min(m, n), dtype=torch.float64)
    grad = (u * spectrum) @ vh
    basis = make(name, 3, side, (m, n))
    state = basis.init((m, n), allocate(torch.float64))
    basis.start_(state, grad, 0)
    for seed in range(1 if name == "svd" else 6):
        basis.refresh_(state, grad, seed)
    captured = basis.project(state, grad).norm() ** 2
    torch.testing.assert_close(captured, spectrum[:3].square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("side", SIDES)
def test_a_random_subspace_captures_its_share_on_average(side):
    """E‖G P Pᵀ‖² = r/n ‖G‖², whatever G is; the mean of 600 is within five of its deviations."""
    m, n, rank = 10, 12, 3
    basis, state, grad = made("random", m, n, rank, side)
    shares = []
    for seed in range(600):
        basis.refresh_(state, grad, seed)
        shares.append(basis.project(state, grad).square().sum() / grad.square().sum())
    expected = {"left": rank / m, "right": rank / n, "both": rank / m * rank / n}[side]
    deviation = torch.stack(shares).std() / len(shares) ** 0.5
    assert abs(torch.stack(shares).mean() - expected) < 5 * deviation
    assert deviation < 0.02 * expected


@pytest.mark.parametrize(("name", "side"), [one for one in STORED if one[0] in ("random", "rsvd")])
def test_what_is_drawn_depends_on_the_seed_alone(name, side):
    before = torch.get_rng_state()
    basis, state, grad = made(name, 12, 12, 3, side)
    found = []
    for seed in (5, 6, 5):
        basis.refresh_(state, grad, seed)
        found.append(cloned(state))
    for key, value in state.items():
        assert torch.equal(value, found[0][key])
        assert not torch.equal(value, found[1][key])
    assert torch.equal(before, torch.get_rng_state())
    if name == "random":
        assert basis.overlap(found[0], found[1]) < 0.9
        # nothing is asked of a gradient
        basis.refresh_(state, torch.full_like(grad, torch.nan), 5)
        assert all(torch.equal(value, found[0][key]) for key, value in state.items())
        if side == "both":
            assert not torch.equal(state["basis"], state["basis_right"].mT)


@pytest.mark.parametrize(("name", "side"), BASES)
def test_full_rank_loses_nothing_of_a_square(name, side):
    basis, state, grad = made(name, 11, 11, 11, side)
    torch.testing.assert_close(dense(basis.lift(state, basis.project(state, grad))), grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [*NAMES, *SEEDED])
def test_the_start_is_repeatable_and_takes_nothing_from_the_global_generator(name):
    before = torch.get_rng_state()
    _, one, _ = made(name, 17, 8, 4, "right")
    _, two, _ = made(name, 17, 8, 4, "right")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("name", "side"), ONE_SIDE)
@given(m=dims, n=dims, rank=dims, kept=st.sampled_from([0.0, 0.5, 0.95]), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_following_a_moment_refreshes_from_what_it_will_be(name, side, m, n, rank, kept, seed):
    """Against the same said densely: lift, average, refresh, and multiply by the product of the two bases."""
    basis, state, first = made(name, m, n, rank, side)
    grad = random(*first.shape, seed)
    moment = basis.project(state, first)
    kept_moment = moment.clone()
    (old,) = vectors(basis, state, side)
    coming = kept * dense(basis.lift(state, moment)) + (1 - kept) * grad
    twin, old_state = cloned(state), cloned(state)
    basis.refresh_(twin, coming, seed)
    coords = basis.follow_(state, grad, moment, (kept, 1 - kept), seed)
    moved = basis.move(old_state, state).first(moment)
    (new,) = vectors(basis, state, side)
    (same,) = vectors(basis, twin, side)
    torch.testing.assert_close(new @ new.mT, same @ same.mT, rtol=0, atol=1e-7)
    if coords is not None:
        torch.testing.assert_close(coords, basis.project(state, grad), rtol=0, atol=1e-12)
    expected = new.mT @ old @ moment if side == "left" else moment @ (old.mT @ new)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)
    # what it was given is left as it was
    assert torch.equal(moment, kept_moment)


def test_subspace_iteration_moves_smoothly():
    """A gradient that hardly changes gives a basis that hardly changes: same vectors, same signs."""
    basis, state, grad = made("subspace", 30, 12, 3, "right")
    for _ in range(60):
        basis.refresh_(state, grad)
    before = state["basis"].clone()
    basis.refresh_(state, grad + 1e-6 * torch.randn_like(grad))
    torch.testing.assert_close(state["basis"], before, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "side"), BASES)
@pytest.mark.parametrize("value", [1.0, 0.0])
def test_a_basis_of_a_rank_deficient_gradient_is_still_orthonormal(name, side, value):
    m, n = fitting(name, side, 10, 6)
    grad = torch.full((m, n), value)
    basis = make(name, 4, "full" if side == "both" else side, (m, n))
    state = basis.init((m, n), allocate(torch.float32))
    basis.start_(state, grad, 0)
    if value or not basis.guarded:
        for v in vectors(basis, state, side, torch.float32):
            torch.testing.assert_close(v.mT @ v, torch.eye(4), rtol=0, atol=1e-5)


# --- from one basis to another


@pytest.mark.parametrize("side", SIDES)
@given(m=dims, n=dims, rank=dims, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_rotation_is_the_formula_in_numpy(side, m, n, rank, seed):
    rank = min(rank, m, n)
    old, new = (stored(m, n, rank, side, seed + i) for i in (0, 1))
    basis = SVD(rank, side)
    move, bc1, bc2 = basis.move(old, new), 0.271, 0.0199
    first = random(*basis.coords_shape((m, n)), seed) * bc1
    second = first.square() * 0.1 + random(*first.shape, seed + 1).square() * bc2
    mean, mean_sq = first.numpy() / bc1, second.numpy() / bc2
    left = np.eye(first.shape[0]) if side == "right" else new["basis"].numpy().T @ old["basis"].numpy()
    name = "basis_right" if side == "both" else "basis"
    right = np.eye(first.shape[1]) if side == "left" else old[name].numpy() @ new[name].numpy().T
    expected = bc2 * np.abs(left**2 @ (mean_sq - mean**2) @ right**2 + (left @ mean @ right) ** 2)
    kept = first.clone(), second.clone()
    np.testing.assert_allclose(move.first(first).numpy(), left @ first.numpy() @ right, rtol=0, atol=1e-12)
    np.testing.assert_allclose(move.second(second, first, (bc1, bc2)).numpy(), expected, rtol=1e-10, atol=1e-12)
    assert (move.second(second, first, (bc1, bc2)) >= 0).all()
    assert torch.equal(first, kept[0])
    assert torch.equal(second, kept[1])
    ages = torch.arange(rank, dtype=torch.int32)
    assert torch.equal(move.columns(ages), ages)


@pytest.mark.parametrize("side", SIDES)
def test_no_rotation_and_a_signed_permutation(side):
    m, n, rank = 9, 7, 4
    basis = SVD(rank, side)
    signs, order = torch.tensor([1.0, -1.0, -1.0, 1.0]).double(), torch.tensor([2, 0, 3, 1])
    turn = torch.zeros(rank, rank).double()
    turn[order, range(rank)] = signs
    first = random(*basis.coords_shape((m, n)))
    second = first.square() + 0.1

    def turned(x, signs):
        x = x if side == "right" else x[order] * signs.unsqueeze(-1)
        return x if side == "left" else x[:, order] * signs

    for matrix, expected in ((torch.eye(rank).double(), (first, second)), (turn, None)):
        move = Rotation(None if side == "right" else matrix.mT, None if side == "left" else matrix)
        firsts, seconds = expected or (turned(first, signs), turned(second, signs.abs()))
        assert torch.equal(move.first(first), firsts)
        torch.testing.assert_close(move.second(second, first, (0.1, 0.01)), seconds, rtol=0, atol=1e-12)
    # where nothing varies, squares move as the mean does
    move = Rotation(None if side == "right" else turn.mT, None if side == "left" else turn)
    torch.testing.assert_close(
        move.second(0.01 * (first / 0.1).square(), first, (0.1, 0.01)),
        0.01 * (turned(first, signs) / 0.1).square(),
    )


@given(m=dims, n=dims)
@settings(max_examples=10, deadline=None)
def test_what_is_forgotten_is_zero(m, n):
    x, ages = random(m, n), torch.ones(n, dtype=torch.int32)
    for found, like in ((Forget().first(x), x), (Forget().second(x, x, (0.1, 0.1)), x), (Forget().columns(ages), ages)):
        assert torch.equal(found, torch.zeros_like(like))
        assert found.dtype == like.dtype
    assert (x != 0).all()


@pytest.mark.parametrize("side", SIDES)
@given(m=dims, n=dims, rank=dims, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_overlap_knows_nothing_of_turns_and_signs(side, m, n, rank, seed):
    rank = min(rank, m, n)
    basis, old = SVD(rank, side), stored(m, n, rank, side, seed)
    mixed = {}
    for place, (name, kept) in enumerate(old.items()):
        turn = orthogonal(rank, rank, seed + place + 7)
        mixed[name] = turn @ kept if name == "basis_right" or side == "right" else kept @ turn
    flipped = {name: -value for name, value in old.items()}
    for new in (old, mixed, flipped):
        torch.testing.assert_close(basis.overlap(old, new), torch.tensor(1.0).double(), rtol=0, atol=1e-12)
    other = stored(m, n, rank, side, seed + 1)
    share = basis.overlap(old, other)
    assert -1e-12 <= share <= 1 + 1e-12
    torch.testing.assert_close(basis.overlap(mixed, other), share, rtol=0, atol=1e-12)
    torch.testing.assert_close(basis.overlap(other, old), share, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
def test_the_overlap_of_orthogonal_subspaces_is_none_and_of_random_ones_r_of_n(side):
    m, n, rank = 12, 9, 3
    basis, whole = SVD(rank, side), [orthogonal(m, m), orthogonal(n, n).mT]
    parts = []
    for some in (slice(0, 3), slice(3, 6), slice(2, 5)):
        left, right = whole[0][:, some], whole[1][some]
        parts.append({"basis": right if side == "right" else left} | ({"basis_right": right} if side == "both" else {}))
    assert basis.overlap(parts[0], parts[1]).abs() < 1e-12
    torch.testing.assert_close(basis.overlap(parts[0], parts[2]), torch.tensor(1 / 3).double())
    shares = [basis.overlap(stored(m, n, rank, side, i), stored(m, n, rank, side, 5000 + i)) for i in range(400)]
    expected = {"left": rank / m, "right": rank / n, "both": (rank / m + rank / n) / 2}[side]
    assert torch.stack(shares).mean().item() == pytest.approx(expected, abs=0.02)


# --- random matrices of which only the seed is kept


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.parametrize("side", ["left", "right"])
@given(m=dims, n=dims, rank=dims, seed=st.integers(0, 2**32 - 2))
@settings(max_examples=25, deadline=None)
def test_a_random_matrix_is_its_seed(name, side, m, n, rank, seed):
    basis = make(name, rank, side, (m, n))
    assert basis == SEEDED[name](min(rank, m, n), side)
    state = basis.init((m, n), allocate(torch.float32))
    grad = random(m, n)
    assert basis.start_(state, grad, seed) is None
    assert state.keys() == {"basis_seed"}
    assert (state["basis_seed"].dtype, state["basis_seed"].device.type) == (torch.int64, "cpu")
    assert state["basis_seed"].tolist() == [seed]
    # counted in float32 numbers
    assert basis.numel((m, n)) * 4 == state["basis_seed"].nbytes
    matrix, coords = basis.matrix(state, grad), basis.project(state, grad)
    assert matrix.shape == (basis.rank, m if side == "left" else n)
    assert coords.shape == basis.coords_shape((m, n))
    assert torch.equal(coords, matrix @ grad if side == "left" else grad @ matrix.mT)
    assert torch.equal(matrix, basis.matrix(cloned(state), grad))
    other = SEEDED[name](basis.rank, "right" if side == "left" else "left")
    torch.testing.assert_close(coords, other.project(state, grad.mT).mT, rtol=0, atol=1e-12)
    basis.refresh_(state, grad, seed + 1)
    assert matrix.numel() < 64 or not torch.equal(matrix, basis.matrix(state, grad))
    basis.follow_(state, grad, coords, (0.5, 0.5), seed)
    assert torch.equal(matrix, basis.matrix(state, grad))


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_random_matrix_keeps_lengths_on_average(name, side):
    """Entries are N(0, 1/r) or ±1/√r: a row has norm √(n/r), and E‖R‖² = ‖G‖² with a deviation that falls as 1/√r."""
    rank, size = 16, 400
    basis = SEEDED[name](rank, side)
    state = basis.init((size, size), allocate(torch.float64))
    # of no seed that is drawn from below
    grad = random(*((1, size) if side == "right" else (size, 1)), seed=10**6)
    ratios, norms, means = [], [], []
    for seed in range(300):
        basis.refresh_(state, grad, seed)
        matrix = basis.matrix(state, grad)
        ratios.append(basis.project(state, grad).square().sum() / grad.square().sum())
        norms.append(matrix.norm(dim=1))
        means.append(matrix.mean())
    ratios, norms = torch.stack(ratios), torch.stack(norms)
    assert ratios.mean().item() == pytest.approx(1, abs=5 * (2 / rank / 300) ** 0.5)
    assert ratios.std().item() == pytest.approx((2 / rank) ** 0.5, rel=0.2)
    assert norms.mean().item() == pytest.approx((size / rank) ** 0.5, rel=0.01)
    assert norms.std() < 0.3
    assert abs(torch.stack(means).mean()) < 5 / (rank * rank * size * 300) ** 0.5


@pytest.mark.parametrize("name", SEEDED)
def test_a_random_matrix_is_not_orthonormal_and_says_so(name):
    basis, state, grad = made(name, 6, 8, 4, "right")
    assert not basis.guarded
    assert basis.overlap(state, state) is None
    with pytest.raises(NotImplementedError, match="coordinates are not lifted"):
        basis.lift(state, basis.project(state, grad))
    with pytest.raises(NotImplementedError, match="moments are not moved"):
        basis.move(state, state)


@pytest.mark.parametrize(
    ("rank", "proj_type", "shape", "expected"),
    [
        (4, "std", (10, 6), (4, "right")),
        (4, "std", (6, 10), (4, "left")),
        (4, "std", (6, 6), (4, "right")),
        (4, "reverse_std", (10, 6), (4, "left")),
        (4, "reverse_std", (6, 10), (4, "right")),
        (99, "left", (10, 6), (6, "left")),
        (4, "right", (6, 10), (4, "right")),
        (0.5, "full", (10, 6), (3, "both")),
        (0.01, "std", (10, 6), (1, "right")),
        (1.0, "std", (10, 6), (6, "right")),
        (1, "std", (10, 6), (1, "right")),
    ],
)
def test_rank_and_side(rank, proj_type, shape, expected):
    assert resolve(rank, proj_type, shape) == expected
    if expected[1] != "both":
        assert make("dct", rank, proj_type, shape) == DCT(*expected, shape[1 if expected[1] == "right" else 0])
    assert make("svd", rank, proj_type, shape) == SVD(*expected)
    assert make("subspace", rank, proj_type, shape) == SubspaceIteration(*expected)


@pytest.mark.parametrize("size", range(1, 18))
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_hadamard_matrix_needs_a_power_of_two(size, side):
    shape = (size, 20) if side == "left" else (20, size)
    if size in (1, 2, 4, 8, 16):
        assert make("hadamard", 2, side, shape).size == size
    else:
        with pytest.raises(ValueError, match=f"'hadamard', which needs a side of 2, 4, 8, ..., not the {size} of"):
            make("hadamard", 2, side, shape)
