"""Tiles of a large image, which a network sees one by one, so that small things in it are not shrunk away.

A tile is an image of the gallery. The first tile of an image, at its top left, has the image's key; the others add
their place to it, as a media fragment does (W3C, Media Fragments URI 1.0): `strip.png#xywh=160,0,200,200`. All tiles of
an image are of one size, and spread evenly, so that neighbours share at least the overlap.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ..arrays import Pixels
from ..errors import FeatureError, ImageError, OptionError
from .view import View

Values = TypeVar("Values", bound=NDArray[Any])
Box = tuple[int, int, int, int]  # (left, top, right, bottom), half-open, pixels of an image

PLACE = re.compile(r"#xywh=(\d+),(\d+),(\d+),(\d+)$")
SHARED = 8  # part of a tile's shorter side that neighbours share unless an overlap is given


def image_key(key: str) -> str:
    """Return the key of the image that a tile is of."""
    return PLACE.sub("", key)


def tile_key(key: str, box: Box) -> str:
    """Return the key of a further tile of an image."""
    left, top, right, bottom = box
    return f"{key}#xywh={left},{top},{right - left},{bottom - top}"


def listed_keys(keys: Iterable[str], error: type[FeatureError | OptionError] = OptionError) -> list[str]:
    """Return the keys that a caller gave as a list.

    Raises:
        FeatureError, OptionError: as `error` says: a single text, which would be taken letter by letter, or no several.
    """
    try:
        found = None if isinstance(keys, (str, bytes)) else list(keys)
    except TypeError:
        found = None
    if found is None:
        raise error(f"keys: expected several, found {keys!r:.80}; put a single key into a list: [KEY]")
    return found


def place_of(key: str) -> Box | None:
    """Return the box of a tile in its image by the tile's key; None: the image's first tile, whose key has no place."""
    found = PLACE.search(key)
    if found is None:
        return None
    left, top, width, height = map(int, found.groups())
    return left, top, left + width, top + height


@dataclass(frozen=True)
class Tiling:
    """How images are cut into tiles, and each tile is viewed; without a tile, the whole image is the one tile."""

    view: View  # of a tile
    tile: tuple[int, int] | None = None  # (height, width) px
    overlap: int | None = None  # px at least that neighbours share of what the network sees; None: 1/8 of a tile

    @property
    def shared(self) -> int:
        """The overlap in effect, in pixels."""
        return shared(self.tile, self.overlap)

    def boxes(self, image_size: tuple[int, int]) -> list[Box]:
        """Return the tiles of an (H, W) image, by rows; the first is at its top left.

        An image that is no larger than a tile is one tile.
        """
        rows, columns = self._spans(image_size)
        return [(left, top, right, bottom) for top, bottom in rows for left, right in columns]

    def views(self, pixels: Pixels) -> list[Pixels]:
        """Return what the network sees of each tile of an (H, W, 3) image; see View.apply."""
        return [self.view.apply(cut(pixels, box)) for box in self.boxes(pixels.shape[:2])]

    def keys(self, key: str, image_size: tuple[int, int]) -> list[str]:
        """Return the keys of the tiles of an (H, W) image, in the order of its boxes.

        Raises:
            FeatureError: the image's key would be that of another image's tile.
        """
        if self.tile is not None and place_of(key) is not None:
            raise FeatureError(
                f"keys: expected one of a whole image, found {key!r}, which a tile of {image_key(key)!r} has; "
                "give the image another key"
            )
        return [key, *(tile_key(key, box) for box in self.boxes(image_size)[1:])]

    def number(self, key: str, image_size: tuple[int, int]) -> int:
        """Return the number of a tile among those of its (H, W) image, by the tile's key.

        Raises:
            ImageError: an image of that size has no such tile.
        """
        place = place_of(key) if self.tile is not None else None
        boxes = self.boxes(image_size)
        if place is not None and place not in boxes:
            raise ImageError(f"expected a tile of an image of {image_size[1]}x{image_size[0]} px, found {key!r}")
        return 0 if place is None else boxes.index(place)

    def box(self, key: str, image_size: tuple[int, int]) -> Box:
        """Return where a tile lies in its (H, W) image, by the tile's key; raises as number."""
        return self.boxes(image_size)[self.number(key, image_size)]

    def region(self, image_size: tuple[int, int]) -> Box:
        """Return the smallest box around what the network sees of an (H, W) image; see View.region."""
        boxes = self.boxes(image_size)
        regions = [_moved(self.view.region(size_of(box)), box) for box in (boxes[0], boxes[-1])]
        return *regions[0][:2], *regions[1][2:]

    def weights(self, image_size: tuple[int, int]) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
        """Return the weights of the tiles' rows and of their columns in a map of the whole image, 1 in total.

        A tile's weight falls to 0 over what it shares with a neighbour, so that maps meet without a step.

        Returns:
            for each row of tiles, weights of its pixel rows; for each column of tiles, of its pixel columns.
        """
        rows, columns = self._spans(image_size)
        return self._blended(rows, 0, image_size[0]), self._blended(columns, 1, image_size[1])

    def _spans(self, image_size: tuple[int, int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        return self._along(0, image_size[0]), self._along(1, image_size[1])

    def _along(self, axis: int, side: int) -> list[tuple[int, int]]:
        """Return the first and the end of the tiles along one axis, evenly spread."""
        if self.tile is None or side <= self.tile[axis]:
            return [(0, side)]
        tile = self.tile[axis]
        low, high = self._seen(axis, tile)
        step = max(1, high - low - self.shared)
        steps = math.ceil((side - tile) / step)
        starts = [round(number * (side - tile) / steps) for number in range(steps + 1)]
        return [(start, start + tile) for start in starts]

    def _seen(self, axis: int, side: int) -> tuple[int, int]:
        """Return the first and the end of the pixels that the network sees along an axis of a tile."""
        left, top, right, bottom = self.view.region((side, side))
        return (top, bottom) if axis == 0 else (left, right)

    def _blended(self, spans: list[tuple[int, int]], axis: int, side: int) -> list[NDArray[np.float32]]:
        seen = [(start + low, start + high) for start, end in spans for low, high in [self._seen(axis, end - start)]]
        found, total = [], np.zeros(side)
        for number, (first, end) in enumerate(seen):
            ramp, at = np.ones(spans[number][1] - spans[number][0]), np.arange(*spans[number]) + 0.5
            ramp[(at < first) | (at > end)] = 0
            if number and (shared := seen[number - 1][1] - first) > 0:
                ramp *= np.clip((at - first) / shared, 0, 1)
            if number + 1 < len(seen) and (shared := end - seen[number + 1][0]) > 0:
                ramp *= np.clip((end - at) / shared, 0, 1)
            found.append(ramp)
            total[slice(*spans[number])] += ramp
        total[total == 0] = 1  # beyond what the network sees
        return [(ramp / total[slice(*span)]).astype(np.float32) for ramp, span in zip(found, spans, strict=True)]


def shared(tile: tuple[int, int] | None, overlap: int | None) -> int:
    """Return the overlap in effect, in pixels, of tiles that are (height, width)."""
    if tile is None:
        return 0
    return min(tile) // SHARED if overlap is None else overlap


def size_of(box: Box) -> tuple[int, int]:
    """Return the (height, width) of a box."""
    left, top, right, bottom = box
    return bottom - top, right - left


def cut(pixels: Values, box: Box) -> Values:
    """Return the part of an (H, W, ...) image that lies in a box; no copy."""
    left, top, right, bottom = box
    return cast("Values", pixels[top:bottom, left:right])


def _moved(inner: Box, box: Box) -> Box:
    """Return a box within a tile as a box within the image."""
    left, top = box[:2]
    return inner[0] + left, inner[1] + top, inner[2] + left, inner[3] + top
