"""Operations under torch.compile on the hardware that they are for: the numbers of the kernels themselves."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from lowrank_optim import backend, ops, orthogonalize

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


# the recursion in one launch, the Gram form by torch's products, and symmetric products by kernels
@pytest.mark.parametrize("shape", [(4, 64, 256), (512, 2048), (2, 2048, 2048)], ids=str)
def test_orthogonalize_is_one_graph_and_gives_the_same_numbers(shape: tuple[int, ...]) -> None:
    x = randn(*shape, dtype=HALF)
    counter = CompileCounterWithBackend("inductor")
    found, expected = torch.compile(orthogonalize, backend=counter)(x), orthogonalize(x)
    assert counter.frame_count == 1
    assert found.dtype == HALF
    # what is fused is rounded elsewhere
    assert (found - expected).norm() <= 1e-2 * expected.norm()


def products(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = ops.normalized(x, eps=0.0, dtype=x.dtype)
    r = ops.symmetric(n, n)
    # one in parts, one with all of its numbers
    return n, r, ops.symmetric(r, r.mT, r, alpha=2.0, beta=0.5, gamma=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_compiled_products_are_those_of_the_kernels(dtype: torch.dtype) -> None:
    compiled = torch.compile(products, fullgraph=True)
    with backend("triton"):
        # the last ones with sizes that are symbols, odd ones and of one tile
        for shape in ((2, 256, 4096), (3, 64, 96), (3, 33, 70), (1, 1, 1)):
            x = randn(*shape, dtype=dtype)
            assert all(map(torch.equal, compiled(x), products(x)))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.T, lambda x: x[:, ::2]], ids=["whole", "turned", "sliced"])
def test_a_compiled_step_writes_what_the_kernel_writes(layout: Callable[[Tensor], Tensor], seed: int | None) -> None:
    def step(param: Tensor, update: Tensor, left: Tensor, right: Tensor, lr: Tensor) -> None:
        ops.apply_(param, update, lr=lr, weight_decay=0.1, seed=seed)
        ops.apply_(param, ops.Factored(left, right), lr=0.1, weight_decay=0.1, seed=seed)

    param, update = layout(randn(96, 130, dtype=HALF)), layout(randn(96, 130))
    factors = randn(param.size(0), 8, dtype=HALF), randn(8, param.size(1), dtype=HALF)
    lr = torch.tensor(0.05, device="cuda")
    ours, theirs = (torch.empty_strided(param.shape, param.stride(), dtype=HALF, device="cuda") for _ in range(2))
    ours.copy_(param)
    theirs.copy_(param)
    with backend("triton"):
        torch.compile(step, fullgraph=True)(ours, update, *factors, lr)
        step(theirs, update, *factors, lr)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, param)


def opaque(name: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A registered function that the compiler does not look into, and what it is called with."""
    from lowrank_optim.kernels import registered

    grads, numbers = [randn(64, 96) for _ in range(2)], {"state_dtype": "float32", "seeds": [3, 4], "dtype": HALF}
    r = randn(3, 48, 48) / 48
    moments = [{key: torch.zeros_like(g) for key in ("exp_avg", "exp_avg_sq", "momentum_buffer")} for g in grads]
    index = torch.arange(8, dtype=torch.int32, device="cuda")
    chosen = [{"basis_index": index} | {key: randn(64, 8).abs() for key in ("exp_avg", "exp_avg_sq")} for _ in "ab"]
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "dct_energies": ((randn(64, 96, dtype=HALF), -2), {"out_dtype": HALF}),
        "gram_recursion": ((r @ r.mT, [(3.4, -4.7, 2.0), (2.0, -1.5, 0.5)]), {}),
        "stored_adam_directions_": (
            (grads, moments),
            numbers | {"betas": (0.9, 0.99), "eps": 1e-8, "steps": [1, 2]},
        ),
        "normalized_momenta_": (
            (grads, moments),
            numbers | {"momentum": 0.9, "nesterov": True, "form": "ema", "eps": 0.0},
        ),
        "all_dct_energies": (([randn(64, 96, dtype=HALF) for _ in range(2)], -2), {"out_dtype": HALF}),
        "select_columns_": ((torch.rand(2, 96, device="cuda"), [index.clone(), index.clone()]), {}),
        "chosen_adam_directions_": (
            ([randn(64, 96, dtype=HALF) for _ in range(2)], chosen, torch.stack([index - 1, index - 1])),
            {"dim": -1, "betas": (0.9, 0.99), "eps": 1e-8, "steps": [1, 2], "dtype": HALF},
        ),
    }
    return (getattr(registered, name), *arguments[name])


OPAQUE = ("dct_energies", "gram_recursion", "stored_adam_directions_", "normalized_momenta_")


@pytest.mark.parametrize("name", [*OPAQUE, "all_dct_energies", "select_columns_", "chosen_adam_directions_"])
def test_what_stays_opaque_compiles_too(name: str) -> None:
    function, args, kwargs = opaque(name)
    written = args[1] if isinstance(args[1], list) else []
    kept = [x for one in written for x in (one.values() if isinstance(one, dict) else [one]) if isinstance(x, Tensor)]
    before = [x.clone() for x in kept]
    found = torch.compile(function, fullgraph=True)(*args, **kwargs)
    after = [x.clone() for x in kept]
    for x, old in zip(kept, before, strict=True):
        x.copy_(old)
    expected = function(*args, **kwargs)
    pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in [*pairs, *zip(after, kept, strict=True)])


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(st.integers(1, 3), st.integers(1, 80), st.integers(1, 80)), st.booleans())
def test_torch_finds_nothing_wrong_with_an_operation(shape: tuple[int, int, int], tall: bool) -> None:
    from lowrank_optim.kernels import registered

    x = randn(*shape, dtype=HALF)
    x = x.mT if tall else x
    opcheck(registered.symmetric, (x, x), {"dtype": torch.float32})
    opcheck(registered.normalized, (x,), {"eps": 0.0, "dtype": torch.float16})
    many = torch.ops.lowrank_optim.all_dct_energies.default
    opcheck(many, ([randn(shape[1], 48, dtype=HALF)], -1), {"out_dtype": HALF})
    param = x[0].clone()
    opcheck(torch.ops.lowrank_optim.apply_.default, (param, torch.randn_like(param), None, 0.1, 0.1, 3, False))
