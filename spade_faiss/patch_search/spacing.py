"""How close normal patches lie to each other where a query's patches were matched."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..system.devices import as_arrays, as_typed, search_device
from .distinct import search_distinct

NEAREST = 3  # neighbours whose nearest patches are averaged


def spacing(
    level: Any, matches: NDArray[np.int32], number: int = NEAREST, device: str | None = "cpu"
) -> NDArray[np.float32]:
    """Measure the mean squared distance of matched patches to their nearest patches in other neighbours.

    Args:
        level: (K, c, h, w) of the neighbours, K >= 2; an array, or a tensor on the device.
        matches: (h, w, 3) neighbour, row and column.
        number: of other neighbours that count, each by its nearest patch; fewer where there are fewer.
        device: as for search_patches.

    Returns:
        (h, w) float32.
    """
    k, _, height, width = level.shape
    neighbours, rows, columns = (part.astype(np.int64).ravel() for part in np.moveaxis(matches, -1, 0))
    places, which = np.unique((neighbours * height + rows) * width + columns, return_inverse=True)
    own, cells = np.divmod(places, height * width)
    count, on = min(number, k - 1), search_device(device)
    with as_typed(on):
        sq_distances, at = search_distinct(_patches(level, own, cells), level, count + 1, on)
    others = np.where(at // (height * width) == own[:, None], np.nan, sq_distances)
    others[~np.isnan(others).any(axis=1), -1] = np.nan  # as many equal patches come before its own
    mean: NDArray[np.float32] = np.asarray(np.nanmean(others, axis=1, dtype=np.float64), np.float32)
    return mean[which.reshape(matches.shape[:2])]


def _patches(level: Any, images: NDArray[np.int64], cells: NDArray[np.int64]) -> Array:
    """Return some patches of a level (K, c, h, w) as an array, (c, m)."""
    [patches] = as_arrays([level.reshape(len(level), level.shape[1], -1)[images, :, cells]])
    return np.ascontiguousarray(patches.T)
