"""How close normal patches lie to each other where a query's patches were matched."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..system.threads import in_one_thread
from .bounds import search_prepared
from .bounds_gallery import BoundsGallery

NEAREST = 3  # neighbours whose nearest patches are averaged


def spacing(level: Array, matches: NDArray[np.int32], number: int = NEAREST) -> NDArray[np.float32]:
    """Measure the mean squared distance of matched patches to their nearest patches in other neighbours.

    Args:
        level: (K, c, h, w) of the neighbours, K >= 2.
        matches: (h, w, 3) neighbour, row and column.
        number: of other neighbours that count, each by its nearest patch; fewer where there are fewer.

    Returns:
        (h, w) float32.
    """
    height, width = level.shape[2:]
    neighbours, rows, columns = (part.astype(np.int64).reshape(-1, 1) for part in np.moveaxis(matches, -1, 0))
    with np.errstate(over="ignore", invalid="ignore"):
        gallery = in_one_thread(BoundsGallery, [level], [level[0]])
    found = spacing_of(gallery, (neighbours * height + rows) * width + columns, number)
    return found.reshape(matches.shape[:2])


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
        rounding = 2.0**-20 * np.sqrt(np.square(wide).sum(axis=1))  # the search's patches are float32
        reach[:] = (np.sqrt(np.sort(others, axis=0)[count - 1]) + rounding) ** 2 * (1 + 1e-5)
    sq_distances, at = search_prepared(gallery, [np.ascontiguousarray(patches.T)], count + 1, True, reach)
    found = np.where(at // n == own[:, :1], np.nan, sq_distances)
    found[~np.isnan(found).any(axis=1), -1] = np.nan  # as many equal patches come before its own
    mean: NDArray[np.float32] = np.asarray(np.nanmean(found, axis=1, dtype=np.float64), np.float32)
    return mean[which.reshape(-1)]
