"""M-FAC: the gradient times the inverse of an empirical Fisher matrix."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim import bases
from lowrank_optim._checks import check_choice, check_momentum, check_rank, require
from lowrank_optim._state import needs, pairs, shapes
from lowrank_optim._types import State, compute_dtype, matrix_shape
from lowrank_optim.gram import Ring, check_numbers
from lowrank_optim.optimizer import Group, RuleOptimizer, StateDict
from lowrank_optim.preconditioned import Member, Preconditioned, leader
from lowrank_optim.room import check_room
from lowrank_optim.storage import storage
from lowrank_optim.views import Coordinates, Nonzero, View, Whole

Scope = Literal["group", "parameter"]
_WINDOWS = {"float32": None, "bfloat16": torch.bfloat16}


class MFAC(RuleOptimizer):
    r"""M-FAC: natural gradient descent with the exact inverse of a damped empirical Fisher matrix.

    With the last m gradients of all d parameters of a group (or of one parameter) as the rows of G (m×d), the newest
    one g in the row j, and c = m:

    .. math::
        g = ∇L + λ_w W, \quad F = λ I + \tfrac1c G^T G, \quad U = F^{-1} g = c\, G^T (cλ I + G G^T)^{-1} e_j, \\
        V ← β V + (1-β) U, \quad W ← W - η V.

    F is never formed and U is exact: two passes over the window, in float32 as long as nothing cancels in that and in
    float64 where the gradients nearly depend on each other, and O(m²) in float64. The published recursion computes the
    same in float32 and loses its digits where ‖g‖² is large beside λ.

    **The scale of λ.** U is invariant to nothing: gradients twice as large make it half as large, once ‖g‖²/m is large
    beside λ. λ has the unit of ‖g‖², so that loss scaling, another batch size or another loss needs another λ, unless
    `relative_damping` ties it to the window.

    **In coordinates.** With a `rank` the window holds, of each matrix, its coordinates in a basis: k·r·max(m, n)
    numbers instead of k·m·n. What it does then is exact for the Fisher matrix of the projected gradients, and what lies
    outside of the basis has no update, as in GaLore. When the basis is found again, what leaves it is lost to the
    window, and what enters has been zero. With `rank=1.0` and `proj_type="std"` it is M-FAC itself.

    Args:
        params: parameters or groups. Each group has its own window, over all that it holds.
        lr: η. Default 1e-3 (the authors' code).
        momentum: β, of the updates. Default 0 (the authors' code).
        weight_decay: λ_w. Default 0.
        num_grads: m. Default 1024 (the authors' code).
        damping: λ. Default 1e-5 (the authors' code).
        relative_damping: λ is `damping` times the mean of ‖g‖² in the window. O(m³) at each step. Default False.
        divisor: c is m ("window", published: a first step of m·g/‖g‖²) or the number of gradients that the window
            holds ("count": a first step of g/‖g‖²). The same once the window is full. Default "window".
        scope: one window for a "group", or for each "parameter": F without the blocks between parameters.
            Default "group".
        decoupled_weight_decay: apply λ_w to the weights as AdamW does, and not to the gradient. Default False
            (the paper).
        sparse: keep weights out of the window that are exactly zero when the optimizer is made, as those of a pruned
            model; they stay zero. Default False.
        rank: of the coordinates of matrices, an int or a fraction of the short side; None for whole gradients. Groups
            may name their own. Default None.
        update_proj_gap: gradients between two refreshes of a basis. Default None, `num_grads`.
        basis: "dct", "identity", "svd", "rsvd", "subspace", "random" or "hadamard". Default "dct".
        proj_type: which side is compressed, as for `GaLoreAdamW`. Default "std".
        state_dtype: "float32" or "bfloat16", of window and momentum. Default "float32".
        stochastic_rounding: round low-precision weights stochastically. Default False.
        maximize: ascend instead of descend. Default False.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: for complex, flattened (FSDP1, DeepSpeed ZeRO) or DTensor parameters, and sparse gradients.
        MemoryError: where the windows are larger than the memory that is free; nothing has been allocated then.

    A gradient that holds NaN, Inf or numbers above 1e30 enters no window and updates nothing of its group;
    `window_refused` counts them. A parameter without a gradient is zeros in the window of its group, and stays.

    State bytes, with k = `num_grads`: 4·k·m·n for an m×n matrix (2 in bfloat16, 8 for float64 parameters), or
    4·k·r·max(m, n) and the basis; with momentum once more without k; 4 for `step`; and for each window 16·k² + 24. With
    `sparse`, 4·k + 4 for each weight that is not zero, and 4 more with momentum. A step holds the gradients of a
    group in float32, and of updates one parameter's.

    Source: Frantar, Kurtic, Alistarh: "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
    arXiv 2107.03356.

    Example:
        >>> import torch
        >>> from lowrank_optim import MFAC
        >>> model = torch.nn.Linear(8, 2)
        >>> opt = MFAC(model.parameters(), lr=1e-2, num_grads=16, damping=1e-3)
        >>> model(torch.randn(4, 8)).square().mean().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        num_grads: int = 1024,
        damping: float = 1e-5,
        relative_damping: bool = False,
        divisor: str = "window",
        scope: str = "group",
        decoupled_weight_decay: bool = False,
        sparse: bool = False,
        rank: int | float | None = None,
        update_proj_gap: int | None = None,
        basis: str = "dct",
        proj_type: str = "std",
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
        maximize: bool = False,
    ) -> None:
        usual = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
        damped = {"num_grads": num_grads, "damping": damping, "relative_damping": relative_damping, "divisor": divisor}
        seen = {"scope": scope, "decoupled_weight_decay": decoupled_weight_decay, "sparse": sparse}
        projected = {"rank": rank, "update_proj_gap": update_proj_gap, "basis": basis, "proj_type": proj_type}
        kept = {"state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding}
        # states that are about to be loaded; parameters whose window has another dtype than its products were made of
        self._loading: dict[Tensor, State] = {}
        self._recast: set[Tensor] = set()
        super().__init__(params, usual | damped | seen | projected | kept)

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_numbers(group["num_grads"], group["damping"], group["divisor"])
        check_momentum(group)
        check_choice(group, "scope", get_args(Scope))
        check_choice(group, "state_dtype", tuple(_WINDOWS))
        check_choice(group, "basis", bases.NAMES)
        check_choice(group, "proj_type", bases.PROJ_TYPES)
        for key in ("relative_damping", "decoupled_weight_decay", "sparse"):
            require(isinstance(group[key], bool), group, key, "a bool")
        if group["rank"] is not None:
            check_rank(group)
            require(not group["sparse"], group, "sparse", "False with a rank: coordinates are not of single weights")
        gap = group["update_proj_gap"]
        require(gap is None or (type(gap) is int and gap >= 1), group, "update_proj_gap", "None or an int >= 1")

    def _check_room(self, group: Group) -> None:
        """Add up a whole group: nothing of it is allocated where a part of it would have no room."""
        sizes: dict[torch.device, int] = {}
        shared = ("gram", "gram_inverse")
        for p in group["params"]:
            if p.requires_grad and not p.is_complex():
                own = self._rule(group, p).init(p.shape, shapes(p))
                # of a group that has no state yet each would lead
                counted = group["scope"] == "parameter" or p.device not in sizes
                size = sum(value.nbytes for name, value in own.items() if counted or name not in shared)
                sizes[p.device] = sizes.get(p.device, 0) + size
        for device, size in sizes.items():
            check_room(size, device, f"a window of {group['num_grads']} gradients")

    def _rule(self, group: Group, p: Tensor) -> Preconditioned:
        return Preconditioned((self._member(group, p),), group["update_proj_gap"] or group["num_grads"])

    def _member(self, group: Group, p: Tensor) -> Member:
        ring = Ring(group["num_grads"], group["damping"], group["divisor"], group["relative_damping"])
        kept, dtype = storage(group["state_dtype"]), _WINDOWS[group["state_dtype"]]
        leads = group["scope"] == "parameter" or self._leads(p)
        return Member(ring, self._view(group, p), kept, dtype, group["momentum"], leads)

    def _view(self, group: Group, p: Tensor) -> View:
        if group["sparse"]:
            places = self._kept(p).get("window_index")
            return Nonzero(int(p.count_nonzero()) if places is None else len(places))
        if group["rank"] is None or p.dim() < 2 or p.numel() == 0:
            return Whole()
        shape = matrix_shape(p.shape)
        return Coordinates(bases.make(group["basis"], group["rank"], group["proj_type"], shape))

    def _kept(self, p: Tensor) -> State:
        """Return the state of a parameter: the one that is about to be loaded, while that is looked at."""
        return self._loading.get(p) or self.state.get(p, {})

    def _leads(self, p: Tensor) -> bool:
        """Say whether this parameter keeps what its group shares: the first that has had a state."""
        if state := self._kept(p):
            return "gram" in state
        beside = next(group["params"] for group in self.param_groups if any(q is p for q in group["params"]))
        return not any("gram" in self._kept(q) for q in beside)

    def _new_state(self, p: Tensor, group: Group) -> State:
        known = "window_index" in self.state.get(p, {})
        state = super()._new_state(p, group)
        if "window_index" in state and not known:
            state["window_index"].copy_(p.detach().reshape(-1).nonzero().squeeze(1))
        return state

    def _check_loadable(self, loaded: StateDict) -> None:
        places = list(pairs(loaded["param_groups"], self.param_groups))
        self._loading = {p: found for pid, p, _ in places if (found := loaded["state"].get(pid))}
        try:
            super()._check_loadable(loaded)
            for old, new in zip(loaded["param_groups"], self.param_groups, strict=True):
                if saved := [self._loading[p] for p in new["params"] if p in self._loading]:
                    _check_led(saved, {**self.defaults, **old})
        finally:
            self._loading = {}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state; see `RuleOptimizer`. A window that is rounded has its products made anew.

        Raises:
            ValueError: as there, and where not one parameter of a group keeps what a window shares.
        """
        super().load_state_dict(state_dict)
        dtypes = {pid: state["window"].dtype for pid, state in state_dict["state"].items() if "window" in state}
        for pid, p, _ in pairs(state_dict["param_groups"], self.param_groups):
            if pid in dtypes and dtypes[pid] != self.state[p]["window"].dtype:
                self._recast.add(p)
        with torch.no_grad():
            for group in self.param_groups:
                for params in self._shared(group, [p for p in group["params"] if self.state.get(p)]):
                    self._rebuild(group, params)

    def _follow(self, p: Tensor, group: Group) -> None:
        before = self.state[p]["window"].dtype if self.state.get(p) else None
        super()._follow(p, group)
        if before is not None and before != self.state[p]["window"].dtype:
            self._recast.add(p)

    def _chunks(self, group: Group) -> Iterator[tuple[Preconditioned, list[Tensor]]]:
        """Yield what shares a window: with it, what has no gradient now and is in the window still."""
        present = list(self._present(group))
        for p in present:
            self._follow(p, group)
        for params in self._shared(group, present):
            for p in params:
                if p.grad is None:
                    self._follow(p, group)
            rules = [self._rule(group, p) for p in params]
            for rule, p in zip(rules, params, strict=True):
                self._check_kept(p, needs(rule, p))
            _check_led([self.state[p] for p in params], group)
            self._rebuild(group, params)
            absent = frozenset(i for i, p in enumerate(params) if p.grad is None)
            yield Preconditioned(tuple(rule.members[0] for rule in rules), rules[0].gap, absent), params

    def _shared(self, group: Group, present: list[Tensor]) -> list[list[Tensor]]:
        """Return the parameters that share a window with these, window by window."""
        if group["scope"] == "parameter":
            return [[p] for p in present]
        return [[p for p in group["params"] if self.state.get(p)]] if present else []

    def _rebuild(self, group: Group, params: list[Tensor]) -> None:
        """Make the products of a window anew where it has been cast."""
        if self._recast.intersection(params):
            states = [self.state[p] for p in params]
            lead = leader(states)
            lead["window_careful"].fill_(1)
            self._rule(group, params[0]).rebuild_(states, int(lead["window_step"]))
            self._recast.difference_update(params)

    def _gradient(self, p: Tensor, group: Group, *, as_is: bool = False) -> Tensor:
        if p.grad is None:
            return torch.zeros((), dtype=compute_dtype(p), device=p.device).expand(p.shape)
        grad = super()._gradient(p, group, as_is=as_is)
        decay: Any = 0 if group["decoupled_weight_decay"] else group["weight_decay"]
        return grad.add(p, alpha=decay) if decay else grad

    def _decay(self, group: Group) -> float:
        return super()._decay(group) if group["decoupled_weight_decay"] else 0.0

    def __setstate__(self, state: StateDict) -> None:
        self._loading, self._recast = {}, set()
        super().__setstate__(state)


def _check_led(states: Sequence[State], group: Group) -> None:
    """Raise ValueError unless one parameter keeps what a window shares, of a group or of each parameter."""
    leaders, windows = sum("gram" in state for state in states), len(states) if group["scope"] == "parameter" else 1
    if leaders != windows:
        raise ValueError(
            f"MFAC: {leaders} of the {len(states)} parameters of a group keep what a window shares, and with scope="
            f"{group['scope']!r} there is a window for {'each' if windows > 1 else 'all of them'}: the scope, or which "
            "parameters are in a group, has changed since the state was made"
        )
