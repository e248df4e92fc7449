"""Launch shapes: our own table, so that no user's first step pays for autotuning."""

from typing import NamedTuple

# elements and warps of one program of an elementwise kernel
ELEMENTWISE = (1024, 4)
# the interpreter pays for each program, not for each element
INTERPRETED = (1 << 16, 1)


class Tiles(NamedTuple):
    """How one program of a matrix kernel computes its square of the result."""

    # of the square, and how much of K is multiplied at once
    side: int
    depth: int
    warps: int
    stages: int


# by bytes of an element, from a side on; chosen to fit registers and shared memory, as no time has been measured yet
TILES = {2: {1: Tiles(64, 64, 4, 3), 1024: Tiles(128, 64, 8, 3)}, 4: {1: Tiles(64, 16, 4, 3)}}
# for operands that are read element by element, where each has an address in a register
ODD_TILES = {2: Tiles(64, 64, 8, 3), 4: Tiles(64, 16, 4, 3)}
# up to a side: the least length of a part of K, and how many parts at most. By the shape of one matrix alone, so that
# it gets the same bits in a stack of any size
SPLITS = {64: (256, 32), 128: (512, 32), 256: (512, 16), 511: (1024, 4)}


def launch_shape(numel: int, *, interpreted: bool) -> tuple[int, int]:
    """Return (block, warps) for an elementwise kernel over `numel` elements."""
    return INTERPRETED if interpreted and numel > ELEMENTWISE[0] else ELEMENTWISE


def tiles_for(n: int, itemsize: int, *, aligned: bool) -> Tiles:
    """Return the tiles of an n×n product of elements of `itemsize` bytes, which are read in vectors or not."""
    if not aligned:
        return ODD_TILES[itemsize]
    return [tiles for side, tiles in TILES[itemsize].items() if n >= side][-1]


def parts_of(n: int, k: int) -> int:
    """Return into how many parts the long dimension of a product n×k by k×n is cut; 1 is not at all."""
    for side, (length, most) in SPLITS.items():
        if n <= side:
            return max(1, min(most, k // length))
    return 1
