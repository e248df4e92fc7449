"""Where matrices of 16 bits are multiplied as they are."""

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def multiplies(x: Tensor) -> bool:
    """Return whether the device of `x` has matrix units for its 16 bits, which add up in float32.

    There a product is sixteen times as fast as one in float32. The other factor is rounded to the 16 bits, which costs
    as much precision as the gradient itself has lost that way.
    """
    return x.dtype in HALF and type(x) is Tensor and x.is_cuda


def takes(part: object, x: Tensor) -> bool:
    """Return whether a rule, a basis or a residual reads a gradient like `x` in its own precision.

    Those that may say so by a method of this name; all others get it in the precision of the mathematics. No protocol:
    asking for one takes longer than what is asked.
    """
    asked = getattr(part, "takes", None)
    return asked is not None and asked(x)
