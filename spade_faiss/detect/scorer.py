"""From the distances of a query to its map and image score, on the scale of normal images if there is one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..images.view import View
from .baseline import Baseline
from .query import Query
from .scoring import anomaly_map, knn_score, top_score
from .settings import Settings


@dataclass(frozen=True)
class Scorer:
    """Makes the scores of queries.

    Attributes:
        settings: of the queries.
        baseline: the scale of normal images; None: distances as they are.
        view: how images were resized.
        k: number of neighbours.
    """

    settings: Settings
    baseline: Baseline | None
    view: View
    k: int

    @property
    def damping(self) -> Baseline | None:
        """What distances at each position are divided by; None: nothing."""
        return self.baseline if self.settings.score.positions == "damped" else None

    def own(self, query: Query, sq_distances: Array) -> NDArray[np.float64] | None:
        """Return (h, w) what the image of a query has added to the baseline; None: it was not measured on it."""
        if self.damping is None or query.key not in self.damping.keys:
            return None
        return sq_distances.mean(axis=2, dtype=np.float64) if query.in_baseline is None else query.in_baseline

    def map_of(
        self, sq_distances: Array, size: tuple[int, int], own: NDArray[np.float64] | None = None
    ) -> NDArray[np.float32]:
        """Make the map of (h, w, kappa) distances at a size (H, W); own: see Baseline.damped."""
        if sq_distances.shape[2] == 0:
            return np.zeros(size, np.float32)
        if self.damping is not None:
            sq_distances = self.damping.damped(sq_distances.mean(axis=2, dtype=np.float64), own)[..., None]
        score = self.settings.score
        return anomaly_map(sq_distances, size, self.view, score.sigma or 0, score.truncate or 0)

    def knn_score(self, query: Query) -> float:
        """Return the mean distance of a query's image feature to those of its neighbours."""
        return knn_score(query.sq_distances, self.settings.search.k_score or self.k)

    def image_score(self, query: Query, at_view: NDArray[np.float32]) -> float:
        """Return the score of an image, by its neighbours or by its map at the size of the resized image."""
        if self.settings.score.image_score == "knn":
            return self.knn_score(query)
        if self.settings.score.image_score == "map_top":
            left, top, right, bottom = self.view.region(self.view.resized)
            return top_score(at_view[top:bottom, left:right])
        if self.settings.score.image_score == "map_max" or self.baseline is None:
            return float(at_view.max())
        return self.baseline.image_score(at_view)
