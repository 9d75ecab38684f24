"""What a report shows of one image: its map, the normal images nearest to it, and the patches that matched."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Pixels
from ..detect.detection import Detection
from ..detect.explanation import Correspondence, Match, correspondences
from ..errors import ImageError
from ..images.tiling import Box, cut
from ..images.view import View
from ..store.source_images import SourceImages
from .colour_scale import Scale
from .drawing import TRUTH, encode, fit, fit_mask, outline, overlay, patch
from .page import figure, template

PICTURE, THUMBNAIL, PATCH = 480, 160, 160  # px, longer side
NEAREST = 5  # normal images shown
AROUND = 4  # cells of the grid shown on each side of a matched one


@dataclass(frozen=True)
class Row:
    """An image in a line of the report's table."""

    number: int
    key: str
    label: str | None
    verdict: str | None
    score: float
    p_value: float | None
    map_max: float | None  # None: not searched
    seconds: float


@dataclass(frozen=True)
class Picture:
    """A picture as a data: URI, or why there is none."""

    uri: str = ""
    reason: str = ""
    width: int = 0
    height: int = 0

    @classmethod
    def of(cls, pixels: Pixels) -> Picture:
        """Encode (H, W, 3) uint8."""
        content = base64.b64encode(encode(pixels, "JPEG")).decode()
        return cls(f"data:image/jpeg;base64,{content}", "", pixels.shape[1], pixels.shape[0])


@dataclass(frozen=True)
class _Patch:
    """A cell of a grid with those around it, and in words where it is."""

    shown: Picture
    cell: str
    place: tuple[str, ...] = ()  # in pixels of its image
    row: int = 0  # of the cell that matched, among those shown
    column: int = 0
    rows: int = 1
    columns: int = 1


