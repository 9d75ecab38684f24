"""Why a pixel scored high: the normal patches that the worst cells of a query were matched with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..images.view import View
from .detection import Detection
from .regions import Region


@dataclass(frozen=True)
class Match:
    """A patch of a normal image, and how far it is from the query's."""

    key: str  # of the normal image
    row: int  # of the finest grid
    column: int
    sq_distance: float


@dataclass(frozen=True)
class Correspondence:
    """A cell of a query's finest grid and its nearest normal patches."""

    region: Region | None  # whose worst cell it is; None: the cell of the map's maximum
    row: int
    column: int
    matches: list[Match]  # nearest first


def correspondences(detection: Detection, view: View, regions: int = 3, matches: int = 3) -> list[Correspondence]:
    """Return the worst cell of each of the worst regions with its matches.

    Without regions it is the cell of the map's maximum; where nothing was searched, there is none.

    Args:
        detection: what a query found.
        view: what the network saw of an image.
        regions: how many, worst first.
        matches: how many of the kappa.
    """
    if not detection.is_searched:
        return []
    cells: list[tuple[Region | None, tuple[int, int]]] = [
        (region, _worst_cell(detection, view, number))
        for number, region in enumerate(detection.regions[:regions], start=1)
    ]
    return [
        Correspondence(region, row, column, _matches(detection, row, column, matches))
        for region, (row, column) in cells or [(None, _cell_of_maximum(detection, view))]
    ]


def match_arrays(detection: Detection) -> dict[str, NDArray[Any]]:
    """Return all matches of a detection as arrays that need no pickle.

    Returns:
        keys (K,) str of the neighbours; neighbour (index into keys), row and column (h, w, kappa) int32 and
        sq_distance (h, w, kappa) float32, nearest first; grid (h, w); region (left, top, right, bottom) in pixels of
        the image. kappa is 0 where the patch search was skipped.
    """
    neighbour, row, column = np.moveaxis(np.asarray(detection.matches, np.int32), 3, 0)
    return {
        "keys": np.array(detection.neighbours.keys, np.str_),
        "neighbour": neighbour,
        "row": row,
        "column": column,
        "sq_distance": np.asarray(detection.sq_distances, np.float32),
        "grid": np.array(detection.sq_distances.shape[:2], np.int32),
        "region": np.array(detection.region, np.int32),
    }


def _worst_cell(detection: Detection, view: View, number: int) -> tuple[int, int]:
    """Return the cell with the highest score of those whose centre lies in a region; else that of its peak."""
    assert detection.judgement is not None
    assert detection.judgement.labels is not None
    region = detection.judgement.labels == number
    size, (h, w) = _size(detection), detection.sq_distances.shape[:2]
    cells = [view.cell_box(size, (h, w), row, 0) for row in range(h)]
    rows = [min(size[0] - 1, int((box[1] + box[3]) / 2)) for box in cells]  # of the pixels at their centres
    cells = [view.cell_box(size, (h, w), 0, column) for column in range(w)]
    columns = [min(size[1] - 1, int((box[0] + box[2]) / 2)) for box in cells]
    inside = region[np.ix_(rows, columns)]
    if not inside.any():
        peak = int(np.where(region, detection.anomaly_map, -np.inf).argmax())
        return view.cell_at(size, (h, w), *divmod(peak, size[1]))
    scores = detection.sq_distances.mean(axis=2, dtype=np.float64)
    row, column = divmod(int(np.where(inside, scores, -np.inf).argmax()), w)
    return row, column


def _cell_of_maximum(detection: Detection, view: View) -> tuple[int, int]:
    size, (h, w) = _size(detection), detection.sq_distances.shape[:2]
    return view.cell_at(size, (h, w), *divmod(int(detection.anomaly_map.argmax()), size[1]))


def _size(detection: Detection) -> tuple[int, int]:
    height, width = detection.anomaly_map.shape
    return height, width


def _matches(detection: Detection, row: int, column: int, count: int) -> list[Match]:
    found = zip(detection.matches[row, column, :count], detection.sq_distances[row, column, :count], strict=True)
    keys = detection.neighbours.keys
    return [Match(keys[match[0]], int(match[1]), int(match[2]), float(sq_distance)) for match, sq_distance in found]
