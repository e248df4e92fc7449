"""Groups for a whole model: matrices to project or to orthogonalize, and what AdamW keeps."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from lowrank_optim._checks import Role
from lowrank_optim._types import matrix_shape
from lowrank_optim.bases import compresses, resolve
from lowrank_optim.orthonormal import SVD
from lowrank_optim.roles import HEADS, Patterns, Placed, Targets, is_transposed, place

Rank = int | float
Split = int | tuple[int, ...]

# further keys of the matrix groups: of all classes, of GaLore and LowRankMuon, of the orthogonalizing ones
_OPTIONS = (
    *("lr", "betas", "eps", "momentum", "nesterov", "momentum_form", "cautious", "state_dtype", "stochastic_rounding"),
    *("update_proj_gap", "scale", "proj_type", "basis", "stagger", "residual"),
    *("carry", "residual_scale", "adaptive_overlap", "ranking", "column_ages", "error_feedback"),
    *("scale_type", "norm_growth", "published_code", "rho", "seed", "proj_dtype"),
    *("num_grads", "damping", "relative_damping", "divisor", "scope", "decoupled_weight_decay", "sparse"),
    *("method", "ns_coefficients", "ns_steps", "ns_dtype", "adjust_lr_fn", "normuon_beta2", "gamma", "normalize"),
)
# and of the other groups
_FALLBACK_OPTIONS = ("fallback_betas", "fallback_eps")

_LABELS: dict[Role, str] = {"embedding": "embeddings", "head": "heads", "other": "other", "vector": "vectors"}


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups for an optimizer of this package, that can say who went where."""

    def unnamed(self) -> list[dict[str, Any]]:
        """Return the same groups with bare parameters, for wrappers that take no names (ZeroRedundancyOptimizer)."""
        return [{**group, "params": [p for _, p in _named(group)]} for group in self]

    def describe(self) -> str:
        """Return a table of the groups, and under each the parameters, alike ones on one line.

        What every optimizer leaves to AdamW is marked so; `SteepestDescent` has a norm for each role instead.
        """
        lines = []
        for group in self:
            params = _named(group)
            hidden = ("params", "param_names", "name")
            options = ", ".join(f"{k}={v}" for k, v in group.items() if k not in hidden and v is not None)
            count = sum(p.numel() for _, p in params)
            how = "" if group["role"] == "matrix" else " [AdamW]"
            lines.append(f"{group['name']}{how}: {len(params)} parameters, {count:,} elements ({options})")
            lines += [f"    {line}" for line in _folded(params, group)]
        return "\n".join(lines)


def param_groups(
    model: nn.Module,
    *,
    rank: Rank | Mapping[str, Rank] | None = None,
    targets: Targets = "all-linear",
    roles: Literal["auto"] | Mapping[str, Role] = "auto",
    split: Mapping[str, int | Sequence[int]] | None = None,
    stacked: str | None = None,
    weight_decay: float | None = None,
    heads: str = HEADS,
    other_lr: float | None = None,
    **options: Any,
) -> ParamGroups:
    """Sort the parameters of a model into named groups: matrices to project, and what AdamW keeps.

    A parameter is routed by the module that owns it, not by its number of dimensions. Every group says its `role`:
    "matrix" (`matrices`, a group for each rank and split), "embedding" (with heads tied to them), "head", "other"
    (matrices that were not targeted) and "vector" (norms and biases, never decayed). A parameter used twice is listed
    once, and an embedding stays one wherever else it is used; parameters that do not require a gradient are left out.

    The keys of `rank`, `roles` and `split` are regular expressions, of which the first that is found decides: in
    module names for `rank`; in the names of modules and of parameters for `roles`, `split` and `stacked`.

    Args:
        model: any module.
        rank: an int, or a float in (0, 1], a fraction of a matrix's short side; or a mapping, in which a target without
            one is left to AdamW. Default: the optimizer's own.
        targets: "all-linear" (every `nn.Linear` but the heads); a regular expression searched for in module names, or a
            callable of module name and module, both of which may choose any module, embeddings and heads too.
            Default "all-linear".
        roles: a mapping to roles, which overrides the automatic ones. Parameters of fewer than two dimensions are
            vectors always, so that a bias stays one beside its matrix. Default "auto".
        split: a mapping to a number of equal blocks of rows, or to their sizes, for matrices that hold several, as
            fused query, key and value do (`{"in_proj": 3}`), or heads: the group's `split`. Default: none.
        stacked: names of parameters of three dimensions or more that are batches of matrices, such as the experts of
            one layer; they are targets, in a group with `flatten` False. Elsewhere, and in convolutions whatever their
            name, such a parameter is one matrix, `flatten(1)`. Default: none.
        weight_decay: for every group but `vectors`, which have 0. Default: the optimizer's.
        heads: regular expression of the names of modules that make logits. A Hugging Face model that knows its head
            is asked instead.
        other_lr: learning rate of the groups that are not matrices. Default: the optimizer's.
        **options: further keys of the matrix groups, such as `update_proj_gap`, `scale`, `momentum`, `ns_steps`,
            `state_dtype`, `lr`; `fallback_betas` and `fallback_eps` go to the other groups.

    Returns:
        Groups of (name, parameter) pairs; give them to an optimizer, and print `describe()`.

    Raises:
        ValueError: when `targets`, `stacked` or a key of a mapping decides nothing, which is a misspelling, when an
            option or a role is unknown or impossible, when a split does not fit the rows of its matrix, or when the
            model has nothing to train.

    Example:
        >>> groups = param_groups(nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8)), rank=2, scale=0.5)
        >>> print(groups.describe())
        matrices: 1 parameters, 64 elements (role=matrix, rank=2, scale=0.5)
            1.weight (8×8)
        embeddings [AdamW]: 1 parameters, 128 elements (role=embedding)
            0.weight (16×8)
        vectors [AdamW]: 1 parameters, 8 elements (role=vector, weight_decay=0.0)
            1.bias (8)
    """
    _check_options(options)
    if isinstance(roles, str):
        if roles != "auto":
            raise ValueError(f"Invalid roles: {roles!r}, must be 'auto' or a mapping from names to roles")
        roles = {}
    splits = split or {}
    ranks: Mapping[str, Rank | None] = rank if isinstance(rank, Mapping) else {"": rank}
    ranked = Patterns("rank", ranks, "target's module")
    cut = Patterns("split", splits, "matrix's or its module's")
    # by type too: rank 1 and rank 1.0 are one vector and all of them
    matrices: dict[tuple[type, Rank | None, Split | None, bool], list[tuple[str, Tensor]]] = {}
    rest: dict[Role, list[tuple[str, Tensor]]] = {role: [] for role in _LABELS}
    for placed in place(model, targets=targets, heads=heads, roles=roles, stacked=stacked):
        use, role = placed.use, placed.role
        pattern = ranked.first([use.module_name]) if role == "matrix" else None
        if pattern is not None:
            value = ranks[pattern]
            key = cut.first(use.names)
            blocks = None if key is None else _blocks(key, splits[key], placed)
            matrices.setdefault((type(value), value, blocks, placed.stacked), []).append((use.name, use.p))
        else:
            rest["other" if role == "matrix" else role].append((use.name, use.p))
    if isinstance(rank, Mapping):
        ranked.check()
    cut.check()
    fallback = {key: options.pop(key) for key in _FALLBACK_OPTIONS if key in options}
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups = ParamGroups()
    for (_, value, blocks, stack), params in matrices.items():
        own = {"rank": value, "split": blocks, "flatten": False if stack else None}
        own = {key: setting for key, setting in own.items() if setting is not None}
        label = _matrix_label(own) if len(matrices) > 1 else "matrices"
        groups.append({"params": params, "name": label, "role": "matrix", **own, **options, **decay})
    if other_lr is not None:
        fallback["lr"] = other_lr
    for role, params in rest.items():
        if params:
            # an explicit None, so that a rank given to the optimizer does not reach these
            own = {"rank": None, **({"weight_decay": 0.0} if role == "vector" else decay)}
            groups.append({"params": params, "name": _LABELS[role], "role": role, **own, **fallback})
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient")
    return groups


