"""Several matrices in one parameter: each as if it were alone, and the state under names and shapes of its own."""

import io
import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from lowrank_optim import DCTAdamW, GaLoreAdamW, state_bytes
from lowrank_optim._types import Tick
from lowrank_optim.pieces import Pieces
from lowrank_optim.steering import Layout

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
# shape, layout, and the stacks of equal matrices that it holds
LAYOUTS = {
    "experts": ((3, 12, 8), {"flatten": False}, [[*range(3)]]),
    "experts of 4-D": ((2, 3, 8, 12), {"flatten": False}, [[*range(6)]]),
    "one": ((12, 8), {"flatten": False}, [[0]]),
    "fused": ((24, 10), {"split": 3}, [[0, 1, 2]]),
    "grouped": ((20, 8), {"split": (12, 4, 4)}, [[0], [1], [2]]),
    "fused experts": ((2, 24, 10), {"flatten": False, "split": 3}, [[*range(6)]]),
    "grouped experts": ((2, 20, 8), {"flatten": False, "split": [12, 4, 4]}, [[0, 1], [2, 3], [4, 5]]),
}
KINDS = {
    "dct": (DCTAdamW, {}),
    "dct-feedback": (DCTAdamW, {"error_feedback": "float32", "column_ages": True, "update_proj_gap": 2}),
    "svd": (GaLoreAdamW, {"update_proj_gap": 3}),
    "subspace": (GaLoreAdamW, {"update_proj_gap": 2, "basis": "subspace", "carry": "rotate"}),
    "adaptive": (GaLoreAdamW, {"update_proj_gap": 2, "adaptive_overlap": 0.3}),
    "fira": (GaLoreAdamW, {"update_proj_gap": 2, "residual": "fira", "carry": "reset"}),
}
ALL = [(kind, layout) for kind in KINDS for layout in LAYOUTS]
RANK = 2


def optimizer(kind, params, **options):
    cls, own = KINDS[kind]
    return cls([{"params": params, "rank": RANK, **options}], stagger=False, **{**HYPER, **own})


def cut(x, layout):
    """The matrices of a parameter, in the order of its stacks, as copies."""
    if isinstance(layout.get("split"), int):
        # blocks of one matrix stay together
        parts = x.unflatten(-2, (layout["split"], -1)).flatten(0, -3)
        return [part.clone() for part in parts]
    blocks = x.flatten(0, -3).unsqueeze(1) if x.dim() > 2 else x.view(1, 1, *x.shape)
    blocks = torch.split(blocks, list(layout.get("split") or [x.size(-2)]), dim=-2)
    return [part.squeeze(0).clone() for block in blocks for part in block]


def named(state, stacks):
    """The state of each matrix, under the names of one that is alone."""
    found = {}
    for place, stack in enumerate(stacks):
        ending = f"_{place}" if place else ""
        names = {name for name in state if name != "step" and name.removesuffix(ending) + ending == name}
        if not place:
            names = {name for name in names if name[-2:] not in ("_1", "_2")}
        for j, i in enumerate(stack):
            found[i] = {name.removesuffix(ending): state[name][j] for name in names}
    return found


