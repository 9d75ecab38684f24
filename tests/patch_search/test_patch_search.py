"""The conformance suite of every patch search engine, on every device: each must equal the oracle."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike
from xxhash import xxh3_128_digest

from spade_faiss.arrays import all_finite
from spade_faiss.errors import FeatureError, OptionError
from spade_faiss.options import SearchOptions
from spade_faiss.patch_search import bounds, bounds_plan, cost_model, pyramid
from spade_faiss.patch_search.search import search_checked, search_patches
from spade_faiss.patch_search.upsampling import as_tensor
from spade_faiss.system import devices
from tests import reference
from tests.helpers.patches import make, make_ties

ENGINES = ["flat", "pyramid", "bounds"]  # a new engine inherits the suite by its name here

Levels = list[np.ndarray]
Search = Callable[..., tuple[Any, Any]]

PYRAMIDS = {
    "one-level": [(6, 5, 8)],
    "one-patch": [(3, 1, 1)],
    "halved": [(4, 8, 6), (5, 4, 3)],
    "indivisible": [(3, 7, 11), (4, 5, 4), (5, 3, 2), (2, 1, 1)],
    "flat-rows": [(2, 1, 9), (3, 1, 4), (2, 1, 5)],  # a level may be larger than the one before it, not than the first
    "same-size": [(2, 5, 3), (3, 5, 3)],
}


# The pyramid engine is torch's on a GPU; the flat one is FAISS's, and prepares its patches by torch.
GPU = {"pyramid": [pytest.mark.cuda], "flat": [pytest.mark.cuda, pytest.mark.faiss_gpu]}


def backends() -> Iterator[Any]:
    """Each engine on each device, as (engine, device, variant of its arithmetic)."""
    variants = {
        "flat": ["", "blas"],
        "pyramid": ["float32", "bfloat16", "torch", "tensors"],
        "bounds": ["", "directed"],
    }
    for engine in ENGINES:
        for variant in variants[engine]:
            yield pytest.param((engine, "cpu", variant), id="-".join(filter(None, (engine, "cpu", variant))))
        for variant in ("", "tensors") if engine in GPU else ():
            name = "-".join(filter(None, (engine, "cuda", variant)))
            yield pytest.param((engine, "cuda", variant), id=name, marks=GPU[engine])


def as_tensors(levels: Sequence[Any], device: str) -> list[torch.Tensor]:
    """Tensors of what torch has no dtype for as well."""
    dtypes = [np.dtype(np.float64 if level.dtype == np.longdouble else level.dtype) for level in levels]
    native = [level.astype(dtype.newbyteorder("=")) for level, dtype in zip(levels, dtypes, strict=True)]
    return [as_tensor(level).to(device) for level in native]


@pytest.fixture(scope="module", params=backends())
def search(request: pytest.FixtureRequest) -> Iterator[Search]:
    """`search_patches` bound to one engine on one device."""
    engine, device, variant = request.param

    def bound(query_levels: Sequence[Any], neighbour_levels: Sequence[Any], **options: Any) -> tuple[Any, Any]:
        options = {"engine": engine, "device": device, **options}
        arrays = all(isinstance(level, np.ndarray) for level in (*query_levels, *neighbour_levels))
        if variant == "tensors" and arrays:
            tensors = as_tensors(query_levels, device), as_tensors(neighbour_levels, device)
            sq_distances, matches = search_patches(*tensors, **options)
            return sq_distances.cpu().numpy(), matches.cpu().numpy()
        return search_patches(query_levels, neighbour_levels, **options)

    with pytest.MonkeyPatch.context() as patch:
        if variant == "blas":  # what FAISS does at the size of real features, with other rounding
            patch.setattr(faiss.cvar, "distance_compute_blas_threshold", 1)
        elif device == "cpu" and variant in ("torch", "tensors"):  # what runs on a GPU; torch has the CPU by this name
            patch.setattr("spade_faiss.patch_search.search.search_device", lambda _: "cpu:0")
        elif variant == "directed":  # what it does where directions pay
            patch.setattr(bounds, "WORTH", -1)
            patch.setattr(bounds, "FIRST", 1)
            patch.setattr(bounds_plan, "COUNTS", (1, 2, 4))
            patch.setattr(bounds_plan, "EXPLAINED", 0)
            patch.setattr(bounds_plan, "MEASURE", 0)
            patch.setattr(bounds_plan, "MEASURE_CHANNEL", 0)
        elif variant in ("float32", "bfloat16"):  # what a machine does that multiplies bfloat16 no faster, or faster
            patch.setattr(pyramid, "bfloat16_pays", lambda: variant == "bfloat16")
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


def assert_same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


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


# --- arrays in, arrays out -------------------------------------------------------------------------------------------


def test_repeated_runs_are_bit_identical(search: Search) -> None:
    query, neighbours = make(PYRAMIDS["indivisible"], 5)
    first = search(query, neighbours, kappa=3)
    for _ in range(3):
        assert_same(search(query, neighbours, kappa=3), first)


def test_arrays_that_are_read_only_or_not_contiguous(search: Search) -> None:
    query, neighbours = make(PYRAMIDS["halved"], 3)
    expected = search(query, neighbours, kappa=2)
    for level in (*query, *neighbours):
        level.flags.writeable = False
    assert_same(search(query, neighbours, kappa=2), expected)
    strided = (
        [np.asfortranarray(level) for level in query],
        [np.repeat(level, 2, axis=3)[..., ::2] for level in neighbours],
    )
    assert_same(search(*strided, kappa=2), expected)
    backwards = [level[::-1, :, ::-1].copy()[::-1, :, ::-1] for level in query]  # negative strides: torch has none
    assert_same(search(backwards, neighbours, kappa=2), expected)
    assert_same(search(tuple(query), tuple(neighbours), kappa=2), expected)


def test_inputs_are_left_alone_and_results_are_writable(search: Search) -> None:
    query, neighbours = make(PYRAMIDS["halved"], 3)
    kept = [level.copy() for level in (*query, *neighbours)]
    sq_distances, matches = search(query, neighbours)
    sq_distances[...], matches[...] = -1, -1
    for level, before in zip((*query, *neighbours), kept, strict=True):
        np.testing.assert_array_equal(level, before)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_tensors_in_tensors_out(search: Search, dtype: DTypeLike) -> None:
    query, neighbours = make(PYRAMIDS["indivisible"], 3, dtype)
    tensors = [torch.from_numpy(level) for level in query], [torch.from_numpy(level) for level in neighbours]
    sq_distances, matches = search(*tensors, kappa=2)
    assert isinstance(sq_distances, torch.Tensor)
    assert isinstance(matches, torch.Tensor)
    assert (sq_distances.dtype, matches.dtype) == (torch.float32, torch.int32)
    assert_same((sq_distances.cpu().numpy(), matches.cpu().numpy()), search(query, neighbours, kappa=2))
    assert all(isinstance(array, np.ndarray) for array in search(query, neighbours))


def test_tensors_that_are_not_contiguous(search: Search) -> None:
    query, neighbours = make(PYRAMIDS["halved"], 3)
    last = [torch.from_numpy(level).contiguous(memory_format=torch.channels_last) for level in neighbours]
    turned = [torch.from_numpy(level).permute(2, 1, 0).contiguous().permute(2, 1, 0) for level in query]
    sq_distances, matches = search(turned, last)
    assert_same((sq_distances.cpu().numpy(), matches.cpu().numpy()), search(query, neighbours))


def test_neighbours_that_are_tensors_are_searched_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    query, neighbours = (as_tensors(levels, "cpu") for levels in make(PYRAMIDS["indivisible"], 3, np.float16))
    moved: list[tuple[int, ...]] = []

    def noted(levels: Sequence[Any]) -> list[Any]:
        moved.extend(tuple(level.shape) for level in levels)
        return devices.as_arrays(levels)

    for module in ("levels", "search"):
        monkeypatch.setattr(f"spade_faiss.patch_search.{module}.as_arrays", noted)
    monkeypatch.setattr("spade_faiss.patch_search.search.search_device", lambda _: "cpu:0")
    on_device = search_patches(query, neighbours, 2, "pyramid", "cpu:0")
    assert moved == PYRAMIDS["indivisible"]  # the query
    monkeypatch.undo()
    on_host = search_patches(query, neighbours, 2, "pyramid", "cpu")
    np.testing.assert_allclose(on_device[0], on_host[0], rtol=1e-5)


def test_tensors_that_numpy_has_no_dtype_for_and_that_have_gradients(search: Search) -> None:
    query, neighbours = (as_tensors(levels, "cpu") for levels in make(PYRAMIDS["halved"], 3))
    narrow = [[level.bfloat16().requires_grad_() for level in levels] for levels in (query, neighbours)]
    wide = [[level.detach().float().numpy() for level in levels] for levels in narrow]
    assert_same([part.cpu().numpy() for part in search(*narrow)], search(*wide))


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD_SHAPES = [(13, 4, 5), (17, 2, 3)]  # with K = 2: 40 patches


def reshaped(shape: tuple[int, ...], number: int = 1) -> Callable[[Levels], None]:
    """Put an array of ones of another shape in a level's place."""

    def change(levels: Levels) -> None:
        levels[number] = np.ones(shape, np.float32)

    return change


