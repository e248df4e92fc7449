"""The fixed transforms: the DCT-II in all its ways against its formula and SciPy's, and Walsh–Hadamard."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_optim import cosine
from lowrank_optim.cosine import choose, dct, dct_matrix, hadamard, hadamard_matrix
from tests.reference import dct_numpy

CPU = torch.device("cpu")
# all sizes, and some that are folded more than once
SIZES = st.integers(1, 130) | st.sampled_from([256, 344, 512])
LAYOUTS = ["plain", "transposed", "strided", "reversed batch", "expanded"]


def draw(shape, layout, seed, dtype=torch.float64):
    """Return random values of this shape that lie in memory as `layout` says."""
    generator = torch.Generator().manual_seed(seed)

    def new(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    *batch, m, n = shape
    if layout == "transposed":
        return new(*batch, n, m).mT
    if layout == "strided":
        return new(*batch, 2 * m, 3 * n)[..., ::2, 1::3]
    if layout == "reversed batch":
        return new(m, n, *reversed(batch)).permute(*reversed(range(2, 2 + len(batch))), 0, 1)
    if layout == "expanded":
        return new(*batch, m, 1).expand(shape)
    return new(*shape)


@functools.cache
def formula(size):
    return torch.from_numpy(dct_numpy.matrix(size))


def product(x, dim):
    """Return the DCT of `x` in float64 as a product with the formula's matrix."""
    columns = formula(x.size(dim))
    return x.double() @ columns if dim == -1 else columns.mT @ x.double()


def relative(result, expected):
    return float((result.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 31, 64, 129])
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("way", cosine.WAYS)
def test_each_way_is_scipy_s_transform(size, dim, way):
    scipy_fft = pytest.importorskip("scipy.fft")
    x = draw((2, size, size), "plain", size)
    expected = torch.from_numpy(scipy_fft.dct(x.numpy(), type=2, norm="ortho", axis=dim))
    torch.testing.assert_close(dct(x, dim, way), expected, rtol=0, atol=1e-12)
    # of one vector, where there is no other dimension
    if dim == -1:
        torch.testing.assert_close(dct(x[0, 0], dim, way), expected[0, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 31, 100, 129])
def test_the_matrix_is_its_formula(size):
    matrix = dct_matrix(size, torch.float64, CPU)
    torch.testing.assert_close(matrix, formula(size), rtol=0, atol=1e-15)
    # other precisions are roundings of this one
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dct_matrix(size, dtype, CPU), matrix.to(dtype))


@pytest.mark.parametrize("size", [1, 2, 31, 64, 256, 344, 512, 688, 1024, 1376])
def test_the_matrix_is_orthogonal(size):
    """To 1e-13 as it is made, in float64. A rounding to float32 leaves less.

    1/√n is rounded the same way in a whole column, whose square is so off by the unit roundoff, 1.2e-7, at most. The
    rows, where it is one of n, are off by less: by less than 1e-8 for large powers of two, 6.4e-8 at worst (n = 100).
    """
    identity = torch.eye(size, dtype=torch.float64)
    matrix = dct_matrix(size, torch.float64, CPU)
    assert (matrix @ matrix.mT - identity).abs().max() < 1e-13
    single = dct_matrix(size, torch.float32, CPU).double()
    assert (single @ single.mT - identity).abs().max() < (1e-8 if size in (256, 512, 1024) else 7e-8)
    assert (single.mT @ single - identity).abs().max() < 1.2e-7


def test_rows_of_the_matrix_are_exact_at_8192():
    """Four rows in float32 are the roundings of their formula, and orthogonal to 1e-8.

    The largest entries are 1/64, which float32 rounds by 2⁻³¹ = 4.7e-10 at most. Made without the cache, which would
    keep 256 MiB.
    """
    size, rows = 8192, [0, 1, 4095, 8191]
    exact = torch.tensor(
        [[dct_numpy.entry(size, row, column) for column in range(size)] for row in rows], dtype=torch.float64
    )
    made = dct_matrix.__wrapped__(size, torch.float32, CPU)[rows].double()
    assert (made - exact).abs().max() < 4.7e-10
    assert (made @ made.mT - torch.eye(4)).abs().max() < 1e-8


