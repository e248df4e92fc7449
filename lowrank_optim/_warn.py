"""Saying something once."""

import functools
import warnings


@functools.cache
def warn_once(message: str) -> None:
    """Warn with `message`, the first time that this process says it.

    The warnings module forgets what it has said whenever anybody enters `warnings.catch_warnings`, and a step loop
    would then say the same thing thousands of times.
    """
    warnings.warn(message, RuntimeWarning, stacklevel=3)
