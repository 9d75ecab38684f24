"""How close normal patches lie to each other where a query's patches were matched."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from .distinct import search_distinct

NEAREST = 3  # neighbours whose nearest patches are averaged


def spacing(level: Array, matches: NDArray[np.int32], number: int = NEAREST) -> NDArray[np.float32]:
    """Measure the mean squared distance of matched patches to their nearest patches in other neighbours.

    Args:
        level: (K, c, h, w) of the neighbours, K >= 2.
        matches: (h, w, 3) neighbour, row and column.
        number: of other neighbours that count, each by its nearest patch; fewer where there are fewer.

    Returns:
        (h, w) float32.
    """
    k, _, height, width = level.shape
    neighbours, rows, columns = (part.astype(np.int64).ravel() for part in np.moveaxis(matches, -1, 0))
    places, which = np.unique((neighbours * height + rows) * width + columns, return_inverse=True)
    own, cells = np.divmod(places, height * width)
    patches = np.ascontiguousarray(level.reshape(k, len(level[0]), -1)[own, :, cells].T)  # (c, patches)
    count = min(number, k - 1)
    sq_distances, at = search_distinct(patches, level, count + 1)
    others = np.where(at // (height * width) == own[:, None], np.nan, sq_distances)
    others[~np.isnan(others).any(axis=1), -1] = np.nan  # as many equal patches come before its own
    mean: NDArray[np.float32] = np.asarray(np.nanmean(others, axis=1, dtype=np.float64), np.float32)
    return mean[which.reshape(matches.shape[:2])]
