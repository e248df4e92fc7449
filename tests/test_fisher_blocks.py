"""Elements, blocks, the static form, state, offloading, memory and errors of the inverse empirical Fisher matrix."""

import io
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_optim import InverseFisher
from tests.reference import fisher_numpy as oracle

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
DIVISORS = ["window", "count"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(gradients: Tensor, *, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    fisher = InverseFisher(gradients.size(1), dtype=dtype, **options)
    for gradient in gradients:
        assert fisher.push(gradient)
    return fisher


def inverse(
    gradients: Tensor, *, num_grads: int, damping: float, divisor: str = "window", block_size: int | None = None
) -> Tensor:
    """Return the dense inverse for the gradients that are in the window."""
    rows = gradients[-num_grads:].double().numpy()
    n = max(1, len(rows)) if divisor == "count" else num_grads
    return torch.from_numpy(np.linalg.inv(oracle.matrix(rows, damping, n, block_size)))


def relative(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def elements(form: Any, size: int) -> Tensor:
    return torch.tensor([[form.element(i, j) for j in range(size)] for i in range(size)], dtype=torch.float64)


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 14),
    num_grads=st.integers(1, 16),
    turns=st.floats(0, 2.5),
    damping=st.sampled_from([0.01, 1.0]),
    divisor=st.sampled_from(DIVISORS),
    block_size=st.none() | st.integers(1, 16),
    seed=st.integers(0, 2**31),
)
def test_elements_diagonal_and_solutions_are_those_of_the_dense_inverse(
    size: int, num_grads: int, turns: float, damping: float, divisor: str, block_size: int | None, seed: int
) -> None:
    gradients, x = draw(round(turns * num_grads), size, seed=seed), draw(2, size, seed=seed + 1)
    options: dict[str, Any] = {"num_grads": num_grads, "damping": damping, "divisor": divisor, "block_size": block_size}
    fisher, expected = filled(gradients, **options), inverse(gradients, **options)
    for form in (fisher, fisher.static()):
        assert relative(form.diagonal(), expected.diag()) < 1e-10
        assert relative(elements(form, size), expected) < 1e-10
        assert relative(form.solve(x), x @ expected) < 1e-10
        assert relative(form.solve(x[0]), x[0] @ expected) < 1e-10
    if len(gradients):
        assert relative(fisher.solve_newest(), gradients[-1] @ expected) < 1e-10


def test_elements_are_numbered_as_in_a_list() -> None:
    fisher = filled(draw(5, 7), num_grads=3, damping=0.1, block_size=3)
    for form in (fisher, fisher.static()):
        assert isinstance(form.element(0, 1), float)
        assert form.element(-1, -1) == form.element(6, 6)
        assert form.element(-7, 2) == form.element(0, 2)
        assert form.element(1, 2) == pytest.approx(form.element(2, 1), rel=1e-12)
        assert form.element(2, 3) == form.element(-1, 0) == 0
        for i, j in ((7, 0), (0, 7), (-8, 0), (0, -8), (6, 70)):
            with pytest.raises(IndexError):
                form.element(i, j)


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 40),
    block_size=st.integers(1, 45),
    num_grads=st.integers(1, 12),
    count=st.integers(1, 30),
    divisor=st.sampled_from(DIVISORS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_each_block_is_a_matrix_of_its_own(
    size: int, block_size: int, num_grads: int, count: int, divisor: str, dtype: torch.dtype, seed: int
) -> None:
    gradients, x = draw(count, size, seed=seed), draw(2, size, seed=seed + 1)
    options: dict[str, Any] = {"num_grads": num_grads, "damping": 0.05, "divisor": divisor, "dtype": dtype}
    fisher = filled(gradients, block_size=block_size, **options)
    starts = range(0, size, block_size)
    parts = [filled(gradients[:, start : start + block_size], **options) for start in starts]
    solutions = [part.solve(x[:, start : start + block_size]) for part, start in zip(parts, starts, strict=True)]
    tolerance = 1e-11 if dtype == torch.float64 else 1e-6
    assert relative(fisher.solve(x), torch.cat(solutions, -1).double()) < tolerance
    assert relative(fisher.solve_newest(), torch.cat([part.solve_newest() for part in parts]).double()) < tolerance
    assert relative(fisher.diagonal(), torch.cat([part.diagonal() for part in parts]).double()) < tolerance
    assert fisher.logdet() == pytest.approx(sum(part.logdet() for part in parts), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("count", [0, 2, 13])
def test_the_static_form_stays_as_it_was(count: int, block_size: int | None) -> None:
    gradients, x = draw(20, 10), draw(10, seed=1)
    options: dict[str, Any] = {"num_grads": 6, "damping": 0.1, "block_size": block_size}
    fisher = filled(gradients[:count], **options)
    form, expected = fisher.static(), inverse(gradients[:count], **options)
    before = fisher.solve(x)
    for gradient in gradients[count:]:
        fisher.push(gradient)
    assert relative(form.solve(x), x @ expected) < 1e-11
    assert relative(before, x @ expected) < 1e-11
    assert relative(form.diagonal(), expected.diag()) < 1e-11
    with pytest.raises(ValueError, match=r"(?s)(?=.*\b10\b)(?=.*\b11\b)"):
        form.solve(torch.ones(11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [None, 30])
def test_the_static_form_of_a_short_window_is_as_precise(block_size: int | None, dtype: torch.dtype) -> None:
    gradients, x = draw(25, 100), draw(3, 100, seed=1).float()
    options: dict[str, Any] = {"num_grads": 20, "damping": 1e-4, "block_size": block_size}
    fisher = filled(gradients, dtype=dtype, **options)
    expected = inverse(gradients.to(dtype), **options)
    for form in (fisher, fisher.static()):
        assert form.solve(x).dtype == torch.float32
        assert relative(form.solve(x), x.double() @ expected) < 1e-6
        assert relative(form.diagonal(), expected.diag()) < 1e-6
        found = torch.tensor([form.element(i, i + 1) for i in range(99)])
        assert relative(found, expected.diagonal(1)) < 1e-6


# --- what the others make up for


def dense_compensation(fisher_matrix: Tensor, change: Tensor, free: Tensor) -> Tensor:
    """Return −F_QQ⁻¹ F_QP δ_P at the free, Q, and zero at the others, P."""
    result = torch.zeros_like(change)
    given = fisher_matrix[free][:, ~free] @ change[~free]
    result[free] = -torch.linalg.solve(fisher_matrix[free][:, free], given)
    return result


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 14),
    num_grads=st.integers(1, 16),
    turns=st.floats(0, 2.5),
    damping=st.sampled_from([0.01, 1.0]),
    divisor=st.sampled_from(DIVISORS),
    block_size=st.none() | st.integers(1, 16),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_the_free_compensate_as_in_the_dense_matrix(
    size: int,
    num_grads: int,
    turns: float,
    damping: float,
    divisor: str,
    block_size: int | None,
    share: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    gradients, change = draw(round(turns * num_grads), size, seed=seed), draw(size, seed=seed + 1)
    free = draw(size, seed=seed + 2).argsort() < round(share * size)
    options: dict[str, Any] = {"num_grads": num_grads, "damping": damping, "divisor": divisor, "block_size": block_size}
    fisher = filled(gradients, dtype=dtype, **options)
    # of the stored rows, whatever their dtype
    rows = gradients[-num_grads:].to(dtype).double().numpy()
    n = max(1, len(rows)) if divisor == "count" else num_grads
    whole = torch.from_numpy(oracle.matrix(rows, damping, n, block_size))
    found, expected = fisher.compensate(change, free), dense_compensation(whole, change, free)
    assert found.dtype == torch.float64
    assert found.shape == (size,)
    assert (found[~free] == 0).all()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    # no other change of the free makes ½δᵀFδ less: F says nothing of them
    both = torch.where(free, found, change)
    torch.testing.assert_close(
        (whole @ both)[free], torch.zeros(int(free.sum()), dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_compensation_keeps_its_digits_where_the_damping_is_tiny() -> None:
    # the same numbers in both: where one of them changes the other takes it back, to within the damping
    gradients = draw(6, 10).repeat(1, 2)
    fisher = filled(gradients, num_grads=6, damping=1e-13)
    free = torch.arange(20) >= 10
    found = fisher.compensate(draw(20, seed=1), free)
    torch.testing.assert_close(gradients @ torch.where(free, found, draw(20, seed=1)), torch.zeros(6).double())


@pytest.mark.parametrize("block_size", [None, 5])
def test_only_the_change_of_what_is_not_free_is_read(block_size: int | None) -> None:
    fisher = filled(draw(7, 12), num_grads=5, damping=0.1, block_size=block_size)
    change, free = draw(12, seed=1), draw(12, seed=2) > 0
    before, kept = change.clone(), free.clone()
    found = fisher.compensate(change, free)
    assert torch.equal(change, before)
    assert torch.equal(free, kept)
    assert torch.equal(fisher.compensate(change.masked_fill(free, torch.nan), free), found)
    assert torch.equal(
        fisher.compensate(change.float().requires_grad_(), free), fisher.compensate(change.float(), free)
    )
    assert not fisher.compensate(change.requires_grad_(), free).requires_grad


@pytest.mark.parametrize("count", [0, 3, 7])
@pytest.mark.parametrize("block_size", [None, 5])
def test_where_all_or_none_are_free_nothing_changes(block_size: int | None, count: int) -> None:
    fisher = filled(draw(7, 12)[:count], num_grads=5, damping=0.1, block_size=block_size)
    for free in (torch.ones(12, dtype=torch.bool), torch.zeros(12, dtype=torch.bool)):
        assert torch.equal(fisher.compensate(draw(12, seed=1), free), torch.zeros(12, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [None, 7])
def test_an_offloaded_window_compensates_alike(block_size: int | None, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"num_grads": 6, "damping": 1e-3, "block_size": block_size, "dtype": dtype}
    change, free = draw(24, seed=1), draw(24, seed=2) > 0
    one, other = (filled(draw(9, 24), offload=offload, **options) for offload in (False, True))
    assert torch.equal(one.compensate(change, free), other.compensate(change, free))


def test_what_cannot_be_compensated_is_refused() -> None:
    fisher = filled(draw(3, 5), num_grads=2, damping=0.1)
    for free in (
        torch.ones(4, dtype=torch.bool),
        torch.ones(1, 5, dtype=torch.bool),
        torch.ones(5),
        torch.ones(5).int(),
    ):
        with pytest.raises(ValueError, match=r"Invalid free: torch\.\w+ of shape .*, must be torch\.bool, \(5,\)"):
            fisher.compensate(torch.ones(5), free)


def test_a_change_of_another_shape_is_refused() -> None:
    fisher = filled(draw(3, 5), num_grads=2, damping=0.1)
    for change in (torch.ones(4), torch.ones(6), torch.ones(1), torch.ones(2, 5), torch.ones(())):
        with pytest.raises(ValueError, match="5"):
            fisher.compensate(change, torch.ones(5, dtype=torch.bool))


# --- what goes in and comes out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_and_vectors_of_all_dtypes_are_taken(given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    gradients, x = draw(7, 12).to(given_dtype), draw(12, seed=1).to(given_dtype)
    fisher = filled(gradients, num_grads=5, damping=0.1, dtype=dtype)
    expected = inverse(gradients.to(dtype), num_grads=5, damping=0.1)
    solution = fisher.solve(x)
    assert solution.dtype == fisher.solve_newest().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(solution, x.double() @ expected) < 1e-6
    assert relative(fisher.solve_newest(), gradients[-1].to(dtype).double() @ expected) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [None, 5, 12])
def test_nothing_is_shared_with_what_goes_in_and_comes_out(block_size: int | None, dtype: torch.dtype) -> None:
    gradients, x = draw(7, 12).to(dtype), nn.Parameter(draw(2, 12, seed=1).to(dtype))
    fisher = InverseFisher(12, 5, 0.1, block_size=block_size, dtype=dtype)
    for gradient in gradients:
        own = nn.Parameter(gradient.clone())
        fisher.push(own)
        with torch.no_grad():
            own.fill_(7)
    expected = inverse(gradients, num_grads=5, damping=0.1, block_size=block_size)
    kept = x.detach().clone()
    for _ in range(2):
        results = (fisher.solve(x), fisher.solve_newest(), fisher.diagonal())
        assert relative(results[0], kept.double() @ expected) < 1e-6
        assert relative(results[1], gradients[-1].double() @ expected) < 1e-6
        assert relative(results[2], expected.diag()) < 1e-6
        for result in results:
            assert not result.requires_grad
            result.fill_(7)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("block_size", [None, 5])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_a_batch_is_solved_as_its_vectors_are(batch: int, block_size: int | None) -> None:
    fisher = filled(draw(7, 12), num_grads=5, damping=0.1, block_size=block_size)
    x = draw(12, batch, seed=1).mT
    result = fisher.solve(x)
    assert result.shape == (batch, 12)
    for vector, solution in zip(x, result, strict=True):
        torch.testing.assert_close(solution, fisher.solve(vector), rtol=1e-12, atol=1e-12)
        assert fisher.solve(vector).shape == (12,)


# --- state


def answers(fisher: Any, x: Tensor) -> list[Tensor]:
    return [fisher.solve(x), fisher.solve_newest(), fisher.diagonal(), torch.tensor(fisher.logdet())]


def continue_alike(one: Any, other: Any, gradients: Tensor) -> None:
    """Assert that both answer the same, bit for bit, now and after each gradient."""
    x = draw(gradients.size(1), seed=9)
    for gradient in (None, *gradients):
        for fisher in (one, other):
            assert gradient is None or fisher.push(gradient)
        assert (one.num_pushed, one.num_rejected) == (other.num_pushed, other.num_rejected)
        assert all(torch.equal(*pair) for pair in zip(answers(one, x), answers(other, x), strict=True))
    have, want = one.state_dict(), other.state_dict()
    assert have.keys() == want.keys()
    for key, value in have.items():
        assert torch.equal(value, want[key]) if isinstance(value, Tensor) else value == want[key]


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("count", [3, 6, 21])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divisor": "count", "dtype": torch.float64},
        {"block_size": 7, "dtype": torch.bfloat16},
        {"offload": True, "block_size": 8},
    ],
    ids=["whole", "count", "blocks", "offloaded"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_loaded_state_continues_bit_for_bit(options: dict[str, Any], count: int, asked: bool) -> None:
    gradients = draw(count + 15, 24)
    fisher = InverseFisher(24, 6, 1e-3, **options)
    for gradient in gradients[:count]:
        fisher.push(gradient)
        # what is computed when asked must not be what it goes on from
        if asked:
            answers(fisher, gradient)
            fisher.static()
    fisher.push(torch.full((24,), float("nan")))
    file = io.BytesIO()
    torch.save(fisher.state_dict(), file)
    file.seek(0)
    other = InverseFisher(24, 6, 1e-3, **options)
    # a state is replaced, not added to
    other.push(torch.ones(24))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.num_pushed, other.num_rejected) == (count, 1)
    continue_alike(fisher, other, gradients[count:])


def test_an_empty_window_can_be_saved() -> None:
    other = filled(draw(3, 5), num_grads=2, damping=0.1)
    other.load_state_dict(InverseFisher(5, 2, 0.1, dtype=torch.float64).state_dict())
    assert other.num_pushed == 0
    with pytest.raises(RuntimeError):
        other.solve_newest()
    torch.testing.assert_close(other.solve(torch.ones(5)), torch.full((5,), 10.0, dtype=torch.float64))


def test_a_loaded_state_is_a_copy() -> None:
    one = filled(draw(9, 5), num_grads=4, damping=0.1)
    other = InverseFisher(5, 4, 0.1, dtype=torch.float64)
    other.load_state_dict(one.state_dict())
    x = draw(5, seed=9)
    before = answers(one, x)
    for gradient in draw(3, 5, seed=2):
        other.push(gradient)
    assert all(torch.equal(*pair) for pair in zip(before, answers(one, x), strict=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_params", {"num_params": 11}),
        ("num_params", {"num_params": 13}),
        ("num_grads", {"num_grads": 5}),
        ("block", {"block_size": None}),
        ("block", {"block_size": 4}),
        ("dtype|bfloat16", {"dtype": torch.bfloat16}),
        ("dtype|float64", {"dtype": torch.float64}),
    ],
)
def test_a_state_of_another_window_is_refused(name: str, options: dict[str, Any]) -> None:
    own: dict[str, Any] = {"num_params": 12, "num_grads": 6, "damping": 0.1, "block_size": 5}
    state = InverseFisher(**own | options).state_dict()
    fisher = filled(draw(8, 12), dtype=torch.float32, **{key: own[key] for key in own if key != "num_params"})
    before = answers(fisher, torch.ones(12))
    with pytest.raises(ValueError, match=name):
        fisher.load_state_dict(state)
    assert all(torch.equal(*pair) for pair in zip(before, answers(fisher, torch.ones(12)), strict=True))


# --- memory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [None, 7])
def test_an_offloaded_window_gives_the_same_bits(block_size: int | None, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"num_grads": 6, "damping": 1e-3, "block_size": block_size, "dtype": dtype}
    one, other = InverseFisher(24, **options), InverseFisher(24, offload=True, **options)
    gradients = draw(30, 24)
    for gradient in gradients[:15]:
        one.push(gradient)
        other.push(gradient)
    continue_alike(one, other, gradients[15:])
    x = draw(2, 24, seed=3)
    assert torch.equal(one.static().solve(x), other.static().solve(x))
    # one can go on from the other
    one.load_state_dict(other.state_dict())
    continue_alike(one, other, gradients)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 60),
    num_grads=st.integers(1, 20),
    block_size=st.none() | st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    offload=st.booleans(),
)
def test_bytes_are_those_of_the_formula_and_of_the_state(
    size: int, num_grads: int, block_size: int | None, dtype: torch.dtype, offload: bool
) -> None:
    fisher = InverseFisher(size, num_grads, block_size=block_size, dtype=dtype, offload=offload)
    width = min(block_size or size, size)
    blocks = -(-size // width)
    expected = blocks * num_grads * width * dtype.itemsize + 16 * blocks * num_grads**2 + 16
    for _ in range(2):
        assert fisher.nbytes == expected
        kept = [value.nbytes for value in fisher.state_dict().values() if isinstance(value, Tensor)]
        # the counters may be plain numbers there
        assert sum(kept) in (expected, expected - 16)
        fisher.push(torch.ones(size))
        fisher.solve_newest()


class NothingRuns(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} ran")


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "block_size"),
    # of the last, it is the products of gradients that are too many
    [(10**12, None), (10**12, 1000), (10**5, 1)],
)
def test_what_is_larger_than_memory_is_refused_before_anything_is_allocated(
    size: int, block_size: int | None, dtype: torch.dtype, offload: bool
) -> None:
    with NothingRuns(), pytest.raises(MemoryError) as refused:
        InverseFisher(size, block_size=block_size, dtype=dtype, offload=offload)
    needed = max(int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", str(refused.value)))
    assert needed >= 1024 * size * (dtype.itemsize if block_size != 1 else 16 * 1024)


# --- errors


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("num_params", {"num_params": 0}),
        ("num_params", {"num_params": -3}),
        ("num_grads", {"num_grads": 0}),
        ("num_grads", {"num_grads": -1}),
        ("damping", {"damping": 0.0}),
        ("damping", {"damping": -1e-5}),
        ("damping", {"damping": float("nan")}),
        ("damping", {"damping": float("inf")}),
        ("block_size", {"block_size": 0}),
        ("block_size", {"block_size": -2}),
        ("divisor", {"divisor": "mean"}),
        ("dtype", {"dtype": torch.float16}),
        ("dtype", {"dtype": torch.int32}),
        ("dtype", {"dtype": torch.complex64}),
    ],
)
def test_arguments_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=name):
        InverseFisher(**{"num_params": 4, "num_grads": 2} | options)