def with_value(value: float, number: int) -> Callable[[Levels], None]:
    def change(levels: Levels) -> None:
        levels[number].flat[-1] = value

    return change


def with_both_infinities(levels: Levels) -> None:
    """They cancel to NaN in a sum."""
    levels[0].flat[:2] = np.inf, -np.inf


def nothing(_: Levels) -> None:
    """Leave a side as it is."""


def as_torch(levels: Levels) -> None:
    levels[:] = [torch.from_numpy(level) for level in levels]


def last_as_torch(levels: Levels) -> None:
    levels[-1] = torch.from_numpy(levels[-1])


def case(
    query: Callable[[Levels], None], neighbours: Callable[[Levels], None], *names: str
) -> tuple[Callable[[Levels], None], Callable[[Levels], None], tuple[str, ...]]:
    return query, neighbours, names


BAD_FEATURES = {
    "query-nan": case(with_value(np.nan, 1), nothing, "nan", "query"),
    "query-infinite": case(with_value(-np.inf, 0), nothing, "inf", "query"),
    "query-infinite-both-ways": case(with_both_infinities, nothing, "inf", "query"),
    "neighbours-nan": case(nothing, with_value(np.nan, 0), "nan", "neighbour"),
    "neighbours-infinite": case(nothing, with_value(np.inf, 1), "inf", "neighbour"),
    "no-channels": case(reshaped((0, 2, 3)), reshaped((2, 0, 2, 3)), "0", "2", "3"),
    "no-rows": case(reshaped((17, 0, 3)), reshaped((2, 17, 0, 3)), "17", "0", "3"),
    "finest-has-no-columns": case(reshaped((13, 4, 0), 0), reshaped((2, 13, 4, 0), 0), "13", "4", "0"),
    "no-levels": case(list.clear, list.clear, "level"),
    "query-has-fewer-levels": case(list.pop, nothing, "1", "2"),
    "neighbours-have-fewer-levels": case(nothing, list.pop, "1", "2"),
    "channels-differ": case(reshaped((19, 2, 3)), nothing, "19", "17"),
    "rows-differ": case(nothing, reshaped((2, 17, 1, 3)), r"1\D+3", r"2\D+3"),
    "columns-differ": case(nothing, reshaped((2, 13, 4, 6), 0), "5", "6"),
    "second-is-taller-than-finest": case(reshaped((17, 5, 3)), reshaped((2, 17, 5, 3)), r"5\D+3", r"4\D+5"),
    "second-is-wider-than-finest": case(reshaped((17, 2, 6)), reshaped((2, 17, 2, 6)), r"2\D+6", r"4\D+5"),
    "no-neighbours": case(nothing, lambda levels: levels.__setitem__(slice(None), [a[:0] for a in levels]), "0"),
    "k-differs-between-levels": case(nothing, reshaped((3, 17, 2, 3)), "3", "2"),
    "query-has-too-many-dimensions": case(reshaped((1, 17, 2, 3)), nothing, "query"),
    "query-has-too-few-dimensions": case(reshaped((4, 5), 0), nothing, "query"),
    "neighbours-have-too-few-dimensions": case(nothing, reshaped((17, 2, 3)), "neighbour"),
    "query-numpy-neighbours-torch": case(nothing, as_torch, "numpy|ndarray", "torch|tensor"),
    "query-torch-neighbours-numpy": case(as_torch, nothing, "numpy|ndarray", "torch|tensor"),
    "mixed-within-the-query": case(last_as_torch, nothing, "numpy|ndarray", "torch|tensor"),
}


