"""The contract of the step loop: what it reads, what it writes, what it needs, and what it survives."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from lowrank_optim import MFAC, GaLoreAdamW, LDAdamW, LowRankMuon, Trion, ops, reference, reference_apply
from lowrank_optim._types import HOST
from lowrank_optim._warn import warn_once
from lowrank_optim.optimizer import RuleOptimizer
from lowrank_optim.rules import Projected
from tests.small_model import ALL, CLASSES, WAYS

# one way is AdamW alone, which the optimizer remarks on
pytestmark = pytest.mark.filterwarnings("ignore:GaLoreAdamW. no parameter group has a rank:RuntimeWarning")


def projected(*params, lr=1e-2, **options):
    return GaLoreAdamW(list(params), lr=lr, **{"rank": 3, "update_proj_gap": 5, **options})


def matrix(m=12, n=8, dtype=torch.float32):
    return nn.Parameter(torch.randn(m, n, dtype=dtype))


def step(opt, *grads):
    params = [p for g in opt.param_groups for p in g["params"]]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    opt.step()


@pytest.fixture
def _said_nothing():
    warn_once.cache_clear()


class _HostSyncError(AssertionError):
    pass


@pytest.fixture
def no_host_sync(monkeypatch):
    def refuse(name, real, known):
        def method(self, *args, **kwargs):
            if self.untyped_storage().data_ptr() in known:
                return real(self, *args, **kwargs)
            raise _HostSyncError(name)

        return method

    def forbid(opt):
        """All but what is on the CPU wherever the parameters are."""
        known = {v.untyped_storage().data_ptr() for s in opt.state.values() for n, v in s.items() if n in HOST}
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "__array__"):
            monkeypatch.setattr(torch.Tensor, name, refuse(name, getattr(torch.Tensor, name), known))

    yield forbid
    monkeypatch.undo()


@pytest.mark.parametrize(("dtype", "lr"), [(torch.float32, torch.tensor(1e-2)), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("way", [way for way in WAYS if way.values[0].kind is not MFAC])
def test_no_host_sync_between_refreshes(no_host_sync, way, dtype, lr):
    """A basis that asks nothing of the gradient is refreshed within that, at each step.

    LDAdam's asks at each step, once for a bucket; with that question answered its refreshes ask nothing more. M-FAC
    asks of each gradient whether it may enter the window.
    """
    params = [matrix(dtype=dtype), matrix(8, 12, dtype), nn.Parameter(torch.ones(5, dtype=dtype))]
    opt = way(params, weight_decay=0.1, **way.rates(lr), **way.seldom(10))
    step(opt, *[torch.randn_like(p) for p in params])
    grads = [[torch.randn_like(p) for p in params] for _ in range(9)]
    before = [p.detach().clone() for p in params]
    no_host_sync(opt)
    with pytest.MonkeyPatch.context() as answered:
        if way.kind is LDAdamW:
            answered.setattr(Projected, "_sizes", lambda _, grads: [1.0] * len(grads))
        for some in grads:
            step(opt, *some)
    with pytest.raises(_HostSyncError):
        # a refresh boundary, or somebody who reads: the forbidden calls are really caught
        step(opt, *grads[0]) if way.guarded else params[0].sum().item()
    assert not any(torch.equal(a, p) for a, p in zip(before, params, strict=True))


def test_refreshes_take_turns():
    """With a period of 10 and 5 matrices no step after the first refreshes more than one."""
    params = [matrix() for _ in range(5)]
    opt = projected(*params, update_proj_gap=10)
    moved = []
    for _ in range(31):
        before = [opt.state[p]["basis"].clone() for p in params]
        step(opt, *[torch.randn_like(p) for p in params])
        moved.append([not torch.equal(b, opt.state[p]["basis"]) for b, p in zip(before, params, strict=True)])
    assert moved[0] == [True] * 5
    assert all(sum(now) <= 1 for now in moved[1:])
    for i in range(5):
        turns = [t for t, now in enumerate(moved) if now[i] and t > 0]
        assert turns == list(range(2 * i + 1, 31, 10))


def test_without_stagger_refreshes_are_galores():
    p = matrix()
    opt = projected(p, stagger=False, update_proj_gap=7)
    moved = []
    for t in range(22):
        before = opt.state[p]["basis"].clone()
        step(opt, torch.randn_like(p))
        if not torch.equal(before, opt.state[p]["basis"]):
            moved.append(t)
    assert moved == [0, 7, 14, 21]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.usefixtures("_said_nothing")
def test_a_refresh_that_meets_nan_waits_and_says_so_once(bad):
    """The matrix and its step stay as they are, the others go on, and the refresh is tried at the next step."""
    hurt, well = matrix(), matrix()
    opt = projected(hurt, well, stagger=False, update_proj_gap=4)
    for _ in range(4):
        step(opt, torch.randn_like(hurt), torch.randn_like(well))
    before = [hurt.detach().clone(), well.detach().clone()]
    state = copy.deepcopy(dict(opt.state[hurt]))
    poisoned = torch.randn_like(hurt)
    poisoned[2, 3] = bad
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            step(opt, poisoned, torch.randn_like(well))
    assert [str(w.message) for w in said] == [str(said[0].message)]
    assert "held NaN, Inf" in str(said[0].message)
    assert torch.equal(hurt, before[0])
    assert not torch.equal(well, before[1])
    for name, value in state.items():
        assert torch.equal(opt.state[hurt][name], value)
    step(opt, torch.randn_like(hurt), torch.randn_like(well))
    assert not torch.equal(opt.state[hurt]["basis"], state["basis"])
    assert torch.isfinite(hurt).all()
    assert not torch.equal(hurt, before[0])


@pytest.mark.usefixtures("_said_nothing")
def test_a_decomposition_that_fails_keeps_the_old_basis(monkeypatch):
    """LAPACK gives up on a finite gradient: the step is made in the old basis. The failure is injected into torch."""
    p = matrix()
    opt = projected(p, stagger=False, update_proj_gap=2)
    for _ in range(2):
        step(opt, torch.randn_like(p))
    basis, weight = opt.state[p]["basis"].clone(), p.detach().clone()

    def fail(*_args, **_kwargs):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    with pytest.warns(RuntimeWarning, match="could not be refreshed .failed to converge.*old one serves"):
        step(opt, torch.randn_like(p))
    assert torch.equal(opt.state[p]["basis"], basis)
    assert not torch.equal(p, weight)
    assert opt.state[p]["step"] == 3


@pytest.mark.parametrize("basis", ["svd", "subspace"])
def test_a_matrix_waits_for_its_first_nonzero_gradient(basis):
    """As zero-initialized branches give it; the first real gradient then sets the basis."""
    p = matrix()
    opt = projected(p, basis=basis, weight_decay=0.1)
    before = p.detach().clone()
    for _ in range(3):
        step(opt, torch.zeros_like(p))
    assert torch.equal(p, before)
    assert opt.state[p]["step"] == 0
    step(opt, torch.randn_like(p))
    gram = opt.state[p]["basis"] @ opt.state[p]["basis"].mT
    torch.testing.assert_close(gram, torch.eye(3), rtol=0, atol=1e-5)
    assert not torch.equal(p, before)


def test_zero_gradients_later_keep_the_basis_and_go_on():
    p = matrix()
    opt = projected(p, stagger=False, update_proj_gap=3)
    for _ in range(3):
        step(opt, torch.randn_like(p))
    basis = opt.state[p]["basis"].clone()
    step(opt, torch.zeros_like(p))
    assert torch.equal(opt.state[p]["basis"], basis)
    assert opt.state[p]["step"] == 4
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_lr_zero_leaves_weights_bit_identical(lr, dtype):
    params = [matrix(dtype=dtype), nn.Parameter(torch.randn(7, dtype=dtype))]
    opt = projected(*params, lr=lr, weight_decay=0.1)
    before = [p.detach().clone() for p in params]
    for _ in range(7):
        step(opt, *[torch.randn_like(p) for p in params])
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


@pytest.mark.parametrize("basis", ["svd", "subspace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maximize_is_minimizing_the_negated_loss_bit_for_bit(basis, dtype):
    start = [torch.randn(12, 8, dtype=dtype), torch.randn(6, dtype=dtype)]
    up, down = ([nn.Parameter(s.clone()) for s in start] for _ in range(2))
    opts = projected(*up, basis=basis, maximize=True), projected(*down, basis=basis)
    for _ in range(12):
        grads = [torch.randn_like(p) for p in up]
        step(opts[0], *grads)
        step(opts[1], *[-g for g in grads])
    assert all(torch.equal(a, b) for a, b in zip(up, down, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_never_written_and_the_global_generator_never_used(way):
    params = [matrix(), matrix(8, 12, torch.bfloat16), nn.Parameter(torch.ones(5))]
    opt = way(params)
    if "stochastic_rounding" in opt.defaults:
        opt = way(params, stochastic_rounding=True)
    for _ in range(7):
        grads = [torch.randn_like(p) for p in params]
        copies = [g.clone() for g in grads]
        random = torch.get_rng_state()
        step(opt, *grads)
        assert torch.equal(random, torch.get_rng_state())
        for p, grad, kept in zip(params, grads, copies, strict=True):
            assert p.grad is grad
            assert torch.equal(grad, kept)


@pytest.mark.parametrize("chunk", [1, 4096])
@pytest.mark.parametrize("way", WAYS)
def test_the_size_of_a_chunk_changes_nothing(monkeypatch, way, chunk):
    def run():
        torch.manual_seed(3)
        params = [matrix() for _ in range(5)] + [matrix(8, 12), nn.Parameter(torch.ones(4))]
        opt = way(params, lr=0.01)
        for _ in range(8):
            step(opt, *[torch.randn_like(p) for p in params])
        return params

    expected = run()
    monkeypatch.setattr(RuleOptimizer, "chunk_bytes", chunk)
    for a, b in zip(expected, run(), strict=True):
        if way.adam:
            assert torch.equal(a, b)
        else:
            # products of a stack need not be, bit for bit, those of its matrices
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_frozen_parameter_has_no_state_until_it_trains():
    frozen, free = matrix().requires_grad_(False), matrix()
    opt = projected(frozen, free)
    assert frozen not in opt.state
    frozen.requires_grad_(True)
    step(opt, torch.randn_like(frozen), torch.randn_like(free))
    assert opt.state[frozen]["step"] == 1


def test_a_parameter_without_a_gradient_is_left_alone():
    used, unused = matrix(), matrix()
    opt = projected(used, unused)
    before = unused.detach().clone()
    step(opt, torch.randn_like(used), None)
    assert torch.equal(unused, before)
    assert opt.state[unused]["step"] == 0
    assert opt.state[used]["step"] == 1


@pytest.mark.parametrize("there", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_the_state_follows_a_model_there_and_back(way, there):
    net = nn.Linear(8, 12)
    opt = way(net.parameters())
    for dtype in (torch.float32, there, torch.float32):
        net.to(dtype)
        for _ in range(3):
            net.zero_grad()
            net(torch.randn(4, 8, dtype=dtype)).square().sum().backward()
            opt.step()
        fresh = nn.Linear(8, 12, dtype=dtype)
        need = {name: value.dtype for name, value in way(fresh.parameters()).state[fresh.weight].items()}
        assert {name: value.dtype for name, value in opt.state[net.weight].items()} == need
    assert opt.state[net.weight]["step"] == 9
    assert torch.isfinite(net.weight).all()


@pytest.mark.parametrize("way", CLASSES)
def test_a_default_dtype_or_device_does_not_reach_the_state(way):
    p = matrix()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            opt = way([p])
        step(opt, torch.randn_like(p))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {v.device.type for v in opt.state[p].values()} == {"cpu"}
    kept = {k: v.dtype for k, v in opt.state[p].items() if k not in HOST and not k.startswith("gram")}
    assert set(kept.values()) <= {torch.float32, torch.int32}


# several matrices in one parameter, equal ones and not, for those who take them
LAYOUTS = {"whole": {}, "stacked": {"flatten": False}, "split": {"split": (4, 4, 4)}, "unequal": {"split": (2, 3, 7)}}
_ONE_BASIS = (LowRankMuon, Trion)
LAID_OUT = [(way, layout) for way in ALL for layout in LAYOUTS if layout == "whole" or way.kind not in _ONE_BASIS]
laid_out_ways = pytest.mark.parametrize(("way", "layout"), LAID_OUT, ids=[f"{way.name}-{how}" for way, how in LAID_OUT])


def laid_out(way, layout, device="cpu"):
    shapes = [(2, 6, 10) if layout == "stacked" else (12, 8), (5,)]
    params = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    return way([{"params": params, **LAYOUTS[layout]}])


def on_the_host(names):
    """Those of HOST, which have a number at the end where they are of a further block of a split."""
    return {name for name in names if re.sub(r"_\d+$", "", name) in HOST}


@laid_out_ways
def test_what_is_allocated_for_the_host_is_what_is_named_so(way, layout):
    opt = laid_out(way, layout)
    for group in opt.param_groups:
        for p in group["params"]:
            hosted = []

            def new(shape, dtype=None, *, host=False, hosted=hosted):
                hosted.append((torch.zeros(tuple(shape), dtype=dtype), host))
                return hosted[-1][0]

            state = opt._rule(group, p).init(p.shape, new)
            found = {name for name, value in state.items() if any(host and value is x for x, host in hosted)}
            assert found == on_the_host(state)
            assert on_the_host(opt.state[p]) == found | {"step"}


def test_every_name_of_the_host_is_some_ways():
    opts = [laid_out(way, layout) for way, layout in LAID_OUT]
    found = {re.sub(r"_\d+$", "", n) for opt in opts for s in opt.state.values() for n in on_the_host(s)}
    assert found == HOST


@laid_out_ways
def test_what_the_host_reads_stays_there_when_a_model_moves(monkeypatch, way, layout):
    """To a device without memory, and back: what was lost there begins anew."""
    # a model that is moved keeps its parameters, as between devices that have memory
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    module = nn.Module()
    opt = laid_out(way, layout)
    module.params = nn.ParameterList([p for g in opt.param_groups for p in g["params"]])
    for _ in range(3):
        for p in module.parameters():
            p.grad = torch.randn_like(p)
        opt.step()
    before = [{k: v.clone() for k, v in opt.state[p].items()} for p in module.parameters()]
    opt.zero_grad()
    module.to("meta")
    for kept, p in zip(before, module.parameters(), strict=True):
        (group,) = (group for group in opt.param_groups if any(p is q for q in group["params"]))
        opt._follow(p, group)
        state = opt.state[p]
        assert {name for name, value in state.items() if not value.is_meta} == on_the_host(kept)
        assert all(torch.equal(state[name], kept[name]) for name in on_the_host(kept))
        # and there they are followed no further
        opt._follow(p, group)
        assert all(opt.state[p][name] is value for name, value in state.items())
    # as does a model that is made there
    there = laid_out(way, layout, "meta")
    for state in there.state.values():
        assert {name for name, value in state.items() if not value.is_meta} == on_the_host(state)
    module.to_empty(device="cpu")
    for p in module.parameters():
        nn.init.zeros_(p)
        p.grad = torch.randn_like(p)
    opt.step()
    for p in module.parameters():
        assert {value.device.type for value in opt.state[p].values()} == {"cpu"}
        lost = on_the_host(opt.state[p]) < set(opt.state[p])
        assert opt.state[p]["step"] == (1 if lost else 4)
        assert p.isfinite().all()


def test_a_step_inside_autocast_is_an_ordinary_step():
    start = torch.randn(12, 8)
    inside, outside = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    opts = projected(inside), projected(outside)
    for _ in range(6):
        grad = torch.randn(12, 8)
        with torch.autocast("cpu", torch.bfloat16):
            step(opts[0], grad)
        step(opts[1], grad)
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("lr", [torch.tensor([1e-2]), torch.tensor([[1e-2]], dtype=torch.float64)])
@pytest.mark.parametrize("shape", [(), (3,), (12, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tensor_lr_of_any_shape_and_dtype(lr, shape, dtype):
    start = torch.randn(shape, dtype=dtype)
    got, expected = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    opts = projected(got, lr=lr, weight_decay=0.1), projected(expected, lr=lr.item(), weight_decay=0.1)
    for _ in range(3):
        grad = torch.randn(shape, dtype=dtype)
        step(opts[0], grad)
        step(opts[1], grad)
    torch.testing.assert_close(got, expected)
    assert got.shape == start.shape


def test_a_rank_that_is_changed_later_is_refused():
    p = matrix()
    opt = projected(p)
    step(opt, torch.randn_like(p))
    opt.param_groups[0]["rank"] = 2
    with pytest.raises(RuntimeError, match="has changed since its state was made"):
        step(opt, torch.randn_like(p))


def test_a_sparse_gradient_is_refused_before_anything_is_updated():
    dense, embedding = nn.Linear(4, 6, bias=False), nn.Embedding(10, 4, sparse=True)
    opt = projected(*dense.parameters(), *embedding.parameters())
    before = dense.weight.detach().clone()
    dense(embedding(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert torch.equal(dense.weight, before)


@pytest.mark.usefixtures("_said_nothing")
def test_an_optimizer_without_any_rank_says_that_it_is_adamw():
    with pytest.warns(RuntimeWarning, match="no parameter group has a rank"):
        GaLoreAdamW([{"params": [matrix()]}])


def test_the_step_tensor_is_the_truth():
    """The host's copy of it follows when somebody else writes to the tensor, or replaces it."""
    p = matrix()
    opt = projected(p, stagger=False, update_proj_gap=5)
    step(opt, torch.randn_like(p))
    opt.state[p]["step"].fill_(5)
    basis = opt.state[p]["basis"].clone()
    step(opt, torch.randn_like(p))
    assert opt.state[p]["step"] == 6
    assert not torch.equal(opt.state[p]["basis"], basis)
    opt.state[p]["step"] = torch.tensor(10.0)
    basis = opt.state[p]["basis"].clone()
    step(opt, torch.randn_like(p))
    assert opt.state[p]["step"] == 11
    assert not torch.equal(opt.state[p]["basis"], basis)