def gradients(shape, count, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize(("kind", "layout"), ALL)
def test_each_matrix_is_treated_as_if_it_were_alone(kind, layout):
    shape, options, stacks = LAYOUTS[layout]
    start = torch.randn(shape, dtype=torch.float64)
    p, alone = nn.Parameter(start.clone()), [nn.Parameter(x) for x in cut(start, options)]
    together, apart = optimizer(kind, [p], **options), optimizer(kind, alone)
    for step, grad in enumerate(gradients(shape, 9), 1):
        p.grad = grad.clone()
        for q, part in zip(alone, cut(grad, options), strict=True):
            q.grad = part
        together.step()
        apart.step()
        assert torch.equal(p.grad, grad)
        for q, part in zip(alone, cut(p.detach(), options), strict=True):
            torch.testing.assert_close(q.detach(), part, rtol=0, atol=1e-12)
        assert together.state[p]["step"].item() == step
    for i, own in named(together.state[p], stacks).items():
        theirs = apart.state[alone[i]]
        assert own.keys() - {"piece_step"} == theirs.keys() - {"step"}
        assert own["piece_step"].item() == theirs["step"].item() == 9
        for name in own.keys() - {"piece_step"}:
            assert own[name].dtype == theirs[name].dtype
            torch.testing.assert_close(own[name].view_as(theirs[name]), theirs[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["svd", "subspace", "adaptive"])
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("layout", ["experts", "grouped", "grouped experts"])
@pytest.mark.filterwarnings("ignore:a gradient held NaN:RuntimeWarning")
def test_an_expert_without_a_gradient_sits_out_alone(kind, value, layout):
    """An expert that gets no token has zeros, and starts at its first gradient."""
    shape, options, stacks = LAYOUTS[layout]
    start = torch.randn(shape, dtype=torch.float64)
    p, alone = nn.Parameter(start.clone()), [nn.Parameter(x) for x in cut(start, options)]
    opts = [optimizer(kind, [p], weight_decay=0.0, **options), optimizer(kind, alone, weight_decay=0.0)]
    idle = 1

    def advance(grad):
        p.grad = grad
        for q, part in zip(alone, cut(grad, options), strict=True):
            q.grad = part
        for opt in opts:
            opt.step()
        for q, part in zip(alone, cut(p.detach(), options), strict=True):
            torch.testing.assert_close(q.detach(), part, rtol=0, atol=1e-12)
        return [int(own["piece_step"]) for own in map(named(opts[0].state[p], stacks).get, range(len(alone)))]

    # in place: what is cut is a view of the parameter's own gradient
    views = Layout(options.get("flatten", True), options.get("split"))
    for step, grad in enumerate(gradients(shape, 3), 1):
        blocks = [block[0] for block in views.blocks(grad.unsqueeze(0))]
        flat = [part for block in blocks for part in block]
        flat[idle].fill_(value)
        assert advance(grad) == [0 if i == idle else step for i in range(len(alone))]
        assert torch.equal(cut(p.detach(), options)[idle], cut(start, options)[idle])
    for step, grad in enumerate(gradients(shape, 5, seed=1), 1):
        assert advance(grad) == [step if i == idle else step + 3 for i in range(len(alone))]
    assert not torch.equal(cut(p.detach(), options)[idle], cut(start, options)[idle])
    # zeros later on are gradients like any other
    assert advance(torch.zeros(shape, dtype=torch.float64))[0] == 9
    assert opts[0].state[p]["step"].item() == 9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_all_sit_out_nothing_happens(layout):
    shape, options, _ = LAYOUTS[layout]
    p = nn.Parameter(torch.ones(shape))
    opt = optimizer("svd", [p], **options)
    p.grad = torch.zeros(shape)
    opt.step()
    assert torch.equal(p, torch.ones(shape))
    assert all((value == 0).all() for value in opt.state[p].values())


def test_what_is_kept_has_these_names_and_shapes():
    experts, fused, grouped = (nn.Parameter(torch.zeros(LAYOUTS[name][0])) for name in ("experts", "fused", "grouped"))
    groups = [
        {"params": [p], "rank": 2, **LAYOUTS[name][1]}
        for name, p in (("experts", experts), ("fused", fused), ("grouped", grouped))
    ]
    opt = GaLoreAdamW(groups)
    moments = ("exp_avg", "exp_avg_sq")

    def shapes(p):
        return {name: tuple(value.shape) for name, value in opt.state[p].items()}

    one = {"step": (), "piece_step": (3,), "basis": (3, 2, 8), **dict.fromkeys(moments, (3, 12, 2))}
    assert shapes(experts) == one
    assert shapes(fused) == {"step": (), "piece_step": (3,), "basis": (3, 8, 2), **dict.fromkeys(moments, (3, 2, 10))}
    expected = {"step": (), "piece_step": (1,), "basis": (1, 2, 8), **dict.fromkeys(moments, (1, 12, 2))}
    for ending in ("_1", "_2"):
        small = {"piece_step": (1,), "basis": (1, 4, 2), **dict.fromkeys(moments, (1, 2, 8))}
        expected |= {name + ending: shape for name, shape in small.items()}
    assert shapes(grouped) == expected
    for p in (experts, fused, grouped):
        for name, value in opt.state[p].items():
            assert value.dtype == (torch.int64 if name.startswith("piece_step") else torch.float32)
            assert value.device.type == "cpu"
    # in the bytes of as many alone, but for the count of each
    alone = GaLoreAdamW([{"params": [nn.Parameter(x) for x in cut(experts.detach(), {})], "rank": 2}])
    whole = GaLoreAdamW([{"params": [experts], "rank": 2, "flatten": False}])
    assert state_bytes(whole).total == state_bytes(alone).total - 3 * 4 + 4 + 3 * 8


def test_columns_and_periods_are_kept_for_each():
    p = nn.Parameter(torch.zeros(20, 8))
    opt = DCTAdamW([{"params": [p], "rank": 2, "split": (12, 4, 4)}], column_ages=True)
    kept = opt.state[p]
    assert {name for name in kept if "basis" in name} == {"basis_index", "basis_index_1", "basis_index_2"}
    assert (kept["basis_index_1"].dtype, kept["column_step_2"].dtype) == (torch.int32, torch.int32)
    opt = GaLoreAdamW([{"params": [p], "rank": 2, "split": (12, 4, 4)}], adaptive_overlap=0.9)
    assert {name for name in opt.state[p] if "due" in name} == {"basis_due", "basis_due_1", "basis_due_2"}
    assert opt.state[p]["basis_due_1"].shape == (1, 2)


@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_in_few_bits_are_kept_for_each(layout, dtype):
    """Rounding at random is of each matrix's own; what is kept has the sizes of as many alone."""
    shape, options, stacks = LAYOUTS[layout]
    start, grads = torch.randn(shape, dtype=torch.float64), gradients(shape, 12)
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    opts = [
        optimizer("svd", [p], **options, state_dtype=kept) for p, kept in zip(params, (dtype, "float32"), strict=True)
    ]
    for grad in grads:
        for p, opt in zip(params, opts, strict=True):
            p.grad = grad.clone()
            opt.step()
    alone = [nn.Parameter(x) for x in cut(start, options)]
    apart = optimizer("svd", alone, state_dtype=dtype)
    for i, own in named(opts[0].state[params[0]], stacks).items():
        theirs = apart.state[alone[i]]
        for name in own.keys() - {"piece_step"}:
            assert (own[name].dtype, own[name].shape) == (theirs[name].dtype, theirs[name].shape)
    moved = (params[1] - start).norm()
    assert 0 < (params[0] - params[1]).norm() < {"int8": 0.1, "int4": 0.6, "bfloat16": 0.05}[dtype] * moved


@dataclass(frozen=True)
class Listener:
    """A rule that takes down when it is called."""

    heard: list[Tick] = field(default_factory=list)

    def init(self, shape, new):
        return {}

    def updates(self, grads, states, ticks):
        self.heard.extend(ticks)
        return [None] * len(grads)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_matrices_of_all_parameters_have_turns_and_seeds_of_their_own(layout, count):
    shape, options, stacks = LAYOUTS[layout]
    rule = Listener()
    pieces = Pieces(Layout(options.get("flatten", True), options.get("split")), lambda _: rule)

    def new(shape, dtype=None, *, host=False):
        return torch.zeros(tuple(shape), dtype=dtype)

    ticks = [Tick(7, (i + 0.5) / count) for i in range(count)]
    pieces.updates([torch.ones(shape)] * count, [pieces.init(shape, new) for _ in range(count)], ticks)
    matrices = sum(map(len, stacks))
    assert len(rule.heard) == count * matrices
    # each counts its own steps
    assert {tick.step for tick in rule.heard} == {1}
    assert all(0 <= tick.turn < 1 for tick in rule.heard)
    assert len({tick.turn for tick in rule.heard}) == count * matrices
    assert len({tick.seed for tick in rule.heard}) == count * matrices
    if count == 1:
        # spread over the period
        turns = sorted(tick.turn for tick in rule.heard)
        assert all(b - a == pytest.approx(1 / matrices, abs=1e-6) for a, b in itertools.pairwise(turns))


@pytest.mark.parametrize(("kind", "layout"), ALL)
@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_a_run_that_is_resumed_is_the_run(kind, layout, state_dtype):
    shape, options, _ = LAYOUTS[layout]
    cls, own = KINDS[kind]
    grads = [grad.float() for grad in gradients(shape, 8)]

    def fresh():
        p = nn.Parameter(torch.ones(shape))
        return p, cls([{"params": [p], "rank": RANK, **options}], state_dtype=state_dtype, **{**HYPER, **own})

    def advance(p, opt, some):
        for grad in some:
            p.grad = grad.clone()
            opt.step()

    p, opt = fresh()
    advance(p, opt, grads[:3])
    buffer = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "p": p.detach().clone()}, buffer)
    advance(p, opt, grads[3:])
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    q, other = fresh()
    q.data.copy_(saved["p"])
    other.load_state_dict(saved["opt"])
    advance(q, other, grads[3:])
    assert torch.equal(p, q)
    assert opt.state[p].keys() == other.state[q].keys()
    for name, value in opt.state[p].items():
        assert torch.equal(value, other.state[q][name])
        assert value.dtype == other.state[q][name].dtype