@pytest.mark.parametrize("shape", [(11,), (13,), (1, 12), (12, 1), (), (0,), (3, 4)])
def test_gradients_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    fisher = filled(draw(3, 12), num_grads=2, damping=0.1)
    before = answers(fisher, torch.ones(12))
    with pytest.raises(ValueError, match=r"\b12\b") as refused:
        fisher.push(torch.ones(shape))
    assert all(str(length) in str(refused.value) for length in shape)
    assert (fisher.num_pushed, fisher.num_rejected) == (3, 0)
    assert all(torch.equal(*pair) for pair in zip(before, answers(fisher, torch.ones(12)), strict=True))


@pytest.mark.parametrize("shape", [(11,), (13,), (2, 11), (12, 2), (1, 1, 12), (), (0,)])
def test_vectors_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    fisher = filled(draw(3, 12), num_grads=2, damping=0.1)
    for form in (fisher, fisher.static()):
        with pytest.raises(ValueError, match=r"\b12\b") as refused:
            form.solve(torch.ones(shape))
        assert all(str(length) in str(refused.value) for length in shape)


@pytest.mark.parametrize("block_size", [None, 3])
def test_an_empty_window_has_no_newest_gradient(block_size: int | None) -> None:
    fisher = InverseFisher(5, 3, block_size=block_size)
    with pytest.raises(RuntimeError):
        fisher.solve_newest()
    # nor after one that was left out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fisher.push(torch.full((5,), float("nan")))
    with pytest.raises(RuntimeError):
        fisher.solve_newest()