class CardMaker:
    """Makes the cards of a run's images: HTML, with every picture in it."""

    def __init__(self, view: View, scale: Scale, source_images: SourceImages) -> None:
        """Make cards of what is found in a view of images, on one colour scale, with the normal images' files."""
        self._view = view
        self._scale = scale
        self._source_images = source_images

    def card(self, row: Row, pixels: Pixels, detection: Detection, mask: NDArray[np.bool_] | None) -> str:
        """Return the card of an image.

        Args:
            row: its line of the report's table.
            pixels: (H, W, 3) uint8.
            detection: what was found.
            mask: (H, W) ground truth, if there is one.
        """
        found = correspondences(detection, self._view)
        thumbnails, patches = self._normal_pictures(detection, found)
        neighbours = detection.neighbours
        nearest = [
            {"key": key, "sq_distance": sq_distance, "shown": thumbnails[key]}
            for key, sq_distance in zip(neighbours.keys[:NEAREST], neighbours.sq_distances[:NEAREST], strict=True)
        ]
        left_out = [neighbours.keys[at] for at in detection.left_out]
        image = fit(pixels, PICTURE)
        if mask is not None:
            image = outline(image, fit_mask(mask, PICTURE), colour=TRUTH)
        return template("card.html").render(
            row=row, figures=_figures(row, detection), image=Picture.of(image), map=self._map(pixels, detection),
            truth=mask is not None and bool(mask.any()), outlined=bool(detection.regions),
            pins=[self._pin(one, detection) for one in found], nearest=nearest, left_out=left_out,
            why=[self._why(number, one, pixels, detection, patches) for number, one in enumerate(found, start=1)],
        )  # fmt: skip

    def _map(self, pixels: Pixels, detection: Detection) -> Picture:
        if not detection.is_searched:
            return Picture(reason="not searched: image score at or under the threshold")
        shown = fit(overlay(pixels, detection.anomaly_map, self._scale), PICTURE)
        if detection.regions:
            shown = outline(shown, fit_mask(detection.region_mask, PICTURE))
        return Picture.of(shown)

    def _pin(self, found: Correspondence, detection: Detection) -> tuple[float, float]:
        """Return the centre of a cell, as per cents of the image's width and height."""
        tile, (height, width) = found.tile, detection.anomaly_map.shape
        left, top, right, bottom = self._view.cell_box(tile.size, _grid(detection), found.row, found.column)
        x, y = tile.box[0] + (left + right) / 2, tile.box[1] + (top + bottom) / 2
        return round(100 * x / width, 1), round(100 * y / height, 1)

    def _why(
        self, number: int, found: Correspondence, pixels: Pixels, detection: Detection, patches: Mapping[Match, _Patch]
    ) -> dict[str, Any]:
        own = self._patch(pixels, detection, found.row, found.column, found.tile.box)
        region = found.region
        title = "Map's maximum" if region is None else f"Region {number}"
        about = figure(detection.map_max if region is None else region.peak)
        if region is not None:
            about = f"peak {about}, {region.area} px"
        matches = [{"match": match, "patch": patches[match]} for match in found.matches]
        return {"title": title, "about": about, "own": own, "matches": matches}

    def _normal_pictures(
        self, detection: Detection, found: list[Correspondence]
    ) -> tuple[dict[str, Picture], dict[Match, _Patch]]:
        """Return the pictures of normal images and of matched patches, each file decoded once, one at a time."""
        wanted: dict[str, list[Match]] = {key: [] for key in detection.neighbours.keys[:NEAREST]}
        for match in (match for one in found for match in one.matches):
            wanted.setdefault(match.key, []).append(match)
        thumbnails: dict[str, Picture] = {}
        patches: dict[Match, _Patch] = {}
        for key, matches in wanted.items():
            try:
                pixels = self._source_images.decode(key)
            except ImageError as error:
                thumbnails[key] = Picture(reason=str(error))
                patches |= {match: _Patch(thumbnails[key], _cell(match.row, match.column)) for match in matches}
                continue
            thumbnails[key] = Picture.of(fit(pixels, THUMBNAIL))
            patches |= {match: self._patch(pixels, detection, match.row, match.column) for match in matches}
        return thumbnails, patches

    def _patch(self, image: Pixels, detection: Detection, row: int, column: int, box: Box | None = None) -> _Patch:
        """Cut a cell and those around it out of an image, or a tile of it, in the proportions that the network saw."""
        pixels = image if box is None else cut(image, box)
        size, (h, w) = pixels.shape[:2], _grid(detection)
        rows, columns = min(h, 2 * AROUND + 1), min(w, 2 * AROUND + 1)
        top, left = min(max(0, row - AROUND), h - rows), min(max(0, column - AROUND), w - columns)
        height, width = rows * self._view.crop[0] / h, columns * self._view.crop[1] / w
        shape = round(PATCH * height / max(height, width)), round(PATCH * width / max(height, width))
        shown = patch(pixels, self._view.cell_box(size, (h, w), top, left, rows, columns), shape)
        x0, y0, x1, y1 = self._view.cell_box(size, (h, w), row, column)
        left_px, top_px = box[:2] if box else (0, 0)
        place = f"x {x0 + left_px:.0f}–{x1 + left_px:.0f},", f"y {y0 + top_px:.0f}–{y1 + top_px:.0f} px"
        return _Patch(Picture.of(shown), _cell(row, column), place, row - top, column - left, rows, columns)


def _grid(detection: Detection) -> tuple[int, int]:
    h, w = detection.sq_distances.shape[:2]
    return h, w


def _cell(row: int, column: int) -> str:
    return f"row {row}, column {column}"


def _figures(row: Row, detection: Detection) -> list[tuple[str, str]]:
    """Return the figures of an image, by name."""
    found = [("image score", figure(row.score))]
    if row.p_value is not None:
        found.append(("p-value", f"{row.p_value:.2g}"))
    if row.map_max is not None:
        found.append(("map maximum", figure(row.map_max)))
    if detection.judgement is not None:
        found.append(("regions", str(len(detection.regions))))
    if row.label:
        found.append(("kind", row.label))
    height, width = detection.anomaly_map.shape
    return [*found, ("size", f"{width} × {height} px"), ("seconds", f"{row.seconds:.2f}")]
