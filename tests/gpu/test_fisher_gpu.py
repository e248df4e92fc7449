"""M-FAC on a CUDA device: the numbers of a CPU, windows that stay in CPU memory, checkpoints that change device."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import MFAC, InverseFisher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZE = 1000


def gradient(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(99)) + torch.randn(SIZE, generator=generator)


def filled(count: int, **options: Any) -> InverseFisher:
    fisher = InverseFisher(SIZE, 20, 1e-3, **options)
    for seed in range(count):
        fisher.push(gradient(seed))
    return fisher


def reloaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location="cpu")


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("block_size", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_products_are_those_of_a_cpu(dtype: torch.dtype, block_size: int | None, offload: bool) -> None:
    options: dict[str, Any] = {"dtype": dtype, "block_size": block_size}
    here = filled(47, device="cpu", **options)
    there = filled(47, device="cuda", offload=offload, **options)
    x = gradient(1000)
    for ours, theirs in (
        (there.solve(x.cuda()), here.solve(x)),
        (there.solve_newest(), here.solve_newest()),
        (there.diagonal(), here.diagonal()),
        (there.static().solve(x.cuda()), here.solve(x)),
    ):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-4)
    assert there.logdet() == pytest.approx(here.logdet(), rel=1e-9)
    assert there.element(3, 5) == pytest.approx(here.element(3, 5), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_window_goes_on_on_another_device(first: str, second: str) -> None:
    one, two = filled(29, device=first), InverseFisher(SIZE, 20, 1e-3, device=second)
    two.load_state_dict(reloaded(one.state_dict()))
    for seed in range(29, 60):
        one.push(gradient(seed))
        two.push(gradient(seed))
        torch.testing.assert_close(one.solve_newest().cpu(), two.solve_newest().cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_an_optimizer_goes_on_on_another_device(first: str, second: str) -> None:
    def run(p: nn.Parameter, opt: MFAC, seeds: range) -> None:
        for seed in seeds:
            p.grad = gradient(seed).view(40, 25).to(p.device)
            opt.step()

    options: dict[str, Any] = {"lr": 0.02, "momentum": 0.5, "num_grads": 6, "damping": 0.1, "rank": 10}
    p = nn.Parameter(torch.zeros(40, 25, device=first))
    opt = MFAC([p], **options)
    run(p, opt, range(10))
    q = nn.Parameter(p.detach().to(second, copy=True))
    other = MFAC([q], **options)
    other.load_state_dict(reloaded(opt.state_dict()))
    run(p, opt, range(10, 15))
    run(q, other, range(10, 15))
    torch.testing.assert_close(p.detach().cpu(), q.detach().cpu(), rtol=1e-4, atol=1e-5)


def test_a_window_that_has_no_room_is_refused_with_its_bytes() -> None:
    with pytest.raises(MemoryError, match="bytes, and cuda"):
        InverseFisher(10**9, 1024, device="cuda")
