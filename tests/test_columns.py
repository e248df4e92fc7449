"""Bases that are columns of a fixed one: the choice against all others, what it captures, and moves between choices."""

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowrank_optim._types import dense
from lowrank_optim.bases import make
from lowrank_optim.columns import DCT, Gather, Hadamard, Identity, Still
from lowrank_optim.cosine import dct_matrix
from tests.reference import dct_numpy

KINDS = {"dct": DCT, "identity": Identity, "hadamard": Hadamard}
SIDES = ["left", "right"]
SELECTED = [(name, side) for name in KINDS for side in SIDES]
# relative to the energy of a matrix
NEAR = {torch.float64: 1e-12, torch.float32: 2e-5}

dims = st.integers(1, 24)
seeds = st.integers(0, 999)
layouts = st.sampled_from(["contiguous", "transposed", "strided", "flipped"])
dtypes = st.sampled_from([torch.float32, torch.float64])


def allocate(dtype):
    def new(shape, dtype_=None, *, host=False):
        return torch.zeros(tuple(shape), dtype=dtype_ or dtype)

    return new


@functools.cache
def fixed(name, size):
    """The columns, in float64."""
    if name == "dct":
        return torch.from_numpy(dct_numpy.matrix(size))
    matrix = np.eye(size if name == "identity" else 1)
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix) / np.sqrt(2)
    return torch.from_numpy(matrix)


def fitting(name, size):
    """The size, or the largest below it that is a power of two where it has to be."""
    return 1 << size.bit_length() - 1 if name == "hadamard" else size


def laid_out(x, layout):
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "strided":
        out = x.new_zeros(2 * x.size(0), 3 * x.size(1))[::2, 1::3]
        return out.copy_(x)
    # a view that ends where its memory begins
    return x.flip(0).contiguous().flip(0) if layout == "flipped" else x


def random(rows, size, side, *, seed=0, dtype=torch.float64, layout="contiguous"):
    """A matrix whose compressed side has `size`."""
    shape = (rows, size) if side == "right" else (size, rows)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return laid_out(x.to(dtype), layout)


def chosen(name, rank, side, grad, ranking="l2"):
    """A basis and its state, set by this gradient, which is left as it is, and the coordinates that came with it."""
    size, kept = grad.size(1 if side == "right" else 0), grad.clone()
    basis = KINDS[name](rank, side, size, ranking)
    state = basis.init(tuple(grad.shape), allocate(grad.dtype))
    coords = basis.refresh_(state, grad, 0)
    assert torch.equal(grad.nan_to_num(), kept.nan_to_num())
    return basis, state, coords


def coefficients(name, side, grad):
    """Along all columns, which are columns here whatever the side."""
    grad = grad.double() if side == "right" else grad.double().T
    return grad @ fixed(name, grad.size(1))


@pytest.mark.parametrize("ranking", ["l1", "l2"])
@pytest.mark.parametrize(("name", "side"), SELECTED)
@given(rows=dims, size=dims, rank=dims, power=st.sampled_from([-15, 0, 10]), seed=seeds, layout=layouts, dtype=dtypes)
@settings(max_examples=25, deadline=None)
def test_the_columns_with_most_energy_are_chosen_in_their_order(
    name, side, ranking, rows, size, rank, power, seed, layout, dtype
):
    size = fitting(name, size)
    rank = min(rank, size)
    grad = random(rows, size, side, seed=seed, dtype=dtype, layout=layout)
    basis, state, coords = chosen(name, rank, side, grad * 10.0**power, ranking)
    index = state["basis_index"]
    assert index.dtype == torch.int32
    assert (index[1:] > index[:-1]).all()
    assert index[0] >= 0
    assert index[-1] < size
    everything = coefficients(name, side, grad)
    energy = (everything.abs() if ranking == "l1" else everything.square()).sum(0)
    torch.testing.assert_close(energy[index.long()].sum(), energy.topk(rank).values.sum(), rtol=1e-5, atol=0)
    # and these are the columns that it projects on; the coordinates that came with the choice are the same to rounding
    near = NEAR[dtype] * 10.0**power * everything.norm()
    kept = everything[:, index.long()] * 10.0**power
    projected = basis.project(state, grad * 10.0**power)
    for found in (coords, projected, basis.analyze(grad * 10.0**power).take(index)):
        assert found.dtype == dtype
        assert ((found if side == "right" else found.T).double() - kept).norm() <= near


