"""Exact distances of candidates, as sums of squares, and the exact search over all images."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Ids
from .training import ImageFeatures

TOGETHER = 64  # queries whose candidates are in memory at a time: 25 MB of 75 with 1280 dimensions


def _nearest_of_all(
    queries: Array, k: int, without: Ids, removed: NDArray[np.bool_] | None, features: ImageFeatures
) -> tuple[Ids, NDArray[np.float32]]:
    """Compare queries with every image that counts; returns ids and squared distances (m, k), as search does."""
    usable = np.ones(len(features), np.bool_) if removed is None else ~removed
    usable[without] = False
    ids, start = np.empty((len(queries), 0), np.int64), 0
    sq_distances = np.empty((len(queries), 0), np.float32)
    for block in features.blocks():
        kept = np.flatnonzero(usable[start : start + len(block)])
        exact = [np.square(block[kept] - query).sum(axis=1) for query in queries]
        sq_distances = np.hstack([sq_distances, np.array(exact)])
        ids = np.hstack([ids, np.tile(kept + start, (len(queries), 1))])
        order = np.lexsort((ids, sq_distances), axis=1)[:, :k]
        ids, sq_distances = np.take_along_axis(ids, order, 1), np.take_along_axis(sq_distances, order, 1)
        start += len(block)
    return ids, sq_distances


def _compared(queries: Array, ids: Ids, usable: NDArray[np.bool_], features: ImageFeatures) -> Array:
    """Return the squared distances, as sums of squares, between queries and the images found, where usable."""
    exact = np.full(ids.shape, np.inf, np.float32)
    for start in range(0, len(queries), TOGETHER):
        some = slice(start, start + TOGETHER)
        needed, at = np.unique(ids[some][usable[some]], return_inverse=True)
        places = np.full(ids[some].shape, -1, np.int64)
        places[usable[some]] = at
        exact[some] = _at_places(queries[some], features.read(needed), places)
    return exact


def _at_places(queries: Array, images: Array, places: Ids) -> Array:
    """Return squared distances (m, c) of queries (m, d) to those of images (n, d) at places (m, c); -1: infinity."""
    (m, d), c = queries.shape, places.shape[1]
    out = np.empty((m, c), np.float32)
    pointers = [faiss.swig_ptr(array) for array in (out, queries, images, places)]
    faiss.fvec_L2sqr_by_idx(*pointers, d, m, c)
    return out