@pytest.mark.parametrize("way", WAYS)
def test_state_is_eager_and_of_tensors_only(way):
    params = [matrix(), nn.Parameter(torch.ones(4)), nn.Parameter(torch.tensor(2.0))]
    opt = way(params)
    keys = {p: {k: (v.shape, v.dtype) for k, v in opt.state[p].items()} for p in params}
    for _ in range(6):
        step(opt, *[torch.randn_like(p) for p in params])
    assert keys == {p: {k: (v.shape, v.dtype) for k, v in opt.state[p].items()} for p in params}
    assert all(isinstance(v, torch.Tensor) for s in opt.state.values() for v in s.values())
    names = {"step", "exp_avg", "exp_avg_sq", "momentum_buffer", "row_avg_sq", "column_step", "error", "update_norm"}
    names |= {"basis", "basis_index", "basis_seed", "basis_due"}
    names |= {"window", "window_index", "window_step", "window_refused", "window_careful", "gram", "gram_inverse"}
    assert {name.removesuffix("_scale") for s in opt.state.values() for name in s} <= names
    plain = (int, float, str, bool, tuple, list, type(None))
    assert all(isinstance(v, plain) for g in opt.state_dict()["param_groups"] for v in g.values())


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was():
    p, q = matrix(), matrix()
    opt = projected(p)
    with pytest.raises(ValueError, match="rank: 0"):
        opt.add_param_group({"params": [q], "rank": 0})
    assert len(opt.param_groups) == 1
    assert q not in opt.state
    opt.add_param_group({"params": [q], "rank": 2})
    step(opt, torch.randn_like(p), torch.randn_like(q))
    assert opt.state[q]["exp_avg"].shape == (12, 2)


