"""Kernels as operations of torch: what fake tensors become, what compilers see, and that the numbers stay the same."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from lowrank_optim import backend, ops
from lowrank_optim._backend import _constant, called, takes_triton
from tests.ahead import SHARED, Job, assert_fits, compiled
from tests.alone import run_alone

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import (
    adam,
    adamw,
    apply,
    chosen_adam,
    dct,
    factored_add,
    momentum,
    normalized,
    recursion,
    select,
    symmetric,
)

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 before triton is imported"
)
TRIPLES = [(3.4445, -4.775, 2.0315), (2.0, -1.5, 0.5)]
KERNELS: dict[str, Callable[..., Any]] = {
    "symmetric": symmetric.symmetric,
    "normalized": normalized.normalized,
    "dct_energies": dct.dct_energies,
    "gram_recursion": recursion.gram_recursion,
    "apply_": apply.apply_,
    "apply_sum_": factored_add.apply_sum_,
    "stored_adam_directions_": adam.stored_adam_directions_,
    "normalized_momenta_": momentum.normalized_momenta_,
    "adamw_": adamw.adamw_,
    "all_dct_energies": dct.all_dct_energies,
    "select_columns_": select.select_columns_,
    "chosen_adam_directions_": chosen_adam.chosen_adam_directions_,
}


def kept(shape: tuple[int, ...], state_dtype: str, name: str, *, signed: bool = True) -> dict[str, Tensor]:
    """A moment as `storage` keeps it."""
    if state_dtype == "float32":
        return {name: torch.rand(shape)}
    code = torch.int8 if signed else torch.uint8
    count = torch.Size(shape).numel()
    codes = torch.randint(0, 100, shape if state_dtype == "int8" else (-(-count // 2),), dtype=code)
    blocks = -(-count // (256 if state_dtype == "int8" else 64))
    return {name: codes, f"{name}_scale": torch.rand(blocks)}


def adam_states(state_dtype: str, count: int = 2) -> list[dict[str, Tensor]]:
    return [
        kept((5, 70), state_dtype, "exp_avg") | kept((5, 70), state_dtype, "exp_avg_sq", signed=False)
        for _ in range(count)
    ]


def samples(name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments that a kernel's function takes."""
    half = torch.bfloat16
    x, r = torch.randn(2, 9, 20), torch.randn(2, 9, 9)
    w, u = torch.randn(9, 20), torch.randn(9, 20)
    grads = [torch.randn(5, 70) for _ in range(2)]
    adamw_tensors = [[torch.randn(7, 3), torch.randn(11)] for _ in range(3)]
    adam_numbers = {"betas": (0.9, 0.99), "eps": 1e-8, "steps": [1, 7], "seeds": [3, 1 << 40], "scale": 0.5}
    momentum_numbers = {"momentum": 0.9, "nesterov": True, "form": "ema", "eps": 0.0, "seeds": [3, 4]}
    adamw_numbers = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    found: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
        "symmetric": [
            ((x, x), {}),
            ((x.to(half), x.to(half)), {"dtype": torch.float32}),
            ((r, r.mT, r), {"alpha": 2.0, "beta": 0.5, "gamma": 1.0}),
        ],
        "normalized": [((x,), {"eps": 0.0, "dtype": half}), ((x.mT,), {"eps": 9.0, "dtype": torch.float32})],
        "dct_energies": [
            ((torch.randn(5, 48), -1), {"out_dtype": half}),
            ((torch.randn(48, 5), -2), {"out_dtype": torch.float32, "ranking": "l1"}),
        ],
        "gram_recursion": [((r @ r.mT, TRIPLES), {}), ((r @ r.mT, TRIPLES[:1]), {"dtype": half})],
        "apply_": [
            ((w.to(half), u), {"lr": 0.1, "weight_decay": 0.1, "seed": 1 << 40}),
            ((w.T, u.T), {"lr": torch.tensor(0.1), "weight_decay": 0.1, "cautious": True}),
        ],
        "apply_sum_": [
            ((w.to(half), (torch.randn(9, 4), torch.randn(4, 20)), None), {"lr": 0.1, "weight_decay": 0.1, "seed": 5}),
            ((w, None, (u, torch.randn(1, 20))), {"lr": torch.tensor(0.1), "weight_decay": 0.0}),
        ],
        "stored_adam_directions_": [
            ((grads, adam_states(name)), {"state_dtype": name, "dtype": dtype} | adam_numbers)
            for name, dtype in (("float32", torch.float32), ("int8", half), ("int4", torch.float32))
        ],
        "normalized_momenta_": [
            (
                (grads, [kept((5, 70), name, "momentum_buffer") for _ in grads]),
                {"state_dtype": name, "dtype": half} | momentum_numbers,
            )
            for name in ("float32", "int4")
        ],
        "adamw_": [
            (([t.to(half) for t in adamw_tensors[0]], adamw_tensors[1], *moments(), [1, 2]), adamw_numbers | options)
            for options in ({"lr": 0.1}, {"lr": torch.tensor(0.1), "seeds": [3, 1 << 40]})
        ],
        "all_dct_energies": [
            (([torch.randn(5, 48) for _ in range(2)], -1), {"out_dtype": half}),
            (([torch.randn(48, 5) for _ in range(2)], -2), {"out_dtype": torch.float32, "ranking": "l1"}),
        ],
        "select_columns_": [
            ((torch.rand(2, 20), [torch.arange(4, dtype=torch.int32) for _ in range(2)]), {}),
            ((list(torch.rand(1, 20)), [torch.arange(4, dtype=torch.int32)]), {}),
        ],
        "chosen_adam_directions_": [
            (
                ([torch.randn(9, 20) for _ in range(2)], chosen_states(dim), places()),
                {"dim": dim, "betas": (0.9, 0.99), "eps": 1e-8, "steps": [1, 7], "scale": 0.5, "dtype": dtype},
            )
            for dim, dtype in ((-1, torch.float32), (-2, half))
        ],
    }
    return found[name]


