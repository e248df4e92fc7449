"""M-FAC as linear algebra: products with the inverse of an empirical Fisher matrix, exactly, in O(d m)."""

import math
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import windows
from lowrank_optim._types import compute_dtype
from lowrank_optim._warn import warn_once
from lowrank_optim.fisher_static import StaticInverseFisher, each
from lowrank_optim.gram import Divisor, Ring, check_numbers, logdet, needs_float64, root, solved
from lowrank_optim.room import check_room
from lowrank_optim.windows import Blocks

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# columns for each row of a block, below which float64 costs little beside what it saves
_SQUARE = 16
_KEPT = ("window", "gram", "inverse", "pushed", "rejected")


class InverseFisher:
    r"""The inverse of a damped empirical Fisher matrix over the last m gradients (M-FAC).

    .. math:: F = λ I + \tfrac1c \sum_{i=1}^{m} g_i g_i^T = λ I + \tfrac1c G^T G, \quad G ∈ ℝ^{m×d}

    is d×d and never formed. With K = (cλI + GGᵀ)⁻¹, which is m×m and kept in float64,

    .. math::
        F^{-1} x = \tfrac1λ (x - G^T K G x), \qquad F^{-1} g_j = c\, G^T K e_j, \qquad
        \log\det F = d \log λ + \log\det(I + \tfrac1{cλ} G G^T).

    Exact algebra, not an approximation of F, and computed in float64 from the stored rows, whatever their dtype. The
    second form, for a gradient of the window, is `solve_newest`; as long as the rows are independent nothing cancels in
    it. The published recursion, in float32, is wrong by 300 % for correlated gradients with ‖g‖ = 14, λ = 10⁻⁶ and
    m = 256, these by 4·10⁻⁷ and 3·10⁻⁸.

    Costs, for d parameters: `push` reads the window once and takes O(m²), and O(m³) once in m times or where K has
    lost its digits; `solve_newest` reads the window once; `solve` twice, and takes O(m³), because solving is more
    precise than any K; `diagonal` takes O(d m²), `element` O(m³); `static` makes these O(d m) and O(m).

    Args:
        num_params: d.
        num_grads: m, how many gradients the window holds. Default 1024 (the authors' code).
        damping: λ. It is to ‖g‖² what a unit is: gradients c times as large need it c² times as large. Default 1e-5
            (the authors' code).
        block_size: F is block-diagonal over consecutive blocks of so many parameters. Default None, one block.
        divisor: c is m ("window", published: steps of one scale while the window fills) or the number of gradients in
            it ("count"). Default "window".
        dtype: of the stored gradients: float32, float64 or bfloat16. All algebra is of the stored numbers.
            Default float32.
        device: where results are, and the window unless it is offloaded. Default None, torch's default device.
        offload: keep the window in CPU memory, pinned where there is CUDA, and stream it. Default False.

    Attributes:
        num_pushed: gradients that have entered the window since it was made.
        num_rejected: gradients that have not, because they held NaN, Inf or numbers whose squares are infinite.
        nbytes: bytes of window, m×m matrices and counters: with b blocks of B parameters (b = 1 and B = d, or
            b = ⌈d/B⌉), b·m·B·itemsize + 16·b·m² + 16.

    Raises:
        ValueError: for an argument out of its range.
        MemoryError: where the window is larger than the memory that is free; nothing has been allocated then.

    Source: Frantar, Kurtic, Alistarh: "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
    arXiv 2107.03356.

    Example:
        >>> import torch
        >>> from lowrank_optim import InverseFisher
        >>> fisher = InverseFisher(3, num_grads=2, damping=0.5, dtype=torch.float64)
        >>> fisher.push(torch.tensor([1.0, 0.0, 2.0]))
        True
        >>> fisher.solve(torch.tensor([0.0, 1.0, 0.0])).tolist()
        [0.0, 2.0, 0.0]
    """

    def __init__(
        self,
        num_params: int,
        num_grads: int = 1024,
        damping: float = 1e-5,
        *,
        block_size: int | None = None,
        divisor: Divisor = "window",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        offload: bool = False,
    ) -> None:
        check_numbers(num_grads, damping, divisor)
        _check_sizes(num_params, block_size, dtype)
        self.num_params, self.damping = num_params, float(damping)
        self._ring = Ring(num_grads, self.damping, divisor)
        self.device = torch.get_default_device() if device is None else torch.device(device)
        self._blocks = Blocks(num_params, min(block_size or num_params, num_params))
        shape = (self._blocks.count, num_grads, self._blocks.width)
        home = torch.device("cpu") if offload else self.device
        count = f"a window of {num_grads} gradients of {num_params}"
        sides = 16 * shape[0] * num_grads**2
        check_room(math.prod(shape) * dtype.itemsize + sides * (home == self.device), home, count)
        check_room(sides, self.device, f"{count}, in {shape[0]} blocks, has two matrices for each, which")
        pinned = offload and torch.cuda.is_available()
        self._window = torch.zeros(shape, dtype=dtype, device=home, pin_memory=pinned)
        self._gram = torch.zeros(shape[0], num_grads, num_grads, dtype=torch.float64, device=self.device)
        self._inverse = torch.zeros_like(self._gram)
        self.num_pushed = 0
        self.num_rejected = 0

    @property
    def nbytes(self) -> int:
        """Return the bytes that are kept."""
        return self._window.nbytes + self._gram.nbytes + self._inverse.nbytes + 16

    @torch.no_grad()
    def push(self, grad: Tensor) -> bool:
        """Replace the oldest gradient of the window by this one, (d,); return False where it is refused.

        Raises:
            ValueError: for another shape than (d,).
        """
        if grad.shape != (self.num_params,) or grad.is_complex() or grad.layout != torch.strided:
            what = f"{grad.dtype}, {grad.layout}, of shape {tuple(grad.shape)}"
            raise ValueError(f"Invalid grad: {what}, must be real, strided and ({self.num_params},)")
        # as it will be stored, because products are of what is stored
        stored = self._blocks.split(grad.to(self.device, self._window.dtype).unsqueeze(0))
        slot = self._ring.slot(self.num_pushed)
        if not windows.fits(windows.largest([stored]), stored.dtype):
            warn_once(windows.REFUSED)
            self.num_rejected += 1
            return False
        self._window[:, slot] = stored.squeeze(2)
        # in float64, because what is orthogonal to the window in `solve` is what is left of a difference; as far as
        # it is filled
        row, end = torch.zeros_like(self._gram[:, 0]), min(self.num_pushed + 1, self._window.size(1))
        row[:, :end] = windows.products(self._window[:, :end], stored.double()).squeeze(2)
        self._ring.push_(self._gram, self._inverse, row, self.num_pushed)
        self.num_pushed += 1
        return True

    @torch.no_grad()
    def solve(self, x: Tensor) -> Tensor:
        """Return F⁻¹x of a vector (d,), or of each row of a batch (p, d), in float32 (float64 with such a window).

        Raises:
            ValueError: for another length than d.
        """
        return each(x, self._blocks, self._solve, self.device).to(compute_dtype(self._window))

    @torch.no_grad()
    def solve_newest(self) -> Tensor:
        """Return F⁻¹g of the newest gradient g, as it is stored, in one pass over the window.

        Raises:
            RuntimeError: where the window is empty.
        """
        if not self.num_pushed:
            raise RuntimeError("no gradient has been pushed, so there is no newest one")
        weights = self._ring.weights(self._gram, self._inverse, self.num_pushed - 1)
        # rows of narrow blocks depend on each other
        narrow = self._window.size(2) < _SQUARE * self._window.size(1)
        careful = narrow or needs_float64(self._gram, weights)
        dtype = torch.float64 if careful else compute_dtype(self._window)
        found = windows.combination(self._window, weights, dtype)
        return self._blocks.join(found).squeeze(0).to(compute_dtype(self._window))

    @torch.no_grad()
    def compensate(self, change: Tensor, free: Tensor) -> Tensor:
        r"""Return the change of the `free` parameters that goes with a given change of the others, zero at these.

        Of all that agree with `change` where `free` is False, it makes ½δᵀFδ least. With Q the free ones and P the
        others it is

        .. math:: δ_Q = -F_{QQ}^{-1} F_{QP} δ_P = -G_Q^T (cλ I + G_Q G_Q^T)^{-1} G_P δ_P,

        exactly, and nothing cancels in it. It reads the window twice and takes O(d m²).

        Args:
            change: (d,), read where `free` is False.
            free: (d,), bool.

        Returns:
            (d,), in float64.

        Raises:
            ValueError: for another shape than (d,), or a `free` that is not bool.
        """
        if change.shape != (self.num_params,):
            raise ValueError(f"Invalid change: of shape {tuple(change.shape)}, must be ({self.num_params},)")
        if free.shape != (self.num_params,) or free.dtype != torch.bool:
            raise ValueError(
                f"Invalid free: {free.dtype} of shape {tuple(free.shape)}, must be torch.bool, ({self.num_params},)"
            )
        free = free.to(self.device)

        def solve(given: Tensor) -> Tensor:
            among = windows.gram(self._window, self.device, self._blocks.split(free.unsqueeze(0)))
            weights = solved(among, self._ring.shift(among, self.num_pushed), windows.products(self._window, given))
            return windows.combination(self._window, weights, torch.float64).neg_()

        given = change.to(self.device, torch.float64)
        return each(given.masked_fill(free, 0), self._blocks, solve, self.device).masked_fill_(~free, 0)

    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """Return the diagonal of F⁻¹, (d,), in O(d m²)."""
        sums = windows.squares(self._window, self._root())
        found = self._blocks.join((1 - sums).div_(self.damping).unsqueeze(2)).squeeze(0)
        return found.to(compute_dtype(self._window))

    @torch.no_grad()
    def element(self, i: int, j: int) -> float:
        """Return the element (i, j) of F⁻¹, in O(m³).

        Raises:
            IndexError: out of range.
        """
        one, two = self._blocks.place(i), self._blocks.place(j)
        if one[0] != two[0]:
            return 0.0
        row, column = (self._window[block, :, i].to(self.device, torch.float64) for block, i in (one, two))
        block = slice(one[0], one[0] + 1)
        weights = solved(self._gram[block], self._shift()[block], column.view(1, -1, 1))
        common = float(row @ weights.flatten())
        return ((one == two) - common) / self.damping

    @torch.no_grad()
    def logdet(self) -> float:
        """Return log det F."""
        return self.num_params * math.log(self.damping) + logdet(self._gram, self._shift())

    @torch.no_grad()
    def static(self) -> "StaticInverseFisher":
        """Return F⁻¹ as it is now in a form whose products take O(d m) and whose elements O(m), for O(d m²) once."""
        rows = windows.transformed(self._window, self._root(), torch.float64)
        return StaticInverseFisher(rows, self._blocks, self.damping, compute_dtype(self._window))

    def state_dict(self) -> dict[str, Any]:
        """Return all that is kept, as tensors and numbers."""
        kept = (self._window, self._gram, self._inverse, self.num_pushed, self.num_rejected)
        return dict(zip(_KEPT, kept, strict=True)) | self._numbers()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that was saved; on any device, bit for bit on the same kind.

        Raises:
            ValueError: where the state is of another window or of other numbers; nothing has been changed then.
        """
        own = self._numbers()
        for name in (*_KEPT, *own):
            if name not in state_dict:
                raise ValueError(f"the saved state has no {name}: is it an InverseFisher's?")
        for name, value in own.items():
            if state_dict[name] != value:
                raise ValueError(f"the saved state has {name} = {state_dict[name]!r}, and this one has {value!r}")
        if not all(type(state_dict[name]) is int and state_dict[name] >= 0 for name in ("pushed", "rejected")):
            raise ValueError("the saved state has counts that are none")
        for name, kept in zip(_KEPT, (self._window, self._gram, self._inverse), strict=False):
            have = state_dict[name]
            if not isinstance(have, Tensor) or have.shape != kept.shape or have.dtype != kept.dtype:
                raise ValueError(
                    f"the saved state has a {name} of {getattr(have, 'dtype', None)} and shape "
                    f"{tuple(getattr(have, 'shape', ()))}, and this one has {kept.dtype} and {tuple(kept.shape)} "
                    "(blocks, num_grads, numbers in each)"
                )
        for name, kept in zip(_KEPT, (self._window, self._gram, self._inverse), strict=False):
            kept.copy_(state_dict[name])
        self.num_pushed, self.num_rejected = int(state_dict["pushed"]), int(state_dict["rejected"])

    def _numbers(self) -> dict[str, Any]:
        return {"num_params": self.num_params, "damping": self.damping, "divisor": self._ring.divisor}

    def _solve(self, x: Tensor) -> Tensor:
        weights = solved(self._gram, self._shift(), windows.products(self._window, x))
        return (x - windows.combination(self._window, weights, torch.float64)).div_(self.damping)

    def _root(self) -> Tensor:
        return root(self._gram, self._shift())

    def _shift(self) -> Tensor:
        return self._ring.shift(self._gram, self.num_pushed)


def _check_sizes(num_params: int, block_size: int | None, dtype: torch.dtype) -> None:
    for name, size in (("num_params", num_params), ("block_size", block_size)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"Invalid {name}: {size!r}, must be an int >= 1")
    if dtype not in _DTYPES:
        raise ValueError(f"Invalid dtype: {dtype}, must be one of {', '.join(map(str, _DTYPES))}")