def _check_options(options: Iterable[str]) -> None:
    known = (*_OPTIONS, *_FALLBACK_OPTIONS)
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the known ones are {', '.join(known)}"
            raise ValueError(f"unknown option {key!r}: {hint}")


def _blocks(key: str, value: int | Sequence[int], placed: Placed) -> Split:
    """Return how the rows of a matrix are cut, checked."""
    name, module, p = placed.use.name, placed.use.module, placed.use.p
    rows = p.shape[-2 if placed.stacked else 0]
    if is_transposed(module):
        raise ValueError(
            f"Invalid split[{key!r}] for {name}: {value!r}, must not name a {type(module).__name__}: its matrix is "
            "kept transposed, so that what it fuses are blocks of columns"
        )
    blocks: Split
    if isinstance(value, Sequence) and not isinstance(value, str):
        blocks = tuple(value)
        fits = all(_count(size) for size in blocks) and sum(blocks) == rows
    else:
        blocks = value
        fits = _count(value) and rows % value == 0
    if not fits:
        raise ValueError(
            f"Invalid split[{key!r}] for {name}: {value!r}, must be a number that divides its {rows} rows, "
            f"or sizes that add up to {rows}"
        )
    return blocks


def _count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _matrix_label(own: Mapping[str, Any]) -> str:
    parts = [f"{key} {own[key]}" for key in ("rank", "split") if key in own]
    parts += ["stacked"] if "flatten" in own else []
    return f"matrices ({', '.join(parts)})" if parts else "matrices"


def _named(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Return (name, parameter) pairs, also after one of torch's optimizers has put two lists in their place."""
    if "param_names" in group:
        return list(zip(group["param_names"], group["params"], strict=True))
    return list(group["params"])


def _folded(params: list[tuple[str, Tensor]], group: dict[str, Any]) -> list[str]:
    """Fold names that differ only in their numbers: `layers.{0..3}.attn.q.weight (64×64)`."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, p in params:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        key = (pattern, "×".join(map(str, p.shape)), _note(p, group))
        alike.setdefault(key, []).append(name)
    lines = []
    for (pattern, shape, note), names in alike.items():
        lines.append(f"{names[0]} ({shape})" if len(names) == 1 else f"{pattern} ({shape}), {len(names)} of them")
        lines[-1] += note
    return lines


def _note(p: Tensor, group: dict[str, Any]) -> str:
    """Return a note for a matrix that no optimizer projects at this rank: whole, its state is not larger."""
    rank = group.get("rank")
    # a rank of blocks or of stacked matrices is one of theirs, and short of the short side it depends on the optimizer
    if rank is None or "split" in group or not group.get("flatten", True) or (rank == 1 and isinstance(rank, float)):
        return ""
    shape = matrix_shape(p.shape)
    basis = SVD(*resolve(rank, group.get("proj_type", "std"), shape))
    small = basis.rank < min(shape) or compresses(basis, shape)
    return "" if small else f" [not projected: rank {rank} does not make it smaller]"
