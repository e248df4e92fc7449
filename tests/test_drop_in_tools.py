"""What drives, saves and watches a torch.optim optimizer: groups, schedulers, names, checkpoints, hooks, profiler."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import lowrank_optim
from lowrank_optim import (
    MFAC,
    APOLLOAdamW,
    AuON,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    LDAdamW,
    LowRankMuon,
    Muon,
    SteepestDescent,
    Trion,
)
from lowrank_optim.optimizer import RuleOptimizer
from lowrank_optim.storage import STATE_DTYPES
from tests.small_model import ALL, CLASSES, NAMED, WAYS, Way, backward, mlp, same, train

# one way is AdamW alone, which the optimizer remarks on
pytestmark = pytest.mark.filterwarnings("ignore:GaLoreAdamW. no parameter group has a rank:RuntimeWarning")


# how each class is made, and another value for each of its numbers, which one group is given
BASE: dict[type[RuleOptimizer], dict[str, Any]] = {
    GaLoreAdamW: {
        "rank": 2,
        # two refreshes within the run, so that a period may double
        "update_proj_gap": 2,
        "scale": 1.0,
        "basis": "subspace",
        "stagger": False,
        "residual": "sign",
    },
    DCTAdamW: {"rank": 2, "update_proj_gap": 3},
    APOLLOAdamW: {"rank": 2, "update_proj_gap": 3},
    FiraAdamW: {"rank": 2, "update_proj_gap": 3},
    LDAdamW: {"rank": 2},
    # γ from the momentum, so that its size shows
    Muon: {"adjust_lr_fn": "nuclear"},
    # little momentum, so that another basis wins soon
    LowRankMuon: {"rank": 2, "update_proj_gap": 4, "momentum": 0.2},
    Trion: {"rank": 2},
    AuON: {"ns_steps": 3, "fallback_lr": None},
    SteepestDescent: {},
    # a window that is full within the run, and coordinates that are found again
    MFAC: {"num_grads": 4, "damping": 0.1, "rank": 2, "update_proj_gap": 3, "weight_decay": 0.2},
}
_ADAM = {"lr": 0.05, "betas": [0.5, 0.9], "eps": 1e-3, "weight_decay": 0.3, "state_dtype": "int4", "maximize": True}
_PROJECTED = {"rank": 3, "proj_type": "reverse_std"}
_MATRICES = {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.5, "state_dtype": "int4", "maximize": True}
_ITERATION = {"eps": 10.0, "ns_coefficients": "you", "ns_steps": 2, "method": "eigh", "ns_dtype": "float32"}
_FALLBACK = {"fallback_betas": [0.5, 0.9], "fallback_eps": 1e-1}
OVERRIDES: dict[type[RuleOptimizer], dict[str, Any]] = {
    GaLoreAdamW: {
        **_ADAM,
        **_PROJECTED,
        "update_proj_gap": 3,
        "scale": 0.5,
        "basis": "svd",
        "stagger": True,
        "carry": "rotate",
        "residual": None,
        "error_feedback": "int8",
        "residual_scale": 0.5,
        "adaptive_overlap": 0.01,
    },
    DCTAdamW: {
        **_ADAM,
        **_PROJECTED,
        "update_proj_gap": 2,
        "ranking": "l1",
        "carry": "keep",
        "column_ages": True,
        "error_feedback": "int4",
        "stagger": False,
    },
    APOLLOAdamW: {
        **_ADAM,
        **_PROJECTED,
        "update_proj_gap": 2,
        "scale": 4.0,
        "scale_type": "tensor",
        "norm_growth": None,
        "basis": "svd",
        "stagger": False,
        "seed": 7,
        "proj_dtype": "float32",
    },
    FiraAdamW: {
        **_ADAM,
        **_PROJECTED,
        "update_proj_gap": 2,
        "scale": 0.5,
        "norm_growth": None,
        "published_code": True,
        "basis": "dct",
        "carry": "reset",
        "stagger": False,
    },
    LDAdamW: {**_ADAM, **_PROJECTED, "rho": 0.5, "error_feedback": None},
    Muon: {
        **_MATRICES,
        **_ITERATION,
        **_FALLBACK,
        "nesterov": False,
        "adjust_lr_fn": "match_rms_adamw",
        "momentum_form": "sum",
        "normuon_beta2": 0.5,
        "cautious": True,
        "split": 2,
        "flatten": False,
    },
    LowRankMuon: {
        **_MATRICES,
        **_ITERATION,
        **_FALLBACK,
        "nesterov": False,
        "adjust_lr_fn": "match_rms_adamw",
        "ns_dtype": "bfloat16",
        "ns_coefficients": [[3.0, -3.2, 1.2], [1.875, -1.25, 0.375]],
        "rank": 3,
        "basis": "identity",
        "update_proj_gap": 2,
        "residual": 0.5,
        "stagger": False,
    },
    Trion: {
        **_MATRICES,
        **_ITERATION,
        **_FALLBACK,
        "adjust_lr_fn": "match_rms_adamw",
        "rank": 3,
        "basis": "identity",
    },
    AuON: {
        **_MATRICES,
        **{key: value for key, value in _ITERATION.items() if key != "eps"},
        **_FALLBACK,
        "nesterov": False,
        "adjust_lr_fn": "match_rms_adamw",
        "gamma": 9.0,
        "normalize": False,
    },
    SteepestDescent: {**_MATRICES, **_ITERATION, "nesterov": False, "ns_coefficients": "jordan", "norm": "column"},
    MFAC: {
        "lr": 0.05,
        "weight_decay": 0.3,
        "momentum": 0.5,
        "maximize": True,
        "num_grads": 2,
        "damping": 1.0,
        "relative_damping": True,
        "divisor": "count",
        "scope": "parameter",
        "decoupled_weight_decay": True,
        "sparse": True,
        "rank": 3,
        "update_proj_gap": 2,
        "basis": "identity",
        "proj_type": "reverse_std",
        "state_dtype": "bfloat16",
    },
}


def test_no_class_and_no_storage_is_forgotten() -> None:
    public = [value for value in vars(lowrank_optim).values() if isinstance(value, type)]
    classes = {kind for kind in public if issubclass(kind, RuleOptimizer)}
    assert classes == {way.kind for way in ALL} == {way.values[0].kind for way in CLASSES} == set(OVERRIDES)
    for kind in classes:
        kept = {way.options.get("state_dtype", "float32") for way in ALL if way.kind is kind}
        assert len(kept) > 1, kind
    assert {way.options.get("state_dtype", "float32") for way in ALL if way.kind is Muon} == set(STATE_DTYPES)


@pytest.mark.parametrize("kind", OVERRIDES)
def test_the_overrides_are_all_there_are(kind: type[RuleOptimizer]) -> None:
    # `fallback_lr` fills the `lr` of groups, `stochastic_rounding` needs weights of a low precision
    elsewhere = {"format_version", "role", "fallback_lr", "stochastic_rounding"}
    # what a published form fixes
    fixed = {AuON: {"eps"}, SteepestDescent: {"adjust_lr_fn"}, DCTAdamW: {"basis"}}
    elsewhere |= (fixed | {LDAdamW: {"basis", "update_proj_gap", "stagger"}}).get(kind, set())
    assert set(kind([nn.Parameter(torch.zeros(2, 2))]).defaults) - elsewhere == set(OVERRIDES[kind])


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in OVERRIDES.items() for key in keys])
def test_every_number_can_be_given_to_one_group(kind: type[RuleOptimizer], key: str) -> None:
    """A group that names it goes as an optimizer that was made with it, and the others as if nothing had been said."""
    base, override = {"lr": 0.02, **BASE[kind]}, {key: OVERRIDES[kind][key]}
    if key == "error_feedback" and "residual" in base:
        # one or the other
        override["residual"] = None
    if key == "sparse":
        override["rank"] = None
    shapes = [(12, 8), (8, 3, 2), (6,)]

    def trained(groups: Callable[[list[nn.Parameter]], list[dict[str, Any]]], **options: Any) -> list[nn.Parameter]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes * 2]
        opt = kind(groups(params), **(base | options))
        for _ in range(6):
            for p in params:
                p.grad = torch.randn_like(p)
            opt.step()
        return params

    halves = trained(lambda params: [{"params": params[:3]}, {"params": params[3:], **override}])
    plain = trained(lambda params: [{"params": params[:3]}, {"params": params[3:]}])
    changed = trained(lambda params: [{"params": params[:3]}, {"params": params[3:]}], **override)
    assert same(halves[:3], plain[:3])
    assert same(halves[3:], changed[3:])
    assert not same(halves[3:], plain[3:])


@pytest.mark.parametrize("way", WAYS)
def test_a_group_can_be_added_in_the_middle_of_training(way: Way) -> None:
    model = mlp()
    opt = way(model[0].parameters())
    train(model, opt, 3)
    before = copy.deepcopy(model[2].weight)
    opt.add_param_group({"params": model[2].parameters(), "lr": 0.1})
    train(model, opt, 3)
    assert opt.state[model[2].weight]["step"] == 3
    assert not same(before, model[2].weight)
    assert opt.param_groups[-1]["lr"] == 0.1
    for key, value in opt.param_groups[0].items():
        if key not in ("params", "lr"):
            assert opt.param_groups[-1][key] == value


@pytest.mark.parametrize("way", [way for way in CLASSES if way.values[0].falls_back])
def test_what_is_no_matrix_may_have_a_rate_of_its_own(way: Way) -> None:
    """For bare parameters and groups that say a role; a rate that a group names wins, and schedulers drive them all."""
    model = mlp()
    opt = way(model.parameters(), lr=0.02, fallback_lr=0.01)
    assert [group["lr"] for group in opt.param_groups] == [0.02, 0.01]
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    opt.step()
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.01, 0.005]
    named = [{"params": model[0].parameters(), "role": "other"}, {"params": model[2].parameters(), "role": "head"}]
    opt = way([named[0], named[1] | {"lr": 0.3}], lr=0.02, fallback_lr=0.01)
    assert [group["lr"] for group in opt.param_groups] == [0.01, 0.3]
    opt = way([{"params": mlp().parameters()}, named[0]], lr=0.02, fallback_lr=None)
    assert [group["lr"] for group in opt.param_groups] == [0.02, 0.02, 0.02]


@pytest.mark.parametrize("way", WAYS)
def test_keys_of_other_tools_are_tolerated(way: Way) -> None:
    foreign = {"fused": True, "foreach": False, "name": "all", "capturable": False, "lr_mult": 2, "layer_id": 3}
    models = [mlp(), mlp()]
    for model, extra in zip(models, ({}, foreign), strict=True):
        train(model, way([{"params": model.parameters(), **extra}]), 4)
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


# all of them for GaLore, and for every class those that do something of their own to groups, rates or momenta
SCHEDULED = [(way, name) for way in ("adamw", "svd", "subspace") for name in SCHEDULERS]
SCHEDULED += [
    (way, name)
    for way in ("dct", "apollo", "fira", "ldadam", "muon-nuclear", "lowrank-dct", "trion", "auon", "steepest")
    for name in ("LambdaLR", "CyclicLR", "OneCycleLR", "ReduceLROnPlateau", "SequentialLR")
]


@pytest.mark.parametrize(("way", "name"), SCHEDULED)
def test_schedulers_drive_it_as_they_drive_torch(way: str, name: str) -> None:
    """With a number and with a tensor; groups without a rank follow torch.optim.AdamW all along."""
    make = NAMED[way]
    tensor_lr = torch.tensor(0.05)
    models = [mlp() for _ in range(4)]
    opts: list[torch.optim.Optimizer] = [
        make(models[0].parameters(), lr=0.05),
        make(models[1].parameters(), lr=tensor_lr),
    ]
    for ours, model in zip(list(opts), models[2:], strict=True):
        like = dict(zip(models[0].parameters(), model.parameters(), strict=True))
        like |= dict(zip(models[1].parameters(), model.parameters(), strict=True))
        # groups share a tensor where ours do, and so do what torch's schedulers make of that
        rates = copy.deepcopy([group["lr"] for group in ours.param_groups])
        groups = [
            {"params": [like[p] for p in g["params"]], "lr": lr} for g, lr in zip(ours.param_groups, rates, strict=True)
        ]
        opts.append(torch.optim.AdamW(groups, lr=0.05, weight_decay=0))
    schedulers = [SCHEDULERS[name](opt) for opt in opts]
    for seed in range(7):
        for model, opt, scheduler in zip(models, opts, schedulers, strict=True):
            opt.zero_grad()
            backward(model, seed)
            opt.step()
            # a loss that does not fall
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        rates = [[float(group["lr"]) for group in opt.param_groups] for opt in opts]
        assert rates[0] == pytest.approx(rates[2], rel=1e-5)
        assert rates[1] == pytest.approx(rates[3], rel=1e-5)
    assert opts[1].param_groups[0]["lr"] is tensor_lr
    # orthogonalization makes the most of the last bit of what is nearly zero
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if make.adam else {"rtol": 1e-4, "atol": 1e-4}
    for p, q, r, _ in zip(*(model.parameters() for model in models), strict=True):
        if rates[0] == pytest.approx(rates[1], rel=1e-5):
            torch.testing.assert_close(q, p, **tolerance)
        if way == "adamw":
            torch.testing.assert_close(p, r, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_names_survive_and_do_not_decide_what_is_loaded(way: Way) -> None:
    model = mlp()
    opt = way([{"params": list(model.named_parameters())}])
    of = {p: name for name, p in model.named_parameters()}
    assert [group["param_names"] for group in opt.param_groups] == [
        [of[p] for p in g["params"]] for g in opt.param_groups
    ]
    assert sum(len(group["params"]) for group in opt.param_groups) == len(of)
    train(model, opt, 3)
    for saved, group in zip(opt.state_dict()["param_groups"], opt.param_groups, strict=True):
        assert saved["param_names"] == group["param_names"]
    plain = way([{"params": list(mlp().parameters())}])
    plain.load_state_dict(opt.state_dict())
    assert same(plain.state_dict()["state"], opt.state_dict()["state"])
    named = way([{"params": [(f"other.{name}", p) for name, p in mlp().named_parameters()]}])
    unnamed = plain.state_dict()
    for group in unnamed["param_groups"]:
        del group["param_names"]
    named.load_state_dict(unnamed)
    assert same(named.state_dict()["state"], opt.state_dict()["state"])
    assert named.param_groups[0]["param_names"][0] == "other.0.weight"


@pytest.mark.parametrize("way", WAYS)
def test_saving_and_loading_disturb_nobody(way: Way) -> None:
    quiet, saved, loaded = mlp(), mlp(), mlp()
    train(quiet, way(quiet.parameters()), 6)
    opt, other = way(saved.parameters()), way(loaded.parameters())
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


@pytest.mark.parametrize("way", WAYS)
def test_state_dict_hooks_see_and_change_what_torch_lets_them(way: Way) -> None:
    model = mlp()
    opt = way(model.parameters())
    train(model, opt, 2)
    dtypes = {key: value.dtype for key, value in opt.state[model[0].weight].items()}
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
        assert {key: value.dtype for key, value in loaded.state[model[0].weight].items()} == dtypes

    model.bfloat16()
    opt.register_load_state_dict_pre_hook(prepare)
    opt.register_load_state_dict_post_hook(look)
    opt.load_state_dict({"state": {"nested": saved["state"]}, "param_groups": saved["param_groups"]})
    assert seen == ["save pre", "save post", "load pre", "load post"]
    assert opt.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("way", CLASSES)
def test_repr_and_profiler_label(way: Way) -> None:
    model = mlp()
    opt = way(model.parameters())
    name = way.kind.__name__
    assert repr(opt).startswith(f"{name} (\nParameter Group 0")
    for key, value in way.options.items():
        assert f"{key}: {value}" in repr(opt)
    backward(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
        opt.zero_grad()
    labels = {event.name for event in profile.events()}
    assert {f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"} <= labels