def assert_says(message: str, *names: str) -> None:
    """One line that names each: a number by itself, anything else as a pattern."""
    assert "\n" not in message
    for name in names:
        pattern = rf"\b{name}\b" if name.isdigit() else name
        assert re.search(pattern, message, re.IGNORECASE), f"{name!r} is not in {message!r}"


@pytest.mark.parametrize(("query_change", "neighbours_change", "names"), BAD_FEATURES.values(), ids=BAD_FEATURES.keys())
def test_bad_features(
    search: Search,
    query_change: Callable[[Levels], None],
    neighbours_change: Callable[[Levels], None],
    names: tuple[str, ...],
) -> None:
    query, neighbours = make(GOOD_SHAPES, 2)
    search(query, neighbours)  # so that what is refused is the change
    query_change(query)
    neighbours_change(neighbours)
    with pytest.raises(FeatureError) as caught:
        search(query, neighbours)
    assert_says(str(caught.value), *names)


def as_integers(levels: Levels) -> None:
    levels[1] = levels[1].astype(np.int32)


@pytest.mark.parametrize(
    ("query_change", "neighbours_change"),
    [change[:2] for change in BAD_FEATURES.values() if not {as_torch, last_as_torch} & {*change[:2]}]
    + [(as_integers, nothing), (nothing, as_integers)],
)
def test_bad_tensors_are_refused_in_the_words_for_arrays(
    query_change: Callable[[Levels], None], neighbours_change: Callable[[Levels], None]
) -> None:
    query, neighbours = make(GOOD_SHAPES, 2)
    query_change(query)
    neighbours_change(neighbours)
    messages = []
    for levels in ((query, neighbours), (as_tensors(query, "cpu"), as_tensors(neighbours, "cpu"))):
        with pytest.raises(FeatureError) as caught:
            search_patches(*levels)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"kappa": 41}, ["kappa", "41", "40"]),
        ({"kappa": 0}, ["kappa", "1", "0"]),
        ({"kappa": -3}, ["kappa", "1", "-3"]),
        ({"engine": "fast"}, ["engine", "fast", *ENGINES]),
    ],
    ids=str,
)
def test_bad_options(search: Search, options: dict[str, Any], names: list[str]) -> None:
    query, neighbours = make(GOOD_SHAPES, 2)
    with pytest.raises(OptionError) as caught:
        search(query, neighbours, **options)
    assert_says(str(caught.value), *names)


