"""How to search: the settings of one search, their checks, and what a window means on a grid.

A window is how far from its own position a patch may be matched, in rows and in columns (Chebyshev): a whole number of
cells of the level, or a share of the level's height and width, each rounded to whole cells, halves up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError
from ..options import WINDOWS, Metric, SearchOptions, is_window

ENGINES = ("flat", "pyramid", "bounds")

Grid = tuple[int, int]
Radius = tuple[int, int]  # rows and columns on either side of a patch's own


@dataclass(frozen=True)
class SearchSettings:
    """How to search; see search_patches. Unlike SearchOptions, nothing is checked before `check`."""

    kappa: int
    engine: str
    device: str | None
    block_bytes: int
    metric: str = "l2"
    window: Any = None
    distinct: bool = False
    scan: bool = False  # whether the neighbours' values may not be finite

    @classmethod
    def of(cls, options: SearchOptions) -> SearchSettings:
        """Take what counts for the patch search from all options; a metric of None is l2."""
        return cls(
            options.kappa or 1,
            options.engine,
            options.device,
            options.block_bytes,
            options.metric or "l2",
            options.window,
            bool(options.distinct),
        )

    def check(self, grids: Sequence[Grid], k: int) -> None:
        """Check all settings for the search of each of these grids (h, w) of K neighbours.

        Raises:
            OptionError: an unknown metric, window or engine, an engine that knows no windows, a window as large as the
                largest grid, or kappa larger than the number of patches that some patch can be matched with.
        """
        if self.engine not in ("auto", *ENGINES):
            raise OptionError(f"engine: expected auto or {' or '.join(ENGINES)}, found {self.engine!r}")
        if self.metric not in get_args(Metric):
            raise OptionError(f"metric: expected {' or '.join(get_args(Metric))}, found {self.metric!r}")
        if not is_window(self.window):
            raise OptionError(f"window: expected {WINDOWS}, found {self.window!r}")
        if self.is_windowed and self.engine != "auto":
            raise OptionError(
                f"engine: expected auto for a window of {self.window}, which has an engine of its own, "
                f"found {self.engine!r}; leave out one of the two"
            )
        if self.distinct:
            self._check_distinct()
        height, width = max(grids, key=max)
        if isinstance(self.window, (int, np.integer)) and self.window >= max(height, width):
            raise OptionError(
                f"window: expected fewer cells than the largest grid {height} x {width} has on a side, "
                f"found {self.window}; window='all' searches everywhere"
            )
        for grid in grids:
            self._check_kappa(grid, k)

    def _check_distinct(self) -> None:
        window = "all" if self.window is None else self.window
        others = ("engine", self.engine, "auto"), ("metric", self.metric, "l2"), ("window", window, "all")
        for name, found, expected in others:
            if found != expected:
                raise OptionError(f"distinct: goes with {name} {expected!r}, found {found!r}; take distinct=False")

    def _check_kappa(self, grid: Grid, k: int) -> None:
        radius = self.radius(grid)
        most, what = k * grid[0] * grid[1], "the number of gallery patches"
        if radius is not None:
            most, what = (
                k * min(grid[0], radius[0] + 1) * min(grid[1], radius[1] + 1),
                "the gallery patches of a corner",
            )
        if self.distinct:
            most, what = k, "the number of neighbours, which are distinct"
        if not isinstance(self.kappa, (int, np.integer)) or not 1 <= self.kappa <= most:
            at = f" on the grid {grid[0]} x {grid[1]}" if radius is not None else ""
            raise OptionError(f"kappa: expected 1 to {most}, {what}{at}, found {self.kappa!r}")

    @property
    def is_windowed(self) -> bool:
        """Whether a window was asked for."""
        return self.window is not None and self.window != "all"

    def radius(self, grid: Grid) -> Radius | None:
        """Return the window's radius in cells of a grid (h, w); None: it covers all of the grid from anywhere."""
        if not self.is_windowed:
            return None
        if isinstance(self.window, (int, np.integer)):
            rows = columns = int(self.window)
        else:
            rows, columns = (int(self.window * side + 0.5) for side in grid)
        return None if rows >= grid[0] - 1 and columns >= grid[1] - 1 else (rows, columns)


def first_places(cells: NDArray[np.int64], kappa: int, grid: Grid, radius: Radius | None) -> NDArray[np.int64]:
    """Return the first kappa candidates of some cells, in the order of neighbour, row, column.

    Args:
        cells: (m,) positions on the grid.
        kappa: how many; at most the number of candidates of each cell.
        grid: (h, w).
        radius: of the window; None: everywhere.

    Returns:
        (m, kappa) positions counted through neighbour, row, column.
    """
    height, width = grid
    rows, columns = radius or grid
    y, x = np.divmod(cells[:, None], width)
    top, left = np.maximum(y - rows, 0), np.maximum(x - columns, 0)
    high, wide = np.minimum(y + rows + 1, height) - top, np.minimum(x + columns + 1, width) - left
    neighbour, number = np.divmod(np.arange(kappa), high * wide)
    places: NDArray[np.int64] = (neighbour * height + top + number // wide) * width + left + number % wide
    return places
