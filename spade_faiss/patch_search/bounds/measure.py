"""Compiled measures of single patches, at addresses, and heaps of the nearest.

The `half` of a query patch a and another patch b is (sq_distance - |a|^2) / 2, at the scale of the products.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import jit
from ..heaps import sink_pair
from .simd import float_at, sq_difference, sq_distance


@jit
def are_equal(mine: int, theirs: int, channels: int) -> Any:
    """Return whether two patches at addresses are."""
    return sq_distance(mine, theirs, channels) == 0


@jit
def about(mine: int, theirs: int, parts: Any, limit: Any) -> Any:
    """Return the squared distance of two patches at addresses as float32 sums it, or some number above the limit."""
    total = np.float32(0)
    for part in range(len(parts)):
        start = 4 * parts[part, 0]
        total += sq_difference(mine + start, theirs + start, parts[part, 1])
        if total > limit:
            break
    return total


@jit
def in_order(mine: int, theirs: int, channels: int) -> Any:
    """Return the squared distance of two patches at addresses as pyramid.kernels.add_differences sums it."""
    total = 0.0
    for offset in range(0, 4 * channels, 4):
        difference = float_at(mine + offset) - float_at(theirs + offset)
        total += np.float64(difference) * np.float64(difference)
    return total


@jit
def measure(mine: int, theirs: int, channels: int, distinct: bool) -> Any:
    """Return the squared distance of two patches at addresses, in float64.

    One match of each neighbour is this engine's alone. Others are found by `pyramid` too, and answers must not depend
    on the engine.
    """
    return sq_distance(mine, theirs, channels) if distinct else in_order(mine, theirs, channels)


@jit
def offer(keys: Any, at: Any, value: Any, place: int, first: int) -> None:
    """Put a patch into a heap (kappa,), if it is among the nearest.

    Args:
        keys: float32.
        at: int64 positions.
        value: float32 squared distance.
        place: position.
        first: an entry at this position or after it is replaced, if it is farther; beyond all positions: none is.
    """
    here = 0
    for entry in range(len(keys) if first <= place else 0):
        if at[entry] >= first:
            here = entry
            break
    if value < keys[here] or (value == keys[here] and place < at[here]):
        sink_pair(keys, at, here, value, place)


@jit
def kth(values: int, n: int, keys: Any, at: Any) -> Any:
    """Return the least but kappa - 1 of n values at an address, or infinity; keys and at (kappa,) are overwritten."""
    keys[:] = np.inf
    for i in range(n):
        value = float_at(values + 4 * i)
        if value < keys[0]:
            sink_pair(keys, at, 0, value, 0)
    return keys[0]


@jit
def half_limit(reach: float, square: float, sq_norm: float, doubt: float) -> Any:
    """Return what no half of a patch within `reach` is above."""
    limit = (reach * (1 + 1e-6) * square - sq_norm) / 2 + doubt
    return np.float32(limit + abs(limit) * 2.0**-23)  # float32, so that a loop over halves compares without converting


@jit
def doubt_of(norm: float, most: Any, figures: Any) -> Any:
    """Return what half a squared distance is off by at most, of a patch with this norm and others with `most` or less.

    `figures` are those of kernels.compare.
    """
    return figures[1] * (norm + most) ** 2 + figures[2] * figures[3] * most
