"""FiraAdamW against an independent float64 NumPy reference, fira and pytorch_optimizer."""

import warnings

import pytest
import torch
from torch import nn

from lowrank_optim import FiraAdamW, GaLoreAdamW
from tests.reference import projected_numpy
from tests.trajectory import SHAPES, assert_equals_reference, assert_same_weights, gradients, run

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def svd(matrix):
    return tuple(x.numpy() for x in torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False))


def transposed_svd(matrix):
    """As ours decomposes what is wide: the signs of vectors are the library's choice, and kept moments see them."""
    u, s, vh = svd(matrix.T.copy())
    return vh.T, s, u.T


def decomposer(shape):
    return svd if shape[0] >= shape[1] else transposed_svd


def optimizer(cls=FiraAdamW, **options):
    return lambda params: cls(params, **{**HYPER, **options})


def reference(shape, **options):
    return lambda w, grads: projected_numpy.fira(w, grads, svd=decomposer(shape), **{**HYPER, **options})


def peer(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason="needs the `peers` extra")


@pytest.mark.parametrize("norm_growth", [1.01, None])
@pytest.mark.parametrize("published_code", [False, True])
@pytest.mark.parametrize(("gap", "scale"), [(1, 0.25), (20, 0.25), (7, 1.0), (1000, 2.0)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula_in_float64(shape, gap, scale, published_code, norm_growth):
    options = {"rank": 4, "scale": scale, "published_code": published_code}
    assert_equals_reference(
        optimizer(update_proj_gap=gap, stagger=False, norm_growth=norm_growth, **options),
        reference(shape, gap=gap, limiter=norm_growth, **options),
        shape,
    )


@pytest.mark.parametrize("carry", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("basis", ["svd", "subspace"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_with_other_bases_and_carries_it_equals_the_formula_too(shape, basis, carry):
    sketch = torch.randn(max(shape), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    options = {"rank": 4, "basis": basis, "carry": carry, "scale": 0.5}
    assert_equals_reference(
        optimizer(update_proj_gap=7, stagger=False, norm_growth=None, **options),
        lambda w, grads: projected_numpy.projected_adamw(
            w, grads, gap=7, residual="fira", limiter=None, sketch=sketch, svd=decomposer(shape), **options, **HYPER
        ),
        shape,
        atol=1e-9,
    )


def test_the_paper_is_galore_with_a_residual():
    options = {"rank": 4, "scale": 0.5, "update_proj_gap": 7}
    assert_same_weights(optimizer(**options), optimizer(GaLoreAdamW, residual="fira", **options), (24, 10), atol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_at_scale_1_the_published_code_is_the_paper(shape):
    options = {"rank": 4, "scale": 1.0, "update_proj_gap": 7}
    assert_same_weights(optimizer(**options), optimizer(published_code=True, **options), shape, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_other_side_is_the_transposed_matrix(shape):
    start, grads = torch.randn(shape, dtype=torch.float64), gradients(shape, 12)
    options = {"rank": 3, "update_proj_gap": 5, "carry": "rotate"}
    one, two = nn.Parameter(start.clone()), nn.Parameter(start.T.clone())
    left, right = (optimizer(proj_type=side, **options)([p]) for side, p in (("left", one), ("right", two)))
    for a, b in zip(run(left, one, grads), run(right, two, [g.T for g in grads]), strict=True):
        torch.testing.assert_close(a, b.T, rtol=0, atol=1e-10)


def test_an_update_has_full_rank_and_each_row_outside_is_as_long_as_inside_in_proportion():
    p = nn.Parameter(torch.zeros(24, 10, dtype=torch.float64))
    opt = FiraAdamW([p], lr=1.0, rank=3, scale=1.0, stagger=False)
    p.grad = gradients((24, 10), 1)[0]
    opt.step()
    basis = opt.state[p]["basis"]
    inside = p @ basis.T
    outside = p - inside @ basis
    assert torch.linalg.matrix_rank(p.detach(), rtol=1e-9) == 10
    of_gradient = p.grad @ basis.T
    ratio = (p.grad - of_gradient @ basis).norm(dim=1) / of_gradient.norm(dim=1)
    torch.testing.assert_close(outside.norm(dim=1) / inside.norm(dim=1), ratio, rtol=1e-4, atol=0)


def follow(projector, opt, p):
    """Let their projector take our basis: r × columns for a tall matrix and rows × r for a wide one."""
    projector.get_orthogonal_matrix = lambda *_, **__: opt.state[p]["basis"].clone()
    return projector


def fira_base(q, keys, hyper, opt, p):
    theirs = peer("fira")
    from fira.gradient_projection import GradientProjector

    base = theirs.FiraAdamW([{"params": [q], **keys}], no_deprecation_warning=True, **hyper)
    base.state[q]["projector"] = follow(GradientProjector(**keys), opt, p)
    return base


@pytest.mark.peers
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-8)])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_published_code_equals_fira_through_our_basis(shape, alpha, dtype, atol):
    """Their eps is added before bias correction, and acts as eps/√(1 − β2^t); all else is equal."""
    keys = {"rank": 4, "update_proj_gap": 20, "alpha": alpha, "proj_type": "std"}
    hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    start = torch.randn(shape, dtype=dtype)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    # their groups, unchanged
    opt = FiraAdamW([{"params": [p], **keys}], stagger=False, published_code=True, **hyper)
    base = fira_base(q, keys, hyper, opt, p)
    for t, grad in enumerate(gradients(shape, 50, dtype=dtype), start=1):
        opt.param_groups[0]["eps"] = hyper["eps"] / (1 - 0.999**t) ** 0.5
        p.grad, q.grad = grad.clone(), grad.clone()
        opt.step()
        base.step()
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


@pytest.mark.peers
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_fira_with_its_own_projector(shape):
    """Its decomposition is the same, so its signs are too."""
    keys = {"rank": 4, "update_proj_gap": 20, "alpha": 0.25, "proj_type": "std"}
    hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    theirs = peer("fira")
    assert_same_weights(
        lambda params: FiraAdamW([{"params": params, **keys}], stagger=False, published_code=True, **hyper),
        lambda params: theirs.FiraAdamW([{"params": params, **keys}], no_deprecation_warning=True, **hyper),
        shape,
        dtype=torch.float32,
        atol=1e-5,
    )


@pytest.mark.peers
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_differs_from_fira_in_weight_decay_eps_and_the_scale_as_documented(shape):
    """They decay after the update: from W₀/(1 − ηλ) our weights, decayed once more, are theirs."""
    keys = {"rank": 4, "update_proj_gap": 20, "alpha": 0.25, "proj_type": "std"}
    hyper = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.5}
    decay = 1 - hyper["lr"] * hyper["weight_decay"]
    start = torch.randn(shape, dtype=torch.float64)
    starts = (start / decay, start / decay, start.clone(), start / decay, start.clone())
    *params, q = (nn.Parameter(x) for x in starts)
    # all as theirs; their eps as a number; their start; the paper's formula
    opts = [
        FiraAdamW([{"params": [p], **keys}], stagger=False, published_code=code, **hyper)
        for p, code in zip(params, (True, True, True, False), strict=True)
    ]
    base = fira_base(q, keys, hyper, opts[0], params[0])
    for t, grad in enumerate(gradients(shape, 50), start=1):
        for i in (0, 2, 3):
            opts[i].param_groups[0]["eps"] = hyper["eps"] / (1 - 0.999**t) ** 0.5
        for p in (*params, q):
            p.grad = grad.clone()
        for opt in (*opts, base):
            opt.step()
        torch.testing.assert_close(decay * params[0], q, rtol=0, atol=1e-8)
    assert all((decay * p - q).abs().max() > 1e-4 for p in (params[1], params[3]))
    assert (params[2] - q).abs().max() > 1e-4


@pytest.mark.peers
@pytest.mark.parametrize("gap", [4, 20])
@pytest.mark.parametrize("name", ["GaLore", "Fira"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_pytorch_optimizer_but_for_the_schedule_eps_and_decay(shape, name, gap):
    """They refresh at t = 0 and where the gap divides t + 1: the turn of the last of gap/2 of our matrices."""
    theirs = peer("pytorch_optimizer")
    from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

    hyper = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 0.5}
    decay = 1 - hyper["lr"] * hyper["weight_decay"]
    start = torch.randn(shape, dtype=torch.float64)
    p, q = nn.Parameter(start / decay), nn.Parameter(start.clone())
    idle = [nn.Parameter(torch.zeros(8, 8)) for _ in range(gap // 2 - 1)]
    keys = {"rank": 4, "update_proj_gap": gap, "scale": 0.25}
    cls, options = {"GaLore": (GaLoreAdamW, {}), "Fira": (FiraAdamW, {"published_code": True})}[name]
    opt = cls([{"params": [*idle, p], **keys}], **options, **hyper)
    base = getattr(theirs, name)([{"params": [q], "projection_type": "std", **keys}], **hyper)
    base.state[q]["projector"] = follow(GaLoreProjector(projection_type="std", **keys), opt, p)
    refreshed, before = [], None
    for t, grad in enumerate(gradients(shape, 50)):
        opt.param_groups[0]["eps"] = hyper["eps"] / (1 - 0.999 ** (t + 1)) ** 0.5
        p.grad, q.grad = grad.clone(), grad.clone()
        opt.step()
        base.step()
        torch.testing.assert_close(decay * p, q, rtol=0, atol=1e-8)
        if before is None or not torch.equal(before, opt.state[p]["basis"]):
            refreshed.append(t)
        before = opt.state[p]["basis"].clone()
    assert refreshed == [0, *(t for t in range(1, 50) if (t + 1) % gap == 0)]


def test_alpha_is_scale_and_both_are_too_much():
    p, q = (nn.Parameter(torch.zeros(24, 10)) for _ in range(2))
    keys = {"rank": 4, "update_proj_gap": 200, "alpha": 0.5, "proj_type": "std"}
    opt = FiraAdamW([{"params": [p], **keys}])
    assert opt.param_groups[0]["scale"] == 0.5
    with pytest.raises(ValueError, match="Invalid key 'alpha'"):
        opt.add_param_group({"params": [q], **keys, "scale": 0.75})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_growth": 0.99}, "norm_growth: 0.99, must be None or a number >= 1"),
        ({"norm_growth": float("inf")}, "norm_growth: inf"),
        ({"norm_growth": True}, "norm_growth: True"),
        ({"published_code": 1}, "published_code: 1, must be a bool"),
        ({"carry": "move"}, "carry: 'move', must be one of keep, reset, rotate"),
        ({"basis": "gaussian"}, "basis: 'gaussian', must be one of svd, "),
        ({"basis": "hadamard"}, "basis: 'hadamard', which needs a side of 2, 4, 8"),
        ({"proj_type": "full"}, "proj_type: 'full', must be another than 'full'"),
        ({"scale": float("nan")}, "scale: nan"),
        ({"rank": 0}, "rank: 0"),
        ({"rank": 1.5}, "rank: 1.5"),
        ({"update_proj_gap": 0}, "update_proj_gap: 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    p = nn.Parameter(torch.zeros(12, 10))
    with pytest.raises(ValueError, match=message):
        FiraAdamW([p], **{"rank": 2, **options})
    with pytest.raises(ValueError, match=message):
        FiraAdamW([{"params": [p], "rank": 2, **options}])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"alpha": "big"}, "scale: 'big'"),
        ({"norm_grow": 1.1}, "did you mean 'norm_growth'"),
        ({"residual_scale": 0.3}, "'residual_scale' in a parameter group: it means nothing"),
    ],
)
def test_bad_groups_are_named(group, message):
    with pytest.raises(ValueError, match=message):
        FiraAdamW([{"params": [nn.Parameter(torch.zeros(8, 8))], "rank": 2, **group}])
