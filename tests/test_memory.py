"""Bytes that are computed equal bytes that are there."""

import pytest
import torch
from torch import nn

from lowrank_optim import GaLoreAdamW, MemoryMeter, adamw_state_bytes, param_groups, state_bytes


def net():
    return nn.Sequential(nn.Embedding(30, 24), nn.Linear(24, 48), nn.Linear(48, 24))


def test_adamw_is_predicted_to_the_byte():
    model = net()
    opt = torch.optim.AdamW(model.parameters())
    assert state_bytes(opt).total == 0
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert state_bytes(opt).total == adamw_state_bytes(model.parameters())
    assert state_bytes(GaLoreAdamW([{"params": list(model.parameters())}])).total == state_bytes(opt).total


def test_names_and_parameters_add_up():
    size = state_bytes(GaLoreAdamW(param_groups(net(), rank=4)))
    assert set(size.by_name) == {"basis", "exp_avg", "exp_avg_sq", "step"}
    assert sum(size.by_name.values()) == size.total
    assert sum(sum(sizes.values()) for sizes in size.by_parameter.values()) == size.total
    assert size.by_parameter["1.weight"] == {
        "exp_avg": 4 * 48 * 4,
        "exp_avg_sq": 4 * 48 * 4,
        "basis": 4 * 24 * 4,
        "step": 4,
    }
    assert str(size).startswith(f"{size.total:,} bytes of optimizer state (basis 768, exp_avg")


def test_what_a_view_keeps_alive_counts():
    p = nn.Parameter(torch.zeros(2, 2))
    opt = torch.optim.SGD([p], momentum=0.9)
    opt.state[p]["momentum_buffer"] = torch.zeros(100, 4)[:1]
    opt.state[p]["nested"] = {"a": [torch.zeros(3)]}
    assert state_bytes(opt).total == 1600 + 12


def test_the_meter_reads_a_training_loop():
    model = net()
    opt = GaLoreAdamW(param_groups(model, rank=4))
    meter = MemoryMeter(model, opt)
    with meter.phase("forward"):
        loss = model(torch.arange(30)).square().mean()
    with meter.phase("backward"):
        loss.backward()
    with meter.phase("step"):
        opt.step()
    opt.zero_grad()
    values = meter.read()
    weights = sum(4 * p.numel() for p in model.parameters())
    assert values["mem/params_bytes"] == weights
    assert values["mem/grads_bytes"] == weights
    assert values["mem/opt_state_bytes"] == state_bytes(opt).total
    assert values["mem/basis_bytes"] == state_bytes(opt).by_name["basis"]
    assert all(isinstance(v, int | float) for v in values.values())
    if not torch.cuda.is_available():
        assert 0.01 < values["mem/rss_gib"] <= values["mem/rss_peak_gib"] * 1.01


def test_the_resident_set_sees_an_allocation():
    meter = MemoryMeter(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
    before = meter.read()["mem/rss_gib"]
    held = torch.ones(64 << 18)  # 64 MiB, touched
    assert meter.read()["mem/rss_gib"] - before == pytest.approx(held.nbytes / 2**30, rel=0.2)


def test_names_that_repeat_count_twice():
    a, b = (nn.Parameter(torch.zeros(8, 8)) for _ in range(2))
    size = state_bytes(GaLoreAdamW([{"params": [("w", a)]}, {"params": [("w", b)]}]))
    assert size.total == 2 * (2 * 4 * 64 + 4)
    assert set(size.by_parameter) == {"w", "w (group 1)"}


def test_gradients_that_share_a_buffer_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    buffer = torch.zeros(32)
    meter = MemoryMeter(model, torch.optim.SGD(model.parameters()))
    with meter.phase("backward"):
        for p, part in zip(model.parameters(), buffer.split(16), strict=True):
            p.grad = part.view(4, 4)
    assert meter.read()["mem/grads_bytes"] == 128


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert MemoryMeter(model, torch.optim.SGD(model.parameters())).read()["mem/params_bytes"] == 256


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_allocators_peaks_are_read_per_phase():
    model = net().cuda()
    opt = GaLoreAdamW(param_groups(model, rank=4))
    meter = MemoryMeter(model, opt)
    with meter.phase("forward"):
        loss = model(torch.arange(30, device="cuda")).square().mean()
    with meter.phase("backward"):
        loss.backward()
    with meter.phase("step"):
        opt.step()
    values = meter.read()
    for phase in ("forward", "backward", "step"):
        assert values[f"mem/peak_in_{phase}_gib"] > 0
