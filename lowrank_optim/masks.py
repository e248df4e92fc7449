"""Which weights are pruned: masks that hold while any optimizer trains, and how many stages lead to how sparse."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lowrank_optim import _checks


def sparsity_schedule(
    sparsity: float, stages: int, kind: Literal["cubic", "geometric"] = "cubic", *, initial: float = 0.0
) -> list[float]:
    r"""Return the sparsities, shares of weights that are zero, of stages that end with a given one.

    With s for `sparsity`, s₀ for `initial` and k for `stages`, stage i = 1, …, k ends with

    .. math::
        s_i = s + (s_0 - s)(1 - i/k)^3 \quad \text{(cubic)}, \qquad
        1 - s_i = (1 - s_0)^{1 - i/k} (1 - s)^{i/k} \quad \text{(geometric)}.

    "cubic" prunes much at first and little at the end, for training in between; "geometric" prunes the same share of
    what is left in each stage, as the rounds of M-FAC do.

    Args:
        sparsity: of the last stage, in [0, 1).
        stages: how many, at least 1.
        kind: "cubic" or "geometric". Default "cubic".
        initial: sparsity before the first stage, in [0, 1). Default 0.

    Returns:
        As many numbers as there are stages; the last is `sparsity` to the bit.

    Raises:
        ValueError: for an argument out of its range.

    Sources: Zhu, Gupta: "To prune, or not to prune: exploring the efficacy of pruning for model compression", arXiv
    1710.01878 (cubic); Frantar, Kurtic, Alistarh: "M-FAC: Efficient Matrix-Free Approximations of Second-Order
    Information", arXiv 2107.03356 (geometric, in the authors' code).

    Example:
        >>> [round(share, 3) for share in sparsity_schedule(0.9, 3)]
        [0.633, 0.867, 0.9]
        >>> [round(share, 3) for share in sparsity_schedule(0.875, 3, "geometric")]
        [0.5, 0.75, 0.875]
    """
    check_sparsity("sparsity", sparsity)
    check_sparsity("initial", initial)
    require(type(stages) is int and stages >= 1, "stages", stages, "an int >= 1")
    require(kind in ("cubic", "geometric"), "kind", kind, "one of cubic, geometric")
    shares = [i / stages for i in range(1, stages)]
    if kind == "cubic":
        return [*(sparsity + (initial - sparsity) * (1 - share) ** 3 for share in shares), sparsity]
    return [*(1 - (1 - initial) ** (1 - share) * (1 - sparsity) ** share for share in shares), sparsity]


class Masks:
    """Which weights of some parameters are kept; the others stay zero, whatever an optimizer does to them.

    They only ever grow sparser, but for `load_state_dict`. One byte for each weight.

    Args:
        named_params: pairs of name and parameter, as `model.named_parameters()` yields them. At first all is kept.

    Attributes:
        params: the parameters by name.
        sparsity: share of the weights that are pruned, in [0, 1].

    Raises:
        ValueError: where there is no weight, or a name or a parameter twice.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> masks = Masks(layer.named_parameters())
        >>> masks.narrow_({"weight": torch.tensor([[True, False, False, True]])})
        >>> masks.sparsity
        0.5
        >>> optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        >>> handle = masks.hold(optimizer)
        >>> layer(torch.ones(4)).sum().backward()
        >>> optimizer.step()
        >>> (layer.weight == 0).tolist()
        [[False, True, True, False]]
    """

    def __init__(self, named_params: Iterable[tuple[str, nn.Parameter]]) -> None:
        pairs = list(named_params)
        self.params = dict(pairs)
        names = [name for name, _ in pairs]
        require(any(p.numel() for p in self.params.values()), "named_params", names, "at least one weight")
        once = len(pairs) == len(self.params) == len({id(p) for _, p in pairs})
        require(once, "named_params", names, "each parameter once, with a name of its own")
        self._masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in pairs}

    @property
    def sparsity(self) -> float:
        """Return the share of weights that are pruned."""
        pruned = sum(int((~mask).sum()) for mask in self._masks.values())
        return pruned / sum(mask.numel() for mask in self._masks.values())

    def narrow_(self, masks: Mapping[str, Tensor]) -> None:
        """Prune also what is False in these, and set it to zero.

        Args:
            masks: by name, bool, of the parameters' shapes; not all of them need be there.

        Raises:
            ValueError: for a name that is not known, or another shape or dtype; nothing has been changed then.
        """
        for name, mask in masks.items():
            require(name in self._masks, "masks", name, f"one of {', '.join(self._masks)}")
            check_mask(f"mask of {name}", mask, self._masks[name].shape)
        self._masks |= {name: self._masks[name] & mask.to(self._masks[name].device) for name, mask in masks.items()}
        self.apply_()

    @torch.no_grad()
    def apply_(self) -> None:
        """Set what is pruned to zero, NaN and Inf too."""
        for name, p in self.params.items():
            # once, where the model has moved
            self._masks[name] = self._masks[name].to(p.device)
            p.masked_fill_(~self._masks[name], 0)

    def hold(self, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
        """Set what is pruned to zero after each step of an optimizer.

        Args:
            optimizer: any whose `step` runs torch's hooks, as all subclasses of `torch.optim.Optimizer` do.

        Returns:
            A handle, whose `remove()` ends it.
        """
        return optimizer.register_step_post_hook(lambda *_: self.apply_())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masks by name, bool, False where a weight is pruned; they stay as they are now."""
        return dict(self._masks)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take masks that were saved in the place of these, and set to zero what they prune.

        Raises:
            ValueError: where a mask is missing, or is of another name, shape or dtype; nothing has been changed then.
        """
        require(state_dict.keys() >= self._masks.keys(), "state_dict", list(state_dict), f"masks of {[*self._masks]}")
        fresh = Masks(self.params.items())
        fresh.narrow_(state_dict)
        self._masks = fresh._masks


def check_mask(name: str, mask: Tensor, shape: torch.Size) -> None:
    """Raise ValueError for a mask that is not bool, or of another shape."""
    ok = mask.dtype == torch.bool and mask.shape == shape
    require(ok, name, (mask.dtype, *mask.shape), f"torch.bool, of shape {tuple(shape)}")


def check_sparsity(name: str, sparsity: float | None) -> float:
    """Return a sparsity; raise ValueError where it is not one."""
    number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
    require(number and 0 <= (share := float(sparsity or 0)) < 1, name, sparsity, "a number in [0, 1)")
    return share


def require(ok: bool, name: str, value: object, must: str) -> None:
    """Raise ValueError, where it is not ok, naming the argument, its value and what is allowed."""
    _checks.require(ok, {name: value}, name, must)