@pytest.mark.parametrize(("name", "side"), SELECTED)
@given(rows=dims, size=dims, rank=dims, seed=seeds, layout=layouts, dtype=dtypes)
@settings(max_examples=30, deadline=None)
def test_what_is_lost_is_what_the_others_hold(name, side, rows, size, rank, seed, layout, dtype):
    """Pythagoras: ‖A − lift(project(A))‖² = ‖A‖² − the energy of the chosen columns."""
    size = fitting(name, size)
    grad = random(rows, size, side, seed=seed, dtype=dtype, layout=layout)
    basis, state, _ = chosen(name, min(rank, size), side, grad)
    lost = (grad - dense(basis.lift(state, basis.project(state, grad)))).double().square().sum()
    energy = coefficients(name, side, grad).square().sum(0)
    whole = grad.double().square().sum()
    assert abs(lost - (whole - energy[state["basis_index"].long()].sum())) <= NEAR[dtype] * whole
    # at full rank that is nothing
    basis, state, _ = chosen(name, size, side, grad)
    assert (grad - dense(basis.lift(state, basis.project(state, grad)))).norm() <= NEAR[dtype] * whole.sqrt()


@pytest.mark.parametrize(("name", "side"), SELECTED)
@given(rows=dims, size=st.integers(1, 8), rank=dims, seed=seeds, layout=layouts, spread=st.floats(0, 4))
@settings(max_examples=25, deadline=None)
def test_no_other_columns_capture_more_and_these_capture_their_share(
    name, side, rows, size, rank, seed, layout, spread
):
    """All choices one by one; at least r/n of the energy, of any matrix; at most what the SVD captures."""
    size = fitting(name, size)
    rank = min(rank, size)
    # columns, or rows, of unlike sizes
    sizes = torch.logspace(0, -spread, size, dtype=torch.float64)
    grad = random(rows, size, side, seed=seed) * (sizes if side == "right" else sizes.unsqueeze(-1))
    basis, _, coords = chosen(name, rank, side, laid_out(grad, layout))
    captured, whole = coords.square().sum(), grad.square().sum()
    for choice in itertools.combinations(range(size), rank):
        other = basis.project({"basis_index": torch.tensor(choice, dtype=torch.int32)}, grad).square().sum()
        assert other <= captured * (1 + 1e-12)
    assert captured >= rank / size * whole * (1 - 1e-12)
    assert captured <= torch.linalg.svdvals(grad)[:rank].square().sum() * (1 + 1e-12)


@pytest.mark.parametrize(("name", "side"), SELECTED)
@given(rows=dims, power=st.integers(0, 4), rank=dims)
@settings(max_examples=10, deadline=None)
def test_the_share_is_all_there_is_where_columns_are_alike(name, side, rows, power, rank):
    """The bound is reached: a matrix with as much along each column."""
    size = 2**power
    rank = min(rank, size)
    grad = torch.ones(rows, size).double() @ fixed(name, size).T
    _, _, coords = chosen(name, rank, side, grad if side == "right" else grad.T)
    torch.testing.assert_close(coords.square().sum(), torch.tensor(rank * rows).double(), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("name", "side"), SELECTED)
@pytest.mark.parametrize("rows", [10, 100, 1000])
def test_by_magnitudes_there_is_no_such_bound(name, side, rows):
    """0.6 all along one column, and 0.5·R once in another: magnitudes choose the first, which has next to nothing."""
    grad = torch.zeros(rows, 4, dtype=torch.float64)
    grad[:, 1], grad[3, 2] = 0.6, 0.5 * rows
    grad = grad @ fixed(name, 4).T
    grad = grad if side == "right" else grad.T
    shares = {}
    for ranking, column in (("l1", 1), ("l2", 2)):
        _, state, coords = chosen(name, 1, side, grad, ranking)
        assert state["basis_index"].tolist() == [column]
        shares[ranking] = (coords.square().sum() / grad.square().sum()).item()
    assert shares["l1"] == pytest.approx(1.44 / (1.44 + rows))
    assert shares["l1"] < 1 / 4 <= shares["l2"]