def test_a_state_of_another_layout_is_refused():
    p = nn.Parameter(torch.zeros(24, 8))
    saved = GaLoreAdamW([{"params": [p], "rank": 2, "split": 3}]).state_dict()
    other = GaLoreAdamW([{"params": [p], "rank": 2, "split": 2}])
    # the saved group wins, as for all that it holds
    other.load_state_dict(saved)
    assert other.state[p]["exp_avg"].shape == (3, 8, 2)
    other = GaLoreAdamW([{"params": [p], "rank": 2, "split": 2}])
    other.param_groups[0]["split"] = 3
    p.grad = torch.ones(24, 8)
    with pytest.raises(RuntimeError, match="another key of a group has changed since its state was made"):
        other.step()


def test_what_the_host_reads_stays_on_the_host():
    """The state of a parameter on another device is made once, whatever its counts are called."""
    p = nn.Parameter(torch.empty(20, 8, device="meta"))
    opt = GaLoreAdamW([{"params": [p], "rank": 2, "split": (12, 4, 4)}], adaptive_overlap=0.9)
    kept = dict(opt.state[p])
    assert {name for name, value in kept.items() if value.device.type == "cpu"} == {
        "step",
        *(f"{name}{ending}" for name in ("piece_step", "basis_due") for ending in ("", "_1", "_2")),
    }
    opt._follow(p, opt.param_groups[0])
    assert all(opt.state[p][name] is value for name, value in kept.items())


