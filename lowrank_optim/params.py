"""Which parameter is a matrix to project, an embedding, a head, a norm or a bias."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lowrank_optim._types import matrix_shape
from lowrank_optim.bases import SVD, compresses, resolve

Rank = int | float
Targets = str | Callable[[str, nn.Module], bool]

# names under which models keep the matrix that makes logits; the vaguer ones only at the top of a model
HEADS = (
    r"(^|\.)(lm_head|heads?|out_head|embed_out|output_projection|qa_outputs)(\.\w+)?$"
    r"|^(output|classifier|score)(\.\w+)?$"
)

# the keys of a group that say how to project
_OPTIONS = ("update_proj_gap", "scale", "proj_type", "basis", "stagger", "state_dtype", "lr", "betas", "eps")

_NORMS = ("norm", "rms")
_LINEAR = ("Conv1D",)  # transformers' transposed Linear, known by name so that it need not be imported


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups for an optimizer of this package, that can say who went where."""

    def unnamed(self) -> list[dict[str, Any]]:
        """Return the same groups with bare parameters, for wrappers that take no names (ZeroRedundancyOptimizer)."""
        return [{**group, "params": [p for _, p in _named(group)]} for group in self]

    def describe(self) -> str:
        """Return a table of the groups, and under each the parameters, alike ones on one line."""
        lines = []
        for group in self:
            params = _named(group)
            hidden = ("params", "param_names", "name")
            options = ", ".join(f"{k}={v}" for k, v in group.items() if k not in hidden and v is not None)
            count = sum(p.numel() for _, p in params)
            how = "" if group.get("rank") is not None else " [AdamW]"
            lines.append(f"{group['name']}{how}: {len(params)} parameters, {count:,} elements ({options})")
            lines += [f"    {line}" for line in _folded(params, group)]
        return "\n".join(lines)


