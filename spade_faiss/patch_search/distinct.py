"""The kappa nearest neighbours of every query patch, each by its nearest patch: at most one match an image.

A defect that hides in one normal image excuses its like only there. Averaged over the nearest patches of several
images, a distance is small only where several images have something alike.
"""

from __future__ import annotations

import numpy as np

from ..arrays import Array
from ..system.threads import in_one_thread
from .bounds import search_bounds, search_prepared
from .bounds_gallery import BoundsGallery, Floats, Ints
from .spacing import spacing_of

KEPT_BYTES = 2**27  # of prepared neighbours


def search_distinct(query: Array, gallery: Array, kappa: int) -> tuple[Floats, Ints]:
    """Search one level of all neighbours on the CPU, with torch's number of threads.

    Args:
        query: (c, m) patches.
        gallery: (K, c, h, w) level of the neighbours.
        kappa: number of neighbours, at most K.

    Returns:
        sq_distances (m, kappa), ascending, and matches (m, kappa): positions counted through neighbour, row, column.
        Equal distances are in the order of positions.

    Raises:
        FeatureError: a squared distance does not fit float32.
    """
    return search_bounds(query, gallery, kappa, distinct=True)


def search_spaced(query: Array, gallery: Array, kappa: int) -> tuple[Floats, Ints, Floats]:
    """Search likewise, among K >= 2 neighbours, and measure the spacing where the nearest patches were matched.

    Returns:
        as search_distinct, and the spacing (m,): see spacing.spacing. Neighbours are prepared once for both.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        prepared = in_one_thread(BoundsGallery, [gallery], [query], KEPT_BYTES)
    sq_distances, matches = search_prepared(prepared, [query], kappa, True)
    return sq_distances, matches, spacing_of(prepared, matches)
