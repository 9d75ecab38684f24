"""The view of an image that a network gets: resizing, cropping, and the way back to pixels of the original."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..arrays import Pixels


@dataclass(frozen=True)
class View:
    """What a network sees of an image: the image resized to `resized`, whatever its proportions, and cropped to `crop`.

    Both are in pixels. The crop is the centre.
    """

    resized: tuple[int, int]  # (height, width)
    crop: tuple[int, int]  # (height, width)

    @property
    def offset(self) -> tuple[int, int]:
        """(top, left) of the crop in pixels of the resized image."""
        return (self.resized[0] - self.crop[0]) // 2, (self.resized[1] - self.crop[1]) // 2

    def apply(self, pixels: Pixels) -> Pixels:
        """Resize (antialiased bilinear) and crop an (H, W, 3) image; returns (crop height, crop width, 3) uint8."""
        (height, width), (top, left) = self.crop, self.offset
        resized = self.resize(pixels)
        return np.ascontiguousarray(resized[top : top + height, left : left + width])

    def resize(self, pixels: Pixels) -> Pixels:
        """Resize (antialiased bilinear) an (H, W, 3) image to `resized`, without the crop."""
        size = self.resized[::-1]
        return pixels if pixels.shape[1::-1] == size else _resize(pixels, size)

    def region(self, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the (left, top, right, bottom), half-open, of the original pixels whose centres the network saw."""
        spans = [
            _span(side, resized, offset, crop)
            for side, resized, offset, crop in zip(image_size, self.resized, self.offset, self.crop, strict=True)
        ]
        return spans[1][0], spans[0][0], spans[1][1], spans[0][1]

    def cell_box(
        self, image_size: tuple[int, int], grid: tuple[int, int], row: int, column: int, rows: int = 1, columns: int = 1
    ) -> tuple[float, float, float, float]:
        """Return where a cell of a level's grid, or a block of cells, lies in the original image.

        Args:
            image_size: (H, W) of the original image.
            grid: (h, w) of the level.
            row: row of the first cell, from 0.
            column: column of the first cell, from 0.
            rows: height of the block in cells.
            columns: width of the block in cells.

        Returns:
            (left, top, right, bottom) in pixels of the original, not rounded; its top left corner is (0, 0).
        """
        top, bottom = (self._to_original(0, edge / grid[0], image_size) for edge in (row, row + rows))
        left, right = (self._to_original(1, edge / grid[1], image_size) for edge in (column, column + columns))
        return left, top, right, bottom

    def _to_original(self, axis: int, share: float, image_size: tuple[int, int]) -> float:
        """Return the coordinate in the original of a position in the crop, given as a share of the crop's side."""
        return (share * self.crop[axis] + self.offset[axis]) * image_size[axis] / self.resized[axis]

    def cell_at(self, image_size: tuple[int, int], grid: tuple[int, int], y: int, x: int) -> tuple[int, int]:
        """Return the (row, column) of the cell that holds a pixel's centre; of a cropped pixel, the nearest cell."""
        row, column = (
            min(cells - 1, max(0, math.floor(((at + 0.5) * resized / side - offset) * cells / crop)))
            for at, cells, crop, offset, side, resized in zip(
                (y, x), grid, self.crop, self.offset, image_size, self.resized, strict=True
            )
        )
        return row, column


def _span(side: int, resized: int, offset: int, crop: int) -> tuple[int, int]:
    """Return the first and the end of the original pixels whose centres lie in the crop, along one axis."""
    centres = (np.arange(side) + 0.5) * resized / side - offset
    inside = np.flatnonzero((centres >= 0) & (centres < crop))
    return (int(inside[0]), int(inside[-1]) + 1) if inside.size else (side // 2, side // 2)


def _resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize to (width, height)."""
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
