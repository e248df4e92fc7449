"""What drives, saves and watches a torch.optim optimizer: groups, schedulers, names, checkpoints, hooks, profiler."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from lowrank_optim import GaLoreAdamW
from tests.small_model import PROJECTED, WAYS, backward, make, mlp, same, train

# one way is AdamW alone, which the optimizer remarks on
pytestmark = pytest.mark.filterwarnings("ignore:GaLoreAdamW. no parameter group has a rank:RuntimeWarning")


OVERRIDES = {
    "lr": 0.05,
    "betas": [0.5, 0.9],
    "eps": 1e-3,
    "weight_decay": 0.3,
    "rank": 3,
    "update_proj_gap": 2,
    "scale": 0.5,
    "proj_type": "reverse_std",
    "basis": "svd",
    "maximize": True,
}


@pytest.mark.parametrize("key", OVERRIDES)
def test_every_number_can_be_given_to_one_group(key: str) -> None:
    base = {"lr": 0.01, "rank": 2, "update_proj_gap": 3, "scale": 1.0, "basis": "subspace", "stagger": False}
    models = [mlp() for _ in range(3)]
    grouped, plain, changed = models
    groups = [{"params": grouped[0].parameters()}, {"params": grouped[2].parameters(), key: OVERRIDES[key]}]
    train(grouped, GaLoreAdamW(groups, **base), 1)
    train(plain, GaLoreAdamW(plain.parameters(), **base), 1)
    train(changed, GaLoreAdamW(changed.parameters(), **(base | {key: OVERRIDES[key]})), 1)
    assert same(list(grouped[0].parameters()), list(plain[0].parameters()))
    assert same(list(grouped[2].parameters()), list(changed[2].parameters()))
    if key not in ("update_proj_gap", "basis"):
        assert not same(list(grouped[2].parameters()), list(plain[2].parameters()))


@pytest.mark.parametrize("way", WAYS)
def test_a_group_can_be_added_in_the_middle_of_training(way: dict[str, Any]) -> None:
    model = mlp()
    opt = make(model[0].parameters(), way)
    train(model, opt, 3)
    before = copy.deepcopy(model[2].weight)
    opt.add_param_group({"params": model[2].parameters(), "lr": 0.1})
    train(model, opt, 3)
    assert opt.state[model[2].weight]["step"] == 3
    assert not same(before, model[2].weight)
    assert opt.param_groups[1]["eps"] == opt.param_groups[0]["eps"]


@pytest.mark.parametrize("way", WAYS)
def test_keys_of_other_tools_are_tolerated(way: dict[str, Any]) -> None:
    foreign = {"fused": True, "foreach": False, "name": "all", "capturable": False, "lr_mult": 2, "layer_id": 3}
    models = [mlp(), mlp()]
    for model, extra in zip(models, ({}, foreign), strict=True):
        train(model, make([{"params": model.parameters(), **extra}], way), 4)
    assert same(list(models[0].parameters()), list(models[1].parameters()))


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 4]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, 1.0, 5),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 6),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 6),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-3, 1e-1, 2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1), lr_scheduler.ExponentialLR(opt, 0.9)], [3]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1), lr_scheduler.ExponentialLR(opt, 0.9)], opt
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("way", WAYS)
def test_schedulers_drive_it_as_they_drive_torch(way: dict[str, Any], name: str) -> None:
    """With a number and with a tensor; groups without a rank follow torch.optim.AdamW all along."""
    tensor_lr = torch.tensor(0.05)
    models = [mlp() for _ in range(3)]
    opts: list[torch.optim.Optimizer] = [
        make(models[0].parameters(), way, lr=0.05),
        make(models[1].parameters(), way, lr=tensor_lr),
        torch.optim.AdamW(models[2].parameters(), lr=0.05, weight_decay=0),
    ]
    schedulers = [SCHEDULERS[name](opt) for opt in opts]
    for seed in range(7):
        for model, opt, scheduler in zip(models, opts, schedulers, strict=True):
            opt.zero_grad()
            backward(model, seed)
            opt.step()
            # a loss that does not fall
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        rates = [float(opt.param_groups[0]["lr"]) for opt in opts]
        assert rates == pytest.approx([rates[2]] * 3, rel=1e-5)
    assert opts[1].param_groups[0]["lr"] is tensor_lr
    for p, q, r in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
        if not way:
            torch.testing.assert_close(p, r, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_names_survive_and_do_not_decide_what_is_loaded(way: dict[str, Any]) -> None:
    model = mlp()
    opt = make([{"params": list(model.named_parameters())}], way)
    assert opt.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    train(model, opt, 3)
    assert opt.state_dict()["param_groups"][0]["param_names"] == opt.param_groups[0]["param_names"]
    plain = make([{"params": list(mlp().parameters())}], way)
    plain.load_state_dict(opt.state_dict())
    assert same(plain.state_dict()["state"], opt.state_dict()["state"])
    named = make([{"params": [(f"other.{name}", p) for name, p in mlp().named_parameters()]}], way)
    unnamed = plain.state_dict()
    del unnamed["param_groups"][0]["param_names"]
    named.load_state_dict(unnamed)
    assert same(named.state_dict()["state"], opt.state_dict()["state"])
    assert named.param_groups[0]["param_names"][0] == "other.0.weight"


@pytest.mark.parametrize("way", WAYS)
def test_saving_and_loading_disturb_nobody(way: dict[str, Any]) -> None:
    quiet, saved, loaded = mlp(), mlp(), mlp()
    train(quiet, make(quiet.parameters(), way), 6)
    opt, other = make(saved.parameters(), way), make(loaded.parameters(), way)
    for seed in range(6):
        opt.zero_grad()
        backward(saved, seed)
        opt.step()
        checkpoint = opt.state_dict()
        frozen = copy.deepcopy(checkpoint)
        other.load_state_dict(checkpoint)
        train(loaded, other, 2)
        # neither loading nor stepping what was loaded has written to the dict or to the optimizer it came from
        assert same(frozen, checkpoint)
        assert same(frozen, opt.state_dict())
    assert same(list(quiet.parameters()), list(saved.parameters()))


def test_state_dict_hooks_see_and_change_what_torch_lets_them() -> None:
    model = mlp()
    opt = make(model.parameters(), PROJECTED[0])
    train(model, opt, 2)
    seen: list[str] = []
    opt.register_state_dict_pre_hook(lambda _: seen.append("save pre"))
    opt.register_state_dict_post_hook(lambda _, state_dict: seen.append("save post") or state_dict | {"note": 1})
    saved = opt.state_dict()
    assert saved["note"] == 1

    def prepare(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("load pre")
        groups = [group | {"lr": 0.5} for group in state_dict["param_groups"]]
        return {"state": state_dict["state"]["nested"], "param_groups": groups}

    def look(loaded: torch.optim.Optimizer) -> None:
        seen.append("load post")
        assert loaded.state[model[0].weight]["exp_avg"].dtype == torch.float32

    model.bfloat16()
    opt.register_load_state_dict_pre_hook(prepare)
    opt.register_load_state_dict_post_hook(look)
    opt.load_state_dict({"state": {"nested": saved["state"]}, "param_groups": saved["param_groups"]})
    assert seen == ["save pre", "save post", "load pre", "load post"]
    assert opt.param_groups[0]["lr"] == 0.5


def test_repr_and_profiler_label() -> None:
    model = mlp()
    opt = make(model.parameters(), PROJECTED[0])
    assert repr(opt).startswith("GaLoreAdamW (\nParameter Group 0")
    assert "update_proj_gap: 3" in repr(opt)
    backward(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
        opt.zero_grad()
    labels = {event.name for event in profile.events()}
    assert {"Optimizer.step#GaLoreAdamW.step", "Optimizer.zero_grad#GaLoreAdamW.zero_grad"} <= labels