def chosen_states(dim: int) -> list[dict[str, Tensor]]:
    shape = (9, 4) if dim == -1 else (4, 20)
    index = torch.tensor([1, 3, 5, 7], dtype=torch.int32)
    return [{"basis_index": index.clone(), "exp_avg": torch.rand(shape), "exp_avg_sq": torch.rand(shape)} for _ in "ab"]


def places() -> Tensor:
    """Where columns were: some stay, some are new."""
    return torch.tensor([[0, -1, 2, 3], [-1, 1, -1, 2]], dtype=torch.int32)


def moments() -> list[list[Tensor]]:
    return [[torch.rand(7, 3), torch.rand(11)] for _ in range(2)]


def copied(x: Any) -> Any:
    """Tensors anew, and as strided as they were."""
    if isinstance(x, Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)
    if isinstance(x, dict):
        return {key: copied(value) for key, value in x.items()}
    return type(x)(map(copied, x)) if isinstance(x, list | tuple) else x


def tensors(x: Any) -> list[Tensor]:
    """All tensors of a nest, in order."""
    if isinstance(x, Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@interpreted
@pytest.mark.parametrize("name", KERNELS)
def test_an_operation_does_what_the_kernel_does(name: str) -> None:
    from lowrank_optim.kernels import registered

    for args, kwargs in samples(name):
        ours, theirs = copied((args, kwargs)), copied((args, kwargs))
        found = getattr(registered, name)(*ours[0], **ours[1])
        expected = KERNELS[name](*theirs[0], **theirs[1])
        assert type(found) is type(expected)
        for x, y in zip(tensors((found, ours)), tensors((expected, theirs)), strict=True):
            assert x.dtype == y.dtype
            assert x.stride() == y.stride()
            assert torch.equal(x, y)


class Recorded:
    """Remembers what an operation is called with."""

    def __init__(self, operation: Any) -> None:
        self.operation, self.calls = operation, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.operation(*args, **kwargs)


# that of one matrix is the operation of many
@interpreted
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "dct_energies"])
def test_torch_finds_nothing_wrong_with_an_operation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its schema says what it writes to, and a fake result is like the real one."""
    from lowrank_optim.kernels import registered

    # some functions sort their arguments before they call the operation
    inner = name if name in ("symmetric", "normalized") else f"_{name}"
    room = registered if inner == name else sys.modules[getattr(registered, name).__module__]
    recorded = Recorded(getattr(room, inner))
    monkeypatch.setattr(room, inner, recorded)
    for args, kwargs in samples(name):
        getattr(registered, name)(*copied(args), **copied(kwargs))
    operation = getattr(torch.ops.lowrank_optim, name).default
    for args, kwargs in recorded.calls:
        opcheck(operation, args, kwargs, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    # takes longest
    opcheck(operation, *recorded.calls[0], test_utils="test_aot_dispatch_static")


@interpreted
@settings(max_examples=20, deadline=None)
@given(
    st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_fake_results_are_like_the_real_ones(shape: tuple[int, int, int], dtype: torch.dtype, tall: bool) -> None:
    def results(device_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = device_of(torch.zeros(shape, dtype=dtype))
        x = x.mT if tall else x
        with backend("triton"):
            return [ops.symmetric(x, x), ops.normalized(x, eps=1.0, dtype=torch.bfloat16)]

    real = results(lambda x: x)
    with FakeTensorMode() as mode:
        fake = results(mode.from_tensor)
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.dtype, x.device, x.stride()) == (y.shape, y.dtype, y.device, y.stride())


def test_who_is_called() -> None:
    x = torch.zeros(2, 3)
    assert called(symmetric.symmetric, x) is symmetric.symmetric
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        inside = called(apply.apply_, fake)
    # and where nothing but the tensor is fake
    for found in (inside, called(apply.apply_, fake)):
        assert (found.__module__, found.__name__) == ("lowrank_optim.kernels.registered", "apply_")


def test_a_fake_tensor_stands_for_a_plain_one() -> None:
    with FakeTensorMode():
        cpu, cuda = torch.empty(2, 3), torch.empty(2, 3, device="cuda")
    assert takes_triton(cuda, faster=True)
    assert not takes_triton(cuda)
    assert not takes_triton(cpu, faster=True)
    with backend("torch"):
        assert not takes_triton(cuda, faster=True)
    with backend("triton"):
        assert takes_triton(cuda)


def test_what_is_constant_is_marked_as_torch_does() -> None:
    def ours() -> None: ...

    def theirs() -> None: ...

    assert vars(_constant(ours)) == vars(torch.compiler.assume_constant_result(theirs))


@interpreted
def test_who_traces_sees_operations() -> None:
    def step(param: Tensor, update: Tensor) -> Tensor:
        with backend("triton"):
            ops.apply_(param, update, lr=0.1, weight_decay=0.0, seed=3)
            return ops.symmetric(param[None], param[None])

    graph = make_fx(step)(torch.ones(3, 4), torch.ones(3, 4))
    seen = [str(node.target) for node in graph.graph.nodes]
    assert "lowrank_optim.apply_.default" in seen
    assert "lowrank_optim.symmetric.default" in seen
    param = torch.ones(3, 4)
    found = graph(param, torch.ones(3, 4))
    assert torch.equal(param, torch.full((3, 4), 0.9))
    assert torch.equal(found, param[None] @ param[None].mT)


@interpreted
def test_compiled_code_calls_kernels_and_keeps_who_was_chosen() -> None:
    graphs = []

    def look(graph: Any, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.symmetric(x, x), ops.normalized(x, eps=0.0, dtype=torch.float32)

    x = torch.randn(2, 9, 20)
    torch.compiler.reset()
    with backend("triton"):
        compiled_two = torch.compile(two, backend=look, fullgraph=True)
        found, expected = compiled_two(x), two(x)
    assert [name for name in graphs[0] if name.startswith("lowrank_optim")] == [
        "lowrank_optim.symmetric.default",
        "lowrank_optim.normalized.default",
    ]
    for y in (found, compiled_two(x)):
        assert all(map(torch.equal, y, expected))
    assert len(graphs) == 1


_CODE = """
import json, types
import torch, triton
from triton.backends.compiler import GPUTarget
from torch._functorch.aot_autograd import aot_module_simplified
from torch._subclasses.fake_tensor import FakeTensorMode

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

