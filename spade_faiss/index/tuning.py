"""Chooses the search parameters of an index by measurement: as many lists and candidates as a recall needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from ..arrays import Array, Ids
from ..options import DEFAULT_K
from .training import SEED, ImageFeatures, in_blocks, sample_of

HELD_OUT = 200  # normal images that the recall is measured on
# Candidates for each neighbour that are tried; beyond these, visiting more lists helps more.
FACTORS = (1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
CODE_SECONDS = 1.5e-8  # to compare a query with a code, approximately
CANDIDATE_SECONDS = 4e-6  # to read an image feature and compare it exactly, approximately
TIE = 1e-6  # relative difference below which squared distances count as equal


@dataclass(frozen=True)
class Tuning:
    """How an index is searched, and what was measured."""

    nprobe: int | None  # IVF lists visited
    candidates: float  # compared exactly for each neighbour; 1: the index's own distances are exact
    # Share of the k nearest that it finds, for held-out normal images or for points between two of these (at least as
    # unlike the others as images with defects), whichever is less. None: not measured.
    recall: float | None
    k: int  # neighbours in that measurement


def tune(
    search: Callable[[Array, int, int], Ids],
    nlist: int | None,
    lossy: bool,
    features: ImageFeatures,
    target: float,
    visited: Sequence[int] | None = None,
) -> Tuning:
    """Find the cheapest search that reaches a recall, measured against an exact search over all images.

    Args:
        search: (queries, n, lists to visit) -> ids (m, n); -1 where the lists hold fewer.
        nlist: number of IVF lists; None: the index has none.
        lossy: whether candidates are compared exactly afterwards, so that more than k are worth fetching.
        features: of all images in the index.
        target: recall to reach.
        visited: numbers of lists to try, ascending; None: up to all.
    """
    held_out = sample_of(features, HELD_OUT, SEED + 1)
    k = min(DEFAULT_K, len(features) - 1)
    normal = np.concatenate([*in_blocks(features, held_out)])
    between = (normal + np.roll(normal, len(normal) // 2, axis=0)) / 2
    queries, own = np.concatenate([normal, between]), np.concatenate([held_out, np.full_like(held_out, -1)])
    nearest, told_apart = _nearest(queries, own, features, k)
    queries, own, is_between = queries[told_apart], own[told_apart], (own < 0)[told_apart]
    if not len(queries):  # all images are alike: every answer is right
        return Tuning(None, 1.0, None, k)
    factors = [factor for factor in (FACTORS if lossy else FACTORS[:1]) if factor * k < len(features) - 1] or [1.0]
    best, least = Tuning(None, 1.0, -1.0, k), np.inf
    for nprobe in visited or _rising(nlist):
        visiting = nprobe * len(features) / nlist * CODE_SECONDS if nlist else 0.0
        if visiting > least:
            break
        recalls: dict[float, float] = {}
        for factor in (
            factors[-1:] if nlist else factors
        ):  # the first of those found in lists are what a smaller factor finds
            found = search(queries, int(np.ceil(factor * k)) + 1, nprobe)
            others = [row[row != mine] for row, mine in zip(found, own, strict=True)]
            fewer = factors if nlist else [factor]
            places = _places(others, nearest)
            recalls |= {few: _recall(places, int(np.ceil(few * k)), is_between) for few in fewer}
        wanted = min(target, max(recalls.values()))
        candidates = next(factor for factor, recall in recalls.items() if recall >= wanted)
        seconds = visiting + candidates * k * CANDIDATE_SECONDS if wanted == target else np.inf
        if seconds < least or (least == np.inf and recalls[candidates] > (best.recall or 0)):
            best, least = Tuning(nprobe if nlist else None, candidates, recalls[candidates], k), seconds
    return best


def _nearest(queries: Array, own: Ids, features: ImageFeatures, k: int) -> tuple[Array, Array]:
    """Find the k nearest other images by comparing queries with every image.

    Queries are left out if their k-th neighbour ties with the next one: a recall could not tell which is right.

    Args:
        queries: (q, d) float32.
        own: id of the image that each query is, (q,); -1: none.
        features: of all images.
        k: neighbours of each query.

    Returns:
        ids (m, k) for m of the queries, and the rows of these queries (m,).
    """
    ids, sq_distances = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    start = 0
    for block in features.blocks():
        found, at = faiss.knn(queries, np.ascontiguousarray(block), min(k + 2, len(block)))
        found[at + start == own[:, None]] = np.inf
        ids, sq_distances = np.hstack([ids, at + start]), np.hstack([sq_distances, found])
        order = np.argsort(sq_distances, axis=1, kind="stable")[:, : k + 1]
        ids, sq_distances = np.take_along_axis(ids, order, 1), np.take_along_axis(sq_distances, order, 1)
        start += len(block)
    told_apart = np.flatnonzero(sq_distances[:, k] > sq_distances[:, k - 1] * (1 + TIE))
    return ids[told_apart, :k], told_apart


def _rising(nlist: int | None) -> Iterator[int]:
    """Yield numbers of lists to visit, each about 20 % more than the last, up to all."""
    step = 1.0
    while nlist and step < nlist:
        yield int(step)
        step = max(step * 1.2, step + 1)
    yield nlist or 0


def _places(found: list[Ids], nearest: Ids) -> Array:
    """Return the place of each of the nearest (q, k) among those found by its query: (q, k); infinite: it is not there.

    Args:
        found: ids, for each of q queries; -1: none.
        nearest: ids.
    """
    ids, rows = np.concatenate(found), np.arange(len(found))
    if not len(ids):
        return np.full(nearest.shape, np.inf)
    lengths = [len(row) for row in found]
    places = np.concatenate([np.arange(length, dtype=np.float64) for length in lengths])
    # All rows at once, each with ids of its own; -1, which is no image, stays none.
    apart = int(max(ids.max(), nearest.max())) + 2
    named, wanted = ids + apart * np.repeat(rows, lengths), nearest + apart * rows[:, None]
    order = np.argsort(named)
    at = order[np.searchsorted(named, wanted, sorter=order).clip(max=len(ids) - 1)]
    return np.where(named[at] == wanted, places[at], np.inf)


def _recall(places: Array, fetched: int, is_between: Array) -> float:
    """Return the share of the nearest among the first `fetched` found, of normal images or points between (lesser)."""
    shares = (places < fetched).mean(axis=1)
    return float(min(shares[group].mean() for group in (is_between, ~is_between) if group.any()))