@pytest.mark.parametrize(
    ("shape", "options"), [((3, 2, 2), {"flatten": False}), ((6, 3), {"split": 3}), ((5, 3), {"split": (3, 1, 1)})]
)
def test_matrices_too_small_to_compress_are_adamw(shape, options):
    start = torch.randn(shape, dtype=torch.float64)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    opt = GaLoreAdamW([{"params": [p], "rank": 2, **options}], **HYPER)
    base = torch.optim.AdamW([q], **HYPER)
    assert not any(name.startswith("basis") for name in opt.state[p])
    for grad in gradients(shape, 6):
        p.grad, q.grad = grad.clone(), grad.clone()
        opt.step()
        base.step()
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_some_may_be_too_small():
    p = nn.Parameter(torch.zeros(20, 8))
    kept = GaLoreAdamW([{"params": [p], "rank": 4, "split": (12, 4, 4)}]).state[p]
    assert {name for name in kept if name.startswith("basis")} == {"basis"}
    assert kept["exp_avg"].shape == (1, 12, 4)
    assert kept["exp_avg_1"].shape == kept["exp_avg_2"].shape == (1, 4, 8)


@pytest.mark.parametrize("kind", ["svd", "dct"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [((8, 3, 3, 3), {}), ((8, 3, 3, 3), {"split": 2}), ((8, 3, 3, 3), {"split": (2, 6)})],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_its_flattened_matrix(kind, shape, options, memory_format):
    start = torch.randn(shape, dtype=torch.float64)
    conv = nn.Parameter(start.clone().to(memory_format=memory_format))
    flat = nn.Parameter(start.flatten(1).clone())
    opts = [optimizer(kind, [p], **options) for p in (conv, flat)]
    assert {n: x.shape for n, x in opts[0].state[conv].items()} == {n: x.shape for n, x in opts[1].state[flat].items()}
    for grad in gradients(shape, 5):
        conv.grad, flat.grad = grad.to(memory_format=memory_format), grad.flatten(1).clone()
        for opt in opts:
            opt.step()
    assert conv.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(conv.flatten(1), flat, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_transposed_parameter_is_its_contiguous_twin(layout):
    shape, options, _ = LAYOUTS[layout]
    start = torch.randn(shape, dtype=torch.float64)
    turned, plain = nn.Parameter(start.mT.contiguous().mT), nn.Parameter(start.clone())
    opts = [optimizer("svd", [p], **options) for p in (turned, plain)]
    for grad in gradients(shape, 5):
        turned.grad, plain.grad = grad.mT.contiguous().mT, grad.clone()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(turned, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((24, 10), {"split": 0}, "split: 0, must be a number of equal blocks"),
        ((24, 10), {"split": -3}, "split: -3"),
        ((24, 10), {"split": True}, "split: True"),
        ((24, 10), {"split": 3.0}, "split: 3.0"),
        ((24, 10), {"split": "3"}, "split: '3'"),
        ((24, 10), {"split": ()}, "split: \\(\\)"),
        ((24, 10), {"split": (12, -12, 24)}, "split: \\(12, -12, 24\\)"),
        ((24, 10), {"split": (12, 12.0)}, "split: \\(12, 12.0\\)"),
        ((24, 10), {"split": 5}, "split: 5, must divide the 24 rows of \\(24, 10\\)"),
        ((24, 10), {"split": (12, 8)}, "split: \\(12, 8\\), must add up to the 24 rows"),
        ((10, 24, 6), {"split": 4, "flatten": True}, "split: 4, must divide the 10 rows"),
        ((4, 10, 6), {"split": 4, "flatten": False}, "split: 4, must divide the 10 rows"),
        ((20, 12, 6), {"split": (12, 4, 4), "flatten": False}, "must add up to the 12 rows of \\(20, 12, 6\\)"),
        ((24, 10), {"flatten": 0}, "flatten: 0, must be a bool"),
    ],
)
@pytest.mark.parametrize("cls", [GaLoreAdamW, DCTAdamW])
def test_a_split_that_does_not_fit_is_refused(cls, shape, options, message):
    p = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match=message):
        cls([{"params": [p], "rank": 2, **options}])
    opt = cls([{"params": [nn.Parameter(torch.zeros(8, 8))], "rank": 2}])
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [p], "rank": 2, **options})
    assert len(opt.param_groups) == 1
    assert p not in opt.state


def test_vectors_beside_split_matrices_are_adamw():
    w, b = nn.Parameter(torch.zeros(24, 10)), nn.Parameter(torch.zeros(25))
    opt = GaLoreAdamW([{"params": [w, b], "rank": 2, "split": 3}])
    assert opt.state[b].keys() == {"step", "exp_avg", "exp_avg_sq"}
    w.grad, b.grad = torch.randn(24, 10), torch.randn(25)
    opt.step()
    assert (b != 0).all()
