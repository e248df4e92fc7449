"""Two gloo ranks on a CPU: what a sharded or replicated run gives is what one process gives."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten

from lowrank_optim import (
    APOLLOAdamW,
    AuON,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    LDAdamW,
    LowRankMuon,
    Muon,
    SteepestDescent,
    Trion,
    param_groups,
)
from tests.distributed._ranks import WORLD, Ranks
from tests.small_model import NAMED

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")]

STEPS = 9
# refreshes in the middle of the run, and one matrix's turn after another's
PROJECTED: dict[str, Any] = {"lr": 0.02, "rank": 2, "update_proj_gap": 4, "weight_decay": 0.1}


def mlp(dtype: torch.dtype = torch.float64, out: int = 7) -> nn.Sequential:
    """Tall, wide, and with rows that two ranks cannot share evenly."""
    torch.manual_seed(0)
    layers = nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, out)
    return nn.Sequential(*layers).to(dtype)


def batch(step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(8, 9, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def train(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    steps: range = range(STEPS),
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> None:
    """On the whole batch, or on this rank's half of it."""
    for step in steps:
        x = batch(step, dtype)
        opt.zero_grad()
        model(x if rank is None else x.chunk(WORLD)[rank]).square().mean().backward()
        opt.step()


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_close(model: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(full(p), q.detach(), **tolerance)


def assert_equal_on_all_ranks(values: Any) -> None:
    """Bit for bit."""
    gathered: list[Any] = [None] * WORLD
    leaves, spec = tree_flatten(values)
    dist.all_gather_object(gathered, ([x.detach() if isinstance(x, Tensor) else x for x in leaves], str(spec)))
    (first, first_spec), (second, second_spec) = gathered
    assert first_spec == second_spec
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def replicas_follow_one_process(rank: int, _: Path) -> None:
    for basis in ("svd", "subspace"):
        for dtype, tolerance in ((torch.float64, {"rtol": 1e-9, "atol": 1e-10}), (torch.bfloat16, None)):
            options = PROJECTED | {"basis": basis}
            model = DistributedDataParallel(mlp(dtype))
            opt = GaLoreAdamW(param_groups(model, targets=r"\d", **_groups(options)), lr=options["lr"])
            before = copy.deepcopy(list(model.parameters()))
            train(model, opt, rank=rank, dtype=dtype)
            assert_equal_on_all_ranks(list(model.parameters()))
            assert_equal_on_all_ranks(opt.state_dict())
            assert not any(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
            if tolerance:
                single = mlp(dtype)
                single_opt = GaLoreAdamW(param_groups(single, targets=r"\d", **_groups(options)), lr=options["lr"])
                train(single, single_opt, dtype=dtype)
                assert_close(model, single, **tolerance)


def replicas_of_every_class_follow_one_process(rank: int, _: Path) -> None:
    """The same directions, columns and roundings on every rank."""
    names = ["muon", "muon-int4", "lowrank-dct", "lowrank-svd", "residual", "trion", "auon", "steepest-int4"]
    names += ["rotate", "reset", "feedback", "random", "adaptive", "identity", "dct", "dct-ages", "dct-int8"]
    names += ["apollo", "apollo-mini", "fira", "fira-code", "ldadam", "ldadam-int4"]
    for name in names:
        way = NAMED[name]
        model = DistributedDataParallel(mlp())
        opt = way(param_groups(model, targets=r"[02]"), lr=0.02, weight_decay=0.1)
        assert [group["role"] for group in opt.param_groups] == ["matrix", "other", "vector"]
        before = copy.deepcopy(list(model.parameters()))
        train(model, opt, rank=rank)
        assert_equal_on_all_ranks(list(model.parameters()))
        assert_equal_on_all_ranks(opt.state_dict())
        assert not any(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        single = mlp()
        train(single, way(param_groups(single, targets=r"[02]"), lr=0.02, weight_decay=0.1))
        assert_close(model, single, rtol=1e-7, atol=1e-8)


def zero_shards_the_state_of_muon(rank: int, _: Path) -> None:
    """By groups that say their roles and rates: it fills in `lr` itself, and takes bare parameters for one group."""
    for name in ("muon", "muon-int4"):
        way, model, single = NAMED[name], DistributedDataParallel(mlp()), mlp()
        options = {**way.options, "lr": 0.02, "weight_decay": 0.1, "fallback_lr": None}

        def sharded(module: nn.Module, options: dict[str, Any] = options) -> ZeroRedundancyOptimizer:
            groups = param_groups(module, other_lr=0.01).unnamed()
            return ZeroRedundancyOptimizer(groups, optimizer_class=Muon, **options)

        opt = sharded(model)
        train(model, opt, rank=rank)
        single_opt = Muon(param_groups(single, other_lr=0.01), **options)
        train(single, single_opt)
        assert_close(model, single, rtol=1e-7, atol=1e-8)
        assert_equal_on_all_ranks(list(model.parameters()))
        held = [p for p in model.parameters() if opt.optim.state.get(p)]
        assert 0 < len(held) < len(list(model.parameters()))
        assert [group["lr"] for group in opt.param_groups] == [group["lr"] for group in single_opt.param_groups]
        opt.consolidate_state_dict(to=0)
        saved: list[Any] = [copy.deepcopy(opt.state_dict()) if rank == 0 else None]
        dist.broadcast_object_list(saved)
        again_model = DistributedDataParallel(copy.deepcopy(model.module))
        again = sharded(again_model)
        again.load_state_dict(copy.deepcopy(saved[0]))
        # one process takes it too
        alone = copy.deepcopy(model.module)
        alone_opt = Muon(param_groups(alone, other_lr=0.01), **options)
        alone_opt.load_state_dict(saved[0])
        later = range(STEPS, STEPS + 4)
        train(model, opt, later, rank=rank)
        train(again_model, again, later, rank=rank)
        train(alone, alone_opt, later)
        assert_close(again_model, model.module, rtol=0, atol=0)
        assert_close(alone, model.module, rtol=1e-7, atol=1e-8)


def zero_follows_one_process(rank: int, _: Path) -> None:
    """Whole parameters on one rank each: without staggering nothing but the place of the state has changed."""
    for basis in ("svd", "subspace"):
        options = PROJECTED | {"basis": basis, "stagger": False}
        model, single = DistributedDataParallel(mlp()), mlp()
        opt = _zero(model, options)
        train(model, opt, rank=rank)
        single_opt = GaLoreAdamW(single.parameters(), **options)
        train(single, single_opt)
        assert_close(model, single, rtol=1e-9, atol=1e-10)
        assert_equal_on_all_ranks(list(model.parameters()))
        held = [p for p in model.parameters() if opt.optim.state.get(p)]
        assert 0 < len(held) < len(list(model.parameters()))
        opt.consolidate_state_dict(to=0)
        # copied, because torch loads this rank's tensors themselves
        saved: list[Any] = [copy.deepcopy(opt.state_dict()) if rank == 0 else None]
        if rank == 0:
            # what is saved is what one process would have saved
            expected = single_opt.state_dict()["state"]
            torch.testing.assert_close(saved[0]["state"], expected, rtol=1e-8, atol=1e-9)
        dist.broadcast_object_list(saved)
        again_model = DistributedDataParallel(copy.deepcopy(model.module))
        again = _zero(again_model, options)
        again.load_state_dict(copy.deepcopy(saved[0]))
        later = range(STEPS, STEPS + 6)
        train(model, opt, later, rank=rank)
        train(again_model, again, later, rank=rank)
        assert_close(again_model, model.module, rtol=0, atol=0)
        # and it is continued by one process
        alone = mlp()
        train(single, single_opt, later)
        alone.load_state_dict(_replayed(options).state_dict())
        alone_opt = GaLoreAdamW(alone.parameters(), **options)
        alone_opt.load_state_dict(saved[0])
        train(alone, alone_opt, later)
        assert_close(alone, single, rtol=1e-8, atol=1e-9)


def staggered_zero_keeps_its_replicas_equal(rank: int, _: Path) -> None:
    """Turns are counted over the matrices that an optimizer holds, so the schedule is not one process's."""
    options = PROJECTED | {"stagger": True}
    model = DistributedDataParallel(mlp())
    opt = _zero(model, options)
    before = copy.deepcopy(list(model.parameters()))
    train(model, opt, range(2 * STEPS), rank=rank)
    assert_equal_on_all_ranks(list(model.parameters()))
    for p, q in zip(before, model.parameters(), strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, q)


def zero_takes_groups(rank: int, _: Path) -> None:
    model, single = DistributedDataParallel(mlp()), mlp()
    options = PROJECTED | {"basis": "subspace", "stagger": False}

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        params = list(module.parameters())
        matrices, rest = [p for p in params if p.dim() > 1], [p for p in params if p.dim() < 2]
        return [{"params": matrices, **options}, {"params": rest, "lr": 0.01}]

    train(model, ZeroRedundancyOptimizer(groups(model), optimizer_class=GaLoreAdamW), rank=rank)
    train(single, GaLoreAdamW(groups(single)))
    assert_close(model, single, rtol=1e-9, atol=1e-10)


def shards_follow_one_process(rank: int, folder: Path) -> None:
    """FSDP2, AdamW groups; one row more than two ranks can share, and a single row that one rank has none of."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for out, lr in ((7, 0.02), (1, torch.tensor(0.02, dtype=torch.float64))):
        model, opt = _sharded(mesh, out, lr)
        single = mlp(out=out)
        train(model, opt, rank=rank)
        train(single, GaLoreAdamW([{"params": single.parameters()}], lr=0.02, weight_decay=0.1))
        assert_close(model, single, rtol=1e-9, atol=1e-10)
        for p in model.parameters():
            assert isinstance(p, DTensor)
            for name in ("exp_avg", "exp_avg_sq"):
                state = opt.state[p][name]
                assert isinstance(state, DTensor)
                assert state.placements == p.placements
                assert state.device_mesh == p.device_mesh
                assert state.to_local().shape == p.to_local().shape
        checkpoint = str(folder / f"out_{out}")
        saved = {"model": get_model_state_dict(model), "opt": get_optimizer_state_dict(model, opt)}
        dcp.save(saved, checkpoint_id=checkpoint)
        fresh, fresh_opt = _sharded(mesh, out, lr)
        loaded = {"model": get_model_state_dict(fresh), "opt": get_optimizer_state_dict(fresh, fresh_opt)}
        dcp.load(loaded, checkpoint_id=checkpoint)
        set_model_state_dict(fresh, loaded["model"])
        set_optimizer_state_dict(fresh, fresh_opt, loaded["opt"])
        for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
            for name, value in opt.state[p].items():
                # this rank's part, so that a value restored on rank 0 alone would show
                local, other = _local(value), _local(fresh_opt.state[q][name])
                assert torch.equal(local, other), (name, rank)
                assert local.dtype == other.dtype
        # one process takes what two have saved
        alone = mlp(out=out)
        alone_opt = GaLoreAdamW([{"params": alone.parameters()}], lr=lr)
        loaded = {"opt": get_optimizer_state_dict(alone, alone_opt)}
        dcp.load(loaded, checkpoint_id=checkpoint, no_dist=True)
        set_optimizer_state_dict(alone, alone_opt, loaded["opt"])
        assert alone_opt.param_groups[0]["weight_decay"] == 0.1
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert all(torch.equal(full(value), alone_opt.state[q][name]) for name, value in opt.state[p].items())
        later = range(STEPS, STEPS + 4)
        train(model, opt, later, rank=rank)
        train(fresh, fresh_opt, later, rank=rank)
        for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(_local(p.detach()), _local(q.detach()))


def projected_shards_are_refused(_: int, __: Path) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    model = mlp()
    fully_shard(model, mesh=mesh)
    with pytest.raises(RuntimeError, match=r"GaLoreAdamW: a DTensor parameter .* cannot be projected.*Keep it in"):
        GaLoreAdamW(model.parameters(), rank=2)
    opt = GaLoreAdamW([{"params": model[0].parameters()}])
    with pytest.raises(RuntimeError, match="cannot be projected"):
        opt.add_param_group({"params": model[2].parameters(), "rank": 2})
    # the failed group has left no trace
    assert len(opt.param_groups) == 1
    assert len(opt.state) == 2


def projected_shards_of_every_class_are_refused(_: int, __: Path) -> None:
    """Also where no basis is kept, and all that is has the shape of the parameter; AdamW beside them works."""
    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    for make in (DCTAdamW, APOLLOAdamW, FiraAdamW, LDAdamW):
        message = rf"{make.__name__}: a DTensor parameter .* cannot be projected"
        for rank in (2, 1.0):
            with pytest.raises(RuntimeError, match=message):
                make(matrices, rank=rank)
        opt = make([{"params": model.parameters()}], lr=0.01)
        assert all(isinstance(state["exp_avg"], DTensor) for state in opt.state.values())
        model(batch(0, torch.float64)).square().mean().backward()
        opt.step()
    with pytest.raises(RuntimeError, match="cannot be projected"):
        APOLLOAdamW(matrices, rank=1.0, norm_growth=None)


def projected_square_shards_are_refused(_: int, __: Path) -> None:
    """Where basis and coordinates happen to have the shape of the parameter."""
    model = nn.Linear(8, 8, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    with pytest.raises(RuntimeError, match="cannot be projected"):
        GaLoreAdamW(model.parameters(), rank=1.0)


def shards_of_matrices_are_refused(_: int, __: Path) -> None:
    """At construction, and AdamW beside them works."""
    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    for make in (Muon, LowRankMuon, Trion, AuON, SteepestDescent):
        message = rf"{make.__name__}: a DTensor parameter .* cannot be projected or orthogonalized"
        with pytest.raises(RuntimeError, match=message):
            make(matrices)
        if make is SteepestDescent:
            continue
        opt = make([{"params": model.parameters(), "role": "other"}], fallback_lr=0.01)
        assert all(isinstance(state["exp_avg"], DTensor) for state in opt.state.values())
        model(batch(0, torch.float64)).square().mean().backward()
        opt.step()
        fresh = nn.Linear(4, 6)
        fully_shard(fresh, mesh=init_device_mesh("cpu", (WORLD,)))
        with pytest.raises(RuntimeError, match=message):
            opt.add_param_group({"params": fresh.parameters()})
        assert len(opt.param_groups) == 1


def shards_of_coded_moments_are_refused(_: int, __: Path) -> None:
    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    for state_dtype in ("bfloat16", "int8", "int4"):
        with pytest.raises(
            RuntimeError, match=f"GaLoreAdamW: state_dtype='{state_dtype}' cannot be kept for a DTensor"
        ):
            GaLoreAdamW([{"params": model.parameters()}], state_dtype=state_dtype)


def shards_of_bfloat16_weights_are_rounded_stochastically(_: int, __: Path) -> None:
    """Steps of 1e-4 of weights of one, which vanish otherwise."""
    means = []
    for stochastic_rounding in (False, True):
        model = mlp(torch.bfloat16)
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
        weight = next(model.parameters())
        with torch.no_grad():
            weight.fill_(1.0)
        opt = GaLoreAdamW([{"params": [weight]}], lr=1e-4, stochastic_rounding=stochastic_rounding)
        for _ in range(200):
            weight.grad = torch.ones_like(weight)
            opt.step()
        means.append(full(weight.detach()).float().mean().item())
    assert means[0] == 1
    assert 1 - means[1] == pytest.approx(0.02, rel=0.3)


def fsdp1_is_refused(_: int, __: Path) -> None:
    for groups in ({"rank": 2}, {}):
        model = FullyShardedDataParallel(mlp(torch.float32), device_id=torch.device("cpu"), use_orig_params=False)
        with pytest.raises(RuntimeError, match=r"GaLoreAdamW: got a flattened parameter .*Use FSDP2"):
            GaLoreAdamW([{"params": model.parameters(), **groups}])


def fsdp1_with_original_parameters_is_refused(_: int, __: Path) -> None:
    """They keep their names and lose their shapes: one-dimensional views of a flat shard."""
    model = FullyShardedDataParallel(mlp(torch.float32), device_id=torch.device("cpu"), use_orig_params=True)
    assert all(p.dim() == 1 for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"GaLoreAdamW: got a flattened parameter .*Use FSDP2"):
        GaLoreAdamW(model.parameters(), rank=2)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    "work",
    [
        replicas_follow_one_process,
        replicas_of_every_class_follow_one_process,
        zero_shards_the_state_of_muon,
        zero_follows_one_process,
        staggered_zero_keeps_its_replicas_equal,
        zero_takes_groups,
        shards_follow_one_process,
        projected_shards_are_refused,
        projected_shards_of_every_class_are_refused,
        projected_square_shards_are_refused,
        shards_of_matrices_are_refused,
        shards_of_coded_moments_are_refused,
        shards_of_bfloat16_weights_are_rounded_stochastically,
        fsdp1_is_refused,
        fsdp1_with_original_parameters_is_refused,
    ],
    ids=lambda work: work.__name__,
)
def test_two_ranks(work: Callable[[int, Path], None], ranks: Ranks, tmp_path: Path) -> None:
    assert WORLD == 2
    ranks.run(work, tmp_path)


def _groups(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "lr"}


def _zero(model: nn.Module, options: dict[str, Any]) -> ZeroRedundancyOptimizer:
    return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=GaLoreAdamW, **options)


def _sharded(mesh: Any, out: int, lr: float | Tensor) -> tuple[nn.Sequential, GaLoreAdamW]:
    model = mlp(out=out)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, GaLoreAdamW([{"params": model.parameters()}], lr=lr, weight_decay=0.1)


def _replayed(options: dict[str, Any]) -> nn.Module:
    model = mlp()
    train(model, GaLoreAdamW(model.parameters(), **options))
    return model


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
