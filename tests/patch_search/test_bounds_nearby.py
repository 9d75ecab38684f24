"""The first bound of how far the nearest patches are: never too low, and much better than none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spade_faiss.patch_search.bounds import rows as bounds_rows
from spade_faiss.patch_search.bounds.kept import KeptNeighbours, Way
from spade_faiss.patch_search.bounds.plan import Projection
from spade_faiss.patch_search.bounds.products_bytes import HAS_BYTES
from spade_faiss.patch_search.bounds.shared import SharedGallery
from spade_faiss.patch_search.bounds.simd import BYTES, HAS_QUADS, PAIRS, QUADS, ROWS, SINGLE
from spade_faiss.patch_search.bounds.workers import Search

KINDS = [
    SINGLE,
    PAIRS,
    pytest.param(BYTES, marks=pytest.mark.skipif(not HAS_BYTES, reason="no products of int8 in sums of int16 here")),
    pytest.param(QUADS, marks=pytest.mark.skipif(not HAS_QUADS, reason="no products of int8 here")),
]


def bounds_nearby(query: Any, level: Any, kappa: int, kind: int, directions: int | None = None) -> Any:
    """What the kappa-th nearest squared distances (q,) are bounded by."""
    kept = KeptNeighbours(2**24).levels(range(len(level)), 1)[0]
    gallery = SharedGallery(level, query, kept)
    chosen = None if directions is None else gallery.directions[:directions]
    gallery.projections = [Projection(gallery.depth, chosen, kind)]
    gallery._way = Way(gallery.frame, gallery.projections[0])
    search, q = Search.of(gallery, [query], True), query[0].size
    found = np.full((q, kappa), np.inf, np.float32), np.full((q, kappa), -1), np.full(q, np.inf, np.float32)
    worker, blocks = bounds_rows._Worker(search, gallery.ready(1), ROWS, found), -(-q // ROWS)
    for piece in (range(blocks // 3), range(blocks // 3, blocks)):
        worker._look_nearby(piece, slice(piece.start * ROWS, piece.stop * ROWS))
    return found[2]


def kth_nearest(query: Any, level: Any, kappa: int) -> Any:
    """The squared distances (q,) of each patch's nearest in the kappa-th nearest neighbour."""
    own = query.reshape(len(query), -1).T.astype(np.float64)
    others = level.reshape(*level.shape[:2], -1).transpose(0, 2, 1).astype(np.float64)
    nearest = np.stack([np.square(own[:, None] - each[None]).sum(axis=2).min(axis=1) for each in others])
    return np.sort(nearest, axis=0)[kappa - 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", [None, 5])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (17, 20)], ids=str)  # less than a panel, and more than are looked at
@pytest.mark.parametrize("kappa", [1, 4, 9])
def test_bounds_are_never_too_low(kind: int, directions: int | None, grid: Any, kappa: int) -> None:
    rng = np.random.default_rng(kappa)
    basis = rng.normal(size=(4, 12))
    level = rng.normal(size=(10, *grid, 4)) @ basis + 0.1 * rng.normal(size=(10, *grid, 12))
    level = np.ascontiguousarray(level.transpose(0, 3, 1, 2)).astype(np.float32)
    bounds, expected = (
        bounds_nearby(level[9], level[:9], kappa, kind, directions),
        kth_nearest(level[9], level[:9], kappa),
    )
    assert (bounds >= expected).all()
    assert np.isfinite(bounds).all()
    if grid == (1, 1) and directions is None and kind == SINGLE:  # all is looked at
        np.testing.assert_allclose(bounds, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_alike_at_the_same_place_is_found(kind: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(16, 20, 20))
    level = (image + 0.1 * rng.normal(size=(6, *image.shape))).astype(np.float16)
    bounds, expected = bounds_nearby(level[5], level[:5], 3, kind), kth_nearest(level[5], level[:5], 3)
    assert (bounds >= expected).all()
    assert np.median(bounds / expected) < 1.05


def test_fewer_patches_than_a_neighbour_has_are_spread_over_it() -> None:
    rng = np.random.default_rng(0)
    level = rng.normal(size=(6, 8, 20, 20)).astype(np.float32)
    query = np.ascontiguousarray(level[5].reshape(8, -1)[:, ::9])
    bounds, expected = bounds_nearby(query, level[:5], 2, PAIRS), kth_nearest(query, level[:5], 2)
    assert (bounds >= expected).all()
    assert (bounds < np.inf).all()


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30])
def test_a_neighbour_that_overflows_bounds_nothing(value: float) -> None:
    """Nothing is known of patches that are near others only."""
    level = np.random.default_rng(0).normal(size=(3, 8, 4, 4)).astype(np.float32)
    level[1] = value
    with np.errstate(over="ignore", invalid="ignore"):
        two, three = (bounds_nearby(level[2], level[:2], kappa, SINGLE) for kappa in (1, 2))
    assert (two >= kth_nearest(level[2], level[:1], 1)).all()
    assert (three == np.inf).all()
