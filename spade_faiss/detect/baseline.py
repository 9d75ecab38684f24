"""What normal images look like: how far their features spread, and their maps when each is compared with the others.

SPADE's distances have no scale of their own. A level with large activations outweighs the others; at the border, where
a network sees padding, normal images differ more than anywhere else; and a map's maximum and its mean are numbers of
different kinds. Each is put on the scale that a sample of the gallery's own images has. Nothing of a query's image, and
no other query, takes part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .level_matches import LevelStats

BULK = 0.75  # quantile of positions: where normal distances are above this share of them, they are damped to it
SMOOTHING = 1 / 32  # of the grid's side: Gaussian over positions, as a mean over 64 images is noisy
STEEPEST = 8.0  # exponent that the mean of a map gets at the most
TINY = float(np.finfo(np.float32).tiny)
HUGE = 1e30
CHANCE = 4  # images whose distances may tie without a reason: two that are nearest to each other have one distance
ALIKE = "normal images: they are blank, or nearly copies of each other"
LEAST_SPREAD = 1e-3  # of logarithms: normal images differ by more


@dataclass(frozen=True)
class LogStats:
    """The median of a figure over normal images, and its spread: 1.4826 times the median deviation, of logarithms."""

    median: float
    spread: float

    @classmethod
    def of(cls, values: list[float]) -> LogStats:
        """Measure it on the values of a sample."""
        logs = np.log(np.maximum(values, TINY))
        middle = float(np.median(logs))
        return cls(float(np.exp(middle)), max(1.4826 * float(np.median(abs(logs - middle))), LEAST_SPREAD))

    def distance(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how many spreads values lie above the median."""
        above: NDArray[np.float64] = (np.log(np.maximum(values, TINY)) - np.log(self.median)) / self.spread
        return above

    @property
    def tied(self) -> bool:
        """Whether at least half of the values were 0, or so nearly equal that their spread is none."""
        return self.spread <= LEAST_SPREAD or self.is_zero

    @property
    def is_zero(self) -> bool:
        """Whether at least half of the values were 0, which has no logarithm."""
        return self.median <= 2 * TINY

    def ratio(self, value: float) -> float:
        """Return how many times the median a value is."""
        return min(value / self.median, HUGE)


@dataclass(frozen=True)
class Baseline:
    """Measured on `keys`, a sample of normal images."""

    keys: frozenset[str]
    level_scales: tuple[float, ...]  # what each level is multiplied by, before the search
    total: NDArray[np.float64]  # (h, w) sum over the sample of the squared distances at each position of the grid
    peak: LogStats  # of a normal map's maximum
    mean: LogStats  # of a normal map's mean
    levels: tuple[LevelStats, ...] = ()  # of levels that are searched apart
    rises: tuple[float, ...] = ()  # ascending, of maps by leaving neighbours out; see LeaveOut
    doubts: Mapping[str, float] = field(default_factory=dict)  # of images by their digests; see standing

    def fits(self, level_shapes: tuple[tuple[int, int, int], ...]) -> bool:
        """Return whether it was measured on levels of these shapes."""
        known = all(len(part) in (0, len(level_shapes)) for part in (self.level_scales, self.levels))
        return known and self.total.shape == level_shapes[0][1:]

    @property
    def ties(self) -> str | None:
        """How ties have driven the scale of image scores to 0, or their spread; None: they have not."""
        n = len(self.keys)
        for name, stats in (("maxima", self.peak), ("means", self.mean)):
            if stats.tied and n > CHANCE:
                median = 0 if stats.is_zero else stats.median
                return f"expected {name} of maps that differ, found {median:g} for at least half of {n} {ALIKE}"
        return None

    def damped(self, grid: NDArray[np.float64], own: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """Divide the distances at each position of an (h, w) grid by what they are among normal images.

        Positions at which normal images are about as far from each other as at most others keep their relation: the
        divisor there is the same, the BULK quantile over positions. Only where normal images are farther than that
        is it their mean distance at the position. So no position is ever amplified.

        Args:
            grid: squared distances.
            own: (h, w) what the image itself has added to the total, which the mean leaves out; None: nothing.
        """
        from scipy import ndimage  # here: it takes a fifth of the time in which a command starts that needs it not

        total, n = self.total, len(self.keys)
        if own is not None and n > 1:
            total, n = total - own, n - 1
        typical = ndimage.gaussian_filter(
            np.maximum(total, 0) / max(n, 1), [SMOOTHING * side for side in grid.shape], mode="nearest"
        )
        floor = float(np.quantile(typical, BULK)) or float(typical.mean()) or 1.0
        divided: NDArray[np.float64] = grid / np.maximum(typical, floor)
        return divided

    def image_score(self, anomaly_map: NDArray[np.float32]) -> float:
        """Score a map by its maximum or its mean, whichever is rarer among normal images; a typical one scores 1.

        Few pixels that are far off show in the maximum, many that are slightly off in the mean. Both are multiples of
        their medians over normal images; the mean's varies less among them, and is raised to the power that gives its
        logarithm the same spread.
        """
        power = min(self.peak.spread / self.mean.spread, STEEPEST)
        mean = self.mean.ratio(float(anomaly_map.mean(dtype=np.float64)))
        return float(max(self.peak.ratio(float(anomaly_map.max())), mean**power))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        # As earlier releases write it.
        apart: dict[str, Any] = {"levels": [vars(level) for level in self.levels]} if self.levels else {}
        apart |= {"rises": self.rises} if self.rises else {}
        apart |= {"doubts": dict(self.doubts)} if self.doubts else {}
        return apart | {
            "keys": sorted(self.keys),
            "level_scales": self.level_scales,
            "total": self.total.tolist(),
            "peak": vars(self.peak),
            "mean": vars(self.mean),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Baseline:
        """Read what to_json wrote.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: the values are not what was written.
        """
        total = np.array(values["total"], np.float64)
        found = cls(
            frozenset(values["keys"]),
            tuple(values["level_scales"]),
            total,
            LogStats(**values["peak"]),
            LogStats(**values["mean"]),
            tuple(LevelStats(**level) for level in values.get("levels", [])),
            tuple(sorted(values.get("rises", []))),
            values.get("doubts", {}),
        )
        numbers = [*found.level_scales, *found.rises]
        for stats in (found.peak, found.mean, *found.levels):
            numbers += vars(stats).values()
        if not all(number > 0 and math.isfinite(number) for number in numbers):
            raise ValueError("baseline: expected numbers above 0")
        if not isinstance(found.doubts, dict) or not all(
            isinstance(doubt, float) and 0 <= doubt <= 1 for doubt in found.doubts.values()
        ):
            raise ValueError("baseline: expected doubts from 0 to 1 by digests")
        if total.ndim != 2 or not np.isfinite(total).all():
            raise ValueError(f"baseline: expected a total for each position, found an array {total.shape}")
        return found