@pytest.mark.parametrize("way", CLASSES)
def test_what_cannot_be_optimized_is_refused_with_its_fix(way):
    name = way.kind.__name__
    with pytest.raises(RuntimeError, match=f"{name} does not support complex parameters.*view_as_real"):
        way([nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))])
    embedding = nn.Embedding(10, 4, sparse=True)
    opt = way(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=f"{name} does not support sparse gradients.*SparseAdam"):
        opt.step()
    if way.kind is not MFAC:
        # which has no use for the shape of a matrix
        with pytest.raises(RuntimeError, match="flattened model.*FSDP2 or ZeroRedundancyOptimizer"):
            way([{"params": [nn.Parameter(torch.zeros(1 << 20))]}])
    flat = nn.Parameter(torch.zeros(6))
    flat.ds_id = 0
    with pytest.raises(RuntimeError, match="lost its matrix shape.*fully_shard"):
        way([flat])


def peak_extra_bytes(call):
    """The largest number of bytes that `call` held at once beyond what was held before, as the allocator saw it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_the_meter_of_peaks_sees_a_known_temporary():
    x = torch.ones(1000, 1000)
    assert peak_extra_bytes(lambda: (x + 1).add_(1)) == pytest.approx(4e6, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [16, None])
def test_a_step_needs_at_most_one_chunk(monkeypatch, dtype, rank):
    """Peak extra memory of ordinary and of refreshing steps, with far more parameters than fit a chunk."""
    assert_bounded(
        monkeypatch,
        dtype,
        lambda params: GaLoreAdamW([{"params": params, "rank": rank, "update_proj_gap": 100, "basis": "svd"}]),
        steps=6,
        shapes=[(256, 512)] * 12 + [(512, 256)] * 12,
        chunk=4 << 20,
    )


@pytest.fixture
def _small_parts(monkeypatch):
    """What is taken in parts is as small beside the chunks of these tests as it is beside those of training."""
    for module in (ops, reference):
        monkeypatch.setattr(module, "part_size", lambda _: 2048)
    monkeypatch.setattr(reference_apply, "_BLOCK", 2048)


IN_COORDINATES = [way for way in WAYS if way.values[0].adam and way.values[0].options]


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("way", IN_COORDINATES)
def test_a_step_in_coordinates_needs_at_most_one_chunk(monkeypatch, way):
    """Several to a chunk, in steps with and without a refresh; some parameters hold several matrices."""
    dtype = torch.bfloat16
    options = {"rank": 16, "stochastic_rounding": True}
    shapes = [(64, 128)] * 10 + [(128, 64)] * 10
    assert_bounded(monkeypatch, dtype, lambda params: way(params, **options), 3, shapes, chunk=300_000)
    shapes = [(4, 32, 64)] * 20

    def stacked(params):
        return way([{"params": params[:10], "flatten": False}, {"params": params[10:], "split": (1, 1, 2)}], **options)

    assert_bounded(monkeypatch, dtype, stacked, 3, shapes, chunk=280_000)


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("layout", [{}, {"split": (96, 32)}])
# a decomposition, which is not counted, needs more where there is only one matrix
@pytest.mark.parametrize("way", [way for way in IN_COORDINATES if "svd" not in way.values[0].basis])
def test_a_step_of_one_matrix_needs_what_is_counted(way, layout):
    p = nn.Parameter(torch.randn(128, 64, dtype=torch.bfloat16))
    opt = way([{"params": [p], **layout}], rank=16, stochastic_rounding=True)
    p.grad = torch.randn_like(p)
    # which makes what all later ones use
    opt.step()
    need = 4 * opt._rule(opt.param_groups[0], p).need(p.shape)
    # and indices and norms
    assert max(peak_extra_bytes(opt.step) for _ in range(4)) <= 1.02 * need


@pytest.mark.parametrize("way", [way for way in WAYS if way.values[0].falls_back])
def test_a_step_on_whole_matrices_needs_at_most_one_chunk(monkeypatch, way):
    """Several to a chunk, of weights whose float32 gradients are temporaries too; plain ones need less."""
    options = {"stochastic_rounding": True}
    if way.options.get("rank"):
        options["rank"] = 16
    if "ns_steps" not in way.options:
        # the second needs what all others need
        options["ns_steps"] = 0 if way.name == "auon" else 2
    shapes = [(64, 128)] * 25 + [(128, 64)] * 25 + [(96, 96)] * 25
    assert_bounded(monkeypatch, torch.bfloat16, lambda params: way(params, **options), 2, shapes, chunk=1 << 20)


def assert_bounded(monkeypatch, dtype, make, steps, shapes, chunk):
    monkeypatch.setattr(RuleOptimizer, "chunk_bytes", chunk)
    params = [nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in shapes]
    opt = make(params)
    for p in params:
        p.grad = torch.randn_like(p)
    peaks = []
    for _ in range(steps):
        peaks.append(peak_extra_bytes(opt.step))
    assert sum(p.numel() * 4 for p in params) > 2 * chunk
    assert max(peaks) <= chunk, peaks
