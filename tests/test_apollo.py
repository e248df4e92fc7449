"""APOLLOAdamW against an independent float64 NumPy reference, apollo-torch and pytorch_optimizer; its seeds."""

import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

from lowrank_optim import APOLLOAdamW, ops, param_groups, state_bytes
from lowrank_optim.random_bases import Gaussian
from tests.reference import projected_numpy
from tests.trajectory import SHAPES, assert_same_weights, gradients, run

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def optimizer(**options):
    return lambda params: APOLLOAdamW(params, **{**HYPER, **options})


def matrix(opt, p, grad, rank, side=None):
    """The random matrix of the last step: r × columns (right) or r × rows (left)."""
    side = side or ("right" if p.size(0) >= p.size(1) else "left")
    return Gaussian(rank, side).matrix(opt.state[p], grad)


def peer(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason="needs the `peers` extra")


def follow(theirs, p, opt, ours, rank):
    """Let their projector take our matrix, r × columns for a tall one and rows × r for a wide one."""

    def ours_now(weights, *_, **__):
        found = matrix(opt, ours, weights, rank) if "basis_seed" in opt.state[ours] else opt.state[ours]["basis"]
        return found.T if "basis_seed" in opt.state[ours] and p.size(0) < p.size(1) else found.clone()

    theirs.get_orthogonal_matrix = ours_now
    return theirs


@pytest.mark.parametrize("norm_growth", [1.01, None])
@pytest.mark.parametrize(("scale_type", "rank", "scale"), [("channel", 4, 1.0), ("tensor", 4, 2.5), ("tensor", 1, 128)])
@pytest.mark.parametrize("gap", [1, 20, 1000])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula_in_float64(shape, gap, scale_type, rank, scale, norm_growth):
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    start, grads = p.detach().numpy().copy(), gradients(shape)
    options = {"scale": scale, "scale_type": scale_type}
    opt = optimizer(rank=rank, norm_growth=norm_growth, update_proj_gap=gap, stagger=False, **options)([p])
    got, drawn = [], []
    for t, weights in enumerate(run(opt, p, grads)):
        got.append(weights)
        if t % gap == 0:
            drawn.append(matrix(opt, p, grads[t], rank).numpy())
    expected = projected_numpy.apollo(
        start, [g.numpy() for g in grads], projections=drawn, gap=gap, limiter=norm_growth, **options, **HYPER
    )
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_with_singular_vectors_it_equals_the_formula_too(shape, scale_type):
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    start, grads = p.detach().numpy().copy(), gradients(shape)
    opt = optimizer(rank=4, basis="svd", scale_type=scale_type, scale=2.0, update_proj_gap=20, stagger=False)([p])
    got, found = [], []
    for t, weights in enumerate(run(opt, p, grads)):
        got.append(weights)
        if t % 20 == 0:
            basis = opt.state[p]["basis"].clone()
            found.append((basis if shape[0] >= shape[1] else basis.T).numpy())
            leading = torch.linalg.svd(grads[t], full_matrices=False)
            vectors = leading.Vh[:4] if shape[0] >= shape[1] else leading.U[:, :4].T
            torch.testing.assert_close(torch.from_numpy(found[-1] @ vectors.numpy().T).abs(), torch.eye(4).double())
    options = {"scale": 2.0, "scale_type": scale_type}
    expected = projected_numpy.apollo(start, [g.numpy() for g in grads], projections=found, gap=20, **options, **HYPER)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_other_side_is_the_transposed_matrix(shape, scale_type):
    start, grads = torch.randn(shape, dtype=torch.float64), gradients(shape, 12)
    options = {"rank": 3, "scale_type": scale_type, "update_proj_gap": 5}
    one, two = nn.Parameter(start.clone()), nn.Parameter(start.T.clone())
    left, right = (optimizer(proj_type=side, **options)([p]) for side, p in (("left", one), ("right", two)))
    for a, b in zip(run(left, one, grads), run(right, two, [g.T for g in grads]), strict=True):
        torch.testing.assert_close(a, b.T, rtol=0, atol=1e-12)


