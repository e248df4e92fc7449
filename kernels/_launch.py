"""Launch shapes: our own table, so that no user's first step pays for autotuning."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

# elements and warps of one program of an elementwise kernel
ELEMENTWISE = (1024, 4)
# the same where little is read and little is computed
WIDE = (2048, 4)
# the same for moments in 4 bits, whose time goes into instructions: compiled for sm_90a it takes 60 an element so, and
# 66 by the shape above (no time has been measured yet)
PACKED = (2048, 4)
# the interpreter pays for each program, not for each element
INTERPRETED = (1 << 16, 1)


class Tiles(NamedTuple):
    """How one program of a matrix kernel computes its square of the result."""

    # of the square, and how much of K is multiplied at once
    side: int
    depth: int
    warps: int
    stages: int


# by architecture, bytes of an element, and from a side on; for sm_90a measured on an H200, for the others chosen to fit
# registers and shared memory
TILES = {
    "sm_90a": {2: {1: Tiles(64, 64, 4, 4), 512: Tiles(128, 64, 4, 3)}, 4: {1: Tiles(64, 16, 4, 3)}},
    "sm_80": {2: {1: Tiles(64, 64, 4, 3), 1024: Tiles(128, 64, 8, 3)}, 4: {1: Tiles(64, 16, 4, 3)}},
    "gfx942": {2: {1: Tiles(64, 64, 4, 2), 1024: Tiles(128, 64, 8, 2)}, 4: {1: Tiles(64, 16, 4, 2)}},
}
# for operands that are read element by element, where each has an address in a register
ODD_TILES = {2: Tiles(64, 64, 8, 3), 4: Tiles(64, 16, 4, 3)}
# rows of tiles that are gone through together, column by column: what they read stays in the cache of the device
BAND = 8
# up to a side: the least length of a part of K, and how many parts at most. By the shape of one matrix alone, so that
# it gets the same bits in a stack of any size
SPLITS = {64: (256, 32), 128: (512, 32), 256: (512, 16), 511: (1024, 4)}
# of the Gram recursion, by the padded side: the largest n that each is for. None spills registers on sm_80, sm_90a and
# gfx942
RECURSIONS = (Tiles(16, 16, 1, 2), Tiles(32, 16, 4, 2), Tiles(64, 16, 4, 2), Tiles(128, 16, 8, 3))
# in the place of those on sm_90a, where they were measured to be faster
HOPPER_RECURSIONS = {64: Tiles(64, 64, 4, 2), 128: Tiles(128, 32, 8, 2)}


def launch_shape(numel: int, *, interpreted: bool, packed: bool = False) -> tuple[int, int]:
    """Return (block, warps) for an elementwise kernel over `numel` elements, or over moments `packed` in 4 bits."""
    if interpreted and numel > ELEMENTWISE[0]:
        return INTERPRETED
    return PACKED if packed else ELEMENTWISE


@functools.cache
def architecture(device: torch.device) -> str:
    """Return whose launch shapes a device gets; those of a CPU, where kernels are interpreted, are of the newest."""
    if device.type == "cpu":
        return "sm_90a"
    if torch.version.hip is not None:
        return "gfx942"
    # of what comes after Hopper, some have its shared memory and some have not
    return "sm_90a" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "sm_80"


def tiles_for(n: int, itemsize: int, device: torch.device, *, aligned: bool) -> Tiles:
    """Return the tiles of an n×n product of elements of `itemsize` bytes, which are read in vectors or not."""
    if not aligned:
        return ODD_TILES[itemsize]
    return [tiles for side, tiles in TILES[architecture(device)][itemsize].items() if n >= side][-1]


def recursion_tiles(n: int, device: torch.device) -> Tiles:
    """Return the tiles of the Gram recursion of n×n matrices."""
    tiles = next(tiles for tiles in RECURSIONS if n <= tiles.side)
    return HOPPER_RECURSIONS.get(tiles.side, tiles) if architecture(device) == "sm_90a" else tiles


def parts_of(n: int, k: int) -> int:
    """Return into how many parts the long dimension of a product n×k by k×n is cut; 1 is not at all."""
    for side, (length, most) in SPLITS.items():
        if n <= side:
            return max(1, min(most, k // length))
    return 1


class ProductTiles(NamedTuple):
    """How one program of `factored_add` computes its rectangle of a weight."""

    rows: int
    columns: int
    # of the inner dimension: how much is multiplied at once
    depth: int
    # tiles below one another that run together
    group: int
    warps: int
    stages: int
    # of a thread at most, where that costs no spill: a second program then fits beside the first, and reads the weight
    # while that one multiplies
    registers: int | None = None


# by bytes of an element of the factors; no time has been measured yet
PRODUCT_TILES = {2: ProductTiles(128, 128, 64, 8, 8, 3, 128), 4: ProductTiles(64, 64, 16, 8, 4, 3)}
# for operands that are read element by element
ODD_PRODUCT_TILES = {2: ProductTiles(64, 64, 64, 8, 8, 3), 4: ProductTiles(64, 64, 16, 8, 4, 3)}


def product_tiles_for(itemsize: int, *, aligned: bool) -> ProductTiles:
    """Return the tiles of a product whose factors have elements of `itemsize` bytes, read in vectors or not."""
    return (PRODUCT_TILES if aligned else ODD_PRODUCT_TILES)[itemsize]


# rows, columns and warps of one program of an elementwise kernel on what is not contiguous
STRIDED_TILE = (64, 64, 4)


class DctSplit(NamedTuple):
    """How the fast DCT takes apart n = first · second elements, where 8 divides `second`, and by how many warps."""

    first: int
    second: int
    warps: int
    stages: int

    @property
    def sides(self) -> tuple[int, int]:
        """Return both as the operands of products are padded."""
        return max(16, 1 << (self.first - 1).bit_length()), max(32, 1 << (self.second - 1).bit_length())


# by architecture and bytes of an element: the largest sides whose program spills nothing, rows of a warp's part of the
# first side, and stages; no time has been measured yet
DCT_SIDES = {
    "sm_90a": {2: (128, 64, 16, 3), 4: (64, 32, 16, 3)},
    "sm_80": {2: (128, 32, 16, 3), 4: (32, 32, 16, 3)},
    "gfx942": {2: (128, 32, 32, 2), 4: (64, 32, 32, 2)},
}
# warps of all programs together, if there are that many rows: what one H200 holds. Each program leaves a row of sums
DCT_WARPS = 1024


@functools.cache
def dct_split(n: int, itemsize: int, device: torch.device) -> DctSplit | None:
    """Return how n elements of `itemsize` bytes are taken apart: with the least padding; None if they cannot be."""
    first, second, part, stages = DCT_SIDES[architecture(device)][itemsize]
    splits = [DctSplit(n // i, i, 1, stages) for i in range(8, second + 1, 8) if n % i == 0 and n // i <= first]
    if n < 16 or n % 16 or not splits:
        return None
    # of those that are padded as little, the ones that are as long in both
    split = min(splits, key=lambda split: (math.prod(split.sides), sum(split.sides)))
    return split._replace(warps=max(1, split.sides[0] // part))


def dct_rows(m: int, warps: int) -> int:
    """Return how many of m rows one program of the fast DCT transforms."""
    return max(4, -(-m * warps // DCT_WARPS))


# elements and warps of one program of AdamW on many tensors; the interpreter pays for each program
ADAMW = (2048, 8)
ADAMW_INTERPRETED = (4096, 1)


# into how many parts at most a matrix is cut whose squares are added up before it is scaled: by its size alone, so that
# it gets the same bits in a stack of any size. Every program reads all sums
MOMENTUM_PARTS = 1024


# of how many columns some are selected at most: their keys are in the registers of one program
SELECTABLE = 1 << 14
# keys of a thread; no time has been measured yet
SELECT_KEYS = 16


def select_warps(block: int) -> int:
    """Return the warps of the program that selects some of `block` columns."""
    return max(1, min(16, block // (32 * SELECT_KEYS)))


class ChosenTile(NamedTuple):
    """Of which coordinates along chosen columns one program advances the moments at once, and by how many warps."""

    # of the rank, and of the other side
    along: int
    others: int
    warps: int


# by the dimension of the rank: most of `along`, least of `others`, elements of a tile, and of a thread; no time has
# been measured yet
CHOSEN_TILES = {-1: (4096, 1, 1024, 4), -2: (256, 16, 4096, 16)}
# so that a small rank gives work to many programs
CHOSEN_OTHERS = 64


def chosen_tile(r: int, dim: int, lanes: int = 32) -> ChosenTile:
    """Return the tile for coordinates of rank r along `dim`, on a device whose warps have so many threads."""
    most, least, elements, own = CHOSEN_TILES[dim]
    along = min(most, 1 << (r - 1).bit_length())
    others = min(CHOSEN_OTHERS, max(least, elements // along))
    return ChosenTile(along, others, max(1, along * others // (lanes * own)))


def traced(x: Tensor) -> bool:
    """Return whether torch's compiler looks at what would be launched: kernels are wrapped, and addresses unknown.

    16 then divides all of them, as it does those of torch's allocators; the compiler copies what is elsewhere.
    """
    return type(x) is not Tensor and isinstance(x, FunctionalTensor)
