"""Checks of the kernels on any device: the tests of the interpreter and those of hardware both call them."""

import pytest

# what is wrong is shown in full, as in a test's own file
pytest.register_assert_rewrite(
    *(
        f"{__name__}.{name}"
        for name in (
            "adam",
            "adamw",
            "apply",
            "dct",
            "moments",
            "momentum",
            "normalized",
            "recursion",
            "select",
            "symmetric",
        )
    )
)
