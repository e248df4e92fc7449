"""The oracles of orthogonalization: a scalar polynomial on the singular values, and what follows from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_optim import orthogonalize
from lowrank_optim.coefficients import REGISTRY, table

TABLES = [name for name, entry in REGISTRY.items() if entry.normalization == "frobenius"]
METHODS = ["newton_schulz", "gram", "auto"]
SHAPES = [(12, 20), (20, 12), (16, 16), (1, 9), (9, 1), (1, 1), (7, 64)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]

dims = st.integers(1, 24)


def oracle(x, triples):
    """U p(S / ‖S‖) Vᵀ in float64."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    for a, b, c in triples:
        s = s * (a + b * s**2 + c * s**4)
    return (u * s.unsqueeze(-2)) @ vh


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stress(m, n):
    """The five spectra on which Gram forms fail: Gaussian, logarithmic to 1e-3 and to 1e-5, of rank 10, two spikes."""
    k = min(m, n)
    u, _ = torch.linalg.qr(gaussian(m, k, seed=1))
    v, _ = torch.linalg.qr(gaussian(n, k, seed=2))
    spikes = torch.full((k,), 1e-3, dtype=torch.float64)
    spikes[:2] = 1
    spectra = {
        "to 1e-3": torch.logspace(0, -3, k, dtype=torch.float64),
        "to 1e-5": torch.logspace(0, -5, k, dtype=torch.float64),
        "rank 10": (torch.arange(k) < 10).double(),
        "spikes": spikes,
    }
    return {"gaussian": gaussian(m, n), **{name: (u * s) @ v.mT for name, s in spectra.items()}}


def one_sided(m, n):
    """Gradients with one dominant direction, on which unsafe coefficients climb."""
    one_hot = torch.zeros(m, n, dtype=torch.float64)
    one_hot[m // 2, n // 3] = -3
    row = 0.01 * gaussian(m, n, seed=3)
    row[1] += gaussian(n, seed=4)
    rank_one = gaussian(m, 1, seed=5) @ gaussian(1, n, seed=6)
    noisy = rank_one + 0.01 * gaussian(m, n, seed=7)
    return {"rank one": rank_one, "one-hot": one_hot, "dominant row": row, "with noise": noisy}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_is_the_polynomial_of_the_singular_values(name, method, shape):
    x = gaussian(*shape)
    assert error(orthogonalize(x, method=method, coefficients=name), oracle(x, table(name))) < 1e-11


@pytest.mark.parametrize("shape", [(96, 160), (40, 300), (200, 80)])
@pytest.mark.parametrize("name", TABLES)
def test_float32_is_the_polynomial_of_the_singular_values(name, shape):
    x = gaussian(*shape)
    for method, bound in (("newton_schulz", 1e-5), ("gram", 1e-4)):
        assert error(orthogonalize(x.float(), method=method, coefficients=name), oracle(x, table(name))) < bound


@given(m=dims, n=dims, seed=st.integers(0, 9), method=st.sampled_from(METHODS), name=st.sampled_from(TABLES))
@settings(max_examples=60, deadline=None)
def test_any_shape(m, n, seed, method, name):
    x = gaussian(m, n, seed=seed)
    assert error(orthogonalize(x, method=method, coefficients=name), oracle(x, table(name))) < 1e-9


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", TABLES)
def test_half_precision_on_gaussians(name, dtype, bound):
    x = gaussian(64, 128).to(dtype)
    assert error(orthogonalize(x, method="newton_schulz", coefficients=name), oracle(x, table(name))) < bound


@pytest.mark.parametrize("shape", [(64, 256), (512, 600)])
@pytest.mark.parametrize("name", TABLES)
def test_gram_loses_at_most_twice_what_the_standard_form_loses(name, shape):
    for kind, x in stress(*shape).items():
        x = x.bfloat16()
        wanted = oracle(x, table(name))
        standard, gram = (
            error(orthogonalize(x, method=method, coefficients=name), wanted) for method in ("newton_schulz", "gram")
        )
        assert gram <= 2 * standard, kind


@pytest.mark.parametrize("name", TABLES)
def test_gram_in_float16(name):
    for kind, x in stress(32, 128).items():
        x = x.half()
        wanted = oracle(x, table(name))
        standard, gram = (
            error(orthogonalize(x, method=method, coefficients=name), wanted) for method in ("newton_schulz", "gram")
        )
        assert gram <= 2 * standard, kind


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_eigh_is_the_polar_factor(shape):
    x = gaussian(*shape)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    assert error(orthogonalize(x, method="eigh"), u @ vh) < 1e-10


def test_eigh_of_a_matrix_of_low_rank():
    x = gaussian(20, 3, seed=1) @ gaussian(3, 30, seed=2)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    assert error(orthogonalize(x, method="eigh"), u[:, :3] @ vh[:3]) < 1e-8


@pytest.mark.parametrize("method", [*METHODS, "eigh"])
def test_equivariance(method):
    g = gaussian(20, 33)
    u, _ = torch.linalg.qr(gaussian(20, 20, seed=1))
    v, _ = torch.linalg.qr(gaussian(33, 33, seed=2))

    def ns(x):
        return orthogonalize(x, method=method)

    torch.testing.assert_close(ns(u @ g @ v), u @ ns(g) @ v, rtol=0, atol=1e-10)
    torch.testing.assert_close(ns(g.mT), ns(g).mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(ns(-g), -ns(g), rtol=0, atol=0)
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ns(g[rows]), ns(g)[rows], rtol=0, atol=1e-10)
    padded = torch.zeros(23, 36, dtype=torch.float64)
    padded[:20, :33] = g
    wanted = torch.zeros_like(padded)
    wanted[:20, :33] = ns(g)
    torch.testing.assert_close(ns(padded), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [*METHODS, "eigh"])
def test_scale_does_not_matter(method, dtype):
    x = gaussian(12, 20)
    x = (x / x.norm()).to(dtype)
    base = orthogonalize(x, method=method)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2}[dtype]
    for scale in (1e-20, 1e-9, 1e-3, 1e5, 1e15):
        torch.testing.assert_close(orthogonalize(x * scale, method=method), base, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("method", [*METHODS, "eigh"])
def test_zero_makes_zero_and_nothing_overflows(method, dtype):
    zero = torch.zeros(6, 9, dtype=dtype)
    assert torch.equal(orthogonalize(zero, method=method), zero)
    large = torch.full((40, 60), 3e2 if dtype == torch.float16 else 1e15, dtype=dtype)
    assert orthogonalize(large, method=method).isfinite().all()
    huge = gaussian(40, 60).mul(2e3).clamp(-6e4, 6e4).half()
    assert huge.float().norm() > 9e4
    assert orthogonalize(huge, method=method).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(REGISTRY))
