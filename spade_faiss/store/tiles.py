"""Which rows of a snapshot are tiles of one image."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from ..arrays import Ids
from ..images.tiling import Box, image_key, place_of


class TileTable:
    """The images of rows that are tiles, by a pass over their keys."""

    def __init__(self, ids: Ids, keys: Iterable[str]) -> None:
        """Take the rows by their ids, ascending, and their keys."""
        images, places = dict[str, int](), dict[Box | None, int]()
        self._ids = ids
        self._image, self._place = np.full((2, int(ids.max(initial=-1)) + 1), -1, np.int32)
        for row, key in zip(ids.tolist(), keys, strict=True):
            self._image[row] = images.setdefault(image_key(key), len(images))
            self._place[row] = places.setdefault(place_of(key), len(places))
        self._n = len(images)
        self._places = places
        order = np.argsort(self._image[ids], kind="stable")
        self._by_image = np.split(ids[order], np.cumsum(np.bincount(self._image[ids]))[:-1])

    def __len__(self) -> int:
        return self._n

    def first_rows(self) -> Ids:
        """Return the first tile of each image, ascending."""
        return self.at_place(None)

    def image_of(self, rows: Ids | Sequence[int]) -> Ids:
        """Return the numbers of the images that some rows are tiles of."""
        found: Ids = self._image[np.asarray(rows, np.int64)].astype(np.int64)
        return found

    def rows_of(self, images: Collection[int]) -> Ids:
        """Return all tiles of some images, ascending."""
        return np.sort(np.concatenate([np.empty(0, np.int64), *(self._by_image[image] for image in images)]))

    def at_place(self, place: Box | None) -> Ids:
        """Return the tiles at a place, ascending; None: the first tiles."""
        rows: Ids = self._ids[self._place[self._ids] == self._places.get(place, -1)]
        return rows

    def at_same_place(self, row: int, rows: Ids) -> Ids:
        """Return those of some rows that have a row's place in their images."""
        same: Ids = rows[self._place[rows] == self._place[row]]
        return same
