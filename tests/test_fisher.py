"""The inverse of the empirical Fisher matrix: against dense inverses, published recursions, closed forms and bounds."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowrank_optim import InverseFisher
from lowrank_optim._warn import warn_once
from tests.reference import fisher_numpy as oracle

DIVISORS = ["window", "count"]
EXTENDED = pytest.mark.skipif(bool(np.finfo(np.longdouble).eps > 1e-18), reason="long double is double precision here")
LAYOUTS = ["plain", "column", "part", "parameter"]


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def laid(x: Tensor, layout: str) -> Tensor:
    """Return the same numbers, which lie in memory as `layout` says."""
    if layout == "column":
        return x[:, None].repeat(1, 3)[:, 1]
    if layout == "part":
        return torch.cat([x, x, x])[len(x) : 2 * len(x)]
    return nn.Parameter(x) if layout == "parameter" else x


def filled(gradients: Tensor, *, layout: str = "plain", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    fisher = InverseFisher(gradients.size(1), dtype=dtype, **options)
    for gradient in gradients:
        assert fisher.push(laid(gradient, layout))
    return fisher


def window(gradients: Tensor, num_grads: int, divisor: str = "window") -> tuple[Any, int]:
    """Return the gradients that are in the window, and by what their sum is divided."""
    rows = gradients[-num_grads:].double().numpy()
    return rows, max(1, len(rows)) if divisor == "count" else num_grads


def solved(fisher: Any, x: Tensor) -> Tensor:
    """Return F⁻¹ x of the vectors in x by LAPACK."""
    return torch.from_numpy(np.linalg.solve(fisher, x.double().numpy().T).T)


def tensors(fisher: Any) -> list[Tensor]:
    """Return copies of the tensors of the state."""
    state = fisher.state_dict()
    return [state[key].clone() for key in sorted(state) if isinstance(state[key], Tensor) and state[key].dim()]


def relative(result: Any, expected: Any) -> float:
    expected = torch.as_tensor(expected).double()
    return float((torch.as_tensor(result).double() - expected).norm() / expected.norm())


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    num_grads=st.integers(1, 40),
    turns=st.floats(0, 3.5),
    damping=st.sampled_from([1e-2, 0.3, 20.0]),
    divisor=st.sampled_from(DIVISORS),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)
def test_solutions_are_those_of_the_dense_matrix(
    size: int, num_grads: int, turns: float, damping: float, divisor: str, layout: str, seed: int
) -> None:
    gradients = draw(round(turns * num_grads), size, seed=seed)
    fisher = filled(gradients, layout=layout, num_grads=num_grads, damping=damping, divisor=divisor)
    rows, n = window(gradients, num_grads, divisor)
    dense = oracle.matrix(rows, damping, n)
    x = draw(3, size, seed=seed + 1)
    kept = x.clone()
    result = fisher.solve(x)
    assert relative(result, solved(dense, x)) < 1e-11
    assert relative(result @ torch.from_numpy(dense), x) < 1e-11
    assert torch.equal(x, kept)
    for vector, solution in zip(x, result, strict=True):
        assert relative(fisher.solve(laid(vector, layout)), solution) < 1e-11
    if len(rows):
        assert relative(fisher.solve_newest(), solved(dense, gradients[-1])) < 1e-11


@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("num_grads", [1, 5, 29, 30, 40])
def test_every_push_replaces_the_oldest_gradient(num_grads: int, divisor: str) -> None:
    gradients, x = draw(2 * num_grads + 7, 30), draw(30, seed=1)
    fisher = filled(gradients[:0], num_grads=num_grads, damping=0.01, divisor=divisor)
    for count in range(1, len(gradients) + 1):
        assert fisher.push(gradients[count - 1])
        rows, n = window(gradients[:count], num_grads, divisor)
        dense = oracle.matrix(rows, 0.01, n)
        assert relative(fisher.solve(x), solved(dense, x)) < 1e-11
        assert relative(fisher.solve_newest(), solved(dense, gradients[count - 1])) < 1e-11
        assert fisher.num_pushed == count


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 40),
    num_grads=st.integers(1, 30),
    filling=st.floats(0, 1),
    damping=st.sampled_from([0.01, 1.0]),
    divisor=st.sampled_from(DIVISORS),
    seed=st.integers(0, 2**31),
)
def test_published_forms_woodbury_and_push_through_agree(
    size: int, num_grads: int, filling: float, damping: float, divisor: str, seed: int
) -> None:
    gradients, x = draw(max(1, round(filling * num_grads)), size, seed=seed), draw(size, seed=seed + 1)
    rows, n = window(gradients, num_grads, divisor)
    options: dict[str, Any] = {"num_grads": num_grads, "damping": damping, "divisor": divisor}
    whole, one_block = filled(gradients, **options), filled(gradients, block_size=size, **options)
    v, q = oracle.static_form(rows, damping, n)
    d, b = oracle.triangles(rows, damping, n)
    assert relative(b @ rows, v) < 1e-10
    for vector in (x.numpy(), rows[-1]):
        expected = solved(oracle.matrix(rows, damping, n), torch.from_numpy(vector))
        for other in (
            oracle.static_solve(v, q, damping, vector),
            oracle.dynamic_solve(rows, d, b, damping, n, vector),
            oracle.woodbury(rows, damping, n, vector),
            whole.solve(torch.from_numpy(vector)),
            one_block.solve(torch.from_numpy(vector)),
            whole.static().solve(torch.from_numpy(vector)),
        ):
            assert relative(other, expected) < 1e-10
    for newest in (oracle.push_through(rows, damping, n, -1), whole.solve_newest(), one_block.solve_newest()):
        assert relative(newest, expected) < 1e-10


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 30), num_grads=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_the_inverse_is_symmetric_positive_and_between_its_bounds(size: int, num_grads: int, seed: int) -> None:
    damping, gradients = 0.05, draw(num_grads + 3, size, seed=seed)
    fisher = filled(gradients, num_grads=num_grads, damping=damping)
    inverse = fisher.solve(torch.eye(size, dtype=torch.float64))
    assert relative(inverse.mT, inverse) < 1e-12
    largest = float(torch.linalg.matrix_norm(gradients[-num_grads:], 2)) ** 2 / num_grads
    spectrum = torch.linalg.eigvalsh(inverse)
    assert spectrum.min() > (1 - 1e-9) / (damping + largest)
    assert spectrum.max() < (1 + 1e-9) / damping
    assert gradients[-1] @ fisher.solve_newest() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_no_gradient_has_seen_is_divided_by_the_damping(dtype: torch.dtype) -> None:
    gradients, x = draw(9, 20), draw(2, 20, seed=1)
    gradients[:, 12:] = 0
    x[:, :12] = 0
    fisher = InverseFisher(20, 6, 1e-3, dtype=dtype)
    exact: dict[str, Any] = {"rtol": 1e-15 if dtype == torch.float64 else 1e-7, "atol": 0}
    for gradient in (None, *gradients):
        assert gradient is None or fisher.push(gradient)
        torch.testing.assert_close(fisher.solve(x).double(), x / 1e-3, **exact)
    # nor has an empty window seen any
    full = draw(20, seed=2)
    torch.testing.assert_close(InverseFisher(20, 6, 1e-3, dtype=dtype).solve(full).double(), full / 1e-3, **exact)


@pytest.mark.parametrize("damping", [1e-8, 1e-3, 1.0, 1e6])
def test_one_gradient_has_its_closed_form(damping: float) -> None:
    gradients, x = draw(3, 50), draw(50, seed=1)
    fisher = filled(gradients, num_grads=1, damping=damping)
    g = gradients[-1]
    whole = damping + g @ g
    assert relative(fisher.solve_newest(), g / whole) < 1e-14
    assert relative(fisher.solve(x), (x - g * (g @ x) / whole) / damping) < 1e-13
    # by the number of gradients, or by the length of the window
    assert relative(filled(g[None], num_grads=8, damping=damping, divisor="count").solve_newest(), g / whole) < 1e-14
    expected = 8 * g / (8 * damping + g @ g)
    assert relative(filled(g[None], num_grads=8, damping=damping).solve_newest(), expected) < 1e-14


def test_the_order_of_gradients_and_duplicates_do_not_matter() -> None:
    gradients, x = draw(8, 20), draw(20, seed=1)
    options: dict[str, Any] = {"num_grads": 8, "damping": 0.01}
    expected = filled(gradients, **options).solve(x)
    for order in (gradients.flip(0), gradients.roll(3, 0), gradients[torch.randperm(8)]):
        fisher = filled(order, **options)
        assert relative(fisher.solve(x), expected) < 1e-11
        assert relative(fisher.solve_newest(), fisher.solve(order[-1])) < 1e-11
    # the slots that the last ones are in do not matter either
    assert relative(filled(torch.cat([draw(5, 20, seed=2), gradients]), **options).solve(x), expected) < 1e-11
    twice = torch.cat([gradients[:6], gradients[:1], gradients[:1]])
    longer = torch.cat([gradients[1:6], 3**0.5 * gradients[:1]])
    assert relative(filled(twice, **options).solve(x), filled(longer, **options).solve(x)) < 1e-11
    same = filled(gradients[:1].expand(8, -1), **options)
    assert relative(same.solve_newest(), gradients[0] / (0.01 + gradients[0] @ gradients[0])) < 1e-10


@pytest.mark.parametrize("c", [1e-6, 0.5, 1e6])
def test_scaled_gradients_and_damping_scale_the_solution(c: float) -> None:
    gradients, x = draw(12, 20), draw(20, seed=1)
    fisher = filled(gradients, num_grads=7, damping=0.01)
    scaled = filled(c * gradients, num_grads=7, damping=0.01 * c**2)
    assert relative(scaled.solve(c * x), fisher.solve(x) / c) < 1e-11
    assert relative(scaled.solve_newest(), fisher.solve_newest() / c) < 1e-11


@EXTENDED
@pytest.mark.parametrize(("norms", "tolerance"), [("steady", 1e-9), ("changing", 1e-7)])
@pytest.mark.parametrize("size", [100, 40])
def test_two_thousand_steps_do_not_drift(size: int, norms: str, tolerance: float) -> None:
    """Whatever is kept from step to step; also where gradients grow and shrink by a factor of 100 again and again."""
    num_grads, damping, x = 64, 1e-3, draw(size, seed=1)
    gradients = draw(2000, size)
    if norms == "changing":
        gradients *= 100 ** torch.sin(torch.arange(2000) / 60)[:, None]
    tolerances = {torch.float64: tolerance, torch.float32: 1e-4}
    windows = {dtype: InverseFisher(size, num_grads, damping, dtype=dtype) for dtype in tolerances}
    for count in range(1, 2001):
        for fisher in windows.values():
            assert fisher.push(gradients[count - 1])
        if count % 97 and count < 1998:
            continue
        for dtype, fisher in windows.items():
            rows, n = window(gradients[:count].to(dtype), num_grads)
            newest, other = oracle.precise(rows, damping, n), oracle.precise(rows, damping, n, x.numpy())
            assert relative(fisher.solve_newest(), newest) < tolerances[dtype]
            error = relative(fisher.solve(x), other)
            # huge gradients of all parameters leave a millionth of x/λ and less, of which its error is one
            left = np.linalg.norm(other) / float(x.norm() / damping) if norms == "changing" else 1.0
            assert error * left < (1e-9 if dtype == torch.float64 else 1e-4)


@EXTENDED
@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 30),
    num_grads=st.integers(1, 24),
    turns=st.floats(1, 4),
    damping=st.sampled_from([1e-8, 1e-5, 1e-2]),
    spread=st.sampled_from([0.0, 1.0, 2.0]),
    common=st.sampled_from([0.0, 10.0]),
    divisor=st.sampled_from(DIVISORS),
    seed=st.integers(0, 2**31),
)
def test_pushes_lose_no_more_digits_than_a_new_factorization(
    size: int, num_grads: int, turns: float, damping: float, spread: float, common: float, divisor: str, seed: int
) -> None:
    count = max(1, round(turns * num_grads))
    gradients = common * draw(size, seed=seed) + draw(count, size, seed=seed + 1)
    gradients *= 10 ** (spread * draw(count, 1, seed=seed + 2))
    rows, n = window(gradients, num_grads, divisor)
    condition = np.linalg.cond(rows @ rows.T + n * damping * np.eye(len(rows)))
    # beyond it there is no factorization in float64 to compare with
    assume(condition < 1e15)
    expected = oracle.precise(rows, damping, n)
    direct = relative(oracle.push_through(rows, damping, n, -1), expected)
    fisher = filled(gradients, num_grads=num_grads, damping=damping, divisor=divisor)
    assert relative(fisher.solve_newest(), expected) < 1e-13 + 100 * (direct + 1e-16 * condition)


@pytest.mark.parametrize(("noise", "lost"), [(1.0, 0.01), (0.3, 0.1)], ids=["independent", "alike"])
def test_single_precision_suffices_where_it_breaks_the_published_recursions(noise: float, lost: float) -> None:
    """Gradients of length 14 and a damping of 1e-6, as published for BERT: x/λ − ... cancels six digits and more."""
    size, num_grads, damping = 20_000, 256, 1e-6
    gradients = noise * draw(num_grads, size) + (noise < 1) * draw(size, seed=1)
    gradients = (14 * gradients / gradients.norm(dim=1, keepdim=True)).float()
    fisher = filled(gradients, num_grads=num_grads, damping=damping, dtype=torch.float32)
    rows, n = window(gradients, num_grads)
    expected = oracle.push_through(rows, damping, n, -1)
    assert relative(fisher.solve_newest(), expected) < 1e-5
    assert relative(fisher.solve(gradients[-1]), expected) < 1e-5
    single = gradients.numpy()
    published = oracle.dynamic_solve(single, *oracle.triangles(single, damping, n), damping, n, single[-1])
    assert published.dtype == np.float32
    # the other recursion loses less, the more of it is alike
    assert relative(published, expected) > lost
    static = oracle.static_solve(*oracle.static_form(single, damping, n), damping, single[-1])
    assert static.dtype == np.float32
    assert relative(static, expected) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_gradients_than_parameters_of_a_block_keep_single_precision(dtype: torch.dtype) -> None:
    """Weights of rows that depend on each other cancel each other."""
    gradients = draw(150, 64, scale=14 / 64**0.5).to(dtype)
    fisher = filled(gradients, num_grads=64, damping=1e-6, block_size=16, dtype=dtype)
    rows, n = window(gradients, 64)
    expected = solved(oracle.matrix(rows, 1e-6, n, 16), gradients[-1])
    assert relative(fisher.solve_newest(), expected) < 1e-5


@EXTENDED
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize(("size", "tolerance"), [(60, 1e-8), (12, 1e-6)])
def test_correlated_gradients_keep_their_digits(size: int, tolerance: float, noise: float) -> None:
    """Against elimination in extended precision; twelve parameters leave G Gᵀ singular but for the damping."""
    num_grads, damping = 16, 1e-8
    gradients = draw(size, seed=1) + noise * draw(2 * num_grads + 5, size)
    rows, n = window(gradients, num_grads)
    fisher = filled(gradients, num_grads=num_grads, damping=damping)
    assert relative(fisher.solve_newest(), oracle.precise(rows, damping, n)) < tolerance


@pytest.mark.parametrize("divisor", DIVISORS)
def test_large_and_small_damping_have_their_limits(divisor: str) -> None:
    gradients = draw(13, 40)
    largest = filled(gradients, num_grads=9, damping=1e9, divisor=divisor)
    assert relative(1e9 * largest.solve_newest(), gradients[-1]) < 1e-7
    assert relative(1e9 * largest.solve(gradients[0]), gradients[0]) < 1e-7
    # G u = m e
    kept, last = gradients[-9:], torch.eye(9, dtype=torch.float64)[-1]
    smallest = filled(gradients, num_grads=9, damping=1e-13, divisor=divisor)
    torch.testing.assert_close(kept @ smallest.solve_newest(), 9 * last, rtol=0, atol=1e-10)
    # G u = m (e − m λ K e)
    middle = filled(gradients, num_grads=9, damping=0.3, divisor=divisor)
    column = torch.linalg.solve(2.7 * torch.eye(9, dtype=torch.float64) + kept @ kept.mT, last)
    expected = 9 * (last - 2.7 * column)
    torch.testing.assert_close(kept @ middle.solve_newest(), expected, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 30),
    num_grads=st.integers(1, 30),
    turns=st.floats(0, 2.5),
    damping=st.sampled_from([1e-6, 0.1, 10.0]),
    divisor=st.sampled_from(DIVISORS),
    block_size=st.none() | st.integers(1, 35),
    seed=st.integers(0, 2**31),
)
def test_the_log_determinant_is_that_of_the_dense_matrix(
    size: int, num_grads: int, turns: float, damping: float, divisor: str, block_size: int | None, seed: int
) -> None:
    gradients = draw(round(turns * num_grads), size, seed=seed)
    options: dict[str, Any] = {"num_grads": num_grads, "damping": damping, "divisor": divisor}
    rows, n = window(gradients, num_grads, divisor)
    sign, expected = np.linalg.slogdet(oracle.matrix(rows, damping, n, block_size))
    assert sign == 1
    result = filled(gradients, block_size=block_size, **options).logdet()
    assert isinstance(result, float)
    # a relative error of an eigenvalue is an absolute one of its logarithm
    assert result == pytest.approx(expected, abs=1e-8, rel=1e-11)


@pytest.mark.parametrize("divisor", DIVISORS)
@pytest.mark.parametrize("count", [3, 10, 27])
@pytest.mark.parametrize("block_size", [None, 7])
def test_a_bfloat16_window_is_exact_for_the_rows_it_holds(block_size: int | None, count: int, divisor: str) -> None:
    gradients, x = draw(count, 25), draw(2, 25, seed=1)
    options: dict[str, Any] = {"num_grads": 10, "damping": 1e-3, "divisor": divisor, "block_size": block_size}
    fisher = filled(gradients, dtype=torch.bfloat16, **options)
    rounded = gradients.bfloat16()
    rows, n = window(rounded, 10, divisor)
    dense = oracle.matrix(rows, 1e-3, n, block_size)
    assert fisher.solve(x).dtype == fisher.solve_newest().dtype == torch.float32
    # all that is left is the rounding of the result, and of x
    assert relative(fisher.solve(x.float()), solved(dense, x.float())) < 1e-7
    assert relative(fisher.solve_newest(), solved(dense, rounded[-1])) < 1e-6
    assert fisher.logdet() == pytest.approx(np.linalg.slogdet(dense)[1], abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_zeros_are_inert(dtype: torch.dtype) -> None:
    fisher = filled(torch.zeros(3, 6), num_grads=4, damping=0.5, dtype=dtype)
    x = torch.ones(6)
    assert torch.equal(fisher.solve(x), torch.full((6,), 2.0, dtype=fisher.solve(x).dtype))
    assert torch.equal(fisher.solve_newest(), torch.zeros(6, dtype=fisher.solve(x).dtype))
    assert torch.equal(fisher.diagonal().double(), torch.full((6,), 2.0, dtype=torch.float64))
    assert fisher.logdet() == pytest.approx(6 * np.log(0.5))
    # they are counted
    half = filled(torch.stack([x, 0 * x]), num_grads=4, damping=0.5, dtype=dtype, divisor="count")
    assert relative(half.solve(x), x / (0.5 + 3)) < 1e-6
    assert not half.solve_newest().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e18, 1e-30])
def test_huge_and_tiny_gradients_have_finite_solutions(size: float, dtype: torch.dtype) -> None:
    gradients = draw(7, 30, scale=size)
    fisher = filled(gradients, num_grads=5, damping=1e-5, dtype=dtype)
    stored = gradients.to(dtype)
    # in units of the gradients, whose squares float32 does not hold
    expected = oracle.push_through(stored[-5:].double().numpy() / size, 1e-5 / size**2, 5, -1)
    assert relative(fisher.solve_newest().double() * size, expected) < 1e-6
    assert fisher.solve(torch.ones(30)).isfinite().all()
    # beside ordinary ones, and after they have left the window
    ordinary = draw(6, 30, seed=1)
    for gradient in ordinary:
        assert fisher.push(gradient)
        assert fisher.solve_newest().isfinite().all()
    rows, n = window(ordinary.to(dtype), 5)
    assert relative(fisher.solve_newest(), oracle.push_through(rows, 1e-5, n, -1)) < 1e-6


@pytest.mark.parametrize("block_size", [None, 3])
def test_gradients_that_are_not_finite_are_left_out_and_reported_once(block_size: int | None) -> None:
    gradients, x = draw(9, 8).float(), draw(8, seed=1)
    clean, fisher = (InverseFisher(8, 4, 0.1, block_size=block_size) for _ in range(2))
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for count, gradient in enumerate(gradients):
            broken = gradient.clone()
            broken[count % 8] = (float("nan"), float("inf"), -float("inf"))[count % 3]
            before = tensors(fisher)
            assert fisher.push(broken) is False
            assert (fisher.num_pushed, fisher.num_rejected) == (count, count + 1)
            assert all(torch.equal(*pair) for pair in zip(before, tensors(fisher), strict=True))
            assert torch.equal(fisher.solve(x), clean.solve(x))
            assert fisher.push(gradient) is True
            assert clean.push(gradient) is True
            assert torch.equal(fisher.solve(x), clean.solve(x))
            assert torch.equal(fisher.solve_newest(), clean.solve_newest())
    assert [warning.category for warning in said] == [RuntimeWarning]
    assert clean.num_rejected == 0


def test_gradients_that_overflow_the_window_are_left_out() -> None:
    double, single = torch.full((3,), 1e300, dtype=torch.float64), torch.full((3,), 3.4e38)
    for dtype, gradient in ((torch.float32, double), (torch.bfloat16, single)):
        fisher = InverseFisher(3, 2, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not fisher.push(gradient)
        assert fisher.solve(torch.ones(3)).isfinite().all()
