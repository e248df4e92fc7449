"""Optimizers that keep AdamW's moments in coordinates of a basis of each matrix."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim import bases
from lowrank_optim._checks import check_choice, check_growth, check_layout, check_projection
from lowrank_optim._types import Basis, Residual, Rule, matrix_shape
from lowrank_optim._warn import warn_once
from lowrank_optim.adam import Adam
from lowrank_optim.optimizer import Group, RuleOptimizer
from lowrank_optim.pieces import Pieces
from lowrank_optim.residuals import Drop, ErrorFeedback, Limiter, rank_dim
from lowrank_optim.rules import CARRIES, Projected
from lowrank_optim.schedule import Schedule
from lowrank_optim.steering import Layout
from lowrank_optim.storage import STATE_DTYPES, storage


class ProjectedAdamW(RuleOptimizer):
    """Groups with a rank follow `_projected`; those without are AdamW.

    A group that says its role has a rank by it: "matrix" takes the optimizer's, any other none. Bare parameters take
    the optimizer's, and vectors among them are AdamW.
    """

    # where nobody says another
    usual_rank: ClassVar[int | float]
    # which bases there are
    bases: ClassVar[tuple[str, ...]] = bases.NAMES
    # what the authors' code calls the keys of a group
    their_keys: ClassVar[Mapping[str, str]] = {}

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        if defaults["rank"] is None and params is not None and not isinstance(params, Tensor):
            params = cast("ParamsT", list(params))
            if params and not any(isinstance(p, dict) for p in params):
                # theirs alone: a group that is added later names its own
                params = cast("ParamsT", [{"params": params, "rank": self.usual_rank}])
        super().__init__(params, defaults)
        if all(group["rank"] is None for group in self.param_groups):
            owner = type(self).__name__
            warn_once(f"{owner}: no parameter group has a rank, so every parameter is AdamW (said once)")

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; one that says its role has a rank by it, unless it names its own."""
        if isinstance(param_group, dict):
            theirs = {key: new for key, new in self.their_keys.items() if key in param_group and new not in param_group}
            param_group = {theirs.get(key, key): value for key, value in param_group.items()}
            if param_group.get("role") is not None:
                rank = self.defaults["rank"] or self.usual_rank if param_group["role"] == "matrix" else None
                param_group = {"rank": rank, **param_group}
        super().add_param_group(param_group)

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_projection(group, proj_types=bases.PROJ_TYPES, bases=self.bases)
        check_layout(group)
        # not keys of all
        if "carry" in known:
            check_choice(group, "carry", CARRIES)
        if "norm_growth" in known:
            check_growth(group, "norm_growth")
        if group.get("error_feedback") is not None:
            check_choice(group, "error_feedback", STATE_DTYPES)
        layout = self._layout(group)
        for p in group.get("params", ()) if layout is not None else ():
            # a loaded group holds numbers
            if isinstance(p, Tensor) and p.dim() > 1:
                cast("Layout", layout).check(p.shape)

    def _rule(self, group: Group, p: Tensor) -> Rule:
        adam = self._adam(group)
        if group["rank"] is None or p.dim() < 2 or p.numel() == 0:
            return adam

        def of_matrix(shape: tuple[int, int]) -> Rule:
            basis = self._basis(group, shape)
            # the int 1 is one vector
            full = isinstance(group["rank"], float) and group["rank"] == 1
            if not full and not bases.compresses(basis, shape):
                return adam
            return self._projected(group, basis)

        layout = self._layout(group)
        return of_matrix(matrix_shape(p.shape)) if layout is None else Pieces(layout, of_matrix)

    def _projected(self, group: Group, basis: Basis) -> Projected:
        """Return what is done with a matrix that is looked at through this basis."""
        raise NotImplementedError

    def _basis(self, group: Group, shape: tuple[int, int], **options: Any) -> Basis:
        return bases.make(group["basis"], group["rank"], group["proj_type"], shape, **options)

    def _adam(self, group: Group, aged: int | None = None) -> Adam:
        return Adam(storage(group["state_dtype"]), tuple(group["betas"]), group["eps"], aged)

    def _carried(self, group: Group, basis: Basis) -> Adam:
        """Return Adam; where moments begin anew with a basis or a column, so may their bias correction."""
        aged = group["carry"] == "reset" or group.get("column_ages", False)
        return self._adam(group, rank_dim(basis) if aged else None)

    def _limiter(self, group: Group) -> Limiter | None:
        growth = group["norm_growth"]
        return None if growth is None else Limiter(growth, tuple(group["betas"]))

    def _fed_back(self, group: Group, scale: float = 1.0, recovers: float = 0.0) -> Residual:
        """Return error feedback, or nothing where a group does not ask for it."""
        kept = group["error_feedback"]
        return Drop(scale) if kept is None else ErrorFeedback(storage(kept), scale, recovers)

    def _schedule(self, group: Group) -> Schedule:
        return Schedule(group["update_proj_gap"], group["stagger"])

    def _layout(self, group: Group) -> Layout | None:
        """Return which matrices a parameter of this group holds; None where it is one."""
        layout = Layout.of(group)
        return None if layout == Layout() else layout