@pytest.mark.parametrize(("name", "side"), SELECTED)
@given(rows=dims, size=dims, rank=dims, seed=seeds)
@settings(max_examples=20, deadline=None)
def test_both_rankings_agree_on_columns_of_equal_magnitudes(name, side, rows, size, rank, seed):
    size = fitting(name, size)
    source = torch.Generator().manual_seed(seed)
    sizes = torch.randperm(size, generator=source) + 1.0
    signs = torch.randint(2, (rows, size), generator=source) * 2.0 - 1
    grad = (signs * sizes).double() @ fixed(name, size).T
    grad = grad if side == "right" else grad.T
    expected = sizes.topk(min(rank, size)).indices.sort().values.tolist()
    for ranking in ("l1", "l2"):
        assert chosen(name, min(rank, size), side, grad, ranking)[1]["basis_index"].tolist() == expected


@pytest.mark.parametrize("ranking", ["l1", "l2"])
@pytest.mark.parametrize("name", KINDS)
@given(rows=dims, size=dims, rank=dims, seed=seeds, dtype=dtypes, layout=layouts)
@settings(max_examples=25, deadline=None)
def test_the_left_of_a_matrix_is_the_right_of_its_transpose(name, ranking, rows, size, rank, seed, dtype, layout):
    size = fitting(name, size)
    grad = random(rows, size, "left", seed=seed, dtype=dtype, layout=layout)
    left, left_state, left_coords = chosen(name, min(rank, size), "left", grad, ranking)
    right, right_state, right_coords = chosen(name, min(rank, size), "right", grad.T, ranking)
    assert torch.equal(left_state["basis_index"], right_state["basis_index"])
    near = {"rtol": 0, "atol": NEAR[dtype]}
    torch.testing.assert_close(left_coords, right_coords.T, **near)
    torch.testing.assert_close(left.project(left_state, grad), right.project(right_state, grad.T).T, **near)
    one, two = left.lift(left_state, left_coords), right.lift(right_state, right_coords)
    torch.testing.assert_close(dense(one), dense(two).T, **near)


