"""Each level searched apart, and cosine, by every engine: each must equal the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike

from spade_faiss.arrays import all_finite
from spade_faiss.errors import DeviceError, FeatureError, OptionError
from spade_faiss.options import SearchOptions
from spade_faiss.patch_search.search import search_finite, search_levels, search_levels_finite, search_patches
from tests import reference
from tests.helpers.patches import GRIDS, assert_equals_oracle, assert_same, assert_says, make, make_ties

ENGINES = ["flat", "pyramid", "bounds"]

pytestmark = pytest.mark.usefixtures("float32_products")

Search = Callable[..., list[tuple[Any, Any]]]

GRIDS = {**GRIDS, "coarsest-first": [(4, 2, 3), (3, 6, 5), (2, 3, 9)]}
GPU = {"pyramid": [pytest.mark.cuda], "flat": [pytest.mark.cuda, pytest.mark.faiss_gpu]}


@pytest.fixture(
    scope="module",
    params=[
        *ENGINES,
        "torch",
        "tensors",
        *(pytest.param(f"{name}-{kind}", marks=GPU[name]) for name in GPU for kind in ("cuda", "cuda-tensors")),
    ],
)
def search(request: pytest.FixtureRequest) -> Search:
    """`search_levels` by one engine."""
    name = request.param
    device = "cuda" if "cuda" in name else "cpu"
    engine = name.partition("-")[0] if name.partition("-")[0] in ENGINES else "pyramid"

    def bound(query: Sequence[Any], neighbours: Sequence[Any], **options: Any) -> list[tuple[Any, Any]]:
        options = {"engine": engine, "device": device, **options}
        arrays = isinstance(query[0], np.ndarray)
        if name.endswith("tensors") and arrays:
            sides = query, neighbours
            query, neighbours = ([torch.tensor(level, device=device) for level in side] for side in sides)
        with pytest.MonkeyPatch.context() as patch:
            if name in ("torch", "tensors"):  # what runs on a GPU; torch has the CPU by this name
                patch.setattr("spade_faiss.patch_search.search.torch_device", lambda _: "cpu:0")
            found = search_levels(query, neighbours, **options)
        if arrays and isinstance(found[0][0], torch.Tensor):
            return [(sq_distances.cpu().numpy(), matches.cpu().numpy()) for sq_distances, matches in found]
        return found

    return bound


def assert_each_equals_oracle(
    found: list[tuple[Any, Any]], query: Any, neighbours: Any, kappa: int, **how: Any
) -> None:
    assert len(found) == len(query)
    for one, own, others in zip(found, query, neighbours, strict=True):
        assert_equals_oracle(one, [own], [others], kappa, **how)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("name", GRIDS)
def test_equals_oracle(search: Search, name: str, metric: str, dtype: DTypeLike) -> None:
    query, neighbours = make(GRIDS[name], 3, dtype)
    found = search(query, neighbours, kappa=3, metric=metric)
    assert_each_equals_oracle(found, query, neighbours, 3, metric=metric)
    one = search(query, neighbours, metric=metric)
    for (sq_distances, matches), (best, at) in zip(found, one, strict=True):
        np.testing.assert_allclose(best[..., 0], sq_distances[..., 0], rtol=1e-6)
        np.testing.assert_array_equal(at[..., 0, :], matches[..., 0, :])


@settings(max_examples=20)
@given(data=st.data())
def test_equals_oracle_at_any_shape(search: Search, data: st.DataObject) -> None:
    channels, sides = st.integers(1, 9), st.integers(1, 6)
    shapes = data.draw(st.lists(st.tuples(channels, sides, sides), min_size=1, max_size=3))
    k = data.draw(st.integers(1, 4))
    kappa = data.draw(st.integers(1, k * min(h * w for _, h, w in shapes)))
    metric = data.draw(st.sampled_from(["l2", "cosine"]))
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    query, neighbours = make(shapes, k, dtype, seed=data.draw(st.integers(0, 2**16)))
    found = search(query, neighbours, kappa=kappa, metric=metric)
    assert_each_equals_oracle(found, query, neighbours, kappa, metric=metric)


@pytest.mark.parametrize("kappa", [1, 4])
def test_ties_are_in_the_order_of_neighbour_row_column(search: Search, kappa: int) -> None:
    query, neighbours = make_ties([(1, 2, 3), (2, 5, 4)], 5)
    expected = reference.search_levels(query, neighbours, kappa)
    for found, right in zip(search(query, neighbours, kappa=kappa), expected, strict=True):
        assert_same(found, right)


def test_levels_are_matched_apart(search: Search) -> None:
    # each neighbour is right in one level and off by 10 in the other; concatenated, both would be at 100
    query = [np.zeros((1, 1, 1), np.float32)] * 2
    fine = np.array([0, 10], np.float32).reshape(2, 1, 1, 1)
    found = search(query, [fine, 10 - fine])
    assert [sq_distances.item() for sq_distances, _ in found] == [0, 0]
    assert [matches[0, 0, 0].tolist() for _, matches in found] == [[0, 0, 0], [1, 0, 0]]


def test_a_level_alone_is_a_pyramid_of_one_level() -> None:
    query, neighbours = make(GRIDS["indivisible"], 3)
    for metric in ("l2", "cosine"):
        found = search_levels(query, neighbours, 2, metric=metric)
        for number, each in enumerate(found):
            alone = search_patches(query[number : number + 1], neighbours[number : number + 1], 2, metric=metric)
            assert_same(each, alone)


# --- cosine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_norms_of_concatenated_levels_are_over_all_of_them(engine: str, dtype: DTypeLike) -> None:
    query, neighbours = make([(4, 5, 3), (3, 5, 3)], 3, dtype)
    query[1][:], neighbours[1][:] = query[1] * 30, neighbours[1] * 30
    found = search_patches(query, neighbours, 3, engine, metric="cosine")
    assert_equals_oracle(found, query, neighbours, 3, "cosine")


@pytest.mark.parametrize("kappa", [1, 13])
def test_zero_vectors_are_at_one_from_everything(search: Search, kappa: int) -> None:
    query, neighbours = make([(4, 3, 4)], 3)
    query[0][:, 1, 2] = 0
    [found] = search(query, neighbours, kappa=kappa, metric="cosine")
    assert_equals_oracle(found, query, neighbours, kappa, "cosine")
    neighbours[0][:, :, 1, 2] = neighbours[0][0, :, 0] = 0
    [found] = search(query, neighbours, kappa=kappa, metric="cosine")
    assert_equals_oracle(found, query, neighbours, kappa, "cosine")
    assert (found[0][1, 2] == 1).all()
    np.testing.assert_array_equal(found[1][1, 2] @ [12, 4, 1], np.arange(kappa))
    [(distances, matches)] = search(query, [np.zeros_like(neighbours[0])], kappa=kappa, metric="cosine")
    assert (distances == 1).all()
    assert (matches @ [12, 4, 1] == np.arange(kappa)).all()


def test_directions_alone_count(search: Search) -> None:
    query, neighbours = make([(5, 4, 3)], 3, np.float16)
    [expected] = search(query, neighbours, kappa=2, metric="cosine")
    lengths = np.float16(2) ** np.random.default_rng(0).integers(-3, 4, (3, 1, 4, 3)).astype(np.float16)
    [found] = search([query[0] * lengths[0]], [neighbours[0] * lengths], kappa=2, metric="cosine")
    assert_same(found, expected)
    [(same, matches)] = search([neighbours[0][1]], neighbours, metric="cosine")
    assert (same == 0).all()
    assert (matches[..., 0, 0] == 1).all()
    assert (search(query, [-query[0][None]], kappa=12, metric="cosine")[0][0][..., -1] <= 2).all()


@pytest.mark.parametrize(("dtype", "scale"), [(np.float32, 1e-42), (np.float32, 1e37), (np.float64, 1e-200)])
def test_lengths_of_any_size(search: Search, dtype: DTypeLike, scale: float) -> None:
    query, neighbours = make([(5, 4, 3)], 3, dtype, scale=scale)
    assert_each_equals_oracle(
        search(query, neighbours, kappa=2, metric="cosine"), query, neighbours, 2, metric="cosine"
    )


def test_cosine_of_concatenated_levels_of_different_grids() -> None:
    query, neighbours = make(GRIDS["halved"], 3)
    search_levels(query, neighbours, metric="cosine")
    for call in (
        lambda: search_patches(query, neighbours, metric="cosine"),
        lambda: search_finite(query, neighbours, SearchOptions(metric="cosine")),
    ):
        with pytest.raises(OptionError) as caught:
            call()
        assert_says(caught.value, "^metric: expected l2", "cosine", r"\(8, 6\) and \(4, 3\)", "search by level$")


# --- arrays in, arrays out; levels that are known to be finite -------------------------------------------------------


def test_tensors_in_tensors_out(search: Search) -> None:
    query, neighbours = make(GRIDS["coarsest-first"], 3, np.float16)
    for metric in ("l2", "cosine"):
        expected = search(query, neighbours, kappa=2, metric=metric)
        tensors = [[torch.from_numpy(level) for level in side] for side in (query, neighbours)]
        for found, right in zip(search(*tensors, kappa=2, metric=metric), expected, strict=True):
            assert all(isinstance(part, torch.Tensor) for part in found)
            assert_same([part.cpu().numpy() for part in found], right)
            assert all(isinstance(part, np.ndarray) for part in right)


@pytest.mark.parametrize("metric", [None, "l2", "cosine"])
@pytest.mark.parametrize("window", [None, "all", 1])
def test_checked_levels_are_searched_without_a_scan(metric: Any, window: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    query, neighbours = make(GRIDS["coarsest-first"], 3)
    expected = search_levels(query, neighbours, 2, metric=metric or "l2", window=window)
    scanned: list[tuple[int, ...]] = []

    def noted(array: Any) -> bool:
        scanned.append(array.shape)
        return all_finite(array)

    monkeypatch.setattr("spade_faiss.patch_search.levels._is_finite", noted)
    options = SearchOptions(kappa=2, metric=metric, window=window, device="cpu")
    for found, right in zip(search_levels_finite(query, neighbours, options), expected, strict=True):
        assert_same(found, right)
    assert scanned == GRIDS["coarsest-first"]  # the query


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"kappa": 13}, ["^kappa: expected 1 to 12, the number of gallery patches", "found 13"]),  # of the coarsest
        ({"kappa": 0}, ["^kappa: expected 1 to ", "found 0"]),
        ({"kappa": 1.5}, ["^kappa: expected 1 to ", "found 1.5"]),
        ({"engine": "fast"}, ["^engine: expected auto or flat or pyramid or bounds, found 'fast'"]),
        ({"metric": "l1"}, ["^metric: expected l2 or cosine, found 'l1'"]),
        ({"metric": None}, ["^metric: expected l2 or cosine, found None"]),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], names: list[str]) -> None:
    query, neighbours = make([(4, 2, 3), (3, 6, 5)], 2)
    with pytest.raises(OptionError) as caught:
        search_levels(query, neighbours, **options)
    assert_says(caught.value, *names)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("metric", "l1", "l2 or cosine"),
        ("metric", "", "l2 or cosine"),
        ("matching", "apart", "concatenated or by_level"),
    ],
)
def test_bad_search_options(name: str, value: Any, expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        SearchOptions(**{name: value})
    assert_says(caught.value, f"^{name}: expected {expected}, found {value!r}$")


def test_bad_device() -> None:
    query, neighbours = make([(4, 2, 3)], 2)
    for window in (None, 1):
        with pytest.raises(DeviceError, match="expected auto, cpu, cuda or cuda:N, found 'tpu'"):
            search_levels(query, neighbours, device="tpu", window=window)


def test_bad_levels() -> None:
    query, neighbours = make([(4, 2, 3), (3, 6, 5)], 2)
    bad = [level.copy() for level in neighbours]
    bad[1].flat[7] = np.nan
    for levels, names in (
        ((query, bad), ["^level 1 of the neighbours: expected finite values, found NaN or infinity$"]),
        ((query, neighbours[:1]), ["^levels: expected as many", "found 1 and 2"]),
        ((query[::-1], neighbours), ["^level 0: expected", r"\(3, 6, 5\) and \(2, 4, 2, 3\)$"]),
        (
            ([level.astype(int) for level in query], neighbours),
            ["^level 0 of the query: expected floats, found int64$"],
        ),
        (([], []), ["^levels: expected as many"]),
    ):
        with pytest.raises(FeatureError) as caught:
            search_levels(*levels)
        assert_says(caught.value, *names)
