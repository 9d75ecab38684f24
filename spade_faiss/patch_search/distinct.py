"""The kappa nearest neighbours of every query patch, each by its nearest patch: at most one match an image.

A defect that hides in one normal image excuses its like only there. Averaged over the nearest patches of several
images, a distance is small only where several images have something alike.
"""

from __future__ import annotations

from typing import Any

from ..system.devices import as_arrays
from .bounds.search import search_bounds
from .bounds.sources import Floats, Ints


def search_distinct(query: Any, gallery: Any, kappa: int, device: str = "cpu") -> tuple[Floats, Ints]:
    """Search one level of all neighbours: on the CPU with torch's number of threads, or on a GPU.

    Args:
        query: (c, m) patches, an array; on a GPU also a tensor there.
        gallery: (K, c, h, w) level of the neighbours, an array or a tensor.
        kappa: number of neighbours, at most K.
        device: "cpu" or "cuda:N", where is searched.

    Returns:
        sq_distances (m, kappa), ascending, and matches (m, kappa): positions counted through neighbour, row, column.
        Equal distances are in the order of positions.

    Raises:
        FeatureError: a squared distance does not fit float32.
    """
    if device == "cpu":
        [level] = as_arrays([gallery])
        return search_bounds(query, level, kappa, distinct=True)
    from .gpu.search import search_together

    [found] = search_together([[query[:, None]]], [gallery[None]], kappa, device, distinct=True)
    return found
