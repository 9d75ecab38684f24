"""Names of array types, and the checks of numbers that several rooms share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Ids = NDArray[np.int64]  # of images: rows counted through all shards; they hold within one snapshot
Pixels = NDArray[np.uint8]  # (H, W, 3) RGB

# Relative rounding error of a float32 sum of d products is below this times sqrt(d): a few times what was ever seen.
ROUNDING = 4 * 2.0**-24

_PIECE = 2**19  # bytes that a core's cache holds while they are looked at twice
_INFINITY = {2: 0x7C00, 4: 0x7F800000}  # itemsize -> bits of infinity: those of NaN are above, all others below


def all_finite(array: Array) -> bool:
    """Return whether no value is NaN or infinite.

    float16 and float32 that lie together are compared as integers, which is several times as fast as np.isfinite.
    """
    size = array.dtype.itemsize
    if array.dtype.kind != "f" or size not in _INFINITY or not array.dtype.isnative or not array.flags.c_contiguous:
        return bool(np.isfinite(array).all())
    infinity, sign = _INFINITY[size], 1 << (8 * size - 1)
    flat = array.reshape(-1)
    for start in range(0, flat.size, _PIECE // size):
        piece = flat[start : start + _PIECE // size]
        positive = piece.view(f"i{size}").max(initial=0) < infinity  # negative values are below zero here
        if not positive or piece.view(f"u{size}").max(initial=0) >= sign + infinity:
            return False
    return True