def test_the_norm_of_an_update_grows_by_a_percent_at_most():
    """Of what is before the bias correction; without the limit it grows by more."""
    sizes = {}
    for growth in (1.01, None):
        p = nn.Parameter(torch.zeros(24, 10, dtype=torch.float64))
        opt = APOLLOAdamW([p], lr=1.0, rank=4, norm_growth=growth)
        before, sizes[growth] = p.detach().clone(), []
        for t, grad in enumerate(gradients((24, 10), 20), start=1):
            p.grad = grad * (10 if t > 10 else 1)
            opt.step()
            bias = (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
            sizes[growth].append(float((p.detach() - before).norm() / bias))
            before = p.detach().clone()
    ratios = {growth: [b / a for a, b in pairwise(s)] for growth, s in sizes.items()}
    assert max(ratios[1.01]) <= 1.01 + 1e-6
    assert max(ratios[None]) > 1.1


@pytest.mark.peers
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-8)])
@pytest.mark.parametrize("proj", ["random", "svd"])
@pytest.mark.parametrize(("scale_type", "rank", "scale"), [("channel", 4, 1.0), ("tensor", 1, 128.0)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_apollo_torch_through_our_matrices(shape, scale_type, rank, scale, proj, dtype, atol):
    """Their eps is added before bias correction, and acts as eps/√(1 − β2^t); all else is equal."""
    theirs_module = peer("apollo_torch")
    keys = {"rank": rank, "update_proj_gap": 20, "scale": scale, "proj_type": "std", "proj": proj}
    keys["scale_type"] = scale_type
    hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    start = torch.randn(shape, dtype=dtype)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    # their groups, unchanged
    opt = APOLLOAdamW([{"params": [p], **keys}], stagger=False, proj_dtype="float32", **hyper)
    base = theirs_module.APOLLOAdamW([{"params": [q], **keys}], **hyper)
    base.state[q]["projector"] = follow(
        base._initialize_projector(base.param_groups[0], base.state[q]), q, opt, p, rank
    )
    for t, grad in enumerate(gradients(shape, 50, dtype=dtype), start=1):
        opt.param_groups[0]["eps"] = hyper["eps"] / (1 - 0.999**t) ** 0.5
        p.grad, q.grad = grad.clone(), grad.clone()
        opt.step()
        base.step()
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


@pytest.mark.peers
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_differs_from_apollo_torch_in_weight_decay_and_eps_as_documented(shape):
    """They decay after the update: from W₀/(1 − ηλ) our weights, decayed once more, are theirs."""
    theirs_module = peer("apollo_torch")
    keys = {"rank": 4, "update_proj_gap": 20, "scale": 1.0, "proj_type": "std", "proj": "random"}
    keys["scale_type"] = "channel"
    hyper = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.5}
    decay = 1 - hyper["lr"] * hyper["weight_decay"]
    start = torch.randn(shape, dtype=torch.float64)
    params = [nn.Parameter(x) for x in (start / decay, start / decay, start.clone(), start.clone())]
    modelled, plain, same_start, q = params
    opts = [APOLLOAdamW([{"params": [p], **keys}], stagger=False, proj_dtype="float32", **hyper) for p in params[:3]]
    base = theirs_module.APOLLOAdamW([{"params": [q], **keys}], **hyper)
    base.state[q]["projector"] = follow(
        base._initialize_projector(base.param_groups[0], base.state[q]), q, opts[0], modelled, 4
    )
    for t, grad in enumerate(gradients(shape, 50), start=1):
        for i in (0, 2):
            opts[i].param_groups[0]["eps"] = hyper["eps"] / (1 - 0.999**t) ** 0.5
        for p in params:
            p.grad = grad.clone()
        for opt in (*opts, base):
            opt.step()
        torch.testing.assert_close(decay * modelled, q, rtol=0, atol=1e-8)
    assert (decay * plain - q).abs().max() > 1e-4
    assert (same_start - q).abs().max() > 1e-4


@pytest.mark.peers
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_pytorch_optimizer_scales_the_projection_where_we_scale_the_gradient(shape, scale_type):
    """Their first update is scale·(ours through Pᵀ P), of rank r; ours has the gradient's."""
    theirs_module = peer("pytorch_optimizer")
    from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector

    rank, scale, lr = 3, 4.0, 1e-2
    p, q = (nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(2))
    ours = {"rank": rank, "scale": scale, "scale_type": scale_type, "update_proj_gap": 20}
    opt = APOLLOAdamW([{"params": [p], **ours}], lr=lr, eps=1e-12)
    keys = {"rank": rank, "update_proj_gap": 20, "scale": scale, "projection_type": "std"}
    base = theirs_module.APOLLO([{"params": [q], **keys}], lr=lr, eps=1e-12, scale_type=scale_type)
    base.state[q]["projector"] = follow(GaLoreProjector(**keys), q, opt, p, rank)
    p.grad = gradients(shape, 1)[0]
    q.grad = p.grad.clone()
    opt.step()
    base.step()
    drawn = matrix(opt, p, p.grad, rank)
    through = p @ drawn.T @ drawn if shape[0] >= shape[1] else drawn.T @ (drawn @ p)
    # 1e-8 beside ‖R‖ acts before their bias correction and after ours
    torch.testing.assert_close(q.detach(), scale * through.detach(), rtol=1e-6, atol=1e-10)
    assert torch.linalg.matrix_rank(q.detach(), rtol=1e-9) == rank
    assert torch.linalg.matrix_rank(p.detach(), rtol=1e-9) == min(shape)


def test_their_groups_work_unchanged():
    p, q = (nn.Parameter(torch.zeros(24, 10)) for _ in range(2))
    keys = {"rank": 4, "scale_type": "channel", "scale": 1.0, "update_proj_gap": 200, "proj_type": "std"}
    opt = APOLLOAdamW([{"params": [p], "proj": "random", **keys}, {"params": [q], "proj": "svd", **keys}])
    assert [group["basis"] for group in opt.param_groups] == ["gaussian", "svd"]
    assert "basis_seed" in opt.state[p]
    assert opt.state[q]["basis"].shape == (4, 10)


@pytest.mark.parametrize("stagger", [True, False])
def test_each_matrix_has_its_own_seed_and_another_at_each_refresh(stagger):
    params = [nn.Parameter(torch.zeros(12, 8)) for _ in range(7)]
    fused = nn.Parameter(torch.zeros(24, 8))
    groups = [{"params": params[:4], "rank": 2}, {"params": params[4:], "rank": 2}]
    opt = APOLLOAdamW([*groups, {"params": [fused], "rank": 2, "split": 3}], update_proj_gap=5, stagger=stagger)
    seen, before, changes = [], None, [0] * 10
    for _ in range(21):
        for p in (*params, fused):
            p.grad = torch.randn_like(p)
        opt.step()
        now = [int(x) for p in (*params, fused) for x in opt.state[p]["basis_seed"].flatten()]
        assert len(set(now)) == 10
        for i, seed in enumerate(now):
            if before is None or seed != before[i]:
                assert seed not in seen
                seen.append(seed)
                changes[i] += 1
        before = now
    # the first, and those of steps 5, 10, 15, 20 or of four to five turns
    assert all(count in ((5, 6) if stagger else (5,)) for count in changes)


@pytest.mark.parametrize("proj_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_matrix_is_stepped_among_others_as_it_is_alone(shape, scale_type, proj_dtype, monkeypatch):
    """Coordinates of several lie in one memory, and of their directions; two at a time, so that there are rests."""
    monkeypatch.setattr(ops, "part_size", lambda device: 2 * 3 * max(shape))
    start, grads = torch.randn(5, *shape), [torch.randn(5, *shape) * 4**t for t in range(5)]
    options = {"rank": 3, "scale_type": scale_type, "scale": 2.0, "proj_dtype": proj_dtype, "update_proj_gap": 3}
    found = []
    for chunk in (1, 1 << 30):
        monkeypatch.setattr(APOLLOAdamW, "chunk_bytes", chunk)
        params = [nn.Parameter(x.clone()) for x in start]
        opt = optimizer(**options)(params)
        for grad in grads:
            for p, g in zip(params, grad, strict=True):
                p.grad = g.clone()
            opt.step()
        found.append(torch.stack([p.detach() for p in params]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_tensors_are_taken_together_where_they_are_all_parts_of_one():
    with torch.no_grad():
        whole, alone = torch.arange(24.0).view(4, 3, 2).clone(), torch.zeros(3, 2)
        square = torch.arange(18.0).view(2, 3, 3).clone()
        cases = {
            "in order, between others": ([alone, *whole.unbind(), alone], [1, 4, 1]),
            "one is missing": (list(whole.unbind()[:3]), [1, 1, 1]),
            "in another order": (list(whole.unbind()[::-1]), [1, 1, 1, 1]),
            "one twice": ([whole[0], whole[1], whole[1], whole[3]], [1, 1, 1, 1]),
            "transposed": ([x.mT for x in square.unbind()], [1, 1]),
            "none": ([], []),
        }
        for name, (xs, sizes) in cases.items():
            found = ops.stacks(xs)
            assert [len(x) for x in found] == sizes, name
            for x, part in zip(xs, [part for some in found for part in some.unbind()], strict=True):
                assert torch.equal(x, part), name
                assert x.data_ptr() == part.data_ptr(), name


def test_seeds_that_are_neighbours_make_matrices_that_have_nothing_in_common():
    """Cosines of whole matrices, and of one with the other's columns in another place, are those of chance."""
    basis, like = Gaussian(8), torch.zeros(1, 32, dtype=torch.float64)
    drawn = torch.stack([basis.matrix({"basis_seed": torch.tensor([seed])}, like) for seed in range(200)])
    for shift in (0, 1, 7):
        cosines = torch.nn.functional.cosine_similarity(drawn[:-1], drawn[1:].roll(shift, -1), dim=(-1))
        assert cosines.mean().abs() < 4 / (199 * 8 * 32) ** 0.5
        assert cosines.square().mean() * 32 == pytest.approx(1, abs=0.15)


def test_the_matrix_is_not_kept_and_nobody_else_s_numbers_change():
    p = nn.Parameter(torch.zeros(24, 10))
    opt = APOLLOAdamW([p], rank=4, update_proj_gap=2)
    before = torch.get_rng_state()
    for grad in gradients((24, 10), 5, dtype=torch.float32):
        p.grad = grad
        opt.step()
    assert torch.equal(before, torch.get_rng_state())
    assert state_bytes(opt).by_name == {
        "basis_seed": 8,
        "exp_avg": 4 * 4 * 24,
        "exp_avg_sq": 4 * 4 * 24,
        "update_norm": 4,
        "step": 4,
    }
    drawn = torch.cat([matrix(opt, p, p, 4) for opt.state[p]["basis_seed"][0] in range(100)])
    assert abs(drawn.var().item() - 1 / 4) < 0.02
    assert abs(drawn.mean().item()) < 0.03


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit():
    grads = gradients((24, 10), 12, dtype=torch.float32)
    start = torch.randn(24, 10)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    whole = list(run(optimizer(rank=4, update_proj_gap=5)([p]), p, grads))
    first = optimizer(rank=4, update_proj_gap=5)([q])
    list(run(first, q, grads[:6]))
    second = optimizer(rank=4, update_proj_gap=5)([q])
    second.load_state_dict(first.state_dict())
    assert torch.equal(list(run(second, q, grads[6:]))[-1], whole[-1])


def test_mini_of_a_model():
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    opt = APOLLOAdamW(param_groups(model, rank=1, scale=128.0, scale_type="tensor"))
    assert opt.state[model[0].weight]["exp_avg"].shape == (32, 1)
    assert opt.state[model[1].weight]["exp_avg"].shape == (1, 32)
    model(torch.randn(3, 16)).square().mean().backward()
    opt.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_type": "row"}, "scale_type: 'row', must be one of channel, tensor"),
        ({"scale": -1.0}, "scale: -1.0, must be a number >= 0"),
        ({"scale": float("inf")}, "scale: inf"),
        ({"norm_growth": 0.9}, "norm_growth: 0.9, must be None or a number >= 1"),
        ({"norm_growth": float("nan")}, "norm_growth: nan"),
        ({"norm_growth": "1.01"}, "norm_growth: '1.01'"),
        ({"basis": "random"}, "basis: 'random', must be one of .*gaussian, svd"),
        ({"proj_type": "full"}, "proj_type: 'full', must be another than 'full'"),
        ({"rank": 0}, "rank: 0"),
        ({"rank": 1.5}, "rank: 1.5"),
        ({"update_proj_gap": 2.0}, "update_proj_gap: 2.0"),
        ({"stagger": 1}, "stagger: 1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    p = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=message):
        APOLLOAdamW([p], **{"rank": 2, **options})
    with pytest.raises(ValueError, match=message):
        APOLLOAdamW([{"params": [p], "rank": 2, **options}])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"proj": "gauss"}, "basis: 'gauss', must be one of .*gaussian, svd"),
        ({"scale_typ": "tensor"}, "did you mean 'scale_type'"),
        ({"carry": "rotate"}, "'carry' in a parameter group: it means nothing"),
    ],
)
def test_bad_groups_are_named(group, message):
    with pytest.raises(ValueError, match=message):
        APOLLOAdamW([{"params": [nn.Parameter(torch.zeros(8, 8))], "rank": 2, **group}])


def test_a_projection_in_bfloat16_says_nearly_the_same():
    """Factors within a hundredth of those of float32; an update that is wrong by no more."""
    updates = []
    for dtype in ("float32", "bfloat16"):
        p = nn.Parameter(torch.zeros(96, 64))
        opt = APOLLOAdamW([p], lr=1.0, rank=16, proj_dtype=dtype, norm_growth=None)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            p.grad = torch.randn(96, 64, generator=generator)
            p.data.zero_()
            opt.step()
        updates.append(p.detach().clone())
    torch.testing.assert_close(updates[1], updates[0], rtol=1e-2, atol=0)
    assert not torch.equal(*updates)
    p = nn.Parameter(torch.zeros(24, 10, dtype=torch.float64))
    assert_same_weights(
        lambda q: APOLLOAdamW(q, rank=4, proj_dtype="bfloat16"),
        lambda q: APOLLOAdamW(q, rank=4, proj_dtype="float32"),
        (24, 10),
        atol=0,
    )
