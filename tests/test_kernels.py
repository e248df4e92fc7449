"""Adam's kernel with moments in float32, interpreted, against its plain twin; and who chooses a kernel at all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_optim import GaLoreAdamW, backend

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import adam
from lowrank_optim.kernels._launch import ELEMENTWISE, launch_shape
from tests.alone import ROOT, run_alone
from tests.kernels import adam as checks
from tests.kernels.common import DTYPES, interpreted, poisoned, shapes_seen


@interpreted
@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", checks.SHAPES, ids=str)
@poisoned("cpu")
def test_adam_equals_its_twin(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    checks.assert_twins(shape, dtype, layout, (0.9, 0.999), device="cpu")


@interpreted
@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple), **checks.NUMBERS)
def test_adam_equals_its_twin_anywhere(**case: Any) -> None:
    checks.anywhere(**case, device="cpu")


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@poisoned("cpu")
def test_a_direction_is_rounded_once_to_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    checks.is_rounded_once((40, 33), dtype, "cpu")


def test_a_direction_of_another_dtype_is_refused() -> None:
    x = torch.ones(4)
    with pytest.raises(ValueError, match="needs a direction of float32, bfloat16 or float16, not torch.float64"):
        adam.adam_direction_(x, x, x, betas=(0.9, 0.999), eps=1e-8, step=1, dtype=torch.float64)
    assert x.eq(1).all()


@interpreted
def test_adam_writes_its_own_elements_only() -> None:
    """The moments are parts of a larger memory, and what is beside them stays."""
    memory = [torch.full((3, 1000), float("nan")) for _ in range(2)]
    exp_avg, exp_avg_sq = (m[1].zero_() for m in memory)
    adam.adam_direction_(torch.randn(1000), exp_avg, exp_avg_sq, betas=(0.9, 0.999), eps=1e-8, step=1)
    for m in memory:
        assert m[1].isfinite().all()
        assert m[::2].isnan().all()


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_adam_hands_nan_and_zero_gradients_on() -> None:
    grad = torch.tensor([float("nan"), 0.0, float("inf"), 1.0])
    direction = adam.adam_direction_(grad, torch.zeros(4), torch.zeros(4), betas=(0.9, 0.999), eps=1e-8, step=1)
    assert direction.isnan().tolist() == [True, False, True, False]
    assert direction[1] == 0


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(torch.zeros(4, 6, dtype=torch.bfloat16), id="dtype"),
        pytest.param(torch.zeros(6, 4), id="shape"),
        pytest.param(torch.zeros(6, 4).mT, id="strides"),
    ],
)
def test_adam_refuses_moments_that_it_would_misread(moment: Tensor) -> None:
    good, grad = torch.zeros(4, 6), torch.ones(4, 6)
    for moments in ((moment, good), (good, moment)):
        with pytest.raises(ValueError, match=r"needs contiguous float32 moments of shape \(4, 6\), not"):
            adam.adam_direction_(grad, *moments, betas=(0.9, 0.999), eps=1e-8, step=1)
    assert good.eq(0).all()


def test_only_the_interpreter_gets_the_interpreters_blocks() -> None:
    for numel in (1, ELEMENTWISE[0], 1 << 24):
        assert launch_shape(numel, interpreted=False) == ELEMENTWISE
    assert launch_shape(1 << 24, interpreted=True)[0] > ELEMENTWISE[0]


@interpreted
@pytest.mark.parametrize("basis", ["svd", "subspace"])
def test_an_optimizer_on_the_kernel_equals_one_on_torch(basis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = shapes_seen(monkeypatch, adam, "stored_adam_directions_")
    how: dict[str, Any] = {"rank": 3, "basis": basis, "device": "cpu"}
    for name in ("auto", "torch"):
        expected, expected_opt = checks.trained(name, (12, 8, 30), **how)
        assert seen == [], name
    weights, opt = checks.trained("triton", (12, 8, 30), **how)
    # the kernel did run: the coordinates of two matrices, each step; a bias is another one's
    assert seen == [(3, 12), (30, 3)] * 7
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(opt.state_dict()["state"], expected_opt.state_dict()["state"], rtol=1e-4, atol=1e-6)


@interpreted
def test_an_optimizer_of_float64_says_that_the_kernel_has_none() -> None:
    p = nn.Parameter(torch.ones(8, 6, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    opt = GaLoreAdamW([p], rank=2)
    with (
        backend("triton"),
        pytest.raises(ValueError, match=r"needs float32, bfloat16 or float16 gradients, not .*float64"),
    ):
        opt.step()
    assert p.eq(1).all()


def test_backends_nest_and_come_back_after_an_error() -> None:
    from lowrank_optim import _backend

    def fail() -> None:
        with backend("auto"):
            assert _backend._backend.get() == "auto"
            raise KeyError("stop")

    with backend("torch"):
        with pytest.raises(KeyError, match="stop"):
            fail()
        assert _backend._backend.get() == "torch"
    assert _backend._backend.get() == "auto"


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="backend must be 'auto', 'torch' or 'triton', not 'cuda'"), backend("cuda"):
        pass


ALONE = """
import sys, torch
from lowrank_optim import GaLoreAdamW, backend
p = torch.nn.Parameter(torch.randn(8, 6))
p.grad = torch.randn(8, 6)
opt = GaLoreAdamW([p], rank=2)
try:
    with backend("triton"):
        opt.step()
