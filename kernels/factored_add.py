"""A weight written from the factors of its update: no matrix of the weight's size is formed on the way."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ._launch import ProductTiles, product_tiles_for, traced
from ._rounding import rounded, wrapped
from .apply import DTYPES, check_param, rate_and_decay, rates


@triton.jit
def _places(ptr, rows, row, columns, column):
    """Return pointers to these rows and columns of a matrix of strides `row` and `column`."""
    # int64, so that matrices of more than 2³¹ elements are addressed right; until here 32 bits save registers
    return ptr + (rows.to(tl.int64) * row)[:, None] + (columns.to(tl.int64) * column)[None, :]


@triton.jit
def _write(
    param_ptr,
    matrix_ptr,
    factors_ptr,
    product,
    rows,
    columns,
    m,
    n,
    lr,
    decay,
    seed,
    param_row,
    param_column,
    matrix_row,
    matrix_column,
    factors_stride,
    HAS_MATRIX: tl.constexpr,
    BY_ROW: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """W ← decay·W − lr·(product + M ∘ f) in these rows and columns."""
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    if HAS_MATRIX:
        matrix_at = _places(matrix_ptr, rows, matrix_row, columns, matrix_column)
        matrix = tl.load(matrix_at, mask=inside, other=0.0).to(tl.float32)
        if BY_ROW:
            factors = tl.load(factors_ptr + rows.to(tl.int64) * factors_stride, mask=rows < m, other=0.0)[:, None]
        else:
            factors = tl.load(factors_ptr + columns.to(tl.int64) * factors_stride, mask=columns < n, other=0.0)[None, :]
        product += matrix * factors.to(tl.float32)
    param_at = _places(param_ptr, rows, param_row, columns, param_column)
    value = decay * tl.load(param_at, mask=inside, other=0.0).to(tl.float32) - lr * product
    # all that noise sees of a place are 32 bits
    index = (rows * n)[:, None] + columns[None, :]
    value = rounded(value, param_ptr.dtype.element_ty, seed, index, STOCHASTIC, INTERPRETED)
    tl.store(param_at, value, mask=inside)


@triton.jit(do_not_specialize=["seed"])
def factored_add_kernel(
    param_ptr,
    left_ptr,
    right_ptr,
    matrix_ptr,
    factors_ptr,
    lr,
    decay,
    seed,
    m,
    n,
    r,
    param_row,
    param_column,
    left_row,
    left_column,
    right_row,
    right_column,
    matrix_row,
    matrix_column,
    factors_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MATRIX: tl.constexpr,
    BY_ROW: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of W ← decay·W − lr·(L R + M ∘ f)."""
    lr, decay = rates(lr, decay, LR_ON_DEVICE)
    program = tl.program_id(0)
    # programs that run at once share rows of L and columns of R: GROUP tiles down, then the next column of tiles
    down, across = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    group = program // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    i = group * GROUP + program % (GROUP * across) % height
    j = program % (GROUP * across) // height
    rows = i * ROWS + tl.arange(0, ROWS)
    columns = j * COLUMNS + tl.arange(0, COLUMNS)
    along = tl.arange(0, DEPTH)
    left_at = _places(left_ptr, rows, left_row, along, left_column)
    right_at = _places(right_ptr, along, right_row, columns, right_column)
    stride = tl.full((), DEPTH, tl.int64)
    value = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(0, tl.cdiv(r, DEPTH)):
        rest = along < r - step * DEPTH
        left = tl.load(left_at, mask=(rows[:, None] < m) & rest[None, :], other=0.0)
        right = tl.load(right_at, mask=rest[:, None] & (columns[None, :] < n), other=0.0)
        if INTERPRETED:
            # the interpreter multiplies the bits of bfloat16 as integers
            left, right = left.to(tl.float32), right.to(tl.float32)
        value = tl.dot(left, right, value, input_precision=PRECISION)
        left_at += stride * left_column
        right_at += stride * right_row
    if COLUMNS > 64:
        # half of the tile at a time: beside all of it registers have no room for the weight
        first, second = tl.split(tl.permute(tl.reshape(value, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            _write(
                param_ptr,
                matrix_ptr,
                factors_ptr,
                first if half == 0 else second,
                rows,
                j * COLUMNS + half * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2),
                m,
                n,
                lr,
                decay,
                seed,
                param_row,
                param_column,
                matrix_row,
                matrix_column,
                factors_stride,
                HAS_MATRIX,
                BY_ROW,
                STOCHASTIC,
                INTERPRETED,
            )
    else:
        _write(
            param_ptr,
            matrix_ptr,
            factors_ptr,
            value,
            rows,
            columns,
            m,
            n,
            lr,
            decay,
            seed,
            param_row,
            param_column,
            matrix_row,
            matrix_column,
            factors_stride,
            HAS_MATRIX,
            BY_ROW,
            STOCHASTIC,
            INTERPRETED,
        )


def apply_sum_(
    param: Tensor,
    product: tuple[Tensor, Tensor] | None,
    scaled: tuple[Tensor, Tensor] | None,
    *,
    lr: float | Tensor,
    weight_decay: float,
    seed: int | None = None,
    precision: str = "ieee",
    tiles: ProductTiles | None = None,
) -> None:
    """Do as `reference_apply.apply_sum_` with sums in float32, rounded once whatever the dtypes are.

    Args:
        param: (m, n) of float32, bfloat16 or float16 and any strides.
        product: left (m, r) and right (r, n), both of one of these dtypes; they are multiplied as they are.
        scaled: matrix (m, n) and factors (m, 1), (1, n) or (1, 1), each of one of these dtypes.
        lr: a number, or a tensor of no dimensions on the same device, which the host does not read.
        weight_decay: per unit of lr.
        seed: of the rounding of bfloat16 and float16; None rounds to the nearest.
        precision: of a product of float32: "ieee", or "tf32x3", which is three products on the matrix units of NVIDIA.
        tiles: what one program computes; None goes by the table.

    Raises:
        ValueError: for tensors that the kernel would misread.
    """
    if product is None and scaled is None:
        raise ValueError("the Triton weight update needs a product or a scaled matrix, or both")
    check_param(param, lr)
    if param.dim() != 2:
        raise ValueError(f"the Triton sum needs a weight of two dimensions, not of shape {tuple(param.shape)}")
    if precision not in ("ieee", "tf32x3"):
        raise ValueError(f"precision must be 'ieee' or 'tf32x3', not {precision!r}")
    m, n = param.shape
    # without them nothing is loaded from where these point
    left, right = product or (param[:, :0], param[:0])
    matrix, factors = scaled or (param, param)
    r = left.size(-1)
    by_row = factors.shape == (m, 1)
    if product is not None:
        _check(param, "left", left, (m, r), left.dtype)
        _check(param, "right", right, (r, n), left.dtype)
    if scaled is not None:
        _check(param, "matrix", matrix, (m, n), matrix.dtype)
        shape = (m, 1) if by_row else (1, n if factors.size(-1) == n else 1)
        _check(param, "factors", factors, shape, factors.dtype)
    if param.numel() == 0:
        return
    operands = [param] if scaled is None else [param, matrix]
    tiles = tiles or product_tiles_for(left.itemsize, aligned=_aligned((n, r), *operands, left, right))
    rate, decay = rate_and_decay(lr, weight_decay)
    kernel, device = factored_add_kernel, param.get_device()
    if traced(param):
        kernel, device = wrap_triton(factored_add_kernel), -1
    # a kernel goes to the current device, which need not be the tensor's
    with torch.cuda.device(device):
        kernel[(triton.cdiv(m, tiles.rows) * triton.cdiv(n, tiles.columns),)](
            param,
            left,
            right,
            matrix,
            factors,
            rate,
            decay,
            wrapped(seed or 0),
            m,
            n,
            r,
            *param.stride(),
            *left.stride(),
            *right.stride(),
            *matrix.stride(),
            0 if factors.numel() == 1 else factors.stride(0 if by_row else 1),
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            DEPTH=tiles.depth,
            GROUP=tiles.group,
            HAS_MATRIX=scaled is not None,
            BY_ROW=by_row,
            LR_ON_DEVICE=isinstance(lr, Tensor),
            STOCHASTIC=seed is not None,
            # of halves there is one kernel, whatever is asked for; AMD's units have float32
            PRECISION=precision if left.itemsize == 4 and torch.version.hip is None else "ieee",
            INTERPRETED=not param.is_cuda,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **_limits(param, tiles),
        )


def _check(param: Tensor, name: str, x: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if x.shape != shape or x.dtype != dtype or x.dtype not in DTYPES or x.device != param.device:
        raise ValueError(
            f"the Triton sum needs {name} of shape {shape}, {dtype if dtype in DTYPES else 'a short float'} and on "
            f"{param.device}, not {x.dtype} of shape {tuple(x.shape)} on {x.device}"
        )


def _limits(param: Tensor, tiles: ProductTiles) -> dict[str, int]:
    """Return the limit of registers where it is known to cost no spill: on Hopper, for a weight of two bytes."""
    if tiles.registers is None or not param.is_cuda or torch.version.hip is not None or param.itemsize > 2:
        return {}
    # torch's compiler knows no such limit
    if traced(param):
        return {}
    return {"maxnreg": tiles.registers} if torch.cuda.get_device_capability(param.device)[0] == 9 else {}


def _aligned(sizes: tuple[int, ...], *operands: Tensor) -> bool:
    """Return whether Triton will find that the operands can be read in vectors."""
    places = [x.data_ptr() for x in operands if not traced(x)]
    numbers = [*sizes, *places, *(stride for x in operands for stride in x.stride())]
    return all(number % 16 == 0 or number == 1 for number in numbers)
