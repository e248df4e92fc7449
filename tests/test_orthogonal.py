"""The oracles of orthogonalization: a scalar polynomial on the singular values, and what follows from it."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_optim import orthogonalize
from lowrank_optim.coefficients import REGISTRY, preconditioned, table
from lowrank_optim.orthogonal import Plan, Spectral, plan, run
from lowrank_optim.reference_matrix import Halves, Whole, gram_newton_schulz, newton_schulz

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


@functools.cache
def alike(m, n):
    """Matrices of one direction, or two, with entries that are alike: what rounding does to them adds up."""
    generator = torch.Generator().manual_seed(8)
    column, row = (0.1 + torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((m, 1), (1, n)))
    blocks = torch.zeros(m, n, dtype=torch.float64)
    blocks[: m // 2, : n // 2] = 1
    blocks[m // 2 :, n // 2 :] = 1
    return {
        "ones": torch.ones(m, n, dtype=torch.float64),
        "positive rank one": column @ row,
        "signs": gaussian(m, 1, seed=9).sign() @ gaussian(1, n, seed=10).sign(),
        "blocks": blocks,
        "mean and noise": torch.ones(m, n, dtype=torch.float64) + 0.01 * gaussian(m, n, seed=11),
        **one_sided(m, n),
    }


@functools.cache
def nuclear_norms(m, n):
    return {kind: torch.linalg.svdvals(x).sum() for kind, x in alike(m, n).items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(REGISTRY))
def test_rounding_that_adds_up_leaves_the_output_range_and_the_direction(name, method):
    """Five steps of a Gram form in one group, its iteration in float32 or not, turn some of these around."""
    for shape in ((64, 128), (73, 292), (330, 163), (118, 472), (520, 930)):
        for kind, x in alike(*shape).items():
            made = orthogonalize(x.bfloat16(), method=method, coefficients=name).double()
            assert torch.linalg.matrix_norm(made.float(), 2) < 1.05 * REGISTRY[name].output_range[1], (kind, shape)
            assert (made * x).sum() > 0.5 * nuclear_norms(*shape)[kind], (kind, shape)


@pytest.mark.parametrize("name", TABLES)
def test_gram_in_float32_on_the_stress_spectra(name):
    for kind, x in stress(96, 160).items():
        x = x.float()
        wanted = oracle(x, table(name))
        standard, gram = (
            error(orthogonalize(x, method=method, coefficients=name), wanted) for method in ("newton_schulz", "gram")
        )
        assert gram <= 3 * standard, kind


@given(
    b=st.integers(1, 3),
    short=st.integers(2, 24),
    more=st.integers(0, 12),
    tall=st.booleans(),
    name=st.sampled_from(["jordan", "you", "polar_express"]),
)
@settings(max_examples=60, deadline=None)
def test_halves_are_wholes(b, short, more, tall, name):
    x = gaussian(b, short, short + more)
    x = (x / torch.linalg.matrix_norm(x, keepdim=True)).mT.contiguous() if tall else x / x.norm()
    triples = table(name)
    for halves, whole in (
        (newton_schulz(x, triples, Halves()), newton_schulz(x, triples, Whole())),
        *((gram_newton_schulz(x, triples, r, Halves()), gram_newton_schulz(x, triples, r, Whole())) for r in [(1, 3)]),
    ):
        assert halves.shape == x.shape
        torch.testing.assert_close(halves, whole, rtol=0, atol=1e-9)


def test_large_matrices_are_stacked_too():
    x = gaussian(3, 512, 520).float()
    made = orthogonalize(x, coefficients="jordan", steps=2)
    for one, matrix in zip(made, x, strict=True):
        assert error(one, oracle(matrix, table("jordan", 2))) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (3, 2, 8, 8)])
def test_turbo_scales_the_short_side_first(method, shape):
    x = gaussian(*shape)
    g = x / torch.linalg.matrix_norm(x, keepdim=True)
    rows = g.mT if shape[-2] > shape[-1] else g
    rows = rows / (rows @ rows.mT).abs().sum(-1, keepdim=True).sqrt()
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    assert s.max() <= 1 + 1e-12
    for a, b, c in table("turbo"):
        s = s * (a + b * s**2 + c * s**4)
    wanted = (u * s.unsqueeze(-2)) @ vh
    wanted = wanted.mT if shape[-2] > shape[-1] else wanted
    assert error(orthogonalize(x, method=method, coefficients="turbo"), wanted) < 1e-11
    assert error(orthogonalize(x.float(), method=method, coefficients="turbo"), wanted) < 1e-5
    zeros = x.clone()
    zeros[..., 0, :] = 0
    assert orthogonalize(zeros, method=method, coefficients="turbo")[..., 0, :].abs().max() < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("method", METHODS)
def test_cubics_need_no_square(method, dtype, bound):
    triples = ((1.5, -0.5, 0.0),) * 6
    x = gaussian(70, 160)
    assert error(orthogonalize(x.to(dtype), method=method, coefficients=triples), oracle(x.to(dtype), triples)) < bound


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [*METHODS, "eigh"])
def test_what_is_not_finite_stays_with_its_matrix(method, value):
    x = gaussian(3, 6, 9)
    wanted = orthogonalize(x, method=method)
    x[1, 2, 3] = value
    made = orthogonalize(x, method=method)
    assert made[1].isnan().all()
    torch.testing.assert_close(made[::2], wanted[::2], rtol=0, atol=1e-12)


def test_float16_on_a_cpu_is_computed_in_float32():
    x = gaussian(20, 50).half()
    assert error(orthogonalize(x), oracle(x, table("you"))) < 5e-4


def test_the_dtype_of_spectral_is_that_of_the_products_and_of_the_result():
    x = 1e8 * gaussian(40, 90).float()
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        made = Spectral(dtype=dtype)(x)
        assert made.dtype == dtype
        assert error(made, oracle(x, table("you"))) < 2e-2
    assert Spectral(dtype=torch.float16) == Spectral(dtype=torch.float16)
    with pytest.raises(ValueError, match="Invalid dtype: torch.int8"):
        Spectral(dtype=torch.int8)


def test_plans():
    jordan, express = table("jordan"), table("polar_express")
    half, full = torch.bfloat16, torch.float32

    def auto(shape, dtype, device="cpu", triples=jordan):
        return plan("auto", shape, dtype, device, triples)

    assert auto((512, 512), half) == Plan("newton_schulz", half, halves=True)
    assert auto((1376, 512), half) == Plan("gram", half, (1, 3), halves=True)
    assert auto((128, 1376), half) == Plan("gram", half, (1, 3))
    assert auto((128, 1376), half, triples=express) == Plan("gram", half, (1, 3, 4))
    assert auto((128, 160), half) == Plan("newton_schulz", half)
    # all steps at once, where float32 allows it
    assert auto((128, 1376), full) == Plan("gram", full)
    assert auto((128, 1376), full, triples=express) == Plan("gram", full, (1, 3, 4))
    assert auto((600, 4000), full) == Plan("gram", full, (1, 3), halves=True)
    assert auto((128, 512), torch.float16) == Plan("gram", full)
    # where rounding has no room, or there is nothing to save, the Gram form is the standard one
    assert plan("gram", (32, 128), half, "cpu", jordan).restarts == (1, 2, 3, 4)
    assert plan("gram", (512, 600), half, "cpu", jordan).restarts == (1, 2, 3, 4)
    assert plan("gram", (32, 128), torch.float64, "cpu", jordan).restarts == (1, 3)
    # other devices: by the count of multiplications, and only what they know
    assert auto((512, 2048), torch.float16, "cuda") == Plan("gram", torch.float16, (2,))
    assert auto((512, 2048), half, "cuda", table("deepseek")) == Plan("gram", torch.float16, (2, 5, 8))
    assert auto((128, 2048), half, "cuda") == Plan("newton_schulz", torch.float16)
    assert plan("gram", (512, 2048), half, "cuda", jordan) == Plan("gram", half, (1, 3))
    assert auto((512, 2048), half, "other") == Plan("newton_schulz", half)
    assert plan("eigh", (4, 4), half, "cpu", jordan) == Plan("eigh", torch.float64)
    assert plan("eigh", (4, 4), half, "mps", jordan) == Plan("eigh", torch.float32)


def test_subclasses_and_the_random_generator_are_left_alone():
    class Named(torch.Tensor):
        pass

    x = gaussian(8, 30)
    state = torch.get_rng_state()
    torch.testing.assert_close(orthogonalize(x.as_subclass(Named)).as_subclass(torch.Tensor), orthogonalize(x))
    torch.testing.assert_close(orthogonalize(torch.nn.Parameter(x)), orthogonalize(x))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_it_is_one_graph_and_gives_the_same_numbers(dtype):
    graphs = []

    def look(graph, _):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(orthogonalize, backend=look)
    x = gaussian(2, 20, 50).to(dtype)
    assert torch.equal(compiled(x), orthogonalize(x))
    # of another size: sizes may become symbols
    assert torch.equal(compiled(x[:, :, :40]), orthogonalize(x[:, :, :40]))
    assert len(graphs) == 2


@pytest.mark.parametrize("name", [name for name in REGISTRY if not preconditioned(name)])
def test_a_gpus_plan_is_no_worse_than_the_standard_form_in_bfloat16(name):
    """Three steps of the Gram form between restarts, in float16; here a CPU follows the plan."""
    source = torch.Generator().manual_seed(0)
    triples = table(name)
    how = plan("auto", (512, 2048), torch.bfloat16, "cuda", triples)
    assert how == Plan("gram", torch.float16, tuple(range(2, len(triples), 3)))
    u, v = (torch.linalg.qr(torch.randn(k, 96, generator=source, dtype=torch.float64)).Q for k in (96, 288))
    at = torch.linspace(0, 1, 96, dtype=torch.float64)
    for sigma in (
        torch.ones(96).double(),
        10 ** (-3 * at),
        10 ** (-5 * at),
        torch.where(at < 0.02, 1.0, 0.01).double(),
    ):
        x = ((u * sigma) @ v.mT).unsqueeze(0)
        exact = run(x, Plan("newton_schulz", torch.float64), triples, eps=0.0)
        made = [run(x, form, triples, eps=0.0) for form in (how, Plan("newton_schulz", torch.bfloat16))]
        ours, standard = (float((y.double() - exact).norm()) for y in made)
        assert ours <= standard
