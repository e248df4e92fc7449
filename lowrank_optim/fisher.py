"""M-FAC as linear algebra: products with the inverse of an empirical Fisher matrix, exactly, in O(d m)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_optim import windows
from lowrank_optim._warn import warn_once
from lowrank_optim.gram import Divisor, Ring, check_numbers, logdet, root
from lowrank_optim.room import check_room
from lowrank_optim.windows import Blocks

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
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
    m = 256, these by 4·10⁻⁷ and 3·10⁻⁸. With ε = 10⁻¹⁶ the error of the first form is about ε (‖GGᵀ‖/cλ)² where
    m ≥ d or m ≥ B.

    Costs, for d parameters: `push` reads the window once and takes O(m²), and O(m³) once in m times or where K has
    become worse than rounding makes it; `solve_newest` reads the window once; `solve` twice; `diagonal` O(d m²);
    `element` O(m²); `static` makes these O(d m) and O(m).

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
        self._ring = Ring(num_grads, float(damping), divisor)
        self._device = torch.get_default_device() if device is None else torch.device(device)
        self._blocks = Blocks(num_params, min(block_size or num_params, num_params))
        shape = (self._blocks.count, num_grads, self._blocks.width)
        home = torch.device("cpu") if offload else self._device
        count = f"a window of {num_grads} gradients of {num_params}"
        sides = 16 * shape[0] * num_grads**2
        check_room(math.prod(shape) * dtype.itemsize + sides * (home == self._device), home, count)
        check_room(sides, self._device, f"{count}, in {shape[0]} blocks, has two matrices for each, which")
        pinned = offload and torch.cuda.is_available()
        self._window = torch.zeros(shape, dtype=dtype, device=home, pin_memory=pinned)
        self._gram = torch.zeros(shape[0], num_grads, num_grads, dtype=torch.float64, device=self._device)
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
        if grad.shape != (self._blocks.size,):
            raise ValueError(f"Invalid grad: of shape {tuple(grad.shape)}, must be ({self._blocks.size},)")
        # as it will be stored, because products are of what is stored
        stored = self._blocks.split(grad.to(self._device, self._window.dtype).unsqueeze(0))
        slot = self._ring.slot(self.num_pushed)
        size = windows.largest([stored])
        if not windows.fits(size):
            warn_once(windows.REFUSED)
            self.num_rejected += 1
            return False
        self._window[:, slot] = stored.squeeze(2)
        # in float64, because what is orthogonal to the window in `solve` is what is left of a difference
        row = windows.new_row([self._window], [stored.double()], size)
        self._ring.push_(self._gram, self._inverse, row, self.num_pushed)
        self.num_pushed += 1
        return True

    @torch.no_grad()
    def solve(self, x: Tensor) -> Tensor:
        """Return F⁻¹x of a vector (d,), or of each row of a batch (p, d), in float32 (float64 with such a window).

        Raises:
            ValueError: for another length than d.
        """
        return _each(x, self._blocks, self._solve, self._device).to(_compute(self._window.dtype))

    @torch.no_grad()
    def solve_newest(self) -> Tensor:
        """Return F⁻¹g of the newest gradient g, as it is stored, in one pass over the window.

        Raises:
            RuntimeError: where the window is empty.
        """
        if not self.num_pushed:
            raise RuntimeError("no gradient has been pushed, so there is no newest one")
        slot = self._ring.slot(self.num_pushed - 1)
        weights = self._ring.divide(self.num_pushed) * self._inverse[:, :, slot]
        # in float64 for the sake of blocks that are shorter than m: their rows depend on each other, and cancel
        found = windows.combination(self._window, weights.unsqueeze(2), torch.float64)
        return self._blocks.join(found).squeeze(0).to(_compute(self._window.dtype))

    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """Return the diagonal of F⁻¹, (d,), in O(d m²)."""
        sums = windows.squares(self._window, self._root())
        found = self._blocks.join((1 - sums).div_(self._ring.damping).unsqueeze(2)).squeeze(0)
        return found.to(_compute(self._window.dtype))

    @torch.no_grad()
    def element(self, i: int, j: int) -> float:
        """Return the element (i, j) of F⁻¹, in O(m²).

        Raises:
            IndexError: out of range.
        """
        one, two = self._blocks.place(i), self._blocks.place(j)
        if one[0] != two[0]:
            return 0.0
        columns = [self._window[block, :, column].to(self._device, torch.float64) for block, column in (one, two)]
        common = float(columns[0] @ self._inverse[one[0]] @ columns[1])
        return ((one == two) - common) / self._ring.damping

    @torch.no_grad()
    def logdet(self) -> float:
        """Return log det F."""
        return self._blocks.size * math.log(self._ring.damping) + logdet(self._gram, self._shift())

    @torch.no_grad()
    def static(self) -> "StaticInverseFisher":
        """Return F⁻¹ as it is now in a form whose products take O(d m) and whose elements O(m), for O(d m²) once."""
        rows = windows.transformed(self._window, self._root(), torch.float64)
        return StaticInverseFisher(rows, self._blocks, self._ring.damping, _compute(self._window.dtype))

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
        for name, kept in zip(_KEPT, (self._window, self._gram, self._inverse), strict=False):
            have = state_dict[name]
            if have.shape != kept.shape or have.dtype != kept.dtype:
                raise ValueError(
                    f"the saved state has a {name} of {have.dtype} and shape {tuple(have.shape)}, and this one has "
                    f"{kept.dtype} and {tuple(kept.shape)} (blocks, num_grads, numbers in each)"
                )
        for name, kept in zip(_KEPT, (self._window, self._gram, self._inverse), strict=False):
            kept.copy_(state_dict[name])
        self.num_pushed, self.num_rejected = int(state_dict["pushed"]), int(state_dict["rejected"])

    def _numbers(self) -> dict[str, Any]:
        return {"num_params": self._blocks.size, "damping": self._ring.damping, "divisor": self._ring.divisor}

    def _solve(self, x: Tensor) -> Tensor:
        weights = self._inverse @ windows.products(self._window, x)
        return (x - windows.combination(self._window, weights, torch.float64)).div_(self._ring.damping)

    def _root(self) -> Tensor:
        return root(self._gram, self._shift())

    def _shift(self) -> Tensor:
        return self._ring.shift(self._gram, self.num_pushed)


class StaticInverseFisher:
    """F⁻¹ in its static form, T = R G with RᵀR = K, which `InverseFisher.static` makes: F⁻¹ = (I − TᵀT)/λ.

    The rows of T are the published v_i of a static window, up to a factor and the order in which they are combined.
    They are kept in float64, because 1 − Σ T² cancels: d·m numbers of 8 bytes.
    """

    def __init__(self, rows: Tensor, blocks: Blocks, damping: float, dtype: torch.dtype) -> None:
        self._rows, self._blocks, self._damping, self._dtype = rows, blocks, damping, dtype

    @torch.no_grad()
    def solve(self, x: Tensor) -> Tensor:
        """Return F⁻¹x of a vector (d,), or of each row of a batch (p, d), in O(d m)."""
        return _each(x, self._blocks, self._solve, self._rows.device).to(self._dtype)

    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """Return the diagonal of F⁻¹, (d,), in O(d m)."""
        sums = self._rows.square().sum(1)
        return self._blocks.join((1 - sums).div_(self._damping).unsqueeze(2)).squeeze(0).to(self._dtype)

    @torch.no_grad()
    def element(self, i: int, j: int) -> float:
        """Return the element (i, j) of F⁻¹, in O(m).

        Raises:
            IndexError: out of range.
        """
        one, two = self._blocks.place(i), self._blocks.place(j)
        if one[0] != two[0]:
            return 0.0
        common = float(self._rows[one[0], :, one[1]] @ self._rows[two[0], :, two[1]])
        return ((one == two) - common) / self._damping

    def _solve(self, x: Tensor) -> Tensor:
        inside = windows.combination(self._rows, windows.products(self._rows, x), torch.float64)
        return (x - inside).div_(self._damping)


def _each(x: Tensor, blocks: Blocks, solve: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """Return what `solve` makes of (b, n, p) numbers in float64, in the shape of `x`."""
    if x.dim() not in (1, 2) or x.size(-1) != blocks.size:
        raise ValueError(f"Invalid x: of shape {tuple(x.shape)}, must be ({blocks.size},) or (p, {blocks.size})")
    rows = x if x.dim() == 2 else x.unsqueeze(0)
    return blocks.join(solve(blocks.split(rows.to(device, torch.float64)))).reshape(x.shape)


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_sizes(num_params: int, block_size: int | None, dtype: torch.dtype) -> None:
    for name, size in (("num_params", num_params), ("block_size", block_size)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"Invalid {name}: {size!r}, must be an int >= 1")
    if dtype not in _DTYPES:
        raise ValueError(f"Invalid dtype: {dtype}, must be one of {', '.join(map(str, _DTYPES))}")
