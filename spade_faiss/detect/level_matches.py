"""Levels that are searched apart, each at its own grid, and one map of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..patch_search.interpolation import taps

Telling = NDArray[np.int32]  # (h, w, 1, 3) matches on the finest grid

LOW, HIGH = 0.75, 0.95  # quantiles of normal distances that a spacing is kept between
POWERS = {"relative": 0, "harmonic": -1, "harmonic_squares": -2}  # by fusion: of the mean of the levels' scores
FLOOR = 0.3  # times a typical normal score: below it a patch is as normal as can be; copies have 0, with no logarithm


@dataclass(frozen=True)
class LevelMatches:
    """What the patches of one level were matched with.

    Attributes:
        sq_distances: (h, w, kappa) float32 of the level's grid, ascending; by cosine, distances.
        matches: (h, w, kappa, 3) int32: neighbour, row and column of each matched patch, on the level's grid.
        spacing: (h, w) float32, distance from the nearest match to its own nearest patches in other neighbours: how
            close normal patches lie to each other there; None: not needed, or there is no other neighbour.
    """

    sq_distances: NDArray[np.float32]
    matches: NDArray[np.int32]
    spacing: NDArray[np.float32] | None = None

    @property
    def distances(self) -> NDArray[np.float64]:
        """The mean over kappa, (h, w)."""
        mean: NDArray[np.float64] = self.sq_distances.mean(axis=2, dtype=np.float64)
        return mean


@dataclass(frozen=True)
class LevelStats:
    """What the distances of one level are among normal images.

    Attributes:
        low: quantile LOW of the squared distances over all positions.
        high: quantile HIGH.
        typical: mean of the scores, see `scores`.
    """

    low: float
    high: float
    typical: float = 1.0

    @classmethod
    def of(cls, found: Sequence[LevelMatches], high: float = HIGH) -> LevelStats:
        """Measure them on one level of several normal images, each compared with the others."""
        distances = np.stack([one.distances for one in found])
        low = float(np.quantile(distances, LOW)) or float(distances.mean()) or 1.0
        bare = cls(low, max(low, float(np.quantile(distances, high))))
        typical = float(np.mean([bare.scores(one).mean() for one in found]))
        return cls(bare.low, bare.high, typical or 1.0)

    def scores(self, found: LevelMatches) -> NDArray[np.float64]:
        """Return (h, w) scores, about 1 for normal images: the root of distances over the spacing where they match.

        Where normal patches lie close to each other, a short distance is much; where they lie far apart, a long one is
        little. A spacing below that of most is taken for that: where nearly all is alike, a hair's breadth would be an
        anomaly. So is one above nearly all: a defect among the normal images lies far from them, and would excuse its
        like.
        """
        spacing: Any = self.low if found.spacing is None else np.clip(found.spacing, self.low, self.high)
        scores: NDArray[np.float64] = np.sqrt(found.distances / spacing) / self.typical
        return scores


def relative(
    found: Sequence[LevelMatches], stats: Sequence[LevelStats], power: int = 0
) -> tuple[NDArray[np.float64], Telling]:
    """Make one map of levels by their scores, see LevelStats.

    Args:
        found: levels.
        stats: of each level.
        power: of the mean, see POWERS; 0: geometric. The lower it is, the more the least of the scores rules: where the
            finest level is calm, a coarse one, whose cells reach far around a defect, raises the map little.

    Returns:
        the mean on the finest grid, (h, w): about 1 for normal images; and the matches of the level whose score is the
        highest there, see `telling`.
    """
    grid = found[0].sq_distances.shape[:2]
    scores = [resized(one.scores(level), grid) for level, one in zip(found, stats, strict=True)]
    return mean_of_levels(scores, power), telling(found, scores)


def mean_of_levels(scores: Sequence[NDArray[np.float64]], power: int) -> NDArray[np.float64]:
    """Return the mean of the levels' scores, arrays of one shape, none below FLOOR; see `relative`."""
    bounded: list[Any] = [np.maximum(each, FLOOR) for each in scores]
    mean: NDArray[np.float64]
    if power == 0:
        mean = np.exp(np.mean(np.log(bounded), axis=0))
    else:  # reciprocals, squares and roots are several times as fast as negative powers
        mean = 1 / (sum((1 / each) ** -power for each in bounded) / len(bounded)) ** (-1 / power)
    return mean


def averaged(found: Sequence[LevelMatches], scales: Sequence[float]) -> tuple[NDArray[np.float64], Telling]:
    """Make one map of levels by their mean distance, each times the square of its scale; returns as `relative` does."""
    grid = found[0].sq_distances.shape[:2]
    weights = [scale**2 for scale in scales] or [1.0] * len(found)
    maps = [resized(one.distances, grid) * weight for one, weight in zip(found, weights, strict=True)]
    mean: NDArray[np.float64] = np.mean(maps, axis=0)
    return mean, telling(found, maps)


def telling(found: Sequence[LevelMatches], scores: Sequence[NDArray[np.float64]]) -> Telling:
    """Return for each cell of the finest grid the nearest match of the level that scores highest there.

    Args:
        found: levels.
        scores: of each level, (h, w) on the finest grid.

    Returns:
        (h, w, 1, 3) int32 neighbour, row and column; of a coarser level, the finest cell under its cell's centre.
    """
    height, width = scores[0].shape
    matches = []
    for level in found:
        h, w = level.matches.shape[:2]
        nearest = level.matches[np.arange(height)[:, None] * h // height, np.arange(width) * w // width, 0]
        neighbour, row, column = np.moveaxis(nearest, -1, 0)
        row, column = (2 * row + 1) * height // (2 * h), (2 * column + 1) * width // (2 * w)
        matches.append(np.stack([neighbour, row, column], axis=-1))
    highest = np.argmax(scores, axis=0)[None, ..., None]
    chosen: Telling = np.take_along_axis(np.stack(matches), highest, axis=0)[0][:, :, None].astype(np.int32)
    return chosen


def resized(values: NDArray[np.float64], grid: tuple[int, ...]) -> NDArray[np.float64]:
    """Interpolate (h, w) values bilinearly to another grid, align_corners=False."""
    for axis, new in enumerate(grid):
        at, weights = taps(values.shape[axis], new)
        shape = (-1, 1) if axis == 0 else (1, -1)
        parts = [
            np.take(values, at[:, side], axis=axis) * weights[:, side].astype(np.float64).reshape(shape)
            for side in (0, 1)
        ]
        values = parts[0] + parts[1]
    return values
