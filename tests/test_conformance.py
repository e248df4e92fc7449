"""Every optimizer under torch's own OptimizerInfo machinery: what upstream asks of each of its optimizers."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lowrank_optim.optimizer import RuleOptimizer
from tests.small_model import ALL, NAMED, Way

try:
    from torch.testing._internal.common_device_type import instantiate_device_type_tests
    from torch.testing._internal.common_optimizers import (
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
        get_error_inputs_for_all_optims,
        optims,
    )
    from torch.testing._internal.common_utils import TestCase, parametrize
except ImportError as error:
    pytest.skip(f"torch.testing._internal, which is private, cannot be used: {error}", allow_module_level=True)

# the import above freezes torch.backends for the process; the tests that share it may set its flags
setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)

# one way is AdamW alone, which the optimizer remarks on
pytestmark = pytest.mark.filterwarnings("ignore:GaLoreAdamW. no parameter group has a rank:RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16]


class Info(OptimizerInfo):
    """One way of using one of our optimizers, and what each of its inputs adds to that."""

    def __init__(self, way: Way, *inputs: dict[str, Any]) -> None:
        self.way = way

        def sample(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
            # copied, because schedulers write into a tensor lr
            kwargs = [copy.deepcopy(one) for one in inputs]
            return [OptimizerInput(params=None, kwargs=one, desc=str(one)) for one in kwargs]

        super().__init__(
            way.kind,
            optim_inputs_func=sample,
            optim_error_inputs_func=get_error_inputs_for_all_optims,
            supported_impls=(),
            not_og_supported_flags=(),
            supports_complex=False,
        )

    @property
    def name(self) -> str:
        return self.way.name.replace("-", "_")

    def make(self, model: nn.Module, kwargs: dict[str, Any], *, named: bool = False) -> RuleOptimizer:
        params = list(model.named_parameters()) if named else list(model.parameters())
        if self.way.name != "adamw":
            return self.way(params, **kwargs)
        return self.way([{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}], **kwargs)


COMMON = ({"lr": 0.02}, {"lr": torch.tensor(0.02)}, {"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.02, "maximize": True})
GALORE = [
    Info(NAMED["adamw"], *COMMON),
    Info(NAMED["svd"], *COMMON, {"lr": 0.02, "proj_type": "full", "stagger": False}),
    Info(NAMED["subspace"], *COMMON, {"lr": 0.02, "proj_type": "reverse_std"}),
]
# what they share with those is asked of them in fewer runs
BRIEF = ({"lr": 0.02, "weight_decay": 0.1}, {"lr": torch.tensor(0.02), "maximize": True})
OTHERS = [
    Info(NAMED["galore-int4"], *BRIEF),
    *[Info(NAMED[name], *BRIEF) for name in ("rotate", "reset", "feedback", "random", "adaptive", "identity")],
    *[Info(NAMED[name], *BRIEF) for name in ("dct", "dct-ages", "dct-int8", "apollo", "apollo-mini", "apollo-int8")],
    *[Info(NAMED[name], *BRIEF) for name in ("fira", "fira-code", "fira-int8", "ldadam", "ldadam-int4")],
    Info(NAMED["muon"], *BRIEF),
    Info(NAMED["muon-int8"], *BRIEF),
    Info(NAMED["lowrank-dct"], *BRIEF),
    Info(NAMED["lowrank-svd"], *BRIEF),
    Info(NAMED["residual"], *BRIEF),
    Info(NAMED["stateless"], *BRIEF),
    Info(NAMED["trion"], *BRIEF),
    Info(NAMED["dion2"], *BRIEF),
    Info(NAMED["auon"], *BRIEF),
    Info(NAMED["hybrid-auon"], *BRIEF),
    Info(NAMED["steepest"], *BRIEF),
    *[Info(NAMED[name], *BRIEF) for name in ("mfac", "mfac-alone", "mfac-dct", "mfac-svd", "mfac-bfloat16")],
]
INFOS = GALORE + OTHERS
assert {info.way.kind for info in INFOS} == {way.kind for way in ALL}


class Net(nn.Module):
    """A convolution, a normalization, vectors, a scalar, and one matrix of more than 4096 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.wide = nn.Linear(24, 192)
        self.tall = nn.Linear(192, 10, bias=False)
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.tall(torch.tanh(self.wide(self.norm(self.conv(x)).flatten(1)))) * self.gain


