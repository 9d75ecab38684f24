"""Why a pixel scored high: the normal patches that the worst cells of a query were matched with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..images.tiling import cut
from ..images.view import View
from .detection import Detection, TileMatches
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
    tile: TileMatches  # that the cell is in


def correspondences(detection: Detection, view: View, regions: int = 3, matches: int = 3) -> list[Correspondence]:
    """Return the worst cell of each of the worst regions with its matches.

    Without regions it is the cell of the map's maximum; where nothing was searched, there is none.

    Args:
        detection: what a query found.
        view: what the network saw of an image.
        regions: how many, worst first.
        matches: how many of the kappa.
    """
    tiles = detection.searched_tiles
    if not tiles:
        return []
    cells: list[tuple[Region | None, Cell]] = [
        (region, _worst_cell(detection, tiles, view, number))
        for number, region in enumerate(detection.regions[:regions], start=1)
    ]
    return [
        Correspondence(region, row, column, _matches(tile, row, column, matches), tile)
        for region, (tile, row, column) in cells or [(None, _cell_at_maximum(detection.anomaly_map, tiles, view))]
    ]


def match_arrays(detection: Detection) -> dict[str, NDArray[Any]]:
    """Return all matches of a detection as arrays that need no pickle.

    Returns:
        keys (K,) str of the neighbours; neighbour (index into keys), row and column (h, w, kappa) int32 and
        sq_distance (h, w, kappa) float32, nearest first; grid (h, w); region (left, top, right, bottom) in pixels of
        the image. kappa is 0 where the patch search was skipped. Of an image that was cut into T tiles: (T, h, w,
        kappa), keys of the neighbours of all tiles, and tiles (T, 4), their (left, top, right, bottom); where the
        search of a tile was skipped, -1 and infinity.
    """
    tiles = detection.tiles or (
        TileMatches((0, 0, 0, 0), detection.neighbours, detection.sq_distances, detection.matches),
    )
    keys = list(dict.fromkeys(key for tile in tiles for key in tile.neighbours.keys))
    kappa = max(tile.sq_distances.shape[2] for tile in tiles)
    found = [_with_shared_keys(tile, keys, kappa) for tile in tiles]
    matches, sq_distances = (np.stack(arrays) for arrays in zip(*found, strict=True))
    if not detection.tiles:
        matches, sq_distances = matches[0], sq_distances[0]
    neighbour, row, column = np.moveaxis(matches, -1, 0)
    arrays = {
        "keys": np.array(keys, np.str_),
        "neighbour": neighbour,
        "row": row,
        "column": column,
        "sq_distance": sq_distances,
        "grid": np.array(detection.sq_distances.shape[:2], np.int32),
        "region": np.array(detection.region, np.int32),
    }
    return arrays | ({"tiles": np.array([tile.box for tile in tiles], np.int32)} if detection.tiles else {})


def _with_shared_keys(tile: TileMatches, keys: list[str], kappa: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return a tile's matches, with neighbours as places among some keys, and distances; of none searched, -1, inf."""
    matches, sq_distances = np.asarray(tile.matches, np.int32), np.asarray(tile.sq_distances, np.float32)
    if sq_distances.shape[2] < kappa:
        shape = (*sq_distances.shape[:2], kappa)
        return np.full((*shape, 3), -1, np.int32), np.full(shape, np.inf, np.float32)
    if tile.neighbours.keys == keys:
        return matches, sq_distances
    place = {key: at for at, key in enumerate(keys)}
    shared = np.array([place[key] for key in tile.neighbours.keys], np.int32)
    return np.concatenate([shared[matches[..., :1]], matches[..., 1:]], axis=-1), sq_distances


NEARLY = 0.9  # of a region's highest score at the centre of a cell
Cell = tuple[TileMatches, int, int]  # of the finest grid: its tile, row and column


def _worst_cell(detection: Detection, tiles: list[TileMatches], view: View, number: int) -> Cell:
    """Return the cell with the largest distance of those at whose centres a region scores highest; else its peak's.

    Distances alone do not say it: the scores may be damped, see ScoreOptions.positions. And scores do not tell
    neighbouring cells apart: the map is smooth.
    """
    assert detection.judgement is not None
    assert detection.judgement.labels is not None
    within = np.where(detection.judgement.labels == number, detection.anomaly_map, -np.inf)
    scores = [_at_centres(cut(within, tile.box), tile, view) for tile in tiles]
    least = NEARLY * max(float(one.max()) for one in scores)
    if least == -np.inf:  # it lies between the centres
        return _cell_at_maximum(within, tiles, view)
    found = []
    for tile, own in zip(tiles, scores, strict=True):
        distances = np.where(own >= least, tile.sq_distances.mean(axis=2, dtype=np.float64), -np.inf)
        row, column = divmod(int(distances.argmax()), distances.shape[1])
        found.append((distances[row, column], (tile, row, column)))
    return max(found, key=lambda pair: pair[0])[1]


def _at_centres(scores: NDArray[Any], tile: TileMatches, view: View) -> NDArray[Any]:
    """Return for each cell of a tile the score of the pixel at its centre, of the (H, W) scores of the tile."""
    size, (h, w) = tile.size, tile.sq_distances.shape[:2]
    cells = [view.cell_box(size, (h, w), row, 0) for row in range(h)]
    rows = [min(size[0] - 1, int((box[1] + box[3]) / 2)) for box in cells]
    cells = [view.cell_box(size, (h, w), 0, column) for column in range(w)]
    columns = [min(size[1] - 1, int((box[0] + box[2]) / 2)) for box in cells]
    found: NDArray[Any] = scores[np.ix_(rows, columns)]
    return found


def _cell_at_maximum(scores: NDArray[Any], tiles: list[TileMatches], view: View) -> Cell:
    """Return the cell that holds the maximum of an (H, W) map; where tiles overlap, of the tile with the higher one."""
    y, x = divmod(int(scores.argmax()), scores.shape[1])
    found = []
    for tile in tiles:
        left, top, right, bottom = tile.box
        if left <= x < right and top <= y < bottom:
            row, column = view.cell_at(tile.size, tile.sq_distances.shape[:2], y - top, x - left)
            found.append((float(tile.sq_distances[row, column].mean()), (tile, row, column)))
    return max(found, key=lambda pair: pair[0])[1] if found else (tiles[0], 0, 0)


def _matches(tile: TileMatches, row: int, column: int, count: int) -> list[Match]:
    found = zip(tile.matches[row, column, :count], tile.sq_distances[row, column, :count], strict=True)
    keys = tile.neighbours.keys
    return [Match(keys[match[0]], int(match[1]), int(match[2]), float(sq_distance)) for match, sq_distance in found]
