"""Neighbours whose panels are sorted: boxes leave nothing out that can be near, and answers are the same."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch

from spade_faiss.errors import FeatureError
from spade_faiss.patch_search.bounds import boxes
from spade_faiss.patch_search.bounds import rows as bounds_rows
from spade_faiss.patch_search.bounds import search as bounds
from spade_faiss.patch_search.bounds import workers as bounds_workers
from spade_faiss.patch_search.bounds.boxes import AXES, TOGETHER, Sorted, corners_of, with_axes
from spade_faiss.patch_search.bounds.kept import KeptNeighbours, Way
from spade_faiss.patch_search.bounds.nearby import nearest_panels
from spade_faiss.patch_search.bounds.plan import Projection
from spade_faiss.patch_search.bounds.products_bytes import HAS_BYTES
from spade_faiss.patch_search.bounds.search import search_prepared
from spade_faiss.patch_search.bounds.shared import SharedGallery
from spade_faiss.patch_search.bounds.simd import BYTES, HAS_QUADS, PAIRS, QUADS, ROWS, SINGLE, TILES, WIDTH
from spade_faiss.patch_search.spacing import search_spaced

KINDS = [
    SINGLE,
    PAIRS,
    pytest.param(BYTES, marks=pytest.mark.skipif(not HAS_BYTES, reason="no products of int8 in sums of int16 here")),
    pytest.param(QUADS, marks=pytest.mark.skipif(not HAS_QUADS, reason="no products of int8 here")),
]
C = 12


@pytest.fixture(autouse=True)
def _any_number_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "PANELS", 0)
    monkeypatch.setattr(bounds, "WORTH", -1)
    monkeypatch.setattr(bounds_workers, "CROWD", 1000)


def made(number: int, grid: tuple[int, int], seed: int = 0) -> Any:
    """Levels (number, C, h, w) float32 that lie near five directions, off the centre."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(5, C)) * np.geomspace(3, 0.3, 5)[:, None]
    values = rng.normal(size=(number, *grid, 5)) @ basis + 0.1 * rng.normal(size=(number, *grid, C)) + 2
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2)).astype(np.float32)


def sorted_search(
    query: Any, level: Any, kappa: int, kind: int, directions: int | None, reach: Any = None
) -> tuple[Any, Any, bool]:
    """Search neighbours in sorted panels; distances and positions, and whether the threads went by them to the end."""
    store, done = KeptNeighbours(2**26), list[bool]()
    like = SharedGallery(level[:2], query, store.levels(range(2), 1)[0])
    projection = Projection(C, None if directions is None else like.directions[:directions], kind)
    store.choose(0, Way(like.frame, with_axes(projection, like.directions)))
    gallery = SharedGallery(level, query, store.levels(range(len(level)), 1)[0])
    by_rows = bounds_rows.by_rows

    def noted(search: Any, *rest: Any) -> Any:
        done.append((found := by_rows(search, *rest))[2])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "by_rows", noted)
        found = search_prepared(gallery, [query.reshape(C, -1)], kappa, True, reach)
    assert all(theirs.is_sorted for _, theirs in gallery.ready(1))
    return *found, done == [True]


def nearest(query: Any, level: Any, kappa: int) -> tuple[Any, Any]:
    """The kappa nearest neighbours of each patch, each by its nearest, in float64."""
    own = query.reshape(C, -1).T.astype(np.float64)
    others = level.reshape(len(level), C, -1).transpose(0, 2, 1).astype(np.float64)
    every = np.stack([np.square(own[:, None] - each).sum(axis=2) for each in others], axis=1)
    at, least = every.argmin(axis=2), every.min(axis=2)
    order = np.argsort(least, axis=1, kind="stable")[:, :kappa]
    places = at + np.arange(len(level)) * every.shape[2]
    return np.take_along_axis(least, order, 1), np.take_along_axis(places, order, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", [None, 4, 6])
@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (17, 20), (40, 41)], ids=str)
def test_answers_are_the_oracles(kind: int, directions: int | None, grid: tuple[int, int]) -> None:
    """Of less than a panel, of one with places to spare, and of more than a group of boxes."""
    levels = made(8, grid)
    sq_distances, places, is_done = sorted_search(levels[7], levels[:7], 4, kind, directions)
    expected, expected_at = nearest(levels[7], levels[:7], 4)
    assert is_done
    np.testing.assert_allclose(sq_distances, expected, rtol=1e-6)
    np.testing.assert_array_equal(places, expected_at)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0, 3, "copies", "rows", "one of two"])