class Problem:
    """The same model and batch each time it is made."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = Net().to(device, dtype)
        self.x = torch.randn(6, 2, 4, 4, device=device, dtype=dtype)

    def loss(self) -> Tensor:
        self.model.zero_grad()
        loss = self.model(self.x).float().square().mean()
        loss.backward()
        return loss

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


SCHEDULERS: dict[str, Callable[[Any], LRScheduler] | None] = {
    "none": None,
    "StepLR": lambda opt: StepLR(opt, step_size=5, gamma=0.5),
    "ReduceLROnPlateau": ReduceLROnPlateau,
}


class TestConformance(TestCase):
    @optims(INFOS, dtypes=DTYPES)
    def test_upstream_errors(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for case in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            given = case.optimizer_error_input
            raises = self.assertWarnsRegex if issubclass(case.error_type, Warning) else self.assertRaisesRegex
            assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
            with raises(case.error_type, case.error_regex):
                optim_info.way.kind(given.params, **(optim_info.way.options | given.kwargs))

    @parametrize("use_closure", [True, False])
    @parametrize("scheduler", list(SCHEDULERS))
    @optims(GALORE, dtypes=DTYPES)
    def test_goes_in_the_right_direction(
        self, device: str, dtype: torch.dtype, optim_info: Info, use_closure: bool, scheduler: str
    ) -> None:
        _assert_right_direction(device, dtype, optim_info, use_closure, scheduler)

    @optims(OTHERS, dtypes=DTYPES)
    def test_others_go_in_the_right_direction(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        _assert_right_direction(device, dtype, optim_info, use_closure=True, scheduler="StepLR")

    @parametrize("named", [True, False])
    @parametrize("steps", [1, 3, 4])
    @optims(GALORE, dtypes=DTYPES)
    def test_resume_is_bitwise(
        self, device: str, dtype: torch.dtype, optim_info: Info, named: bool, steps: int
    ) -> None:
        _assert_resumes(device, dtype, optim_info, named, steps)

    @optims(OTHERS, dtypes=DTYPES)
    def test_resume_of_others_is_bitwise(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        # `tests/test_resume.py` cuts them at every step
        _assert_resumes(device, dtype, optim_info, named=True, steps=3)

    @optims(INFOS, dtypes=DTYPES)
    def test_copies_evolve_independently(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for given in optim_info.optim_inputs_func(device):
            problem = Problem(device, dtype)
            opt = optim_info.make(problem.model, given.kwargs)
            for _ in range(3):
                opt.step(problem.loss)
            together = {"problem": problem, "opt": opt}
            twins = [copy.deepcopy(together), pickle.loads(pickle.dumps(together))]
            before = problem.weights()
            for twin in twins:
                public = {key for key in vars(opt) if not key.startswith("_")}
                assert public == {key for key in vars(twin["opt"]) if not key.startswith("_")}
                _assert_same_state(opt, twin["opt"])
                for _ in range(3):
                    twin["opt"].step(twin["problem"].loss)
                # the original has stayed where it was
                assert _same(before, problem.weights())
            for _ in range(3):
                opt.step(problem.loss)
            assert not _same(before, problem.weights())
            for twin in twins:
                assert _same(problem.weights(), twin["problem"].weights())
                _assert_same_state(opt, twin["opt"])

    @optims(INFOS)
    def test_hooks_run_in_the_order_of_torch(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        problem = Problem(device, dtype)
        opt = optim_info.make(problem.model, {})
        seen: list[str] = []
        hooks = [
            opt.register_step_post_hook(lambda *_: seen.append("own post")),
            register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
            opt.register_step_pre_hook(lambda *_: seen.append("own pre")),
            register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        ]
        try:
            opt.step(lambda: (seen.append("closure"), problem.loss())[1])
        finally:
            for hook in hooks:
                hook.remove()
        assert seen == ["global pre", "own pre", "closure", "own post", "global post"]

    @parametrize("flat", [True, False])
    @optims(INFOS, dtypes=DTYPES)
    def test_distributed_checkpoint(self, device: str, dtype: torch.dtype, optim_info: Info, flat: bool) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        for given in optim_info.optim_inputs_func(device):
            if isinstance(given.kwargs["lr"], Tensor):
                # torch makes a number of it, which is another lr
                continue
            one, two = Problem(device, dtype), Problem(device, dtype)
            opt = optim_info.make(one.model, given.kwargs)
            before = one.weights()
            shapes = _shapes(get_optimizer_state_dict(one.model, opt, options=options))
            assert _same(before, one.weights())
            for _ in range(4):
                opt.step(one.loss)
            saved = get_optimizer_state_dict(one.model, opt, options=options)
            # every key is there from the start, in its final shape and dtype
            assert shapes == _shapes(saved)
            two.model.load_state_dict(one.model.state_dict())
            again = optim_info.make(two.model, given.kwargs)
            set_optimizer_state_dict(two.model, again, saved, options=options)
            _assert_same_state(opt, again)
            for _ in range(4):
                opt.step(one.loss)
                again.step(two.loss)
            assert _same(one.weights(), two.weights())

    @optims(INFOS, dtypes=DTYPES)
    def test_zero_gradients_at_lr_zero_change_nothing(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        # what torch.distributed.checkpoint does to an optimizer that has no state yet
        problem, fresh = Problem(device, dtype), Problem(device, dtype)
        opt = optim_info.make(problem.model, {"weight_decay": 0.1})
        opt.state.clear()
        before = problem.weights()
        saved = get_optimizer_state_dict(problem.model, opt)
        assert _same(before, problem.weights())
        new = get_optimizer_state_dict(fresh.model, optim_info.make(fresh.model, {}))
        assert _shapes(saved) == _shapes(new)
        for values in saved["state"].values():
            for name, value in values.items():
                assert value.isfinite().all(), name


def _assert_right_direction(device: str, dtype: torch.dtype, info: Info, use_closure: bool, scheduler: str) -> None:
    for given in info.optim_inputs_func(device):
        problem = Problem(device, dtype)
        opt = info.make(problem.model, given.kwargs)
        make = SCHEDULERS[scheduler]
        sched = make(opt) if make else None
        first = problem.loss().item()
        for _ in range(10):
            if use_closure:
                loss = opt.step(problem.loss)
            else:
                loss = problem.loss()
                assert opt.step() is None
            assert isinstance(loss, Tensor)
            if isinstance(sched, ReduceLROnPlateau):
                sched.step(loss.item())
            elif sched:
                sched.step()
        last = problem.loss().item()
        assert (last > first) if given.kwargs.get("maximize") else (last < first), given.desc


def _assert_resumes(device: str, dtype: torch.dtype, info: Info, named: bool, steps: int) -> None:
    for given in info.optim_inputs_func(device):
        one = Problem(device, dtype)
        opt = info.make(one.model, given.kwargs, named=named)
        for _ in range(steps):
            opt.step(one.loss)
        file = io.BytesIO()
        torch.save({"model": one.model.state_dict(), "opt": opt.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        two = Problem(device, dtype)
        two.model.load_state_dict(saved["model"])
        # the checkpoint names the parameters or not; it loads either way
        again = info.make(two.model, copy.deepcopy(given.kwargs), named=not named)
        again.load_state_dict(saved["opt"])
        _assert_same_state(opt, again)
        for _ in range(4):
            opt.step(one.loss)
            again.step(two.loss)
        assert _same(one.weights(), two.weights())
        _assert_same_state(opt, again)


def _same(one: list[Tensor], two: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, two, strict=True))


def _assert_same_state(one: RuleOptimizer, two: RuleOptimizer) -> None:
    """Bits, keys and dtypes; nothing but tensors."""
    first, second = one.state_dict()["state"], two.state_dict()["state"]
    assert first.keys() == second.keys()
    for pid, values in first.items():
        assert values.keys() == second[pid].keys()
        for name, value in values.items():
            assert isinstance(value, Tensor), name
            assert second[pid][name].dtype == value.dtype, name
            assert torch.equal(second[pid][name], value), name


def _shapes(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Put shape and dtype where a tensor is."""
    shapes = {}
    for key, value in state_dict.get("state", state_dict).items():
        if isinstance(value, dict):
            shapes[key] = _shapes(value)
        elif isinstance(value, Tensor):
            shapes[key] = (tuple(value.shape), value.dtype)
    return shapes


instantiate_device_type_tests(TestConformance, globals(), only_for=("cpu", "cuda"))
