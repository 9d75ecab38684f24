"""What a query found."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .calibration import Judgement
from .level_matches import LevelMatches
from .regions import Region


@dataclass(frozen=True)
class Neighbours:
    """The K normal images nearest to a query, nearest first.

    Attributes:
        keys: of the K images.
        sq_distances: (K,) float32, of image features.

    >>> found = detector.query("normal/000.png").neighbours
    >>> found.keys[0], float(found.sq_distances[0])
    ('000.png', 0.0)
    """

    keys: list[str]
    sq_distances: NDArray[np.float32]


@dataclass(frozen=True)
class TileMatches:
    """A tile of an image, or all of it, and what its patches were matched with."""

    box: tuple[int, int, int, int]  # (left, top, right, bottom), half-open, pixels of the image
    neighbours: Neighbours
    sq_distances: NDArray[np.float32]  # (h, w, kappa); see Detection
    matches: NDArray[np.int32]  # (h, w, kappa, 3)
    left_out: tuple[int, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the image."""
        left, top, right, bottom = self.box
        return bottom - top, right - left


@dataclass(frozen=True, repr=False)
class Detection:
    """What a query found.

    Attributes:
        image_score: higher is more anomalous.
        anomaly_map: (H, W) float32 at the image's size, higher is more anomalous; 0 outside the region, and where the
            patch search was skipped.
        region: (left, top, right, bottom), half-open: the pixels of the image that were looked at.
        neighbours: the K normal images that were searched.
        sq_distances: (h, w, kappa) float32 of the finest grid, ascending; kappa is 0 where the search was skipped.
        matches: (h, w, kappa, 3) int32: neighbour (as in `neighbours`), row and column of each matched patch.
        seconds: time of each stage's own work; of stages that work on a batch, this image's share. In a stream stages
            overlap, so that all of them together may be more than the time that passed.
        path: where the image came from, if it was a path.
        judgement: verdict, p-value and regions, if the gallery is calibrated.
        tiles: of an image that was cut into tiles, each with its own neighbours and matches. `image_score` is then
            that of the highest tile, whose neighbours, distances, matches and left_out are those above and below.
        levels: each level's own distances and matches, where levels are searched apart (matching "by_level") in an
            image that is seen whole. `sq_distances` is then what fusion made of them, (h, w, 1), and `matches` are the
            nearest of the level that scores highest at each cell.
        left_out: which of the neighbours were left out of the comparison, because the verdict would have rested on
            them (`leave_out`), in the order in which they were chosen.
        missing: of a cluster, the members that took no part, where that was allowed (partial "allow"): their normal
            images were not compared.

    >>> detection = detector.query("test/000.png")
    >>> detection.anomaly_map.shape, detection.matches.shape
    ((40, 48), (8, 8, 1, 3))
    >>> detection.region, detection.verdict
    ((0, 0, 48, 40), None)
    """

    image_score: float
    anomaly_map: NDArray[np.float32]
    region: tuple[int, int, int, int]
    neighbours: Neighbours
    sq_distances: NDArray[np.float32]
    matches: NDArray[np.int32]
    seconds: dict[str, float] = field(default_factory=dict)
    path: str | None = None
    judgement: Judgement | None = None
    tiles: tuple[TileMatches, ...] = ()
    levels: tuple[LevelMatches, ...] = ()
    left_out: tuple[int, ...] = ()
    missing: tuple[str, ...] = ()

    def __repr__(self) -> str:
        height, width = self.anomaly_map.shape
        verdict = "not calibrated" if self.verdict is None else f"{self.verdict}, {len(self.regions)} regions"
        nearest = self.neighbours.keys[0]
        return (
            f"Detection({self.path or 'image'!r}, score {self.image_score:.4g}, {verdict}, "
            f"map {width}x{height} px up to {self.map_max:.4g}, nearest {nearest!r})"
        )

    @property
    def verdict(self) -> str | None:
        """Either "normal" or "anomalous"; None if the gallery is not calibrated."""
        return self.judgement.verdict if self.judgement else None

    @property
    def regions(self) -> list[Region]:
        """Regions above the pixel threshold, highest peak first; none if the gallery is not calibrated."""
        return self.judgement.regions if self.judgement else []

    @property
    def region_mask(self) -> NDArray[np.bool_]:
        """The pixels of the regions, (H, W)."""
        if self.judgement is None or self.judgement.labels is None:
            return np.zeros(self.anomaly_map.shape, np.bool_)
        return self.judgement.labels > 0

    @property
    def searched_tiles(self) -> list[TileMatches]:
        """The tiles whose patches were searched; of an image that is no larger than a tile, all of it."""
        height, width = self.anomaly_map.shape
        whole = TileMatches((0, 0, width, height), self.neighbours, self.sq_distances, self.matches, self.left_out)
        return [tile for tile in self.tiles or (whole,) if tile.sq_distances.shape[2]]

    @property
    def map_max(self) -> float:
        """The largest pixel score."""
        return float(self.anomaly_map.max())

    @property
    def is_searched(self) -> bool:
        """Whether the patches were searched: the first stage may have said already that the image is normal."""
        return bool(self.sq_distances.shape[2])
