"""The kappa nearest neighbours of every query patch, each by its nearest patch: at most one match an image.

A defect that hides in one normal image excuses its like only there. Averaged over the nearest patches of several
images, a distance is small only where several images have something alike.
"""

from __future__ import annotations

from ..arrays import Array
from .bounds import Floats, Ints, search_bounds


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
