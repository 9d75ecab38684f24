"""The map and the scores of a whole image, put together from its tiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..images.tiling import Tiling
from .detection import TileMatches


@dataclass(frozen=True)
class ScoredTile:
    """A tile with its scores."""

    found: TileMatches
    image_score: float
    peak: float  # of its map, at the size that calibration saw
    missing: frozenset[str]  # members of a cluster that did not take part


class Mosaic:
    """Tiles of one image as they come, in any order; memory is that of the map and of what the tiles matched."""

    def __init__(self, tiling: Tiling, image_size: tuple[int, int]) -> None:
        """Begin with no tile of an (H, W) image."""
        self.boxes = tiling.boxes(image_size)
        self.region = tiling.region(image_size)
        self.anomaly_map: NDArray[np.float32] = np.zeros(image_size, np.float32)
        self._rows, self._columns = tiling.weights(image_size)
        self._tiles: dict[int, ScoredTile] = {}
        self.seconds: dict[str, float] = {}

    def add(self, number: int, tile: ScoredTile, tile_map: NDArray[np.float32], seconds: dict[str, float]) -> None:
        """Take a tile by its number among the boxes, its (h, w) map and its seconds by stage."""
        self._tiles[number] = tile
        left, top, right, bottom = self.boxes[number]
        row, column = divmod(number, len(self._columns))
        weighed = self._rows[row][:, None] * tile_map
        weighed *= self._columns[column]
        self.anomaly_map[top:bottom, left:right] += weighed
        for stage, spent in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    @property
    def is_whole(self) -> bool:
        """Whether every tile is there."""
        return len(self._tiles) == len(self.boxes)

    @property
    def tiles(self) -> list[ScoredTile]:
        """All tiles, in the order of the boxes."""
        return [self._tiles[number] for number in range(len(self.boxes))]

    @property
    def highest(self) -> ScoredTile:
        """The tile with the highest image score, the first of several."""
        return max(self.tiles, key=lambda tile: tile.image_score)

    @property
    def peak(self) -> float:
        """The highest peak of a tile's map, at the size that calibration saw."""
        return max(tile.peak for tile in self.tiles)