@pytest.mark.parametrize("ranking", ["l1", "l2"])
@pytest.mark.parametrize(("name", "side"), SELECTED)
@given(rows=dims, size=dims, seed=seeds, data=st.data())
@settings(max_examples=25, deadline=None)
def test_columns_that_span_a_matrix_are_found_whatever_its_order(name, side, ranking, rows, size, seed, data):
    size = fitting(name, size)
    planted = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    inside = random(rows, len(planted), "right", seed=seed)
    # so that no column is next to nothing
    assume(inside.norm(dim=0).min() > 1e-3)
    grad = inside @ fixed(name, size)[:, planted].T
    basis, state, _ = chosen(name, len(planted), side, grad if side == "right" else grad.T, ranking)
    assert state["basis_index"].tolist() == planted
    coords = basis.project(state, grad if side == "right" else grad.T)
    lifted = dense(basis.lift(state, coords))
    torch.testing.assert_close(lifted if side == "right" else lifted.T, grad, rtol=0, atol=1e-12)
    # the order of the other side has no say
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    mixed = grad[order]
    _, other, permuted = chosen(name, len(planted), side, mixed if side == "right" else mixed.T, ranking)
    assert torch.equal(other["basis_index"], state["basis_index"])
    expected = coords[order] if side == "right" else coords[:, order]
    torch.testing.assert_close(permuted, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranking", ["l1", "l2"])
@pytest.mark.parametrize(("name", "side"), SELECTED)
@given(rows=st.integers(3, 24), size=dims, rank=dims, seed=seeds, parts=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_the_energies_of_shards_add_up_to_the_choice_of_the_whole(name, side, ranking, rows, size, rank, seed, parts):
    """What an all-reduce of r numbers in the place of a gather of the matrix would rest on."""
    size = fitting(name, size)
    grad = random(rows, size, side, seed=seed)
    basis, state, coords = chosen(name, min(rank, size), side, grad, ranking)
    along = 0 if side == "right" else 1
    shards = [basis.analyze(shard) for shard in grad.tensor_split(parts, along)]
    index = basis.select(sum(shard.energies() for shard in shards))
    assert index.tolist() == state["basis_index"].tolist()
    torch.testing.assert_close(torch.cat([x.take(index) for x in shards], along), coords, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranking", ["l1", "l2"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("size", [7, 64, 300])
def test_equal_columns_are_chosen_by_their_index(side, ranking, size):
    """Plain columns: signs and orders of summation may not tell equal ones apart."""
    grad = torch.ones(5, size)
    grad[:, ::2] *= -1
    grad[:, 3] = 2.0
    turned = grad if side == "right" else grad.T
    for _ in range(3):
        assert chosen("identity", 4, side, turned, ranking)[1]["basis_index"].tolist() == [0, 1, 2, 3]
    grad[:, 5] = 3.0
    assert chosen("identity", 4, side, turned, ranking)[1]["basis_index"].tolist() == [0, 1, 3, 5]
    assert chosen("identity", 4, side, torch.zeros_like(turned), ranking)[1]["basis_index"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("ranking", ["l1", "l2"])
@pytest.mark.parametrize(("name", "side"), SELECTED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("whole", [True, False])
def test_a_gradient_that_is_not_finite_still_gives_columns(name, side, ranking, value, whole):
    grad = random(6, 16, side)
    grad[2, 3] = value
    basis, state, _ = chosen(name, 5, side, torch.full_like(grad, value) if whole else grad, ranking)
    for _ in range(2):
        index = state["basis_index"].tolist()
        assert index == sorted(set(index))
        assert len(index) == 5
        assert index[0] >= 0
        assert index[-1] < 16
        basis.follow_(state, grad, basis.project(state, grad), (0.9, 0.1), 0)


# --- from one choice to another


@given(size=st.integers(1, 40), rows=st.integers(1, 6), side=st.sampled_from(SIDES), data=st.data())
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("name", KINDS)
def test_a_move_is_the_product_of_the_two_bases_and_survivors_keep_their_bits(name, size, rows, side, data):
    size = fitting(name, size)
    rank = data.draw(st.integers(1, size))
    subsets = st.sets(st.integers(0, size - 1), min_size=rank, max_size=rank)
    before, after = (sorted(data.draw(subsets)) for _ in range(2))
    basis = KINDS[name](rank, side, size)
    old, new = ({"basis_index": torch.tensor(x, dtype=torch.int32)} for x in (before, after))
    move = basis.move(old, new)
    assert isinstance(move, Still) == (before == after)
    product = torch.tensor([[float(i == j) for j in after] for i in before], dtype=torch.float64)
    rotation = fixed(name, size)[:, before].T @ fixed(name, size)[:, after]
    torch.testing.assert_close(product, rotation, rtol=0, atol=1e-14)

    def upright(x):
        return x if side == "right" else x.T

    first = random(rows, rank, side)
    second = first.square()
    ages = torch.arange(1, rank + 1, dtype=torch.int32)
    for moment, moved in ((first, move.first(first)), (second, move.second(second, first, (0.1, 0.01)))):
        torch.testing.assert_close(upright(moved), upright(moment) @ product, rtol=0, atol=5e-16)
        for place, column in enumerate(after):
            kept = upright(moment)[:, before.index(column)] if column in before else torch.zeros(rows).double()
            assert torch.equal(upright(moved)[:, place], kept)
    assert (move.second(second, first, (0.1, 0.01)) >= 0).all()
    assert move.columns(ages).tolist() == [before.index(j) + 1 if j in before else 0 for j in after]
    assert move.columns(ages).dtype == torch.int32
    assert basis.overlap(old, new).item() == pytest.approx(len(set(before) & set(after)) / rank)


@pytest.mark.parametrize("side", SIDES)
def test_a_move_that_moves_nothing_has_the_bits_of_one_that_does_not_know(side):
    index = torch.tensor([1, 4, 6], dtype=torch.int32)
    basis, first = DCT(3, side, 8), random(5, 3, side)
    still = basis.move({"basis_index": index}, {"basis_index": index.clone()})
    general = Gather(torch.arange(3), torch.ones(3, dtype=torch.bool), -1 if side == "right" else -2)
    assert isinstance(still, Still)
    for x, y in ((still, general), (general, still)):
        assert torch.equal(x.first(first), y.first(first))
        assert torch.equal(x.second(first.square(), first, (0.1, 0.1)), y.second(first.square(), first, (0.1, 0.1)))
        assert torch.equal(x.columns(index), y.columns(index))


# --- the transform


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