def test_equal_patches_are_told_apart_by_position(kind: int, value: Any) -> None:
    """The first of them counts, wherever it lies in a panel."""
    levels = made(6, (17, 20))
    if value == "copies":
        levels[:] = levels[0]
    elif value == "rows":
        levels[:] = levels[:, :, :1]
    elif value == "one of two":
        levels[:] = np.where(np.random.default_rng(0).random((6, 1, 17, 20)) < 0.5, levels[:1, :, :1, :1], 7)
    else:
        levels[:5] = value
    for directions in (None, 4):
        sq_distances, places, _ = sorted_search(levels[5], levels[:5], 3, kind, directions)
        expected, expected_at = nearest(levels[5], levels[:5], 3)
        np.testing.assert_allclose(sq_distances, expected, rtol=1e-6)
        np.testing.assert_array_equal(places, expected_at)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1e-15, 1e-3, 1e4, 1e15])
def test_features_of_any_size_are_found(kind: int, factor: float) -> None:
    levels = made(6, (17, 20)) * np.float32(factor)
    for directions in (None, 5):
        _, places, _ = sorted_search(levels[5], levels[:5], 3, kind, directions)
        np.testing.assert_array_equal(places, nearest(levels[5], levels[:5], 3)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_known_of_some_patches_does_not_hide_others(kind: int) -> None:
    """A reach that is just the distance leaves the patch that lies there, and an infinite one all."""
    levels = made(6, (17, 20))
    expected, expected_at = nearest(levels[5], levels[:5], 3)
    reach = (expected[:, -1] * (1 + 1e-5)).astype(np.float32)
    for known in (reach, np.where(np.arange(len(reach)) % 7 == 0, np.float32(np.inf), reach)):
        _, places, is_done = sorted_search(levels[5], levels[:5], 3, kind, 4, known)
        np.testing.assert_array_equal(places, expected_at)
        assert is_done


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e25])
def test_neighbours_that_overflow_are_refused_or_farther_than_others(kind: int, value: float) -> None:
    levels = made(6, (17, 20))
    levels[2] = value
    _, places, _ = sorted_search(levels[5], levels[:5], 3, kind, 4)
    finite = levels[[0, 1, 3, 4]]
    expected_at = nearest(levels[5], finite, 3)[1]
    n = 17 * 20
    expected_at = np.array([0, 1, 3, 4])[expected_at // n] * n + expected_at % n
    np.testing.assert_array_equal(places, expected_at)
    with pytest.raises(FeatureError, match="expected values whose squared distances fit float32"):
        sorted_search(levels[5], levels[:5], 5, kind, 4)


@pytest.mark.parametrize("n", [1, WIDTH - 1, WIDTH, 5 * WIDTH + 3, 100 * WIDTH])
@pytest.mark.parametrize("kind", ["normal", "equal", "few values", "sorted"])
def test_patches_are_sorted_into_boxes(n: int, kind: str) -> None:
    rng = np.random.default_rng(n)
    told_apart = rng.normal(size=(AXES, n)).astype(np.float32)
    if kind != "normal":
        told_apart = {"equal": np.ones_like(told_apart), "few values": np.rint(told_apart)}.get(
            kind, np.sort(told_apart)
        )
    projection = with_axes(Projection(C, torch.eye(C)[:6], PAIRS), torch.eye(C))
    found = Sorted.of(np.concatenate([told_apart, np.zeros((3, n), np.float32)]), projection, True)
    assert found is not None
    np.testing.assert_array_equal(np.sort(found.order), np.arange(n))
    begin, end = found.boxes.transpose(1, 2, 0, 3).reshape(2, AXES, -1)
    for panel in range(len(found.boxes) * TOGETHER):
        here = told_apart[:, found.order[panel * WIDTH : panel * WIDTH + WIDTH]]
        np.testing.assert_array_equal(begin[:, panel], here.min(axis=1, initial=np.inf))
        np.testing.assert_array_equal(end[:, panel], here.max(axis=1, initial=-np.inf))
    if n == 100 * WIDTH and kind == "normal":  # panels as they come would be as wide as all
        assert np.median(end[:, :100] - begin[:, :100]) < 0.5 * np.ptp(told_apart)


def test_boxes_are_compared_as_numbers_are() -> None:
    rng, n, q = np.random.default_rng(0), 21 * WIDTH + 5, 5 * ROWS - 2
    theirs, own = (rng.normal(size=(AXES, number)).astype(np.float32) for number in (n, q))
    found = Sorted.of(
        theirs, with_axes(Projection(AXES + 1, torch.eye(AXES + 1)[:AXES], SINGLE), torch.eye(AXES + 1)), True
    )
    assert found is not None
    corners, groups = corners_of(own), len(found.boxes)
    assert corners.shape == (5, AXES, ROWS)
    begin, end = found.boxes.transpose(1, 2, 0, 3).reshape(2, 1, AXES, -1).astype(np.float64)
    gaps = np.maximum(0, np.maximum(begin - own.T[:, :, None], own.T[:, :, None] - end))
    expected, limits = np.square(gaps).sum(axis=1), np.full(5 * ROWS, np.nan, np.float32)
    limits[:q] = np.quantile(expected[:, :22], 0.1, axis=1)
    limits[3] = np.nan

    @numba.njit
    def within(boxes_at: int, corners_at: int, limits_at: int) -> Any:
        return boxes.boxes_within(boxes_at, corners_at, limits_at)

    with np.errstate(invalid="ignore"):
        is_within = np.concatenate([expected, np.full((2, groups * TOGETHER), np.nan)]) <= limits[:, None]
    for block in range(5):
        for group in range(groups):
            bits = within(
                found.boxes[group].ctypes.data, corners[block].ctypes.data, limits[block * ROWS :].ctypes.data
            )
            some = is_within[block * ROWS : block * ROWS + ROWS, group * TOGETHER : group * TOGETHER + TOGETHER]
            assert bits == (some.any(axis=0) << np.arange(TOGETHER)).sum()

    @numba.njit
    def nearest_of(boxes_at: int, point_at: int, number: int, distances: Any) -> Any:
        return nearest_panels(boxes_at, point_at, number, 22, distances)

    for row in range(q):
        point, distances = np.ascontiguousarray(own[:, row]), np.empty(groups * TOGETHER, np.float32)
        [one, first] = [nearest_of(found.boxes.ctypes.data, point.ctypes.data, number, distances) for number in (1, 2)]
        np.testing.assert_allclose(distances[:22], expected[row, :22], rtol=1e-5)
        assert distances[one] == distances[:22].min()
        assert first in (one - 1, one)
        assert 0 <= first < 21


def test_fewer_patches_are_left_than_in_panels_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is told of the search: with patches of five directions, anywhere in the images."""
    levels, shares = made(9, (40, 40)), []
    for panels in (0, 10**6):
        monkeypatch.setattr(boxes, "PANELS", panels)
        store = KeptNeighbours(2**26)
        monkeypatch.setattr(store, "tell", lambda level, way, share: shares.append(share))
        search_spaced(levels[8].reshape(C, -1), levels[:8], 3, kept=store.levels(range(8), 1)[0])
    by_boxes, as_they_come = shares[:2], shares[2:]
    assert sum(by_boxes) < 0.8 * sum(as_they_come)


@pytest.mark.parametrize("channels", [1, AXES, AXES + 1])
def test_few_channels_have_no_axes(channels: int) -> None:
    directions = torch.eye(channels)
    assert (with_axes(Projection(channels, None, PAIRS), directions).axes is None) == (channels <= AXES)
    assert with_axes(Projection(channels, None, TILES), directions).axes is None
    assert with_axes(Projection(channels, None, PAIRS), directions[:0]).axes is None
