"""Names of arrays, and what the rooms share about their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Ids = NDArray[np.int64]  # of images: rows counted through all shards; they hold within one snapshot
Pixels = NDArray[np.uint8]  # (H, W, 3) RGB

ROUNDING = 4 * 2.0**-24  # of a float32 sum of d products, times sqrt(d); a few times what was ever seen


def all_finite(array: Array) -> bool:
    """Tell whether no value is NaN or infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum is finite unless a value is not, or it overflows: only then look at every value.
        return bool(np.isfinite(array.sum(dtype=np.float32)) or np.isfinite(array).all())