# --- levels that are known to be finite ------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("of", [list, lambda levels: as_tensors(levels, "cpu")], ids=["arrays", "tensors"])
def test_checked_levels_are_searched_without_a_scan(
    engine: Any, of: Callable[[Levels], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, neighbours = map(of, make(PYRAMIDS["indivisible"], 3))
    expected = search_patches(query, neighbours, 2, engine, "cpu", 1000)
    scanned: list[tuple[int, ...]] = []

    def noted(array: Any) -> bool:
        scanned.append(tuple(array.shape))
        return all_finite(np.asarray(array))

    monkeypatch.setattr("spade_faiss.patch_search.levels._is_finite", noted)
    options = SearchOptions(kappa=2, engine=engine, device="cpu", block_bytes=1000)
    assert_same(search_checked(query, neighbours, options), expected)
    assert scanned == PYRAMIDS["indivisible"]  # the query


def test_checked_levels_have_their_shapes_and_kappa_checked() -> None:
    query, neighbours = make(GOOD_SHAPES, 2)
    with pytest.raises(OptionError, match="kappa: expected 1 to 40"):
        search_checked(query, neighbours, SearchOptions(kappa=41))
    with pytest.raises(FeatureError, match="level 1: expected"):
        search_checked(query, [neighbours[0], neighbours[1][:1]], SearchOptions())
    query[0].flat[0] = np.nan
    with pytest.raises(FeatureError, match="level 0 of the query: expected finite"):
        search_checked(query, neighbours, SearchOptions())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_escaped_the_checks_do_not_pass_for_distances(engine: Any, value: float) -> None:
    query, neighbours = make(GOOD_SHAPES, 2)
    neighbours[0][:] = value
    with pytest.raises(FeatureError, match="expected values whose squared distances fit float32"):
        search_checked(query, neighbours, SearchOptions(engine=engine, device="cpu"))