# a graph is made for a GPU that is not here
triton.runtime.driver.set_active(Driver())
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=132, major=9, minor=0)

from lowrank_optim import backend, ops, passes
from lowrank_optim.kernels import registered
from torch._library.triton import triton_ops_to_kernels

half = torch.bfloat16
found = {"kernels": {name: [kernel.__name__ for kernel in kernels] for name, kernels in triton_ops_to_kernels.items()}}

def empty(*shape, dtype=half):
    return torch.empty(shape, dtype=dtype, device="cuda")

def seen(made):
    made = [made] if isinstance(made, torch.Tensor) else list(made or [])
    return [[list(x.shape), str(x.dtype), str(x.device), list(x.stride())] for x in made]

def calls():
    x, w, r, f = empty(3, 64, 96), empty(64, 96), empty(3, 64, 64, dtype=torch.float32), torch.float32
    numbers = {"betas": (0.9, 0.99), "eps": 1e-8, "steps": [1, 2], "seeds": [3, 4]}
    state = lambda: {"exp_avg": empty(64, 96, dtype=f), "exp_avg_sq": empty(64, 96, dtype=f)}
    moment = lambda: {"momentum_buffer": empty(64, 96, dtype=f)}
    yield "symmetric", lambda g: g.symmetric(x, x, dtype=f)
    yield "normalized", lambda g: g.normalized(x, eps=0.0, dtype=torch.float16)
    yield "dct_energies", lambda g: g.dct_energies(w, -2, out_dtype=half)
    yield "gram_recursion", lambda g: g.gram_recursion(r, [(3.0, -4.0, 2.0)])
    yield "apply_", lambda g: g.apply_(w, w.clone(), lr=0.1, weight_decay=0.1)
    yield "apply_sum_", lambda g: g.apply_sum_(w, (empty(64, 8), empty(8, 96)), None, lr=0.1, weight_decay=0.1)
    yield "stored_adam_directions_", lambda g: g.stored_adam_directions_(
        [w, w], [state(), state()], state_dtype="float32", dtype=half, **numbers)
    yield "normalized_momenta_", lambda g: g.normalized_momenta_(
        [w, w], [moment(), moment()], state_dtype="float32", momentum=0.9, nesterov=True, form="ema", eps=0.0,
        seeds=[1, 2], dtype=half)
    yield "adamw_", lambda g: g.adamw_(
        [w, w], [w, w], [empty(64, 96, dtype=f)] * 2, [empty(64, 96, dtype=f)] * 2, [1, 2], lr=0.1,
        betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    i = torch.int32
    index, energies, places = empty(8, dtype=i), empty(2, 64, dtype=f), empty(2, 8, dtype=i)
    chosen = lambda: {"basis_index": index, "exp_avg": empty(8, 96, dtype=f), "exp_avg_sq": empty(8, 96, dtype=f)}
    yield "all_dct_energies", lambda g: g.all_dct_energies([w, w], -2, out_dtype=half)
    yield "select_columns_", lambda g: g.select_columns_(energies, [index, index])
    yield "chosen_adam_directions_", lambda g: g.chosen_adam_directions_(
        [w, w], [chosen(), chosen()], places, dim=-2, betas=(0.9, 0.99), eps=1e-8, steps=[1, 2], dtype=half)

with FakeTensorMode():
    found["fake"] = {name: seen(call(registered)) for name, call in calls()}

class Done(Exception):
    pass

def compiled(function, *shapes, dynamic=False):
    graphs = []
    def lowered(graph, inputs):
        graphs.append(graph)
        raise Done
    def look(graph, inputs):
        return aot_module_simplified(graph, inputs, fw_compiler=lowered)
    torch.compiler.reset()
    with FakeTensorMode(), torch.no_grad(), backend("triton"):
        try:
            torch.compile(function, backend=look, fullgraph=True, dynamic=dynamic)(*[empty(*shape) for shape in shapes])
        except Exception as error:
            if not graphs:
                raise
    # an operation that writes is the first argument of a node
    called = [[str(node.target), *map(str, node.args[:1])] for node in graphs[0].graph.nodes]
    ours = [next((name for name in names if "lowrank" in name), names[0]) for names in called]
    return [
        [name, *node.kwargs.get("tensors_to_clone", [])]
        for name, node in zip(ours, graphs[0].graph.nodes, strict=True)
        if "triton" in name or "lowrank" in name
    ]

def dct_adam(*grads):
    f, i = torch.float32, torch.int32
    states = [
        {"basis_index": empty(8, dtype=i), "exp_avg": empty(64, 8, dtype=f), "exp_avg_sq": empty(64, 8, dtype=f)}
        for _ in grads
    ]
    numbers = {"betas": (0.9, 0.99), "eps": 1e-8, "steps": [1, 2], "scale": 1.0, "dtype": half}
    return passes.dct_adam_directions_(list(grads), states, dim=-1, ranking="l2", **numbers)

functions = {
    "symmetric": (lambda x: ops.symmetric(x, x), (3, 64, 96)),
    "split": (lambda x: ops.symmetric(x, x), (1, 64, 4096)),
    "normalized": (lambda x: ops.normalized(x, eps=0.0, dtype=half), (3, 64, 96)),
    "apply_": (lambda w, u: ops.apply_(w, u, lr=0.1, weight_decay=0.1, seed=3), (64, 96), (64, 96)),
    "transposed": (lambda w, u: ops.apply_(w.T, u.T, lr=0.1, weight_decay=0.1, seed=3), (64, 96), (64, 96)),
    "apply_sum_": (
        lambda w, p, q: ops.apply_(w, ops.Factored(p, q), lr=0.1, weight_decay=0.1, seed=3), (64, 96), (64, 8), (8, 96)
    ),
    "dct_energies": (lambda w: passes.dct_energies(w, -1, "l2"), (64, 96)),
    "dct_adam": (dct_adam, (64, 96), (64, 96)),
}
found["graphs"] = {name: compiled(*arguments) for name, arguments in functions.items()}
names = ("symmetric", "normalized", "apply_", "dct_energies")
found["dynamic"] = {name: compiled(*functions[name], dynamic=True) for name in names}
print("found" + json.dumps(found))
"""

FUNCTIONAL = "triton_kernel_wrapper_functional"


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What torch makes of operations on tensors of a GPU that is not here, where nothing is interpreted."""
    return json.loads(run_alone(_CODE).rpartition("found")[2])


def test_fake_tensors_of_a_gpu(alone: dict[str, Any]) -> None:
    half, on = "torch.bfloat16", "cuda:0"
    matrix = [[64, 96], half, on, [96, 1]]
    assert alone["fake"] == {
        "symmetric": [[[3, 64, 64], "torch.float32", on, [4096, 64, 1]]],
        "normalized": [[[3, 64, 96], "torch.float16", on, [6144, 96, 1]]],
        "dct_energies": [[[64, 96], half, on, [1, 64]], [[64], "torch.float32", on, [1]]],
        "gram_recursion": [[[3, 64, 64], "torch.float32", on, [4096, 64, 1]]],
        "stored_adam_directions_": [matrix, matrix],
        "normalized_momenta_": [[[2, 64, 96], half, on, [6144, 96, 1]]],
        "apply_": [],
        "apply_sum_": [],
        "adamw_": [],
        "all_dct_energies": [[[2, 64, 96], half, on, [6144, 1, 64]], [[2, 64], "torch.float32", on, [64, 1]]],
        "select_columns_": [[[2, 8], "torch.int32", on, [8, 1]]],
        "chosen_adam_directions_": [[[8, 96], half, on, [96, 1]]] * 2,
    }


def test_a_compiler_sees_the_launches_and_what_each_writes(alone: dict[str, Any]) -> None:
    normalized_graph = [[FUNCTIONAL, "sums_ptr"], [FUNCTIONAL, "out_ptr"]]
    assert alone["graphs"] == {
        "symmetric": [[FUNCTIONAL, "out_ptr"]],
        "split": [[FUNCTIONAL, "out_ptr"], [FUNCTIONAL, "out_ptr"]],
        "normalized": normalized_graph,
        "apply_": [[FUNCTIONAL, "param_ptr"]],
        "transposed": [[FUNCTIONAL, "param_ptr"]],
        "apply_sum_": [[FUNCTIONAL, "param_ptr"]],
        "dct_energies": [["lowrank_optim.all_dct_energies.default"]],
        "dct_adam": [
            ["lowrank_optim.all_dct_energies.default"],
            ["lowrank_optim.select_columns_.default"],
            ["lowrank_optim.chosen_adam_directions_.default"],
        ],
    }
    assert alone["dynamic"] == {
        "symmetric": [[FUNCTIONAL, "out_ptr"]],
        "normalized": normalized_graph,
        "apply_": [[FUNCTIONAL, "param_ptr"]],
        "dct_energies": [["lowrank_optim.all_dct_energies.default"]],
    }


def test_torch_knows_whose_source_a_compiled_graph_depends_on(alone: dict[str, Any]) -> None:
    """What is kept on disk of a graph must not outlive a change of a kernel."""
    assert alone["kernels"] == {
        "lowrank_optim::symmetric": ["symmetric_kernel", "sum_parts_kernel"],
        "lowrank_optim::normalized": ["squares_kernel", "normalized_kernel"],
        "lowrank_optim::apply_": ["apply_kernel"],
        "lowrank_optim::apply_sum_": ["factored_add_kernel"],
    }


def test_kernels_compile_as_inductor_calls_them(tmp_path: Path) -> None:
    """Each integer that is 1 is a constant there, whatever `do_not_specialize` says, and each number a float64."""
    shared = {"SIDE": 64, "BAND": 8, "HAS_C": False, "EVEN": False, "NEAR": True, "INTERPRETED": False}
    numbers = dict.fromkeys(("alpha", "scale", "gamma"), "fp64")
    strides = {f"{x}_{side}": "i32" for x in "abc" for side in ("batch", "row", "column")}
    products = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*bf16", "n": "i32", "k": "i32"} | numbers | strides
    ones = {"count": 1, "tiles": 1, "parts": 1, "steps": 1, "a_column": 1, "b_column": 1, "c_column": 1}
    sums = {"parts_ptr": "*fp32", "c_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32", "parts": "i32"} | numbers | strides
    whole = {"x_ptr": "*bf16", "sums_ptr": "*fp64", "numel": "i32"}
    written = {"param_ptr": "*bf16", "lr": "fp64", "decay": "fp64", "seed": "i32", "n": "i32", "param_row": "i32"}
    rounding = {"LR_ON_DEVICE": False, "STOCHASTIC": True, "INTERPRETED": False}
    jobs = {
        "symmetric": Job(
            "symmetric",
            "symmetric_kernel",
            products | {"out_ptr": "*bf16"},
            shared | ones | {"DEPTH": 64, "SPLIT": False, "HAS_C": True},
            options={"num_warps": 4, "num_stages": 3},
        ),
        "sum_parts": Job("symmetric", "sum_parts_kernel", sums, shared | {"count": 1, "tiles": 1, "c_column": 1}),
        "squares": Job("normalized", "squares_kernel", whole, {"parts": 1, "steps": 1, "BLOCK": 1024}),
        "normalized": Job(
            "normalized",
            "normalized_kernel",
            whole | {"out_ptr": "*fp16", "eps": "fp64"},
            {"parts": 1, "steps": 1, "BLOCK": 1024, "PARTS": 1024, "INTERPRETED": False},
        ),
        "apply": Job(
            "apply",
            "apply_kernel",
            written | {"update_ptr": "*bf16", "update_row": "i32"},
            rounding
            | {"m": 1, "param_column": 1, "update_column": 1, "ROWS": 1, "COLUMNS": 1024, "CAUTIOUS": False, "seed": 1},
        ),
        "factored_add": Job(
            "factored_add",
            "factored_add_kernel",
            written
            | {f"{x}_ptr": "*bf16" for x in ("left", "right", "matrix", "factors")}
            | {f"{x}_row": "i32" for x in ("left", "right", "matrix")}
            | {"m": "i32", "r": "i32"},
            rounding
            | {f"{x}_column": 1 for x in ("param", "left", "right", "matrix")}
            | {"factors_stride": 1, "seed": 1, "ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "GROUP": 8}
            | {"HAS_MATRIX": False, "BY_ROW": False, "PRECISION": "ieee"},
            options={"num_warps": 8, "num_stages": 3},
            targets=("sm_90a",),
        ),
    }
    built = compiled(jobs, tmp_path)
    assert len(built) == len(SHARED) * (len(jobs) - 1) + 1
    for name, one in built.items():
        assert_fits(name, one)
        # nothing but what was float64 anyhow is computed in it
        assert name.split()[0] == "gfx942" or "normalized" in name or "squares" in name or "mul.f64" not in one.text, (
            name
        )


def test_importing_the_package_imports_neither_triton_nor_a_compiler() -> None:
    code = "import sys, lowrank_optim; print([x for x in ('triton', 'torch._dynamo') if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
