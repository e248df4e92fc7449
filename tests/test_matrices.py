"""What the optimizers of matrices make of groups, and what they refuse."""

import pytest
import torch
from torch import nn

from lowrank_optim import AuON, GaLoreAdamW, LowRankMuon, Muon, SteepestDescent, Trion

MATRICES = [Muon, LowRankMuon, Trion, AuON, SteepestDescent]


def parameters():
    return nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))


def step(opt):
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = 1e-3 * torch.randn_like(p)
    opt.step()


@pytest.mark.parametrize("to", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("first", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("cls", MATRICES)
def test_a_state_dtype_that_changes_is_refused_before_anything_is_written(cls, first, to):
    matrix, vector = parameters()
    opt = cls([{"params": [matrix], "role": "matrix"}, {"params": [vector], "role": "vector"}], state_dtype=first)
    step(opt)
    opt.param_groups[0]["state_dtype"] = opt.param_groups[1]["state_dtype"] = to
    before = matrix.detach().clone(), vector.detach().clone()
    if to == first:
        step(opt)
        return
    with pytest.raises(RuntimeError, match="has changed since its state was made"):
        step(opt)
    assert torch.equal(matrix, before[0])
    assert torch.equal(vector, before[1])


@pytest.mark.parametrize(("key", "value"), [("role", "other"), ("normuon_beta2", 0.9)])
def test_other_keys_that_change_the_state_are_refused(key, value):
    opt = Muon([parameters()[0]])
    step(opt)
    opt.param_groups[0][key] = value
    with pytest.raises(RuntimeError, match="has changed since its state was made"):
        step(opt)


def test_a_state_of_torch_keeps_the_roles_of_the_groups_that_it_goes_to():
    matrix, vector = parameters()
    theirs = torch.optim.AdamW([{"params": [matrix]}, {"params": [vector]}], lr=0.1)
    step(theirs)
    opt = Muon([{"params": [matrix], "role": "other"}, {"params": [vector], "role": "vector"}])
    opt.load_state_dict(theirs.state_dict())
    assert [group["role"] for group in opt.param_groups] == ["other", "vector"]
    assert torch.equal(opt.state[vector]["exp_avg"], theirs.state[vector]["exp_avg"])
    step(opt)


def test_a_group_of_both_kinds_gives_its_lr_to_its_matrices():
    matrix, vector = parameters()
    opt = Muon([{"params": [matrix, vector], "lr": 0.02}], fallback_lr=3e-3)
    assert [(group["role"], group["lr"]) for group in opt.param_groups] == [("matrix", 0.02), ("vector", 3e-3)]
    opt = Muon([{"params": [matrix, vector], "lr": 0.02}])
    assert [group["lr"] for group in opt.param_groups] == [0.02, 0.02]
    opt = Muon([{"params": [vector], "lr": 0.02}], fallback_lr=3e-3)
    assert opt.param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize("sort", [{"role": "vector"}, {"use_muon": False}])
def test_adamw_groups_may_call_their_numbers_as_others_do(sort):
    vector = parameters()[1]
    opt = Muon([{"params": [vector], "betas": (0.5, 0.6), "eps": 1e-3, **sort}])
    group = opt.param_groups[0]
    assert (group["fallback_betas"], group["fallback_eps"]) == ((0.5, 0.6), 1e-3)
    twin = nn.Parameter(vector.detach().clone())
    theirs = torch.optim.AdamW([twin], lr=1e-3, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.1)
    for _ in range(3):
        vector.grad = twin.grad = torch.randn(6)
        opt.step()
        theirs.step()
    torch.testing.assert_close(vector, twin, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "steps"), [("deepseek", 10), ("modula", 6), ("turbo", 4)])
def test_a_table_made_for_another_number_of_steps_is_refused(name, steps):
    with pytest.raises(ValueError, match=f"Invalid ns_steps: 5, must be {steps}, for which '{name}' is made"):
        Muon([parameters()[0]], ns_coefficients=name)
    step(Muon([parameters()[0]], ns_coefficients=name, ns_steps=steps))


@pytest.mark.parametrize("name", ["jordan", "polar_express"])
def test_tables_of_any_length_take_any_number_of_steps(name):
    matrix = parameters()[0]
    before = matrix.detach().clone()
    step(Muon([matrix], ns_coefficients=name, ns_steps=7))
    assert matrix.isfinite().all()
    assert not torch.equal(matrix, before)


@pytest.mark.parametrize(
    ("cls", "key", "value"),
    [
        (LowRankMuon, "momentum_form", "sum"),
        (LowRankMuon, "normuon_beta2", 0.9),
        (Muon, "residual", 0.3),
        (GaLoreAdamW, "gamma", 1.0),
        (AuON, "norm", "row"),
    ],
)
def test_a_key_of_another_optimizer_is_not_lost_silently(cls, key, value):
    with pytest.raises(ValueError, match=f"Invalid key '{key}'"):
        cls([{"params": [parameters()[0]], key: value}])


@pytest.mark.parametrize("cls", MATRICES)
@pytest.mark.parametrize("key", ["splits", "flaten", "momentun", "fallback_lrs"])
def test_misspelt_keys_are_named(cls, key):
    with pytest.raises(ValueError, match=f"unknown key '{key}'"):
        cls([{"params": [parameters()[0]], key: 2}])


def test_vectors_are_rounded_apart():
    """Equal bfloat16 vectors with equal gradients do not get equal noise."""
    one, two = (nn.Parameter(torch.ones(256, dtype=torch.bfloat16)) for _ in range(2))
    opt = Muon([{"params": [one, two], "role": "vector"}], lr=1e-4, stochastic_rounding=True)
    for _ in range(20):
        one.grad = two.grad = torch.ones(256, dtype=torch.bfloat16)
        opt.step()
    assert not torch.equal(one, two)
