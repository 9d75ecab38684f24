"""The numbers of every patch search engine, on every device: each must equal the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike
from xxhash import xxh3_128_digest

from spade_faiss.patch_search import cost_model
from spade_faiss.patch_search.search import search_patches
from tests import reference
from tests.helpers.engines import PYRAMIDS, Search, backends, searching
from tests.helpers.patches import Levels, assert_same, make, make_ties

# The pyramid engine is torch's on a GPU; the flat one is FAISS's, and prepares its patches by torch.
GPU = {"pyramid": [pytest.mark.cuda], "flat": [pytest.mark.cuda, pytest.mark.faiss_gpu]}


@pytest.fixture(scope="module", params=backends(GPU))
def search(request: pytest.FixtureRequest) -> Iterator[Search]:
    """`search_patches` bound to one engine on one device."""
    with searching(*request.param) as bound:
        yield bound


ORACLE: dict[Any, tuple[np.ndarray, float]] = {}  # by the features, as every back end is asked the same


def oracle(query: Levels, neighbours: Levels, kappa: int) -> tuple[np.ndarray, float]:
    """(h, w, kappa) squared distances, and the mean of those to all patches."""
    levels = [np.ascontiguousarray(level) for level in (*query, *neighbours)]
    key = kappa, *((level.shape, level.dtype.str, xxh3_128_digest(level.tobytes())) for level in levels)
    if key not in ORACLE:
        patches = len(neighbours[0]) * query[0].shape[1] * query[0].shape[2]
        everything, _ = reference.search_patches(query, neighbours, patches)
        ORACLE[key] = everything[..., :kappa].copy(), everything.mean()
    return ORACLE[key]


def assert_equals_oracle(found: tuple[Any, Any], query: Levels, neighbours: Levels, kappa: int) -> None:
    """Equal distances, and matches that have these distances: which of two near-ties is found is left open."""
    sq_distances, matches = found
    k, (height, width) = len(neighbours[0]), query[0].shape[1:]
    assert sq_distances.shape == (height, width, kappa)
    assert sq_distances.dtype == np.float32
    assert matches.shape == (height, width, kappa, 3)
    assert matches.dtype == np.int32
    expected, scale = oracle(query, neighbours, kappa)
    # float32 arithmetic rounds at the scale of all distances, however small the least of them is
    tolerance = 1e-4 * expected + 1e-6 * scale
    assert (np.abs(sq_distances - expected) <= tolerance).all()
    assert (sq_distances >= 0).all()
    assert (np.diff(sq_distances, axis=-1) >= 0).all()

    assert (matches >= 0).all()
    assert (matches < [k, height, width]).all()
    positions = np.sort(matches @ [height * width, width, 1], axis=-1)
    assert (np.diff(positions, axis=-1) > 0).all()  # no patch is matched twice
    gallery = np.array([reference.patch_features([level[n] for level in neighbours]) for n in range(k)])
    matched = gallery[matches[..., 0], matches[..., 1], matches[..., 2]]
    true = ((matched - reference.patch_features(query)[:, :, None]) ** 2).sum(axis=-1)
    assert (np.abs(true - expected) <= tolerance).all()


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("kappa", [1, 3])
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("shapes", [pytest.param(shapes, id=name) for name, shapes in PYRAMIDS.items()])
def test_equals_oracle(
    search: Search, shapes: list[tuple[int, int, int]], k: int, kappa: int, dtype: DTypeLike
) -> None:
    query, neighbours = make(shapes, k, dtype)
    kappa = min(kappa, k * shapes[0][1] * shapes[0][2])
    assert_equals_oracle(search(query, neighbours, kappa=kappa), query, neighbours, kappa)


@pytest.mark.slow
@settings(max_examples=40)
@given(data=st.data())
def test_equals_oracle_at_any_shape(search: Search, data: st.DataObject) -> None:
    channels, sides = st.integers(1, 9), st.integers(1, 7)
    shapes = [(data.draw(channels), data.draw(sides), data.draw(sides))]
    _, height, width = shapes[0]
    coarser = st.tuples(channels, st.integers(1, height), st.integers(1, width))
    shapes += data.draw(st.lists(coarser, max_size=3))
    k = data.draw(st.integers(1, 6))
    patches = k * height * width
    kappa = data.draw(st.one_of(st.integers(1, min(4, patches)), st.just(patches)))
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    query, neighbours = make(shapes, k, dtype, seed=data.draw(st.integers(0, 2**16)))
    block_bytes = data.draw(st.sampled_from([1, 3000, 2**30]))
    found = search(query, neighbours, kappa=kappa, block_bytes=block_bytes)
    assert_equals_oracle(found, query, neighbours, kappa)


def test_equals_oracle_by_default() -> None:
    query, neighbours = make(PYRAMIDS["indivisible"], 3)
    assert_equals_oracle(search_patches(query, neighbours), query, neighbours, 1)


@pytest.mark.parametrize(
    ("shapes", "k", "kappa", "expected"),
    [
        ([(256, 56, 56), (512, 28, 28), (1024, 14, 14)], 50, 1, "pyramid"),
        ([(24, 56, 56), (40, 28, 28), (112, 14, 14)], 50, 5, "pyramid"),
        ([(24, 56, 56), (40, 28, 28), (112, 14, 14)], 5, 300, "flat"),  # where measuring matches takes longest
        ([(6, 16, 16), (6, 8, 8)], 1, 1, "flat"),  # where there is little to do
        ([(384, 16, 16)] * 3, 10, 5, "flat"),  # where nothing is coarser
    ],
)
def test_auto_takes_the_faster(
    monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, int, int]], k: int, kappa: int, expected: str
) -> None:
    assert cost_model.faster(shapes, k, kappa) == expected
    query, neighbours = make(PYRAMIDS["halved"], 2)
    monkeypatch.setattr("spade_faiss.patch_search.search.faster", lambda *_: expected)
    assert_same(search_patches(query, neighbours, device="cpu"), search_patches(query, neighbours, 1, expected, "cpu"))


def test_kappa_is_one_unless_given(search: Search) -> None:
    query, neighbours = make(PYRAMIDS["halved"], 2)
    assert_same(search(query, neighbours), search(query, neighbours, kappa=1))


def test_every_patch_of_the_gallery_can_be_asked_for(search: Search) -> None:
    query, neighbours = make(PYRAMIDS["halved"], 3)
    assert_equals_oracle(search(query, neighbours, kappa=3 * 8 * 6), query, neighbours, 3 * 8 * 6)


def test_many_channels(search: Search) -> None:
    query, neighbours = make([(700, 4, 3), (900, 2, 2)], 2)
    assert_equals_oracle(search(query, neighbours, kappa=2), query, neighbours, 2)


def test_float16_whose_squares_do_not_fit_float16(search: Search) -> None:
    query, neighbours = make(PYRAMIDS["indivisible"], 3, np.float16, scale=3000)
    assert_equals_oracle(search(query, neighbours), query, neighbours, 1)


def test_float64_and_query_and_neighbours_of_different_dtypes(search: Search) -> None:
    query, neighbours = make(PYRAMIDS["indivisible"], 3, np.float64)
    assert_equals_oracle(search(query, neighbours), query, neighbours, 1)
    stored = [level.astype(np.float16) for level in neighbours]
    assert_equals_oracle(search(query, stored), query, stored, 1)
    wide = [level.astype(np.longdouble) for level in query]
    assert_same(search(wide, stored), search(query, stored))
    swapped = [level.astype(level.dtype.newbyteorder()) for level in query]
    assert_same(search(swapped, stored), search(query, stored))


@pytest.mark.parametrize("shapes", [[(6, 5, 8)], PYRAMIDS["indivisible"]], ids=["one-level", "indivisible"])
def test_query_that_is_one_of_the_neighbours_is_at_zero(search: Search, shapes: list[tuple[int, int, int]]) -> None:
    _, neighbours = make(shapes, 4, scale=50)
    sq_distances, matches = search([level[2].copy() for level in neighbours], neighbours)
    assert (sq_distances == 0).all()
    assert (matches[..., 0, 0] == 2).all()
    rows, columns = np.indices(sq_distances.shape[:2])
    np.testing.assert_array_equal(matches[..., 0, 1], rows)
    np.testing.assert_array_equal(matches[..., 0, 2], columns)


@pytest.mark.parametrize("channels", [8, 64])
def test_query_among_near_copies_of_it_is_at_zero(search: Search, channels: int) -> None:
    # a still camera: the neighbours differ in the last digits of float16, by less than |a|^2 + |b|^2 - 2ab resolves
    rng = np.random.default_rng(0)
    frames = np.abs(rng.normal(size=(channels, 7, 8))) + 1e-4 * rng.normal(size=(10, channels, 7, 8))
    neighbours = [frames.astype(np.float16)]
    assert (search([neighbours[0][6]], neighbours)[0] == 0).all()


@pytest.mark.parametrize("kappa", [1, 3])
@pytest.mark.parametrize("shapes", [[(6, 5, 8)], PYRAMIDS["indivisible"]], ids=["one-level", "indivisible"])
def test_small_differences_on_a_large_offset(search: Search, shapes: list[tuple[int, int, int]], kappa: int) -> None:
    # |a|^2 + |b|^2 - 2ab in float32 would be off by about 1 here, where the distances are about 0.001
    query, neighbours = make(shapes, 3, np.float64, scale=0.01)
    query = [(1000 + level).astype(np.float32) for level in query]
    neighbours = [(1000 + level).astype(np.float32) for level in neighbours]
    assert_equals_oracle(search(query, neighbours, kappa=kappa), query, neighbours, kappa)


# --- ties and blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [None, 1, 1000, 5000])
@pytest.mark.parametrize("kappa", [1, 2, 7])
@pytest.mark.parametrize("shapes", [[(2, 5, 7)], [(1, 6, 4), (1, 3, 2)]], ids=["one-level", "halved"])
def test_ties_are_in_the_order_of_neighbour_row_column(
    search: Search, shapes: list[tuple[int, int, int]], kappa: int, block_bytes: int | None
) -> None:
    query, neighbours = make_ties(shapes, 5)
    options = {} if block_bytes is None else {"block_bytes": block_bytes}
    expected = reference.search_patches(query, neighbours, kappa)
    assert_same(search(query, neighbours, kappa=kappa, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [1, 5, 110])
def test_ties_in_a_gallery_of_many_patches(search: Search, kappa: int) -> None:
    # FAISS goes through the gallery in pieces of 1024, and for 100 or more candidates in another way than for fewer
    query, neighbours = make_ties([(1, 20, 19)], 4)
    assert_same(search(query, neighbours, kappa=kappa), reference.search_patches(query, neighbours, kappa))


@pytest.mark.parametrize("block_bytes", [1, 2**30])
@pytest.mark.parametrize("kappa", [1, 3])
@pytest.mark.parametrize("channels", [8, 300])
def test_where_an_image_is_repeated_its_first_copy_is_matched(
    search: Search, channels: int, kappa: int, block_bytes: int
) -> None:
    query, neighbours = make([(channels, 6, 7)], 7)
    neighbours = [np.repeat(neighbours[0][:1], 7, axis=0)]
    expected = reference.search_patches(query, neighbours, kappa)
    np.testing.assert_array_equal(expected[1][..., 0], np.broadcast_to(np.arange(kappa), (6, 7, kappa)))
    found = search(query, neighbours, kappa=kappa, block_bytes=block_bytes)
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("kappa", [1, 5, 36])
@pytest.mark.parametrize("block_bytes", [1, 2**30])
def test_where_all_patches_are_equal_the_first_are_matched_in_order(
    search: Search, block_bytes: int, kappa: int
) -> None:
    query, neighbours = [np.zeros((2, 3, 4), np.float32)], [np.ones((3, 2, 3, 4), np.float32)]
    sq_distances, matches = search(query, neighbours, kappa=kappa, block_bytes=block_bytes)
    assert (sq_distances == 2).all()
    positions = matches @ [12, 4, 1]
    np.testing.assert_array_equal(positions, np.broadcast_to(np.arange(kappa), positions.shape))


@pytest.mark.parametrize("kappa", [1, 4])
def test_block_size_does_not_change_the_answer(search: Search, kappa: int) -> None:
    shapes = PYRAMIDS["indivisible"]
    query, neighbours = make(shapes, 7)
    whole = search(query, neighbours, kappa=kappa)
    one_neighbour = 4 * sum(shape[0] for shape in shapes) * 7 * 11
    for block_bytes in (1, one_neighbour, int(2.5 * one_neighbour), 2**40):
        assert_same(search(query, neighbours, kappa=kappa, block_bytes=block_bytes), whole)


# --- the mistakes of known re-implementations ------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 700, 2**30])
def test_the_tail_of_the_gallery_is_searched(search: Search, block_bytes: int) -> None:
    query, neighbours = [np.full((4, 3, 7), 9, np.float32)], make([(4, 3, 7)], 5)[1]
    neighbours[0][4, :, 2, 6] = 9
    sq_distances, matches = search(query, neighbours, block_bytes=block_bytes)
    assert (sq_distances == 0).all()
    assert (matches == [4, 2, 6]).all()


def test_other_positions_are_searched(search: Search) -> None:
    query = [np.arange(12, dtype=np.float32).reshape(1, 3, 4)]
    neighbours = [query[0][None, :, ::-1, ::-1].copy()]
    sq_distances, matches = search(query, neighbours)
    assert (sq_distances == 0).all()
    np.testing.assert_array_equal(matches[:, :, 0, 1], 2 - np.indices((3, 4))[0])
    np.testing.assert_array_equal(matches[:, :, 0, 2], 3 - np.indices((3, 4))[1])


@pytest.mark.parametrize("block_bytes", [1, 2**20])
def test_a_patch_whose_square_is_no_float32_hides_no_other(search: Search, block_bytes: int) -> None:
    query = [np.zeros((1, 1, 3), np.float32)]
    neighbours = [np.array([[[[5, 1e20, 4]]], [[[1e20, 3, 1]]]], np.float32)]
    sq_distances, matches = search(query, neighbours, kappa=2, block_bytes=block_bytes)
    assert sq_distances.tolist() == [[[1, 9]] * 3]
    assert matches.tolist() == [[[[1, 0, 2], [1, 0, 1]]] * 3]


def test_distances_are_squared(search: Search) -> None:
    query, neighbours = [np.zeros((2, 1, 1), np.float32)], [np.array([[[[3]], [[4]]]], np.float32)]
    assert search(query, neighbours)[0].item() == 25


def test_levels_are_concatenated_before_the_search(search: Search) -> None:
    # each neighbour is right in one level and off by 10 in the other; searched level by level, both would be at 0
    query = [np.zeros((1, 1, 1), np.float32)] * 2
    fine = np.array([0, 10], np.float32).reshape(2, 1, 1, 1)
    sq_distances, matches = search(query, [fine, 10 - fine], kappa=2)
    np.testing.assert_array_equal(sq_distances, [[[100, 100]]])
    np.testing.assert_array_equal(matches, [[[[0, 0, 0], [1, 0, 0]]]])


def test_features_are_upsampled_not_distances(search: Search) -> None:
    # on the finest grid the gallery's second level is 2, 3, 5, 6 and the query's 2.5, 3, 4, 4.5
    query = [np.zeros((1, 1, 4), np.float32), np.array([[[2.5, 4.5]]], np.float32)]
    neighbours = [np.zeros((1, 1, 1, 4), np.float32), np.array([[[[2, 6]]]], np.float32)]
    sq_distances, matches = search(query, neighbours)
    np.testing.assert_array_equal(sq_distances[0, :, 0], [0.25, 0, 1, 0.25])
    np.testing.assert_array_equal(matches[0, :, 0, 2], [0, 1, 1, 2])