def test_the_folded_parts_are_columns_of_the_matrix():
    size = 512
    first, *others, last = cosine._parts(size, torch.float32, CPU)
    matrix = dct_matrix(size, torch.float32, CPU)
    assert torch.equal(first, matrix[:256, 1::2])
    assert torch.equal(last, matrix[: len(last), :: size // len(last)])
    # together fewer numbers than the half
    assert sum(part.numel() for part in (first, *others, last)) < size**2 / 2


@settings(max_examples=150, deadline=None)
@given(
    size=SIZES,
    others=st.integers(1, 9),
    dim=st.sampled_from([-1, -2]),
    batch=st.sampled_from([(), (1,), (3,), (2, 3)]),
    layout=st.sampled_from(LAYOUTS),
    way=st.sampled_from(cosine.WAYS),
    seed=st.integers(0, 2**31),
)
def test_all_ways_are_the_product(size, others, dim, batch, layout, way, seed):
    shape = (*batch, others, size) if dim == -1 else (*batch, size, others)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        if dtype == torch.bfloat16 and way == "fft":
            continue
        x = draw(shape, layout, seed, dtype)
        before = x.clone()
        result = dct(x, dim, way)
        assert torch.equal(x, before)
        assert result.shape == x.shape
        assert result.dtype == dtype
        assert relative(result, product(x, dim)) < tolerance


@pytest.mark.parametrize("way", cosine.WAYS)
def test_what_lies_around_a_view_is_not_written(way):
    whole = draw((12, 20), "plain", 0)
    before = whole.clone()
    dct(whole[2:10, 3:19], -1, way)
    dct(whole[2:10, 3:19], -2, way)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("way", cosine.WAYS)
@pytest.mark.parametrize("dim", [-1, -2])
def test_the_transposed_matrix_leads_back(way, dim):
    size = 96
    x = draw((2, size, size), "plain", 1)
    matrix = dct_matrix(size, torch.float64, CPU)
    there = dct(x, dim, way)
    back = there @ matrix.mT if dim == -1 else matrix @ there
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    # Parseval, of each row or column
    torch.testing.assert_close(there.square().sum(dim), x.square().sum(dim), rtol=1e-12, atol=0)


@pytest.mark.parametrize("way", cosine.WAYS)
def test_a_gradient_is_the_transposed_transform(way):
    x = draw((3, 8), "plain", 2).requires_grad_()
    (gradient,) = torch.autograd.grad(dct(x, -1, way)[:, 5].sum(), x)
    torch.testing.assert_close(gradient, dct_matrix(8, torch.float64, CPU)[:, 5].expand(3, 8), rtol=0, atol=1e-14)


@pytest.mark.parametrize("way", cosine.WAYS)
@pytest.mark.parametrize("shape", [(0, 6), (6, 0)])
def test_no_rows_give_no_coefficients(way, shape):
    dim = -1 if shape[0] == 0 else -2
    assert dct(torch.empty(shape), dim, way).shape == shape


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="Invalid way: 'fast', must be one of auto, matmul, fft, folded"):
        dct(torch.ones(2, 2), -1, "fast")


@pytest.mark.parametrize(
    ("size", "dim", "way"),
    [
        *((size, dim, "matmul") for size in (1, 2, 64, 128, 251) for dim in (-1, -2)),
        *((size, -1, "fft") for size in (256, 344)),
        *((size, -2, "folded") for size in (256, 344)),
        *((size, dim, "fft") for size in (512, 1021, 1376, 4096) for dim in (-1, -2)),
    ],
)
def test_auto_chooses_by_the_table(size, dim, way):
    assert choose(size, dim, torch.float32, "cpu") == way
    assert choose(size, dim, torch.float64, "cpu") == way
    for dtype in (torch.bfloat16, torch.float16):
        assert choose(size, dim, dtype, "cpu") == ("folded" if size >= 512 else "matmul")
    assert choose(size, dim, torch.float32, "cuda") == "matmul"


def test_auto_multiplies_tensors_that_are_more_than_one(monkeypatch):
    asked = []
    monkeypatch.setattr(cosine, "choose", lambda *about: asked.append(about) or "matmul")
    dct(torch.ones(2, 6), -1)
    dct(torch.nn.Parameter(torch.ones(2, 6)), -2)
    assert asked == [(6, -1, torch.float32, "cpu"), (2, -2, torch.float32, "other")]


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("shape", [(40,), (17, 20), (5, 17, 20), (9, 2, 3), (2, 3, 17, 20), (1, 1, 400)])
@pytest.mark.parametrize("part", [1, 50, 700])
def test_an_fft_in_parts_is_the_whole_one(monkeypatch, dim, shape, part):
    """Rows, columns or matrices at a time, down to one."""
    if len(shape) == 1 and dim == -2:
        pytest.skip("a vector has one dimension")
    monkeypatch.setattr(cosine, "_PART", {-1: part, -2: part})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(dct(x, dim, "fft"), product(x, dim), rtol=0, atol=1e-12)


def test_matrices_are_made_once():
    for made in (dct_matrix, hadamard_matrix, cosine._parts):
        made.cache_clear()
        one = made(64, torch.float32, CPU)
        assert made(64, torch.float32, CPU) is one
        assert made.cache_info().currsize == 1
    # folding needs no whole matrix
    dct_matrix.cache_clear()
    dct(torch.ones(2, 128), -1, "folded")
    assert dct_matrix.cache_info().currsize == 0


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128, 256, 1024, 2048])
def test_hadamard_is_scipy_s(size):
    linalg = pytest.importorskip("scipy.linalg")
    expected = torch.from_numpy(linalg.hadamard(size)).double() / math.sqrt(size)
    matrix = hadamard_matrix(size, torch.float64, CPU)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-16)
    x = draw((3, size), "plain", size)
    torch.testing.assert_close(hadamard(x, -1), x @ expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard(x.mT, -2), expected @ x.mT, rtol=0, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    power=st.integers(0, 10),
    others=st.integers(1, 9),
    dim=st.sampled_from([-1, -2]),
    batch=st.sampled_from([(), (3,), (2, 3)]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)
def test_hadamard_is_its_product_and_its_own_inverse(power, others, dim, batch, layout, seed):
    size = 2**power
    shape = (*batch, others, size) if dim == -1 else (*batch, size, others)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = draw(shape, layout, seed, dtype)
        before = x.clone()
        result = hadamard(x, dim)
        assert torch.equal(x, before)
        assert result.shape == x.shape
        assert result.dtype == dtype
        matrix = hadamard_matrix(size, torch.float64, CPU)
        assert relative(result, x.double() @ matrix if dim == -1 else matrix @ x.double()) < tolerance
        assert relative(hadamard(result, dim), x.double()) < tolerance
        assert abs(float(result.double().norm() / x.double().norm()) - 1) < tolerance


@pytest.mark.parametrize("size", [0, 3, 12, 65, 96])
def test_hadamard_is_refused_for_other_sizes(size):
    with pytest.raises(ValueError, match=f"Invalid size: {size}, must be a power of two"):
        hadamard(torch.ones(2, size), -1)
