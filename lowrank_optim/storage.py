"""How a moment is kept between steps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim._types import Moments, NewState, State, Storage


@dataclass(frozen=True)
class Full:
    """As the mathematics has it: float32, or float64 for float64 parameters. The moment is worked on in place."""

    in_place: ClassVar[bool] = True
    name: ClassVar[str] = "float32"

    def init(self, name: str, shape: Sequence[int], new: NewState, *, signed: bool = True) -> State:
        """Allocate `name` in the dtype of the mathematics."""
        return {name: new(shape)}

    def read(self, states: Sequence[State], name: str, shape: Sequence[int], dtype: torch.dtype) -> Moments:
        """Return the stored tensors themselves."""
        return [state[name] for state in states]

    def write_(self, states: Sequence[State], name: str, values: Moments, seeds: Sequence[int]) -> None:
        """Copy the values unless they are the stored tensors."""
        for state, value in zip(states, list(values), strict=True):
            if value is not state[name]:
                state[name].copy_(value)

    def parts(self, state: State, names: Sequence[str], numel: int) -> Iterator[tuple[int, int, State]]:
        """Yield the whole: nothing is gained by cutting."""
        yield 0, numel, {name: state[name].view(-1) for name in names}


@dataclass(frozen=True)
class BFloat16:
    """bfloat16, rounded stochastically. State bytes of n elements: 2·n.

    Rounded to nearest, a moment stops moving where a step changes it by less than half of the 2⁻⁸ to 2⁻⁷ of itself
    that lie between neighbours: at β₂ = 0.999 a second moment would never decay.
    """

    in_place: ClassVar[bool] = False
    name: ClassVar[str] = "bfloat16"

    def init(self, name: str, shape: Sequence[int], new: NewState, *, signed: bool = True) -> State:
        """Allocate `name`."""
        return {name: new(shape, torch.bfloat16)}

    def read(self, states: Sequence[State], name: str, shape: Sequence[int], dtype: torch.dtype) -> Moments:
        """Return copies."""
        return torch.stack([state[name] for state in states]).to(dtype).view(len(states), *shape)

    def write_(self, states: Sequence[State], name: str, values: Moments, seeds: Sequence[int]) -> None:
        """Round and keep."""
        _scatter(states, name, ops.rounded_(_rows(values), torch.bfloat16, seeds))

    def parts(self, state: State, names: Sequence[str], numel: int) -> Iterator[tuple[int, int, State]]:
        """Yield parts."""
        for start, stop in _cut(numel, state[names[0]].device):
            yield start, stop, {name: state[name].view(-1)[start:stop] for name in names}


@dataclass(frozen=True)
class Blockwise:
    """Codes of 8 or 4 bits, with one float32 scale for each block of the flat moment, its largest magnitude s.

    A first moment is ±s·(c/L)², rounded to nearest: |x̂ − x| ≤ √(s|x|)/L + s/2L². L, the largest code, is 127 or 7. A
    second moment is s·(c/L)⁴ in 8 bits and s·(c/L)² in 4, with L = 255 or 15, rounded up or down at random, to zero
    only from zero: x̂ is a neighbour of x. A block with NaN or Inf in it reads back as NaN and Inf throughout.

    The grid is finer near zero because Adam divides each element by its own root mean square, and within a block these
    differ by orders of magnitude. Measured by replaying 300 gradients of a language model in float32 beside it (β = .9,
    .999): Adam's directions differ by 2.6 % for an attention matrix, 3.6 % for an embedding and 9 % for GaLore's
    coordinates, where a linear grid has 3, 18 and 45 %; a momentum (β = .95) of a matrix differs by 2 to 3 %, linear 2
    to 6 %. In 4 bits directions differ by 30, 28 and 57 %, most of it from the first moment.

    First moments are rounded to nearest because rounding at random makes these errors 1.4 times as large in 8 bits, and
    in 4 bits blows up single directions to 25; the price is a bias towards zero, up to 10 % where an element is below
    1 % of its block's largest and mostly noise. Second moments are rounded at random because with β₂ = .999 a step
    changes them by less than half a step of the grid, and to nearest they would never move.

    Codes are int8 where signed and uint8 where not, in the shape of the moment; with 4 bits two in a byte, flat.
    State bytes of n elements: n + 4·⌈n/256⌉ in 8 bits, ⌈n/2⌉ + 4·⌈n/64⌉ in 4.
    """

    in_place: ClassVar[bool] = False

    bits: int
    block: int

    @property
    def name(self) -> str:
        """Return what `state_dtype` calls it."""
        return f"int{self.bits}"

    def init(self, name: str, shape: Sequence[int], new: NewState, *, signed: bool = True) -> State:
        """Allocate the codes `name` and the scales `name`_scale."""
        numel = math.prod(shape)
        codes = new(shape if self.bits == 8 else (-(-numel // 2),), torch.int8 if signed else torch.uint8)
        return {name: codes, f"{name}_scale": new((-(-numel // self.block),), torch.float32)}

    def read(self, states: Sequence[State], name: str, shape: Sequence[int], dtype: torch.dtype) -> Moments:
        """Decode."""
        numel = math.prod(shape)
        moments = torch.empty(len(states), numel, dtype=torch.float32, device=states[0][name].device)
        if len(states) > 1 or numel <= ops.part_size(moments.device):
            self._decode_(moments, states, name)
        else:
            for start, stop, views in self.parts(states[0], (name,), numel):
                self._decode_(moments[:, start:stop], [views], name)
        return moments.to(dtype).view(len(states), *shape)

    def write_(self, states: Sequence[State], name: str, values: Moments, seeds: Sequence[int]) -> None:
        """Encode."""
        moments = _rows(values)
        if len(states) > 1 or moments.numel() <= ops.part_size(moments.device):
            self._encode_(states, name, moments, seeds)
        else:
            for start, stop, views in self.parts(states[0], (name,), moments.numel()):
                self._encode_([views], name, moments[:, start:stop], [seeds[0] + start])

    def parts(self, state: State, names: Sequence[str], numel: int) -> Iterator[tuple[int, int, State]]:
        """Yield parts of whole blocks."""
        per_byte = 8 // self.bits
        for start, stop in _cut(numel, state[names[0]].device):
            views = {}
            for name in names:
                views[name] = state[name].view(-1)[start // per_byte : -(-stop // per_byte)]
                scales = f"{name}_scale"
                views[scales] = state[scales][start // self.block : -(-stop // self.block)]
            yield start, stop, views

    def _decode_(self, moments: Tensor, states: Sequence[State], name: str) -> None:
        codes, scale = _stacked(states, name), _stacked(states, f"{name}_scale")
        if self.bits == 4:
            codes = ops.unpack(codes, moments.size(1))
        for cut, scales, blocks in self._blocks(*moments.shape):
            out, rows = moments[:, cut].view(blocks), codes[:, cut].view(blocks)
            ops.dequantize_(out, rows, scale[:, scales], **self._grid(codes))

    def _encode_(self, states: Sequence[State], name: str, moments: Tensor, seeds: Sequence[int]) -> None:
        kept, scale = _room(states, name), _room(states, f"{name}_scale")
        codes = torch.empty(moments.shape, dtype=kept.dtype, device=kept.device) if self.bits == 4 else kept
        signed = codes.dtype == torch.int8
        dither = None if signed else ops.dither(moments.size(1), seeds, moments.device)
        for cut, scales, blocks in self._blocks(*moments.shape):
            rows, part = codes[:, cut].view(blocks), moments[:, cut].view(blocks)
            up = None if dither is None else dither[:, cut].view(blocks)
            ops.quantize_(rows, scale[:, scales], part, dither=up, **self._grid(codes))
        if self.bits == 4:
            ops.pack_(kept, codes)
        if len(states) > 1:
            _scatter(states, name, kept)
            _scatter(states, f"{name}_scale", scale)

    def _blocks(self, count: int, numel: int) -> Iterator[tuple[slice, slice, tuple[int, int, int]]]:
        """Yield where in each row the whole blocks and their scales are, and their shape; then the same of the rest."""
        whole, rest = divmod(numel, self.block)
        if whole:
            yield slice(0, whole * self.block), slice(0, whole), (count, whole, self.block)
        if rest:
            yield slice(numel - rest, numel), slice(whole, whole + 1), (count, 1, rest)

    def _grid(self, codes: Tensor) -> dict[str, int]:
        if codes.dtype == torch.int8:
            return {"levels": (1 << self.bits - 1) - 1, "root": 2}
        return {"levels": (1 << self.bits) - 1, "root": 4 if self.bits == 8 else 2}


_KINDS: tuple[Storage, ...] = (Full(), BFloat16(), Blockwise(bits=8, block=256), Blockwise(bits=4, block=64))
_STORAGES = {kind.name: kind for kind in _KINDS}
STATE_DTYPES = tuple(_STORAGES)


def storage(state_dtype: str) -> Storage:
    """Return the storage of this name; one of `STATE_DTYPES`."""
    return _STORAGES[state_dtype]


def _rows(values: Moments) -> Tensor:
    """Return moments as rows of float32; they may be the very memory."""
    if not isinstance(values, Tensor):
        values = torch.stack([*values]) if len(values) > 1 else values[0].unsqueeze(0)
    return values.reshape(len(values), -1).to(torch.float32)


def _stacked(states: Sequence[State], name: str) -> Tensor:
    """Return what is kept as rows; of a single one it is the very memory."""
    if len(states) == 1:
        return states[0][name].view(1, -1)
    return torch.stack([state[name] for state in states]).view(len(states), -1)


def _scatter(states: Sequence[State], name: str, rows: Tensor) -> None:
    """Keep each row."""
    stored = [state[name] for state in states]
    torch._foreach_copy_(stored, list(rows.view(len(states), *stored[0].shape).unbind()))


def _room(states: Sequence[State], name: str) -> Tensor:
    """Return memory for as much as is kept; of a single one it is the very memory."""
    like = states[0][name].view(1, -1)
    return like if len(states) == 1 else torch.empty(len(states), like.size(1), dtype=like.dtype, device=like.device)


def _cut(numel: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield where parts start and stop; there is always one, which may be empty."""
    size = ops.part_size(device)
    for start in range(0, max(numel, 1), size):
        yield start, min(start + size, numel)
