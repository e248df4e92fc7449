"""One property suite for every basis; a new one is a line in BASES."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_optim._types import dense
from lowrank_optim.bases import NAMES, make, resolve
from lowrank_optim.orthonormal import SVD, SubspaceIteration
from lowrank_optim.columns import DCT, Identity
from lowrank_optim.cosine import dct_matrix
from tests.reference import dct_numpy

STORED = [(name, side) for name in ("svd", "rsvd", "subspace", "random") for side in ("left", "right", "both")]
# Hadamard matrices have sides of their own: see test_columns.py
SELECTED = [(name, side) for name in ("dct", "identity") for side in ("left", "right")]
BASES = STORED + SELECTED

dims = st.integers(1, 24)


def allocate(dtype):
    def new(shape, dtype_=None, *, host=False):
        return torch.zeros(tuple(shape), dtype=dtype_ or dtype)

    return new


def made(name, m, n, rank, side, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(m, n, generator=generator, dtype=dtype) * scale
    basis = make(name, rank, "full" if side == "both" else side, (m, n))
    state = basis.init((m, n), allocate(dtype))
    basis.start_(state, grad)
    return basis, state, grad


def vectors(basis, state, side, dtype=torch.float64):
    """Each basis with its vectors as columns: what it lifts the unit vectors to."""
    if side == "both":
        return [state["basis"], state["basis_right"].mT]
    found = dense(basis.lift(state, torch.eye(basis.rank, dtype=dtype)))
    return [found if side == "left" else found.mT]


def test_every_basis_is_here():
    assert {name for name, _ in BASES} == set(NAMES) - {"hadamard"}


@pytest.mark.parametrize(("name", "side"), BASES)
@given(m=dims, n=dims, rank=dims, power=st.integers(-20, 10))
@settings(max_examples=40, deadline=None)
def test_vectors_are_orthonormal_whatever_the_shape_and_scale(name, side, m, n, rank, power):
    dtype = torch.float32
    basis, state, grad = made(name, m, n, rank, side, dtype, scale=10.0**power)
    for _ in range(2):
        for v in vectors(basis, state, side, dtype):
            gram = v.mT @ v
            torch.testing.assert_close(gram, torch.eye(v.size(1), dtype=dtype), rtol=0, atol=1e-5)
        basis.refresh_(state, grad)


@pytest.mark.parametrize(("name", "side"), BASES)
@given(m=dims, n=dims, rank=dims)
@settings(max_examples=25, deadline=None)
def test_shapes_sizes_and_the_projection(name, side, m, n, rank):
    basis, state, grad = made(name, m, n, rank, side)
    coords = basis.project(state, grad)
    assert coords.shape == basis.coords_shape((m, n))
    assert sum(t.numel() for t in state.values()) == basis.numel((m, n))
    # lifting is a projector: applied twice it is itself, and it never lengthens
    once = dense(basis.lift(state, coords))
    twice = dense(basis.lift(state, basis.project(state, once)))
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-9)
    assert once.norm() <= grad.norm() * (1 + 1e-9)
    if side != "both":
        (q,) = vectors(basis, state, side)
        expected = q @ q.mT @ grad if side == "left" else grad @ q @ q.mT
        torch.testing.assert_close(once, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "side"), [(name, side) for name, side in STORED if side != "both"])
@pytest.mark.parametrize("shape", [(20, 9), (9, 20), (12, 12)])
def test_a_refresh_captures_what_the_svd_does(name, side, shape):
    m, n = shape
    u, _, vh = torch.linalg.svd(torch.randn(m, n, dtype=torch.float64), full_matrices=False)
    spectrum = 0.5 ** torch.arange(min(m, n), dtype=torch.float64)
    grad = (u * spectrum) @ vh
    basis = make(name, 3, side, (m, n))
    state = basis.init((m, n), allocate(torch.float64))
    basis.start_(state, grad)
    for _ in range(6):
        basis.refresh_(state, grad)
    captured = basis.project(state, grad).norm() ** 2
    torch.testing.assert_close(captured, spectrum[:3].square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "side"), BASES)
def test_full_rank_loses_nothing_of_a_square(name, side):
    basis, state, grad = made(name, 11, 11, 11, side)
    torch.testing.assert_close(dense(basis.lift(state, basis.project(state, grad))), grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_start_is_repeatable_and_takes_nothing_from_the_global_generator(name):
    before = torch.get_rng_state()
    _, one, _ = made(name, 17, 8, 4, "right")
    _, two, _ = made(name, 17, 8, 4, "right")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("name", "side"), [(name, side) for name, side in BASES if side != "both"])
@given(m=dims, n=dims, rank=dims, kept=st.sampled_from([0.0, 0.5, 0.95]), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_following_a_moment_refreshes_from_what_it_will_be_and_carries_it(name, side, m, n, rank, kept, seed):
    """Against the same said densely: lift, average, refresh, and multiply by the product of the two bases."""
    basis, state, first = made(name, m, n, rank, side)
    grad = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moment = basis.project(state, first)
    kept_moment = moment.clone()
    (old,) = vectors(basis, state, side)
    coming = kept * dense(basis.lift(state, moment)) + (1 - kept) * grad
    twin = {key: value.clone() for key, value in state.items()}
    basis.refresh_(twin, coming)
    coords, moved = basis.follow_(state, grad, moment, (kept, 1 - kept))
    (new,) = vectors(basis, state, side)
    (same,) = vectors(basis, twin, side)
    torch.testing.assert_close(new @ new.mT, same @ same.mT, rtol=0, atol=1e-7)
    torch.testing.assert_close(coords, basis.project(state, grad), rtol=0, atol=1e-12)
    expected = new.mT @ old @ moment if side == "left" else moment @ (old.mT @ new)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)
    # what it was given is left as it was
    assert torch.equal(moment, kept_moment)
    assert moved.data_ptr() != moment.data_ptr() or not moment.numel()


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
    grad = torch.full((10, 6), value)
    basis = make(name, 4, "full" if side == "both" else side, (10, 6))
    state = basis.init((10, 6), allocate(torch.float32))
    basis.start_(state, grad)
    if value or name in ("dct", "identity"):
        for v in vectors(basis, state, side, torch.float32):
            torch.testing.assert_close(v.mT @ v, torch.eye(4), rtol=0, atol=1e-5)


# --- columns of a fixed basis


def fixed(name, size):
    return torch.from_numpy(dct_numpy.matrix(size)) if name == "dct" else torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("ranking", ["l1", "l2"])
@pytest.mark.parametrize(("name", "side"), SELECTED)
@given(m=dims, n=dims, rank=dims, power=st.sampled_from([-15, 0, 10]), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_columns_with_most_energy_are_chosen_in_their_order(name, side, ranking, m, n, rank, power, seed):
    size = m if side == "left" else n
    rank = min(rank, size)
    grad = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = {"dct": DCT, "identity": Identity}[name](rank, side, size, ranking)
    state = basis.init((m, n), allocate(torch.float32))
    basis.refresh_(state, (grad * 10.0**power).float())
    index = state["basis_index"]
    assert index.dtype == torch.int32
    assert (index[1:] > index[:-1]).all()
    assert index[0] >= 0
    assert index[-1] < size
    coefficients = grad @ fixed(name, size) if side == "right" else fixed(name, size).T @ grad
    energy = coefficients.abs() if ranking == "l1" else coefficients.square()
    energy = energy.sum(0 if side == "right" else 1)
    best = energy.topk(rank).values.sum()
    torch.testing.assert_close(energy[index.long()].sum(), best, rtol=1e-5, atol=0)
    # and these are the columns that it projects on
    torch.testing.assert_close(
        basis.project(state, grad), coefficients.index_select(1 if side == "right" else 0, index), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(basis.take(basis.transform(grad), index), basis.project(state, grad), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "side"), SELECTED)
def test_the_best_columns_capture_no_less_than_any_other_choice(name, side):
    """All choices of 3 out of 6, one by one."""
    import itertools

    grad = torch.randn(6, 6, dtype=torch.float64)
    basis = make(name, 3, side, (6, 6))
    state = basis.init((6, 6), allocate(torch.float64))
    basis.refresh_(state, grad)
    captured = basis.project(state, grad).square().sum()
    for choice in itertools.combinations(range(6), 3):
        other = basis.project({"basis_index": torch.tensor(choice, dtype=torch.int32)}, grad).square().sum()
        assert other <= captured * (1 + 1e-12)


@pytest.mark.parametrize("ranking", ["l1", "l2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [7, 64, 300])
def test_equal_columns_are_chosen_by_their_index(side, ranking, size):
    """Plain columns: signs and orders of summation may not tell equal ones apart."""
    grad = torch.ones(5, size)
    grad[:, ::2] *= -1
    grad[:, 3] = 2.0
    basis = Identity(4, side, size, ranking)
    state = basis.init((5, size), allocate(torch.float32))
    for _ in range(3):
        basis.refresh_(state, grad if side == "right" else grad.T)
        assert state["basis_index"].tolist() == [0, 1, 2, 3]
    grad[:, 5] = 3.0
    basis.refresh_(state, grad if side == "right" else grad.T)
    assert state["basis_index"].tolist() == [0, 1, 3, 5]
    zeros = torch.zeros(5, size) if side == "right" else torch.zeros(size, 5)
    basis.refresh_(state, zeros)
    assert state["basis_index"].tolist() == [0, 1, 2, 3]


@given(
    size=st.integers(1, 40),
    rows=st.integers(1, 6),
    side=st.sampled_from(["left", "right"]),
    name=st.sampled_from(["dct", "identity"]),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_the_carry_is_the_product_of_the_two_bases_and_survivors_keep_their_bits(size, rows, side, name, data):
    rank = data.draw(st.integers(1, size))
    subsets = st.sets(st.integers(0, size - 1), min_size=rank, max_size=rank)
    before, after = (sorted(data.draw(subsets)) for _ in range(2))
    basis = {"dct": DCT, "identity": Identity}[name](rank, side, size)
    old, new = ({"basis_index": torch.tensor(x, dtype=torch.int32)} for x in (before, after))
    coords = torch.randn(rows, rank, dtype=torch.float64)
    columns = fixed(name, size)
    rotation = columns[:, before].T @ columns[:, after]
    expected = coords @ rotation
    moved = basis.move(old, new).first(coords if side == "right" else coords.T.contiguous())
    moved = moved if side == "right" else moved.T
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-14)
    # the product itself: of the unit vectors
    unit = torch.eye(rank, dtype=torch.float64)
    turned = basis.move(old, new).first(unit)
    torch.testing.assert_close(turned if side == "right" else turned.T, rotation, rtol=0, atol=1e-15)
    for place, column in enumerate(after):
        if column in before:
            assert torch.equal(moved[:, place], coords[:, before.index(column)])
        else:
            assert (moved[:, place] == 0).all()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 31, 64, 100, 129])
def test_the_dct_matrix_is_its_formula_and_scipy_s(size):
    scipy_fft = pytest.importorskip("scipy.fft")
    matrix = dct_matrix(size, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(matrix, torch.from_numpy(dct_numpy.matrix(size)), rtol=0, atol=1e-15)
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    x = torch.randn(4, size, dtype=torch.float64)
    expected = torch.from_numpy(scipy_fft.dct(x.numpy(), type=2, norm="ortho"))
    torch.testing.assert_close(x @ matrix, expected, rtol=0, atol=1e-12)
    single = dct_matrix(size, torch.float32, torch.device("cpu"))
    assert torch.equal(single, matrix.float())


def test_the_dct_matrix_is_exact_at_8192():
    """Made without the cache, which would keep 512 MiB; 2,000 entries against their formula, and some columns."""
    size = 8192
    matrix = dct_matrix.__wrapped__(size, torch.float64, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randint(size, (2, 2000), generator=generator).tolist()
    rows += [0, size - 1, 0, size - 1, size // 2]
    columns += [0, 0, size - 1, size - 1, size - 1]
    worst = max(abs(float(matrix[i, j]) - dct_numpy.entry(size, i, j)) for i, j in zip(rows, columns, strict=True))
    assert worst < 1e-16
    some = matrix[:, columns[:50]]
    torch.testing.assert_close(some.mT @ some, torch.eye(50, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_dct_matrix_is_made_once_in_one_precision_alone():
    dct_matrix.cache_clear()
    one = dct_matrix(48, torch.float32, torch.device("cpu"))
    assert dct_matrix.cache_info().currsize == 1
    assert dct_matrix(48, torch.float32, torch.device("cpu")) is one
    # every matrix of a model that has this short side uses this one
    for shape in ((48, 100), (100, 48)):
        basis = make("dct", 4, "std", shape)
        state = basis.init(shape, allocate(torch.float32))
        basis.refresh_(state, torch.randn(shape))
    assert dct_matrix.cache_info().currsize == 1


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


@pytest.mark.parametrize("size", [64, 65, 70, 96, 127, 128, 343, 512])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_the_fast_transform_is_the_product(size, side, dtype, bound):
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(size, 37, generator=generator, dtype=torch.float64)
    matrix = matrix if side == "left" else matrix.mT
    columns = dct_matrix(size, torch.float64, torch.device("cpu"))
    wanted = columns.mT @ matrix if side == "left" else matrix @ columns
    found = DCT(3, side, size).transform(matrix.to(dtype))
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() <= bound * wanted.norm()
