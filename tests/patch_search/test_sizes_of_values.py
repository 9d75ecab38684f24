"""Values that are large or small beside what tells patches apart: every engine keeps the digits that matter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.patch_search.bounds import search as bounds
from tests import reference
from tests.helpers.engines import Search, backends, searching
from tests.helpers.patches import Levels

GPU = {"pyramid": [pytest.mark.cuda], "flat": [pytest.mark.cuda, pytest.mark.faiss_gpu]}
SHAPES = [(16, 8, 8), (24, 4, 4), (7, 1, 5)]


@pytest.fixture(scope="module", params=backends(GPU))
def search(request: pytest.FixtureRequest) -> Iterator[Search]:
    """`search_patches` bound to one engine on one device."""
    with searching(*request.param) as bound:
        yield bound


def with_offsets(varying: float, seed: int, k: int = 5) -> tuple[Levels, Levels]:
    """Channels of different means, about 7, that vary little within themselves."""
    rng = np.random.default_rng(seed)
    query, neighbours = [], []
    for channels, height, width in SHAPES:
        means = 7 * rng.standard_normal((channels, 1, 1))
        query.append((means + varying * rng.standard_normal((channels, height, width))).astype(np.float32))
        others = means + varying * rng.standard_normal((k, channels, height, width))
        neighbours.append(others.astype(np.float32))
    return query, neighbours


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("varying", [1e-6, 1e-5, 1e-4, 1e-2, 1.0])
def test_channels_that_differ_more_from_each_other_than_within(search: Search, varying: float, seed: int) -> None:
    query, neighbours = with_offsets(varying, seed)
    found, _ = search(query, neighbours, kappa=3)
    expected, _ = reference.search_patches(query, neighbours, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("varying", [1e-7, 1e-6, 1e-4])
def test_bounds_finds_what_pyramid_does_bit_for_bit(monkeypatch: pytest.MonkeyPatch, varying: float) -> None:
    monkeypatch.setattr(bounds, "WORTH", 0)
    for seed in range(8):
        query, neighbours = with_offsets(varying, seed, 9)
        found, expected = (sf.search_patches(query, neighbours, 4, engine=one) for one in ("bounds", "pyramid"))
        np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [0.0, 0.7, 7.0, -1e4])
def test_constant_channels_are_at_zero(search: Search, value: float, dtype: type) -> None:
    rng = np.random.default_rng(0)
    means = [value * rng.standard_normal((channels, 1, 1)).astype(dtype) for channels, _, _ in SHAPES]
    query = [np.broadcast_to(one, shape).astype(dtype) for one, shape in zip(means, SHAPES, strict=True)]
    neighbours = [np.stack([level] * 3) for level in query]
    found, matches = search(query, neighbours, kappa=2)
    assert (found == 0).all()
    assert (matches[..., 0] == 0).all()


@pytest.mark.parametrize(("query_size", "size"), [(1e-20, 1), (1e-15, 1e10), (1, 1e-20), (1e-12, 1e-12), (1e15, 1)])
def test_queries_far_smaller_or_larger_than_their_neighbours(search: Search, query_size: float, size: float) -> None:
    rng = np.random.default_rng(1)
    query = [(query_size * rng.standard_normal(shape)).astype(np.float32) for shape in SHAPES]
    neighbours = [(size * rng.standard_normal((3, *shape))).astype(np.float32) for shape in SHAPES]
    found, _ = search(query, neighbours)
    expected, _ = reference.search_patches(query, neighbours, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [3e-39, 1e-40])
def test_values_whose_squares_are_no_float32_are_at_zero(search: Search, size: float) -> None:
    rng = np.random.default_rng(2)
    query = [(size * rng.standard_normal(shape)).astype(np.float32) for shape in SHAPES]
    neighbours = [(size * rng.standard_normal((3, *shape))).astype(np.float32) for shape in SHAPES]
    assert (search(query, neighbours)[0] == 0).all()


@pytest.mark.parametrize("side", [2, 7, 64])
@pytest.mark.parametrize("distinct", [False, True])
def test_patches_that_float32_cannot_tell_apart_are_in_the_order_of_their_places(side: int, distinct: bool) -> None:
    """Whether they are compared in one pass or in several."""
    level = np.full((2, 2, side, side), 9, np.float32)
    for first, at in ((1.7e-4, (0, 0)), (1.3e-4, (0, 1)), (1e-4, (side - 1, side - 1))):
        level[:, :, at[0], at[1]] = 1, first
    [(sq_distances, matches)] = sf.search_levels(
        [np.zeros((2, side, side), np.float32)], [level], 2, distinct=distinct, engine="auto"
    )
    assert (sq_distances == 1).all()
    expected = [[0, 0, 0], [1, 0, 0]] if distinct else [[0, 0, 0], [0, 0, 1]]
    assert (matches == expected).all()
