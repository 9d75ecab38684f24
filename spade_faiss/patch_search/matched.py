"""The patches of neighbours that a query's were matched with, for measuring how close normal patches lie there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..system.devices import as_arrays

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
        return cls.at(positions(matches, grid), grid[0] * grid[1])

    @classmethod
    def at(cls, places: NDArray[np.int64], size: int) -> MatchedPatches:
        """Take positions of any shape, counted through neighbour, row and column of a grid of so many cells."""
        found, which = np.unique(places, return_inverse=True)
        return cls(*np.divmod(found, size), which.reshape(places.shape), size)

    def spacing(self, sq_distances: NDArray[np.float32], at: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the spacing where each patch of the query was matched.

        Args:
            sq_distances: (n, count + 1) of the nearest patches of as many neighbours, ascending.
            at: (n, count + 1) their positions, counted through neighbour, row, column.

        Returns:
            (h, w) float32: the mean over count neighbours other than the patch's own.
        """
        return mean_of_others(sq_distances, at // self.size == self.neighbours[:, None])[self.which]


def positions(matches: NDArray[np.int32], grid: tuple[int, ...]) -> NDArray[np.int64]:
    """Return (..., 3) matches on a grid (height, width) as positions (...), counted through neighbour, row, column."""
    height, width = grid
    neighbours, rows, columns = np.moveaxis(matches.astype(np.int64), -1, 0)
    places: NDArray[np.int64] = (neighbours * height + rows) * width + columns
    return places


def patches_at(level: Any, neighbours: NDArray[np.int64], cells: NDArray[np.int64]) -> Array:
    """Return patches of a (K, c, h, w) level by neighbour and cell, each (n,), as an array (n, c)."""
    found: list[Array] = as_arrays([level.reshape(len(level), level.shape[1], -1)[neighbours, :, cells]])
    return found[0]


def mean_of_others(sq_distances: NDArray[np.float32], is_own: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the mean of each row without the patch's own neighbour."""
    others = np.where(is_own, np.nan, sq_distances)
    others[~np.isnan(others).any(axis=1), -1] = np.nan  # as many equal patches come before its own
    mean: NDArray[np.float32] = np.asarray(np.nanmean(others, axis=1, dtype=np.float64), np.float32)
    return mean
