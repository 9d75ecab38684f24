"""How close normal patches lie to each other where a query's patches were matched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..system.devices import as_arrays, as_typed, search_device

NEAREST = 3  # neighbours whose nearest patches are averaged


@dataclass(frozen=True)
class MatchedPatches:
    """The patches of one level that a query's were matched with, each once, in the order of positions.

    Attributes:
        neighbours: (n,) which neighbour each is of.
        cells: (n,) its cell on the level's grid.
        which: (h, w) which of them each patch of the query was matched with.
        size: number of cells of the grid.
    """

    neighbours: NDArray[np.int64]
    cells: NDArray[np.int64]
    which: NDArray[np.int64]
    size: int

    @classmethod
    def of(cls, matches: NDArray[np.int32], grid: tuple[int, ...]) -> MatchedPatches:
        """Take (h, w, 3) matches: neighbour, row and column on a grid (height, width)."""
        height, width = grid
        neighbours, rows, columns = (part.astype(np.int64).ravel() for part in np.moveaxis(matches, -1, 0))
        places, which = np.unique((neighbours * height + rows) * width + columns, return_inverse=True)
        return cls(*np.divmod(places, height * width), which.reshape(matches.shape[:2]), height * width)

    def spacing(self, sq_distances: NDArray[np.float32], at: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the spacing where each patch of the query was matched.

        Args:
            sq_distances: (n, count + 1) of the nearest patches of as many neighbours, ascending.
            at: (n, count + 1) their positions, counted through neighbour, row, column.

        Returns:
            (h, w) float32: the mean over count neighbours other than the patch's own.
        """
        others = np.where(at // self.size == self.neighbours[:, None], np.nan, sq_distances)
        others[~np.isnan(others).any(axis=1), -1] = np.nan  # as many equal patches come before its own
        mean: NDArray[np.float32] = np.asarray(np.nanmean(others, axis=1, dtype=np.float64), np.float32)
        return mean[self.which]


def patches_at(level: Any, neighbours: NDArray[np.int64], cells: NDArray[np.int64]) -> Array:
    """Return patches of a (K, c, h, w) level by neighbour and cell, each (n,), as an array (n, c)."""
    found: list[Array] = as_arrays([level.reshape(len(level), level.shape[1], -1)[neighbours, :, cells]])
    return found[0]


def nearest_of_each(
    patches: Array, level: Any, count: int, device: str | None = "cpu"
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the nearest patches of count neighbours, each by its nearest.

    Args:
        patches: (n, c).
        level: (K, c, h, w), an array, or a tensor on the device.
        count: of neighbours, at most K.
        device: as for search_patches.

    Returns:
        sq_distances (n, count), ascending, and positions (n, count) counted through neighbour, row, column.
    """
    from .distinct import search_distinct  # here, as it takes torch and numba

    on = search_device(device)
    with as_typed(on):
        return search_distinct(np.ascontiguousarray(patches.T), level, count, on)


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
    found = MatchedPatches.of(matches, level.shape[2:])
    patches = patches_at(level, found.neighbours, found.cells)
    return found.spacing(*nearest_of_each(patches, level, min(number, len(level) - 1) + 1, device))
