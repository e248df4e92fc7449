"""The role of each parameter: by the module that owns it, and by what the caller says of its name."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, get_args

from torch import Tensor, nn

from lowrank_optim._checks import Role

Targets = str | Callable[[str, nn.Module], bool]

# names under which models keep the matrix that makes logits; the vaguer ones only at the top of a model
HEADS = (
    r"(^|\.)(lm_head|heads?|out_head|embed_out|output_projection|qa_outputs)(\.\w+)?$"
    r"|^(output|classifier|score)(\.\w+)?$"
)

_NORMS = ("norm", "rms")
# what torch.compile, DDP, DataParallel and AveragedModel put before every name of the model that they wrap
_WRAPPERS = re.compile(r"^((_orig_mod|module)(\.|$))+")
# transformers' transposed Linear, known by name so that it need not be imported
_TRANSPOSED = ("Conv1D",)


class Use(NamedTuple):
    """A trainable parameter, once, wherever it is used."""

    name: str
    p: Tensor
    module_name: str
    module: nn.Module
    names: list[str]  # of the modules that use it, and its own under each


class Placed(NamedTuple):
    """A parameter with its role; `stacked` says that it is a batch of matrices over its last two dimensions."""

    use: Use
    role: Role
    stacked: bool


class Patterns:
    """Regular expressions searched for in names, the first that is found deciding; one that never does is an error."""

    def __init__(self, argument: str, patterns: Iterable[str], what: str) -> None:
        self._argument, self._what = argument, what
        self._patterns = {key: re.compile(key) for key in patterns}
        self._idle = set(self._patterns)

    def first(self, names: Iterable[str]) -> str | None:
        """Return the pattern that decides for something of these names."""
        names = list(names)
        for key, pattern in self._patterns.items():
            if any(pattern.search(name) for name in names):
                self._idle.discard(key)
                return key
        return None

    def check(self) -> None:
        """Raise ValueError for patterns that decided nothing."""
        if self._idle:
            idle = ", ".join(sorted(map(repr, self._idle)))
            raise ValueError(
                f"{self._argument}: no {self._what} name matches {idle}, or an earlier pattern takes all that do"
            )


def place(
    model: nn.Module, *, targets: Targets, heads: str, roles: Mapping[str, Role], stacked: str | None
) -> list[Placed]:
    """Return every trainable parameter once, with its role.

    Raises:
        ValueError: when a pattern matches nothing that it could decide, or names a role that does not exist or that
            what it matches cannot have.
    """
    for key, name in roles.items():
        if name not in get_args(Role):
            raise ValueError(f"Invalid roles[{key!r}]: {name!r}, must be one of {', '.join(get_args(Role))}")
    embeddings = {id(p) for m in model.modules() if _is_embedding(m) for p in m.parameters(recurse=False)}
    head_ids = _head_ids(model, heads)
    chosen = _chooser(targets, head_ids)
    said = Patterns("roles", roles, "trainable parameter's or its module's")
    stacks = Patterns("stacked", () if stacked is None else (stacked,), "batch of matrices (3 dimensions or more)")
    taken: dict[str, list[Use]] = {key: [] for key in roles}
    placed = []
    any_target = False
    for use in _uses(model):
        p, module = use.p, use.module
        norm = _is_norm(module)
        target = p.dim() > 1 and not norm and chosen(use.module_name, module, id(p) in embeddings)
        any_target = any_target or target
        # the dimensions of a convolution after the first are its inputs and its window, not matrices
        whole = norm or isinstance(module, nn.modules.conv._ConvNd)
        stack = p.dim() > 2 and not whole and stacks.first(use.names) is not None
        pattern = said.first(use.names)
        if pattern is not None:
            taken[pattern].append(use)
        role: Role
        if p.dim() < 2:
            role = "vector"
        elif pattern is not None:
            role = roles[pattern]
        elif target or stack:
            role = "matrix"
        elif id(p) in embeddings:
            role = "embedding"
        elif norm:
            role = "vector"
        else:
            role = "head" if id(p) in head_ids else "other"
        placed.append(Placed(use, role, stack))
    if isinstance(targets, str) and targets != "all-linear" and not any_target:
        raise ValueError(f"targets={targets!r} matches no matrix of the model")
    said.check()
    stacks.check()
    for key, uses in taken.items():
        # a bias beside its matrix stays a vector in silence
        if roles[key] != "vector" and all(use.p.dim() < 2 for use in uses):
            raise ValueError(
                f"Invalid roles[{key!r}]: {roles[key]!r}, must be 'vector': it names vectors alone, "
                f"such as {uses[0].name}"
            )
    return placed


def is_transposed(module: nn.Module) -> bool:
    """Say whether a module keeps its matrix as (in, out), where `nn.Linear` keeps (out, in)."""
    return type(module).__name__ in _TRANSPOSED


def _uses(model: nn.Module) -> list[Use]:
    found: dict[int, Use] = {}
    for module_name, module in model.named_modules():
        # torch.compile puts a wrapper around the model, which must not defeat anchored patterns
        module_name = module_name.removeprefix("_orig_mod").removeprefix(".")
        for key, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                name = f"{module_name}.{key}" if module_name else key
                use = found.setdefault(id(p), Use(name, p, module_name, module, []))
                use.names.extend((module_name, name))
    return list(found.values())


def _chooser(targets: Targets, head_ids: set[int]) -> Callable[[str, nn.Module, bool], bool]:
    def all_linear(_: str, module: nn.Module, embedding: bool) -> bool:
        linear = isinstance(module, nn.Linear) or is_transposed(module)
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
        found = [m for name, m in model.named_modules() if pattern.search(_WRAPPERS.sub("", name))]
    return {id(p) for m in found for p in m.parameters(recurse=False)}


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _is_norm(module: nn.Module) -> bool:
    named = any(word in type(module).__name__.lower() for word in _NORMS)
    return named and not isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
