"""One property suite for every basis; a new one is a line in BASES."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_optim.bases import SVD, SubspaceIteration, resolve

BASES = [SVD, SubspaceIteration]
SIDES = ["left", "right", "both"]

dims = st.integers(1, 24)


def allocate(dtype):
    def new(shape, dtype_=None):
        return torch.zeros(tuple(shape), dtype=dtype_ or dtype)

    return new


def made(cls, m, n, rank, side, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(m, n, generator=generator, dtype=dtype) * scale
    basis = cls(min(rank, m, n), side)
    state = basis.init((m, n), allocate(dtype))
    basis.start_(state, grad)
    return basis, state, grad


def vectors(state, side):
    """Each stored basis with its vectors as columns."""
    if side == "left":
        return [state["basis"]]
    if side == "right":
        return [state["basis"].mT]
    return [state["basis"], state["basis_right"].mT]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("cls", BASES)
@given(m=dims, n=dims, rank=dims, power=st.integers(-20, 10))
@settings(max_examples=40, deadline=None)
def test_vectors_are_orthonormal_whatever_the_shape_and_scale(cls, side, m, n, rank, power):
    dtype = torch.float32
    basis, state, grad = made(cls, m, n, rank, side, dtype, scale=10.0**power)
    for _ in range(2):
        for v in vectors(state, side):
            gram = v.mT @ v
            torch.testing.assert_close(gram, torch.eye(v.size(1), dtype=dtype), rtol=0, atol=1e-5)
        basis.refresh_(state, grad)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("cls", BASES)
@given(m=dims, n=dims, rank=dims)
@settings(max_examples=25, deadline=None)
def test_shapes_sizes_and_the_projection(cls, side, m, n, rank):
    basis, state, grad = made(cls, m, n, rank, side)
    coords = basis.project(state, grad)
    assert coords.shape == basis.coords_shape((m, n))
    assert sum(t.numel() for t in state.values()) == basis.numel((m, n))
    left, right = basis.lift(state, coords)
    # lifting is a projector: applied twice it is itself, and it never lengthens
    once = left @ right
    twice_left, twice_right = basis.lift(state, basis.project(state, once))
    torch.testing.assert_close(twice_left @ twice_right, once, rtol=0, atol=1e-9)
    assert once.norm() <= grad.norm() * (1 + 1e-9)


@pytest.mark.parametrize("cls", BASES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(20, 9), (9, 20), (12, 12)])
def test_a_refresh_captures_what_the_svd_does(cls, side, shape):
    m, n = shape
    u, _, vh = torch.linalg.svd(torch.randn(m, n, dtype=torch.float64), full_matrices=False)
    spectrum = 0.5 ** torch.arange(min(m, n), dtype=torch.float64)
    grad = (u * spectrum) @ vh
    basis = cls(3, side)
    state = basis.init((m, n), allocate(torch.float64))
    basis.start_(state, grad)
    for _ in range(6):
        basis.refresh_(state, grad)
    captured = basis.project(state, grad).norm() ** 2
    torch.testing.assert_close(captured, spectrum[:3].square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("cls", BASES)
def test_full_rank_loses_nothing_of_a_square(cls, side):
    basis, state, grad = made(cls, 11, 11, 11, side)
    left, right = basis.lift(state, basis.project(state, grad))
    torch.testing.assert_close(left @ right, grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cls", BASES)
def test_the_start_is_repeatable_and_takes_nothing_from_the_global_generator(cls):
    before = torch.get_rng_state()
    _, one, _ = made(cls, 17, 8, 4, "right")
    _, two, _ = made(cls, 17, 8, 4, "right")
    assert torch.equal(one["basis"], two["basis"])
    assert torch.equal(before, torch.get_rng_state())


def test_subspace_iteration_moves_smoothly():
    """A gradient that hardly changes gives a basis that hardly changes: same vectors, same signs."""
    basis, state, grad = made(SubspaceIteration, 30, 12, 3, "right")
    for _ in range(60):
        basis.refresh_(state, grad)
    before = state["basis"].clone()
    basis.refresh_(state, grad + 1e-6 * torch.randn_like(grad))
    torch.testing.assert_close(state["basis"], before, rtol=0, atol=1e-4)


def test_a_basis_of_a_rank_deficient_gradient_is_still_orthonormal():
    grad = torch.ones(10, 6)
    basis = SubspaceIteration(4, "right")
    state = basis.init((10, 6), allocate(torch.float32))
    basis.start_(state, grad)
    torch.testing.assert_close(state["basis"] @ state["basis"].mT, torch.eye(4), rtol=0, atol=1e-5)


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
