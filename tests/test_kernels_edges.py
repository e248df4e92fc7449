"""What a user may hand over that kernels do not read: on them, interpreted, a step is that of plain torch."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import DCTAdamW, GaLoreAdamW, Muon, _half, _state, backend, columns, ops, orthonormal, storage

pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the CPU with TRITON_INTERPRET=1 only"
)


class Named(Tensor):
    """A tensor of a class of its own."""


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this device multiply 16 bits."""
    for module in (_half, ops, orthonormal, columns):
        monkeypatch.setattr(module, "multiplies", lambda x: type(x) is Tensor and x.dtype in _half.HALF)


def moved(kind: Any, name: Any, p: nn.Parameter, grads: list[Tensor], **options: Any) -> Tensor:
    """Return where a copy of `p` is after these gradients."""
    p = nn.Parameter(p.detach().clone())
    opt = kind([p], lr=0.1, **options)
    with backend(name):
        for grad in grads:
            p.grad = grad.clone()
            opt.step()
    return p.detach()


def assert_same(kind: Any, p: nn.Parameter, grads: list[Tensor], atol: float = 1e-5, **options: Any) -> None:
    found, expected = (moved(kind, name, p, grads, **options) for name in ("triton", "torch"))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [(Muon, {"ns_dtype": "float32"}), (GaLoreAdamW, {"rank": 4, "basis": "random"}), (GaLoreAdamW, {"rank": None})],
)
@pytest.mark.filterwarnings("ignore:GaLoreAdamW. no parameter group has a rank:RuntimeWarning")
def test_weights_that_are_no_matrix_in_memory(kind: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    for weight in (
        torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(3, 8, 12).mT,
        torch.randn(12, 8).mT,
    ):
        p = nn.Parameter(weight.to(dtype))
        assert_same(kind, p, [torch.randn(p.shape).to(dtype) for _ in range(2)], atol=2e-2, **options)


@pytest.mark.filterwarnings("ignore:GaLoreAdamW. no parameter group has a rank:RuntimeWarning")
@pytest.mark.parametrize("state_dtype", storage.STATE_DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0, 5), (3,), (65,)], ids=str)
def test_moments_of_few_elements_or_none(shape: tuple[int, ...], state_dtype: str) -> None:
    p, grads = nn.Parameter(torch.randn(shape)), [torch.randn(shape) for _ in range(3)]
    assert_same(GaLoreAdamW, p, grads, atol=2e-2, rank=None, state_dtype=state_dtype)
    if len(shape) == 2:
        assert_same(Muon, p, grads, atol=2e-2, state_dtype=state_dtype)


@pytest.mark.usefixtures("halves")
@pytest.mark.parametrize("gap", [1, 3])
def test_coefficients_larger_than_float16_holds(gap: int) -> None:
    """All elements alike: the first coefficient is the root of their number times as large."""
    p = nn.Parameter(torch.zeros(48, 32).half())
    grads = [torch.full((48, 32), 20000.0).half() for _ in range(2)]
    with backend("triton"):
        opt = DCTAdamW([p], lr=0.1, rank=4, update_proj_gap=gap)
        for grad in grads:
            p.grad = grad
            opt.step()
    assert p.isfinite().all()
    assert all(opt.state[p][name].isfinite().all() for name in ("exp_avg", "exp_avg_sq"))


def test_a_weight_of_another_class_keeps_its_precision() -> None:
    weight, grad = torch.randn(24, 40), torch.randn(24, 40)
    plain = moved(Muon, "triton", nn.Parameter(weight), [grad], weight_decay=0.0)
    p = nn.Parameter(weight.as_subclass(Named))
    with backend("triton"):
        update = ops.normalized(grad.unsqueeze(0), eps=0.0, dtype=torch.float16)[0]
    before = p.detach().as_subclass(Tensor).clone()
    with torch.no_grad():
        ops.apply_(p, update, lr=1e-4, weight_decay=0.0)
    torch.testing.assert_close(p.detach().as_subclass(Tensor), before - 1e-4 * update.float(), rtol=0, atol=1e-7)
    assert plain.isfinite().all()


def test_what_is_stepped_together_is_alike() -> None:
    p = nn.Parameter(torch.zeros(3, 4).bfloat16())
    p.grad = torch.zeros(3, 4).bfloat16()
    other = nn.Parameter(torch.zeros(3, 4).bfloat16().as_subclass(Named))
    other.grad = torch.zeros(3, 4).bfloat16()
    assert _state.alike(p) != _state.alike(other)
    other = nn.Parameter(torch.zeros(3, 4).bfloat16())
    other.grad_dtype = None
    other.grad = torch.zeros(3, 4)
    assert _state.alike(p) != _state.alike(other)
    other.grad = None
    other.grad = torch.ones(3, 4).bfloat16()
    assert _state.alike(p) == _state.alike(other)


@pytest.mark.parametrize(
    ("weight", "grad"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_gradients_of_another_dtype(weight: torch.dtype, grad: torch.dtype) -> None:
    p = nn.Parameter(torch.randn(12, 20).to(weight))
    for kind, options in ((Muon, {"ns_dtype": "float32"}), (GaLoreAdamW, {"rank": 4, "basis": "random"})):
        found = []
        for name in ("triton", "torch"):
            own = nn.Parameter(p.detach().clone())
            own.grad_dtype = None
            own.grad = torch.ones(12, 20).to(grad) * torch.arange(20).to(grad)
            with backend(name):
                kind([own], lr=0.1, **options).step()
            found.append(own.detach())
        torch.testing.assert_close(*found, rtol=2e-2, atol=1e-3)


def test_a_negation_that_was_put_off_happens() -> None:
    p, grad = nn.Parameter(torch.randn(12, 20)), torch.randn(12, 20)
    found = []
    for made in (torch._neg_view(-grad), grad):
        own = nn.Parameter(p.detach().clone())
        own.grad = made
        with backend("triton"):
            Muon([own], lr=0.1).step()
        found.append(own.detach())
    torch.testing.assert_close(*found)
