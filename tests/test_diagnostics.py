"""Readings of a step against the same by hand, from the formulas; and that to listen changes nothing and waits once."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lowrank_optim import APOLLOAdamW, DCTAdamW, Diagnostics, FiraAdamW, GaLoreAdamW, Muon, param_groups
from lowrank_optim.random_bases import Gaussian
from tests.reference import dct_numpy, projected_numpy
from tests.small_model import CLASSES, backward, mlp, same, snapshot

M, N, R = 20, 8, 3
RATE = {"lr": 1.0, "weight_decay": 0.0}


def gradients(count, shape=(M, N)):
    source = np.random.default_rng(3)
    return [source.standard_normal(shape) for _ in range(count)]


def listened(opt, *grads):
    """Step with these gradients, and read."""
    diagnostics = Diagnostics(opt)
    params = [p for group in opt.param_groups for p in group["params"]]
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else torch.as_tensor(grad, dtype=p.dtype).clone()
    with diagnostics.listening():
        opt.step()
    return diagnostics.read()


def matrix(shape=(M, N)):
    return nn.Parameter(torch.zeros(shape, dtype=torch.float64))


def rms(update):
    return math.sqrt(np.square(update).mean())


def of_coordinates(coords, grad):
    """The first two readings: shares of squares, and a participation ratio of singular values."""
    energies = np.linalg.svd(coords, compute_uv=False) ** 2
    captured = energies.sum() / np.square(grad).sum()
    return {"captured_energy": captured, "effective_rank": energies.sum() ** 2 / np.square(energies).sum()}


def near(expected):
    # numbers are read in float32
    return pytest.approx(expected, rel=1e-5)


def test_columns_of_the_dct():
    opt = DCTAdamW([matrix()], rank=R, eps=1e-30, **RATE)
    columns, before = dct_numpy.matrix(N), None
    for step, grad in enumerate(gradients(6)):
        own = listened(opt, grad)["0"]
        coefficients = grad @ columns
        chosen = np.argsort(-np.square(coefficients).sum(0))[:R]
        expected = of_coordinates(coefficients[:, chosen], grad)
        if step == 0:
            # the first direction of Adam is a sign
            expected["update_rms"] = math.sqrt(R / N)
        else:
            expected["subspace_overlap"] = len({*chosen} & {*before}) / R
            expected["update_rms"] = own["update_rms"]
        assert own == near(expected)
        before = chosen


def test_singular_vectors_that_are_found_again():
    opt = GaLoreAdamW([{"params": [matrix()], "rank": R}], update_proj_gap=3, stagger=False, eps=1e-30, **RATE)
    vectors = None
    for step, grad in enumerate(gradients(7)):
        own = listened(opt, grad)["0"]
        expected = {}
        if step % 3 == 0:
            old, vectors = vectors, np.linalg.svd(grad)[2][:R]
            if old is not None:
                expected["subspace_overlap"] = np.square(vectors @ old.T).sum() / R
        expected |= of_coordinates(grad @ vectors.T, grad)
        # α is in the update, and η is not
        expected["update_rms"] = 0.25 * math.sqrt(R / N) if step == 0 else own["update_rms"]
        assert own == near(expected)


@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_fira_s_update_is_two_parts_that_are_never_formed(scale):
    p, grads = matrix(), gradients(4)
    opt = FiraAdamW([{"params": [p], "rank": R}], scale=scale, update_proj_gap=9, stagger=False, **RATE)
    svd = {"svd": lambda x: np.linalg.svd(x, full_matrices=False)}
    hyper = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "published_code": False}
    start = np.zeros((M, N))
    weights = projected_numpy.fira(start, grads, rank=R, scale=scale, gap=9, limiter=1.01, **svd, **hyper)
    vectors = np.linalg.svd(grads[0])[2][:R]
    for grad, before, after in zip(grads, [start, *weights], weights, strict=False):
        expected = of_coordinates(grad @ vectors.T, grad) | {"update_rms": rms(before - after)}
        assert listened(opt, grad)["0"] == near(expected)


def test_apollo_s_scaled_gradient():
    p, (grad,) = matrix(), gradients(1)
    opt = APOLLOAdamW([p], rank=R, eps=1e-30, scale=4.0, **RATE)
    own = listened(opt, grad)["0"]
    coords = grad @ Gaussian(R, "right").matrix(opt.state[p], p).numpy().T
    # of signs in each row, √r
    factors = math.sqrt(R) / np.linalg.norm(coords, axis=1, keepdims=True)
    expected = of_coordinates(coords, grad) | {"update_rms": 2 * rms(factors * grad)}
    assert own == near(expected)


def test_muon_has_no_basis():
    opt = Muon([matrix()], method="eigh", **RATE)
    for grad in gradients(3):
        # all N singular values are one, times the factor for the shape
        assert listened(opt, grad)["0"] == near({"update_rms": math.sqrt(N / (M * N)) * math.sqrt(M / N)})


@pytest.mark.parametrize("way", CLASSES)
def test_to_listen_changes_no_bit(way):
    found = []
    for heard in (True, False):
        model = mlp()
        opt = way(list(model.parameters()), **way.rates(1e-2), **way.seldom(2))
        diagnostics = Diagnostics(opt)
        for seed in range(6):
            opt.zero_grad()
            backward(model, seed)
            # one may listen to any step, and to the last one of all twice
            if heard and seed != 2:
                with diagnostics.listening():
                    opt.step()
            else:
                opt.step()
        said = diagnostics.read()
        assert bool(said) == heard
        assert all(math.isfinite(value) for own in said.values() for value in own.values())
        found.append(snapshot(model, opt))
    assert same(*found)


@pytest.fixture
def waits(monkeypatch):
    """The names of what has made the host wait for a device."""
    seen = []

    def watched(name, real):
        def method(self, *args, **kwargs):
            seen.append(name)
            return real(self, *args, **kwargs)

        return method

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "__array__"):
            patch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
        yield seen


@pytest.mark.parametrize("cls", [DCTAdamW, Muon])
def test_a_step_that_is_listened_to_waits_for_nothing_and_a_reading_once(cls, waits):
    model = mlp()
    opt = cls(model.named_parameters(), **({"rank": 2} if cls is DCTAdamW else {}))
    diagnostics = Diagnostics(opt)
    backward(model)
    opt.step()
    waits.clear()
    with diagnostics.listening():
        opt.step()
    assert waits == []
    said = diagnostics.read()
    assert len(said) == 3
    assert waits == ["tolist"]
    assert diagnostics.read() == {}
    assert waits == ["tolist"]


def test_names_are_those_of_the_optimizer_else_numbers_in_its_groups():
    model = mlp()
    backward(model)
    names = {"0.weight", "0.bias", "2.weight"}
    for opt in (DCTAdamW(model.named_parameters(), rank=2), DCTAdamW(param_groups(model, rank=2))):
        diagnostics = Diagnostics(opt)
        with diagnostics.listening():
            opt.step()
        said = diagnostics.read()
        assert said.keys() == names
        assert [*said] == [name for group in opt.param_groups for name in group["param_names"]]
        assert said["0.bias"].keys() == {"update_rms"}
        assert said["0.weight"].keys() >= {"captured_energy", "update_rms"}
    # a group of its own for the vector, behind the matrices
    weight, bias, last = model.parameters()
    opt = Muon([weight, bias, last], momentum=0.5)
    said = listened(opt, torch.ones(8, 12), torch.ones(10, 8), torch.ones(8))
    assert [*said] == ["0", "1", "2"]
    assert [group["params"] for group in opt.param_groups] == [[weight, last], [bias]]
    # Adam's first direction
    assert said["2"] == near({"update_rms": 1.0})
    assert listened(opt, None, torch.ones(10, 8), None).keys() == {"1"}


def test_groups_have_their_own_ranks_and_rates():
    a, b, c = matrix(), matrix((N, M)), matrix()
    groups = [
        {"params": [a], "rank": 2, "lr": 1e-3},
        {"params": [b], "rank": 0.5, "scale": 2.0},
        {"params": [c], "rank": None},
    ]
    opt = GaLoreAdamW(groups, eps=1e-30, stagger=False, **RATE)
    grad, wide = gradients(1)[0], gradients(1, (N, M))[0]
    said = listened(opt, grad, wide, grad)
    energies = np.linalg.svd(grad, compute_uv=False)[:2] ** 2
    assert said["0"]["captured_energy"] == near(energies.sum() / np.square(grad).sum())
    assert said["0"]["update_rms"] == near(0.25 * math.sqrt(2 / N))
    energies = np.linalg.svd(wide, compute_uv=False)[:4] ** 2
    assert said["1"]["effective_rank"] == near(energies.sum() ** 2 / np.square(energies).sum())
    assert said["1"]["update_rms"] == near(2.0 * math.sqrt(4 / N))
    assert said["2"] == near({"update_rms": 1.0})


def test_of_stacked_experts_the_mean_is_said():
    experts, grads = 4, gradients(3, (4, M, N))
    stacked = GaLoreAdamW([{"params": [matrix((experts, M, N))], "rank": R, "flatten": False}], lr=1.0, stagger=False)
    for step, grad in enumerate(grads):
        own = listened(stacked, grad)["0"]
        if step == 0:
            vectors = [np.linalg.svd(one)[2][:R] for one in grad]
        parts = [of_coordinates(one @ v.T, one) for one, v in zip(grad, vectors, strict=True)]
        for name in ("captured_energy", "effective_rank"):
            assert own[name] == near(sum(part[name] for part in parts) / experts)
        assert own.keys() == {"captured_energy", "effective_rank", "update_rms"}


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
def test_sharded_and_whole_parameters_are_read_together(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        grad = torch.from_numpy(gradients(1)[0])
        sharded, whole = (nn.Parameter(distribute_tensor(grad, mesh, [Shard(0)])), nn.Parameter(grad.clone()))
        opt = GaLoreAdamW([{"params": [sharded], "rank": None}, {"params": [whole], "rank": R}], eps=1e-30, **RATE)
        for p in (sharded, whole):
            p.grad = p.detach().clone()
        diagnostics = Diagnostics(opt)
        with diagnostics.listening():
            opt.step()
        said = diagnostics.read()
    finally:
        dist.destroy_process_group()
    assert said["0"] == near({"update_rms": 1.0})
    assert said["1"]["update_rms"] == near(0.25 * math.sqrt(R / N))


def test_nothing_is_kept_from_an_earlier_step():
    first, second, third = gradients(3)
    opt = GaLoreAdamW([{"params": [matrix(), matrix()], "rank": R}], update_proj_gap=2, stagger=False, lr=1.0)
    diagnostics, (p, q) = Diagnostics(opt), opt.param_groups[0]["params"]

    def step(*grads):
        for x, grad in zip((p, q), grads, strict=True):
            x.grad = None if grad is None else torch.from_numpy(grad.copy())
        opt.step()

    with diagnostics.listening():
        step(first, second)
    assert diagnostics.read().keys() == {"0", "1"}
    with diagnostics.listening():
        # the second one has none, and so nothing to say
        step(second, None)
    assert diagnostics.read().keys() == {"0"}
    with diagnostics.listening():
        step(third, second)
        assert "subspace_overlap" in diagnostics.read()["0"]
        step(third, second)
        step(first, second)
    # of two steps in one block the last one counts; bases move in every other one
    last = diagnostics.read()
    assert "subspace_overlap" in last["0"]
    vectors = np.linalg.svd(first)[2][:R]
    assert last["0"]["captured_energy"] == near(of_coordinates(first @ vectors.T, first)["captured_energy"])
    # nobody listens here
    step(first, second)
    assert diagnostics.read() == {}


@pytest.mark.filterwarnings("ignore:a gradient held NaN")
def test_what_a_matrix_said_is_forgotten_when_it_sits_a_step_out():
    opt = GaLoreAdamW([{"params": [matrix(), matrix()], "rank": R}], update_proj_gap=1, lr=1.0)
    diagnostics = Diagnostics(opt)
    with diagnostics.listening():
        for bad in (1.0, math.nan):
            for p, factor in zip(opt.param_groups[0]["params"], (1.0, bad), strict=True):
                p.grad = torch.from_numpy(factor * gradients(1)[0])
            opt.step()
    assert diagnostics.read().keys() == {"0"}


def test_an_error_within_the_block_ends_it():
    opt = DCTAdamW([matrix()], rank=R)
    diagnostics = Diagnostics(opt)

    def closure():
        raise KeyError("data")

    with pytest.raises(KeyError), diagnostics.listening():
        opt.step(closure)
    opt.param_groups[0]["params"][0].grad = torch.ones(M, N, dtype=torch.float64)
    opt.step()
    assert diagnostics.read() == {}


def test_two_may_listen_to_two_optimizers():
    one, two = (DCTAdamW([matrix()], rank=R) for _ in range(2))
    said = [listened(opt, grad) for opt, grad in zip((one, two), gradients(2), strict=True)]
    assert said[0]["0"]["captured_energy"] != said[1]["0"]["captured_energy"]
    # who listens to another optimizer hears nothing of its own
    diagnostics = Diagnostics(one)
    with diagnostics.listening():
        two.step()
    assert diagnostics.read() == {}
