"""The DCT-II matrix from its definition, each entry from an angle that is exact until the last step."""

import math

import numpy as np


def cosine(numerator, denominator):
    """cos(π·numerator/denominator) with the angle brought into [0, π/4] in integers."""
    numerator %= 2 * denominator
    if numerator > denominator:
        # cos(2π − x) = cos x
        numerator = 2 * denominator - numerator
    sign = 1
    if 2 * numerator > denominator:
        # cos(π − x) = −cos x
        numerator, sign = denominator - numerator, -1
    if 4 * numerator > denominator:
        # cos(π/2 − x) = sin x
        return sign * math.sin(math.pi * (denominator - 2 * numerator) / (2 * denominator))
    return sign * math.cos(math.pi * numerator / denominator)


def entry(size, row, column):
    """Entry of the orthonormal DCT-II matrix whose columns are the cosines."""
    if column == 0:
        return 1 / math.sqrt(size)
    return math.sqrt(2 / size) * cosine((2 * row + 1) * column, 2 * size)


def matrix(size):
    return np.array([[entry(size, row, column) for column in range(size)] for row in range(size)])
