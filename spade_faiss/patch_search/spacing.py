"""How close normal patches lie to each other where a query's patches were matched."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..system.devices import as_arrays, as_typed, search_device
from ..system.threads import in_one_thread
from .bounds import search_prepared
from .bounds_gallery import BoundsGallery, Floats, Ints
from .distinct import search_distinct

NEAREST = 3  # neighbours whose nearest patches are averaged


def search_spaced(query: Array, gallery: Any, kappa: int, device: str = "cpu") -> tuple[Floats, Ints, Floats]:
    """Search as search_distinct, among K >= 2 neighbours, and measure the spacing where the nearest was matched.

    Returns:
        as search_distinct, and the spacing (m,): see `spacing`. On the CPU, neighbours are prepared once for both.
    """
    if device != "cpu":
        sq_distances, matches = search_distinct(query, gallery, kappa, device)
        return sq_distances, matches, _spacing_on(device, gallery, matches[:, 0].astype(np.int64), NEAREST)
    [level] = as_arrays([gallery])
    with np.errstate(over="ignore", invalid="ignore"):
        prepared = in_one_thread(BoundsGallery, [level], [query])
    sq_distances, matches = search_prepared(prepared, [query], kappa, True)
    return sq_distances, matches, spacing_of(prepared, matches)


def spacing(
    level: Any, matches: NDArray[np.int32], number: int = NEAREST, device: str | None = "cpu"
) -> NDArray[np.float32]:
    """Measure the mean squared distance of matched patches to their nearest patches in other neighbours.

    Args:
        level: (K, c, h, w) of the neighbours, K >= 2; an array, or a tensor on the device.
        matches: (h, w, 3) neighbour, row and column.
        number: of other neighbours that count, each by its nearest patch; fewer where there are fewer.
        device: as for search_patches.

    Returns:
        (h, w) float32.
    """
    height, width = level.shape[2:]
    neighbours, rows, columns = (part.astype(np.int64).ravel() for part in np.moveaxis(matches, -1, 0))
    places, on = (neighbours * height + rows) * width + columns, search_device(device)
    if on != "cpu":
        with as_typed(on):
            return _spacing_on(on, level, places, number).reshape(matches.shape[:2])
    [level] = as_arrays([level])
    with np.errstate(over="ignore", invalid="ignore"):
        gallery = in_one_thread(BoundsGallery, [level], [level[0]])
    return spacing_of(gallery, places[:, None], number).reshape(matches.shape[:2])


def spacing_of(gallery: BoundsGallery, matches: NDArray[np.int64], number: int = NEAREST) -> NDArray[np.float32]:
    """Measure the spacing where patches were matched in a gallery of one level, K >= 2.

    Args:
        gallery: the neighbours.
        matches: (q, kappa) positions; the first of each row are the matched patches. The others, in other neighbours,
            are near them: what is farther than these need not be looked at.
        number: as for `spacing`.

    Returns:
        (q,) float32.
    """
    level, n = gallery.levels[0], gallery.n
    cells = level.reshape(gallery.k, len(level[0]), -1)
    _, rows, which = np.unique(matches[:, 0], return_index=True, return_inverse=True)
    own, places = np.divmod(matches[rows], n)
    patches = cells[own[:, 0], :, places[:, 0]]  # (patches, c)
    count = min(number, gallery.k - 1)
    reach = np.full(len(rows), np.inf, np.float32)
    if matches.shape[1] > count:
        wide = patches.astype(np.float64)
        others = [
            np.square(cells[one, :, at] - wide).sum(axis=1) for one, at in zip(own.T[1:], places.T[1:], strict=True)
        ]
        reach[:] = np.sort(others, axis=0)[count - 1] * (1 + 1e-5)
    sq_distances, at = search_prepared(gallery, [np.ascontiguousarray(patches.T)], count + 1, True, reach)
    return _mean_of_others(sq_distances, at // n == own[:, :1])[which.reshape(-1)]


def _spacing_on(device: str, level: Any, matches: NDArray[np.int64], number: int) -> NDArray[np.float32]:
    """Measure the spacing (q,) at positions (q,) of a level, on a GPU."""
    k, n = len(level), level.shape[2] * level.shape[3]
    places, which = np.unique(matches, return_inverse=True)
    own, cells = np.divmod(places, n)
    sq_distances, at = search_distinct(_patches(level, own, cells), level, min(number, k - 1) + 1, device)
    return _mean_of_others(sq_distances, at // n == own[:, None])[which]


def _mean_of_others(sq_distances: Floats, is_own: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the mean of each row without the patch's own neighbour."""
    others = np.where(is_own, np.nan, sq_distances)
    others[~np.isnan(others).any(axis=1), -1] = np.nan  # as many equal patches come before its own
    mean: NDArray[np.float32] = np.asarray(np.nanmean(others, axis=1, dtype=np.float64), np.float32)
    return mean


def _patches(level: Any, images: NDArray[np.int64], cells: NDArray[np.int64]) -> Array:
    """Return some patches of a level (K, c, h, w) as an array, (c, m)."""
    [patches] = as_arrays([level.reshape(len(level), level.shape[1], -1)[images, :, cells]])
    return np.ascontiguousarray(patches.T)
