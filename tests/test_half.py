"""Gradients of 16 bits that are multiplied as they are, as on a GPU: here a CPU says that it does too."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import (
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    LDAdamW,
    _half,
    backend,
    columns,
    cosine,
    ops,
    orthonormal,
    reference,
)
from lowrank_optim._types import Factored

SHAPES = [(48, 96), (96, 40), (33, 70), (8, 4, 3, 3)]


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Let every device multiply 16 bits, and note what products are made of."""
    seen: list[torch.dtype] = []
    real = reference.product

    def product(a: Tensor, b: Tensor) -> Tensor:
        seen.extend((a.dtype, b.dtype))
        return real(a, b)

    for module in (_half, ops, orthonormal, columns):
        monkeypatch.setattr(module, "multiplies", lambda x: x.dtype in _half.HALF)
    monkeypatch.setattr(reference, "product", product)
    return seen


def moved(kind: Any, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Return how far each parameter has gone in a few steps from gradients that bfloat16 holds."""
    source = torch.Generator().manual_seed(1)
    params = [nn.Parameter((torch.randn(shape, generator=source) * 0.1).bfloat16().to(dtype)) for shape in SHAPES]
    before = [p.detach().float().clone() for p in params]
    opt = kind(params, lr=0.1, **options)
    for _ in range(6):
        for p in params:
            p.grad = torch.randn(p.shape, generator=source).bfloat16().to(dtype)
        opt.step()
    return [p.detach().float() - start for p, start in zip(params, before, strict=True)]


WAYS = [
    pytest.param(GaLoreAdamW, {"basis": "random"}, id="random"),
    pytest.param(GaLoreAdamW, {"basis": "random", "weight_decay": 0.1, "maximize": True}, id="maximize"),
    pytest.param(GaLoreAdamW, {"basis": "random", "state_dtype": "int8"}, id="int8"),
    pytest.param(GaLoreAdamW, {"basis": "random", "carry": "reset", "update_proj_gap": 3}, id="reset"),
    pytest.param(GaLoreAdamW, {"basis": "svd", "update_proj_gap": 4}, id="svd"),
    pytest.param(GaLoreAdamW, {"basis": "rsvd", "update_proj_gap": 3, "carry": "rotate"}, id="rsvd"),
    pytest.param(GaLoreAdamW, {"basis": "subspace", "update_proj_gap": 3}, id="subspace"),
    pytest.param(GaLoreAdamW, {"basis": "random", "proj_type": "full"}, id="full"),
    pytest.param(LDAdamW, {"error_feedback": None}, id="ldadam"),
    pytest.param(DCTAdamW, {"update_proj_gap": 100}, id="dct"),
]


@pytest.mark.parametrize(("kind", "options"), WAYS)
def test_steps_are_those_of_float32_but_for_rounding(
    kind: Any, options: dict[str, Any], halves: list[torch.dtype]
) -> None:
    expected = moved(kind, torch.float32, rank=8, **options)
    assert halves == []
    found = moved(kind, torch.bfloat16, rank=8, **options)
    # of a gradient and a basis that was rounded to it
    assert torch.bfloat16 in halves
    for ours, theirs in zip(found, expected, strict=True):
        # the basis and the directions are rounded, and Adam's first steps are signs
        assert float((ours - theirs).norm() / theirs.norm()) < 0.25


def test_what_looks_at_the_gradient_itself_gets_it_in_float32(halves: list[torch.dtype]) -> None:
    for kind, options in (
        (FiraAdamW, {}),
        (GaLoreAdamW, {"error_feedback": "float32"}),
        (GaLoreAdamW, {"basis": "identity"}),
    ):
        moved(kind, torch.bfloat16, rank=8, **{"basis": "random", **options})
    assert halves == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_product_rounds_one_factor_and_sums_in_float32(dtype: torch.dtype) -> None:
    a, b = torch.randn(5, 300).to(dtype), torch.randn(300, 7)
    found = ops.product(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), a.double() @ b.to(dtype).double(), rtol=1e-5, atol=1e-4)
    assert ops.product(b.mT, b).dtype == torch.float32
    assert ops.product(b.mT.double(), b.double()).dtype == torch.float64


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_of_16_bits_are_added_to_any_weight(dtype: torch.dtype, cautious: bool) -> None:
    weight, left, right = torch.randn(6, 5).to(dtype), torch.randn(6, 2).half(), torch.randn(2, 5)
    before = weight.double()
    expected = 0.99 * before - 0.1 * (left.double() @ right.double())
    ops.apply_(weight, Factored(left, right), lr=0.1, weight_decay=0.1, cautious=cautious)
    if cautious:
        update = left.double() @ right.double()
        expected += 0.01 * before * (update * before < 0)
    torch.testing.assert_close(weight.double(), expected.to(dtype).double(), rtol=1e-5, atol=1e-6)


def test_a_cpu_is_not_said_to_multiply_them() -> None:
    assert not _half.multiplies(torch.zeros(2, dtype=torch.bfloat16))
    assert not _half.takes(GaLoreAdamW([nn.Parameter(torch.zeros(2, 2))], rank=1), torch.zeros(2))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are not interpreted in this process")
@pytest.mark.parametrize(("gap", "dtype"), [(1, torch.bfloat16), (2, torch.float16)], ids=str)
def test_columns_are_selected_and_moments_go_along_in_one_kernel(
    gap: int, dtype: torch.dtype, halves: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowrank_optim.kernels import chosen_adam
    from tests.kernels.common import shapes_seen

    seen: list[tuple[int, ...]] = shapes_seen(monkeypatch, chosen_adam, "chosen_adam_directions_")

    def indices(name: Any, kind: torch.dtype) -> tuple[list[Tensor], list[list[int]]]:
        source = torch.Generator().manual_seed(1)
        shapes = [(16, 24), (24, 16), (16, 24)]
        params = [nn.Parameter((torch.randn(shape, generator=source) * 0.05).to(dtype).to(kind)) for shape in shapes]
        before = [p.detach().float().clone() for p in params]
        opt = DCTAdamW(params, lr=0.1, rank=5, weight_decay=0.1, update_proj_gap=gap)
        with backend(name):
            for _ in range(3):
                for p in params:
                    # each with an energy of its own, so that rounding does not decide which are selected
                    side = p.dim() - 1 if p.size(0) > p.size(1) else 0
                    place = torch.randperm(p.size(side), generator=source)
                    waves = torch.randn(p.shape, generator=source) * 0.8 ** (place if side else place.unsqueeze(1))
                    columns = cosine.dct_matrix(p.size(side), torch.float32, waves.device)
                    p.grad = (waves @ columns.mT if side else columns @ waves).to(dtype).to(kind)
                opt.step()
        moved = [p.detach().float() - start for p, start in zip(params, before, strict=True)]
        return moved, [opt.state[p]["basis_index"].tolist() for p in params]

    expected, columns_of = indices("torch", torch.float32)
    assert seen == []
    found, chosen = indices("triton", dtype)
    assert seen
    assert chosen == columns_of
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.1


@pytest.mark.usefixtures("halves")
def test_a_step_that_fails_in_the_middle_has_counted_what_it_has_written(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.randn(16, 8).bfloat16()) for _ in range(4)]
    opt = GaLoreAdamW(params, lr=0.1, rank=4, basis="random")
    real, done = Tensor.addmm_, []

    def third_fails(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        done.append(1)
        if len(done) == 3:
            raise torch.OutOfMemoryError
        return real(self, *args, **kwargs)

    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
    monkeypatch.setattr(Tensor, "addmm_", third_fails)
    with pytest.raises(torch.OutOfMemoryError):
        opt.step()
    written = [not torch.equal(p, old) for p, old in zip(params, before, strict=True)]
    assert written == [True, True, False, False]
    assert [int(opt.state[p]["step"]) for p in params] == written


@pytest.mark.parametrize(
    ("options", "halves"),
    [
        # coordinates in 32 bits and directions in 16, and the basis in 16
        ({"basis": "svd"}, 3 * 96 * 8 + 8 * 40),
        ({"basis": "svd", "proj_type": "left"}, 3 * 8 * 40 + 96 * 8),
        # and a factor (8, 40) of the update in 32
        ({"basis": "svd", "proj_type": "full"}, 3 * 8 * 8 + 8 * (96 + 40) + 2 * 8 * 40),
        # coefficients, directions, columns
        ({"basis": "dct"}, 96 * 40 + 96 * 8 + 8 * 40),
        # those of a copy that is turned
        ({"basis": "dct", "proj_type": "left"}, 2 * 96 * 40 + 8 * 40 + 8 * 96),
    ],
)
def test_what_a_chunk_holds_is_counted(options: dict[str, Any], halves: int) -> None:
    p = nn.Parameter(torch.zeros(96, 40).bfloat16())
    opt = GaLoreAdamW([p], rank=8, **options)
    rule: Any = opt._rule(opt.param_groups[0], p)
    assert rule.need_as_is(p.shape) == halves // 2
