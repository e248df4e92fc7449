"""Launch shapes: our own table, so that no user's first step pays for autotuning."""

# elements and warps of one program of an elementwise kernel
ELEMENTWISE = (1024, 4)
# the interpreter pays for each program, not for each element
INTERPRETED = (1 << 16, 1)


def launch_shape(numel: int, *, interpreted: bool) -> tuple[int, int]:
    """Return (block, warps) for an elementwise kernel over `numel` elements."""
    return INTERPRETED if interpreted and numel > ELEMENTWISE[0] else ELEMENTWISE