except RuntimeError as error:
    print(error)
print(opt.state[p]["step"].item())
opt.step()
# now as where it is not installed
sys.modules["triton"] = None
try:
    with backend("triton"):
        print("entered")
except RuntimeError as error:
    print(error)
opt.step()
print(opt.state[p]["step"].item(), [m for m in sys.modules if "lowrank_optim.kernels" in m])
"""


def test_triton_is_had_or_refused_and_auto_on_a_cpu_never_touches_it() -> None:
    assert run_alone(ALONE).splitlines() == [
        "backend('triton'): a Tensor on cpu needs a CUDA device, or TRITON_INTERPRET=1 set before Triton is imported",
        "0.0",
        "backend('triton'): Triton is not installed (pip install triton)",
        "2.0 []",
    ]


def test_what_ships_is_what_is_imported() -> None:
    assert Path(adam.__file__).resolve() == ROOT / "kernels" / "adam.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing but what is asked before the first kernel."""
    from lowrank_optim import _backend
    from lowrank_optim._warn import warn_once

    def forget() -> None:
        _backend._tried.clear()
        warn_once.cache_clear()

    forget()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_backend, "_device", lambda _: (132, 90))
    # its tensors are a CPU's
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **how: real(*shape, **how))
    yield
    forget()


@pytest.mark.usefixtures("gpu")
def test_where_no_kernel_compiles_torch_computes_and_says_why_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_optim import _backend
    from lowrank_optim.kernels import cast

    tried = []

    def fails(*_: Any) -> None:
        tried.append(1)
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(cast, "cast", fails)
    first, second = (torch.device("cuda", i) for i in range(2))
    # a memory estimate before the first step tries nothing, and remembers nothing
    with FakeTensorMode():
        assert _backend._ready(first)
    assert tried == []
    with pytest.warns(RuntimeWarning, match=r"plain torch .* \(RuntimeError: Failed to find C compiler.\)"):
        assert not _backend._ready(first)
    assert not _backend._ready(first)
    assert tried == [1]
    assert not _backend._ready(second)
    assert tried == [1, 1]


@pytest.mark.usefixtures("gpu")
def test_a_device_that_is_full_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_optim import _backend
    from lowrank_optim.kernels import cast

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    device = torch.device("cuda", 0)
    monkeypatch.setattr(cast, "cast", full)
    with pytest.raises(torch.OutOfMemoryError):
        _backend._ready(device)
    monkeypatch.setattr(cast, "cast", lambda *_: None)
    assert _backend._ready(device)


@interpreted
@pytest.mark.usefixtures("gpu")
def test_where_one_runs_kernels_do() -> None:
    from lowrank_optim import _backend

    assert _backend._ready(torch.device("cuda", 0))