def test_the_direction_is_never_uphill(name, method, dtype):
    for kind, x in one_sided(16, 48).items():
        x = x.to(dtype)
        made = orthogonalize(x, method=method, coefficients=name).double()
        nuclear = torch.linalg.svdvals(x.double()).sum()
        assert (made * x.double()).sum() > 0.4 * nuclear, kind


@pytest.mark.parametrize("method", [*METHODS, "eigh"])
@pytest.mark.parametrize("shape", [(10, 30), (30, 10), (12, 12)])
def test_stacked_is_looped(method, shape):
    x = gaussian(2, 3, *shape)
    made = orthogonalize(x, method=method)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(made[i, j], orthogonalize(x[i, j], method=method), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("method", [*METHODS, "eigh"])
def test_the_input_is_neither_written_nor_shared(method, dtype):
    for x in (gaussian(6, 9), gaussian(9, 6).mT, gaussian(12, 18)[::2, ::2]):
        x = x.to(dtype)
        kept = x.clone()
        made = orthogonalize(x, method=method)
        made.zero_()
        assert torch.equal(x, kept)
        assert made.dtype == dtype
        assert made.shape == x.shape


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 5), (3, 0, 5)])
def test_empty_dimensions(shape):
    assert orthogonalize(torch.zeros(shape)).shape == shape


def test_autocast_and_graphs_are_left_alone():
    x = gaussian(16, 40).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = orthogonalize(x)
    assert made.dtype == torch.float32
    assert not made.requires_grad
    assert error(made, oracle(x.detach(), table("you"))) < 1e-4


def test_bad_input():
    with pytest.raises(TypeError, match="real"):
        orthogonalize(torch.zeros(3, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="int64"):
        orthogonalize(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="two dimensions"):
        orthogonalize(torch.zeros(3))
    with pytest.raises(ValueError, match="Invalid steps: 0"):
        orthogonalize(torch.zeros(3, 3), steps=0)
    with pytest.raises(ValueError, match="Invalid method: 'qr'"):
        orthogonalize(torch.zeros(3, 3), method="qr")
    with pytest.raises(ValueError, match="Invalid eps: -1"):
        orthogonalize(torch.zeros(3, 3), eps=-1)
    with pytest.raises(ValueError, match="Invalid coefficients: 'nobody'"):
        orthogonalize(torch.zeros(3, 3), coefficients="nobody")


def test_a_floor_for_the_norm_as_in_torch():
    x = 1e-9 * gaussian(8, 12)
    made = orthogonalize(x, method="newton_schulz", eps=1e-7)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / 1e-7
    for a, b, c in table("you"):
        s = s * (a + b * s**2 + c * s**4)
    torch.testing.assert_close(made, (u * s) @ vh, rtol=0, atol=1e-12)