def param_groups(
    model: nn.Module,
    *,
    rank: Rank | Mapping[str, Rank] = 128,
    targets: Targets = "all-linear",
    weight_decay: float = 0.0,
    heads: str = HEADS,
    other_lr: float | None = None,
    **options: Any,
) -> ParamGroups:
    """Sort the parameters of a model into named groups: matrices to project, and what AdamW keeps.

    A parameter is routed by the module that owns it, not by its number of dimensions. Groups, those that are not
    empty: `matrices` (one for each rank), `embeddings` (with heads tied to them), `heads`, `other` (matrices that
    were not targeted) and `vectors` (norms and biases, never decayed). A parameter used twice is listed once, and an
    embedding stays one wherever else it is used; parameters that do not require a gradient are left out.

    Args:
        model: any module.
        rank: an int, or a float in (0, 1], a fraction of a matrix's short side; or a mapping from regular expressions,
            searched for in module names, the first that is found deciding; a target without one is left to AdamW.
            Default 128.
        targets: "all-linear" (every `nn.Linear` but the heads); a regular expression searched for in module names, or a
            callable of module name and module, both of which may choose any module, embeddings and heads too.
            Default "all-linear".
        weight_decay: for every group but `vectors`. Default 0.
        heads: regular expression of the names of modules that make logits. A Hugging Face model that knows its head
            is asked instead.
        other_lr: learning rate of the groups that are not projected. Default: the optimizer's.
        **options: further keys of the projected groups: `update_proj_gap`, `scale`, `proj_type`, `basis`, `stagger`,
            `state_dtype`, `lr`, `betas`, `eps`.

    Returns:
        Groups of (name, parameter) pairs; give them to an optimizer, and print `describe()`.

    Raises:
        ValueError: when `targets` or a key of `rank` matches nothing, which is a misspelling, when an option is
            unknown, or when the model has nothing to train.

    Example:
        >>> groups = param_groups(nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8)), rank=2, scale=0.5)
        >>> print(groups.describe())
        matrices: 1 parameters, 64 elements (rank=2, scale=0.5, weight_decay=0.0)
            1.weight (8×8)
        embeddings [AdamW]: 1 parameters, 128 elements (weight_decay=0.0)
            0.weight (16×8)
        vectors [AdamW]: 1 parameters, 8 elements (weight_decay=0.0)
            1.bias (8)
    """
    for key in options:
        if key not in _OPTIONS:
            near = difflib.get_close_matches(key, _OPTIONS, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"the known ones are {', '.join(_OPTIONS)}"
            raise ValueError(f"unknown option {key!r}: {known}")
    embeddings = {id(p) for m in model.modules() if _is_embedding(m) for p in m.parameters(recurse=False)}
    head_ids = _head_ids(model, heads)
    chosen = _chooser(targets, head_ids)
    ranks = rank if isinstance(rank, Mapping) else {"": rank}
    unmatched = set(ranks)
    # by type too: rank 1 and rank 1.0 are one vector and all of them
    matrices: dict[tuple[type, Rank], list[tuple[str, Tensor]]] = {}
    rest: dict[str, list[tuple[str, Tensor]]] = {"embeddings": [], "heads": [], "other": [], "vectors": []}
    any_target = False
    for name, p, module_name, module in _owned(model):
        target = p.dim() > 1 and not _is_norm(module) and chosen(module_name, module, id(p) in embeddings)
        pattern = next((key for key in ranks if re.search(key, module_name)), None) if target else None
        any_target = any_target or target
        if pattern is not None:
            unmatched.discard(pattern)
            matrices.setdefault((type(ranks[pattern]), ranks[pattern]), []).append((name, p))
        elif id(p) in embeddings:
            rest["embeddings"].append((name, p))
        elif p.dim() < 2 or _is_norm(module):
            rest["vectors"].append((name, p))
        elif id(p) in head_ids:
            rest["heads"].append((name, p))
        else:
            rest["other"].append((name, p))
    if isinstance(targets, str) and targets != "all-linear" and not any_target:
        raise ValueError(f"targets={targets!r} matches no matrix of the model")
    if isinstance(rank, Mapping) and unmatched:
        raise ValueError(f"rank: no target's module name matches {', '.join(sorted(map(repr, unmatched)))}")
    groups = ParamGroups()
    for (_, value), params in matrices.items():
        label = "matrices" if len(matrices) == 1 else f"matrices (rank {value})"
        groups.append({"params": params, "name": label, "rank": value, **options, "weight_decay": weight_decay})
    for label, params in rest.items():
        if params:
            # an explicit None, so that a rank given to the optimizer does not reach these
            decay = 0.0 if label == "vectors" else weight_decay
            group = {"params": params, "name": label, "rank": None, "weight_decay": decay}
            groups.append(group if other_lr is None else {**group, "lr": other_lr})
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient")
    return groups


def _named(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Return (name, parameter) pairs, also after one of torch's optimizers has put two lists in their place."""
    if "param_names" in group:
        return list(zip(group["param_names"], group["params"], strict=True))
    return list(group["params"])


def _owned(model: nn.Module) -> Iterator[tuple[str, Tensor, str, nn.Module]]:
    """Yield each trainable parameter once: its name, itself, its module's name and its module."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        # torch.compile puts a wrapper around the model, which must not defeat anchored patterns
        module_name = module_name.removeprefix("_orig_mod").removeprefix(".")
        for key, p in module.named_parameters(recurse=False):
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                yield (f"{module_name}.{key}" if module_name else key), p, module_name, module


def _chooser(targets: Targets, head_ids: set[int]) -> Callable[[str, nn.Module, bool], bool]:
    def all_linear(_: str, module: nn.Module, embedding: bool) -> bool:
        linear = isinstance(module, nn.Linear) or type(module).__name__ in _LINEAR
        return linear and not embedding and id(getattr(module, "weight", None)) not in head_ids

    if callable(targets):
        function = targets
        return lambda name, module, _: bool(function(name, module))
    if targets == "all-linear":
        return all_linear
    pattern = re.compile(targets)
    return lambda name, _module, _embedding: pattern.search(name) is not None


def _head_ids(model: nn.Module, heads: str) -> set[int]:
    output = getattr(model, "get_output_embeddings", None)
    if callable(output) and (module := output()) is not None:
        found = [module]
    else:
        pattern = re.compile(heads)
        found = [m for name, m in model.named_modules() if pattern.search(name)]
    return {id(p) for m in found for p in m.parameters(recurse=False)}


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _is_norm(module: nn.Module) -> bool:
    named = any(word in type(module).__name__.lower() for word in _NORMS)
    return named and not isinstance(module, nn.Linear | nn.modules.conv._ConvNd)


def _folded(params: list[tuple[str, Tensor]], group: dict[str, Any]) -> list[str]:
    """Fold names that differ only in their numbers: `layers.{0..3}.attn.q.weight (64×64)`."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, p in params:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        key = (pattern, "×".join(map(str, p.shape)), _left_to_adamw(p, group))
        alike.setdefault(key, []).append(name)
    lines = []
    for (pattern, shape, note), names in alike.items():
        lines.append(f"{names[0]} ({shape})" if len(names) == 1 else f"{pattern} ({shape}), {len(names)} of them")
        lines[-1] += note
    return lines


def _left_to_adamw(p: Tensor, group: dict[str, Any]) -> str:
    """Return a note for a parameter that is in a projected group and will not be projected."""
    rank = group.get("rank")
    if rank is None or (rank == 1 and isinstance(rank, float)):
        return ""
    shape = matrix_shape(p.shape)
    basis = SVD(*resolve(rank, group.get("proj_type", "std"), shape))
    return "" if p.dim() > 1 and compresses(basis, shape) else f" [AdamW: rank {rank} does not make it smaller]"
