"""The one step loop, the one reload, and the eager, tensor-only state."""

from collections.abc import Callable, Hashable, Iterator
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim import _state, distributed, ops, probes
from lowrank_optim._checks import check_choice, check_group
from lowrank_optim._state import FORMAT_VERSION, check_groups, code_dtype, filled, pairs, shapes, spread, with_roles
from lowrank_optim._types import Rule, State, Tick, compute_dtype
from lowrank_optim.storage import STATE_DTYPES

Group = dict[str, Any]
StateDict = dict[str, Any]
Loss = TypeVar("Loss")

# added to a seed, so that a weight is not rounded as its moments are
_WEIGHT = 0x5851F42D


class RuleOptimizer(torch.optim.Optimizer):
    """A group is plain data; `_rule` turns it into behaviour; `step` is written once.

    State is created with the optimizer, for every parameter that requires a gradient, so that its keys and shapes are
    the same on every rank and a checkpoint loads before the first step. It is tensors under stable names, moments as
    `state_dtype` says ("float32" is float64 for float64 parameters), `step` a float32 scalar on the CPU.

    Attributes:
        chunk_bytes: the transient memory of a step. Parameters of one shape are stepped together up to this many
            bytes of temporaries (four times as many on a GPU, or once for each 8 GiB of its memory, if that is more);
            a parameter that needs more is stepped alone. A decomposition of a matrix needs about three more copies of
            that matrix while it runs.
    """

    chunk_bytes: ClassVar[int] = 64 << 20

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        defaults = {**defaults, "format_version": FORMAT_VERSION}
        self._check(defaults, defaults)
        self._clocks = _state.Clocks()
        # what groups said when they were checked
        self._checked: dict[int, Group] = {}
        super().__init__(params, defaults)

    def _rule(self, group: Group, p: Tensor) -> Rule:
        """Return what is done with a parameter of this shape under this group's numbers."""
        raise NotImplementedError

    def _check(self, group: Group, known: Group) -> None:
        """Raise ValueError for a value out of range, or a key that looks like a misspelt one of `known`."""
        check_group(group, known)
        check_choice(group, "state_dtype", STATE_DTYPES)

    def _check_room(self, group: Group) -> None:
        """Raise MemoryError for a state that is to be made and is known to have no room."""

    def _decay(self, group: Group) -> float:
        """Return the weight decay that is apart from the gradient."""
        return float(group["weight_decay"])

    def add_param_group(self, param_group: Group) -> None:
        """Add a group and create its state; on an error the optimizer is left as it was."""
        # a copy: torch fills in the dict that it is given, and the same groups may serve two optimizers
        super().add_param_group(dict(param_group) if isinstance(param_group, dict) else param_group)
        group = self.param_groups[-1]
        try:
            self._check(group, self.defaults)
            if group.get("rank") is not None:
                distributed.refuse_flattened_group(group["params"], type(self).__name__)
            self._check_room(group)
            for p in group["params"]:
                if p.requires_grad:
                    self.state[p] = self._new_state(p, group)
        except (ValueError, RuntimeError, MemoryError):
            self.param_groups.pop()
            for p in group["params"]:
                self.state.pop(p, None)
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Make one update of every parameter that has a gradient.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for a sparse gradient; nothing has been updated then.
            ValueError: for a value out of range that a group has been given since it was made; the same.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_changed()
        turns = spread(self.param_groups)
        chunks = [(group, *chunk) for group in self.param_groups for chunk in self._chunks(group)]
        for group, rule, params in chunks:
            with ops.without_autocast(params[0].device.type):
                self._update_(rule, params, group, turns)
        return loss

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state into tensors of our own dtype, layout and placement (torch casts them to the parameter's).

        As in torch, parameters are matched by their order and the saved hyperparameters win. A state of
        `torch.optim.AdamW` loads into groups without a rank. What the state lacks is created.

        Raises:
            ValueError: when a tensor has not the shape that this model and the saved group need, when the same named
                parameters come in another order, or when the state was saved by a newer version. Nothing has been
                changed then.
        """
        saved: StateDict = {}

        def look(_: torch.optim.Optimizer, loaded: StateDict) -> StateDict:
            loaded = {**loaded, "param_groups": with_roles(loaded["param_groups"], self.param_groups)}
            self._check_loadable(loaded)
            saved.update(loaded)
            return loaded

        def restore(_: torch.optim.Optimizer) -> None:
            for pid, p, group in pairs(saved["param_groups"], self.param_groups):
                if saved["state"].get(pid) or p.requires_grad:
                    group = {**self.defaults, **group}
                    self.state[p] = filled(self._new_state(p, group), saved["state"].get(pid, {}))

        # as hooks, after the user's own that prepare the dict and before those that look at the result
        hooks = [
            self.register_load_state_dict_pre_hook(look),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        self._clocks, self._checked = _state.Clocks(), {}
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def _check_changed(self) -> None:
        """Raise ValueError where a schedule or a user has put a value out of range into a group since it was made."""
        for place, group in enumerate(self.param_groups):
            said = {key: value for key, value in group.items() if key not in ("params", "lr")}
            # a list may be written to
            said = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items() if type(v) is not Tensor}
            if self._checked.get(place) != said:
                # values, not keys: schedulers keep their own there
                self._check(group, {**self.defaults, **group})
                self._checked[place] = said

    def _update_(self, rule: Rule, params: list[Tensor], group: Group, turns: dict[Tensor, float]) -> None:
        whole = _state.as_is(rule, params[0])
        grads = [self._gradient(p, group, as_is=whole) for p in params]
        states = [self.state[p] for p in params]
        kept = list(zip(params, states, strict=True))
        ticks = [Tick(self._clocks.taken(p, state) + 1, turns.get(p, 0.0)) for p, state in kept]
        probes.chunk(params)
        numbers: dict[str, Any] = {"lr": _state.rate(group["lr"]), "weight_decay": self._decay(group)}
        apart = _WEIGHT if group.get("stochastic_rounding") else None
        cautious = group.get("cautious", False)
        plain = not cautious and not probes.listening()
        write_ = getattr(rule, "write_", None) if plain else None
        if write_ is not None and write_(params, grads, states, ticks, **numbers, apart=apart):
            for (p, state), tick in zip(kept, ticks, strict=True):
                self._clocks.count_(p, state, tick.step)
            return
        updates = rule.updates(grads, states, ticks)
        alike = plain and apart is None and ops.adds_products(params[0], updates, numbers["lr"])
        for i, ((p, state), tick, update) in enumerate(zip(kept, ticks, updates, strict=True)):
            if alike:
                ops.add_product_(p, update, **numbers)
            elif update is None:
                continue
            else:
                probes.updated(i, update)
                seed = None if apart is None else tick.seed + apart
                ops.apply_(p, update, **numbers, seed=seed, cautious=cautious)
            self._clocks.count_(p, state, tick.step)

    def _chunks(self, group: Group) -> Iterator[tuple[Rule, list[Tensor]]]:
        """Yield same-shape parameters that have gradients, as many as fit `chunk_bytes`, with their rule."""
        buckets: dict[Hashable, list[Tensor]] = {}
        for p in self._present(group):
            buckets.setdefault(_state.alike(p), []).append(p)
        for params in buckets.values():
            rule = self._rule(group, params[0])
            needs = _state.needs(rule, params[0])
            for p in params:
                if not _state.fits(self.state.get(p), needs):
                    self._follow(p, group)
                    self._check_kept(p, needs)
            size = _state.together(rule, params[0], self.chunk_bytes)
            for start in range(0, len(params), size):
                yield rule, params[start : start + size]

    def _present(self, group: Group) -> Iterator[Tensor]:
        """Yield the parameters that have a gradient."""
        for p in group["params"]:
            grad = p.grad
            if grad is not None:
                if grad.layout != torch.strided:
                    owner = type(self).__name__
                    raise RuntimeError(f"{owner} does not support sparse gradients; use torch.optim.SparseAdam")
                yield p

    def _check_kept(self, p: Tensor, needs: list[_state.Need]) -> None:
        """Raise RuntimeError where a group's numbers ask for another state than is kept; nothing is updated then."""
        for need in needs:
            if not _state.fits(self.state[p], [need]):
                name, shape, dtype, _ = need
                kept = self.state[p].get(name)
                have = "missing" if kept is None else f"{kept.dtype} of shape {tuple(kept.shape)}"
                raise RuntimeError(
                    f"{type(self).__name__}: the rank, the state_dtype, the role or another key of a group has "
                    f"changed since its state was made: {name} is {have}, and needs {dtype} of shape "
                    f"{tuple(shape)}; make a new optimizer, or keep the group as it was"
                )

    def _gradient(self, p: Tensor, group: Group, *, as_is: bool = False) -> Tensor:
        """Return what descends, in the dtype of the mathematics or as it is."""
        assert p.grad is not None
        # a kernel reads memory, where a negation that was put off has not happened
        grad = p.grad.resolve_neg() if as_is else p.grad.to(compute_dtype(p))
        return -grad if group["maximize"] else grad

    def _new_state(self, p: Tensor, group: Group) -> State:
        owner = type(self).__name__
        if p.is_complex():
            raise RuntimeError(f"{owner} does not support complex parameters; optimize torch.view_as_real of them")
        distributed.refuse_flattened(p, owner)
        if distributed.is_sharded(p) and group["state_dtype"] != "float32":
            distributed.refuse_coded_shards(p, owner, group["state_dtype"])
        step = torch.zeros((), dtype=torch.float32, device="cpu")
        state = self._rule(group, p).init(p.shape, distributed.allocator(p, owner))
        if distributed.is_sharded(p) and any(name.startswith(("basis", "piece_step")) for name in state):
            distributed.refuse_shards(p, owner)
        return {"step": step} | state

    def _follow(self, p: Tensor, group: Group) -> None:
        """Give `p` its state: created if it was frozen until now, moved or cast if the model has been since."""
        state: State = self.state.get(p, {})
        if not state:
            self.state[p] = self._new_state(p, group)
            return
        moved, recast = _state.strayed(state, p)
        if recast:
            # not all that is kept need be in the dtype of the mathematics
            need = self._rule(group, p).init(p.shape, shapes(p))
            recast = any(name in need and value.dtype != need[name].dtype for name, value in state.items())
        if recast or moved:
            lost = any(isinstance(value, Tensor) and value.is_meta for value in state.values())
            self.state[p] = filled(self._new_state(p, group), {} if lost else state)

    def _check_loadable(self, loaded: StateDict) -> None:
        check_groups(loaded["param_groups"], self.param_groups)
        for pid, p, group in pairs(loaded["param_groups"], self.param_groups):
            found = loaded["state"].get(pid)
            if not found:
                continue
            # a capturable AdamW keeps the same state
            group = {**self.defaults, **group, "capturable": False}
            self._check(group, self.defaults)
            # torch.optim.Muon counts no steps, and momentum needs none
            if "step" not in found and "momentum_buffer" not in found:
                raise ValueError(f"the saved state of parameter {pid} has no step: is it another optimizer's?")
            for name, need in self._rule(group, p).init(p.shape, shapes(p)).items():
                value = found.get(name)
                if isinstance(value, Tensor) and code_dtype(value) != code_dtype(need):
                    raise ValueError(
                        f"the saved state of parameter {pid} has {name} in {value.dtype}, and state_dtype="
                        f"{group['state_dtype']!r} of the saved group, or our default for it, needs {need.dtype}"
                    )
                have = tuple(value.shape) if isinstance(value, Tensor) else None
                if have != tuple(need.shape):
                    raise ValueError(
                        f"the saved state of parameter {pid} has {name} of shape {have}, and a parameter of shape "
                        f"{tuple(p.shape)} at rank {group.get('rank')} needs {tuple(need.shape)}: "
                        "is it a checkpoint of this model and this optimizer?"
                    )
