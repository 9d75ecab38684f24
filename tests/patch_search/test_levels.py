"""What every patch search engine takes and gives: arrays and tensors, bad features and options, checked levels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import DTypeLike

from spade_faiss.arrays import all_finite
from spade_faiss.errors import FeatureError, OptionError
from spade_faiss.options import SearchOptions
from spade_faiss.patch_search.search import search_finite, search_patches
from spade_faiss.system import devices
from tests.helpers.engines import ENGINES, PYRAMIDS, Search, as_tensors, backends, searching
from tests.helpers.patches import Levels, assert_same, assert_says, make

# The pyramid engine is torch's on a GPU; the flat one is FAISS's, and prepares its patches by torch.
GPU = {"pyramid": [pytest.mark.cuda], "flat": [pytest.mark.cuda, pytest.mark.faiss_gpu]}


@pytest.fixture(scope="module", params=backends(GPU))
def search(request: pytest.FixtureRequest) -> Iterator[Search]:
    """`search_patches` bound to one engine on one device."""
    with searching(*request.param) as bound:
        yield bound


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
    monkeypatch.setattr("spade_faiss.patch_search.search.torch_device", lambda _: "cpu:0")
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
    "query-nan": case(with_value(np.nan, 1), nothing, "NaN", "query"),
    "query-infinite": case(with_value(-np.inf, 0), nothing, "inf", "query"),
    "query-infinite-both-ways": case(with_both_infinities, nothing, "inf", "query"),
    "neighbours-nan": case(nothing, with_value(np.nan, 0), "NaN", "neighbour"),
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
    assert_says(caught.value, *names)


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
    assert_says(caught.value, *names)


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
    assert_same(search_finite(query, neighbours, options), expected)
    assert scanned == PYRAMIDS["indivisible"]  # the query


def test_checked_levels_have_their_shapes_and_kappa_checked() -> None:
    query, neighbours = make(GOOD_SHAPES, 2)
    with pytest.raises(OptionError, match="kappa: expected 1 to 40"):
        search_finite(query, neighbours, SearchOptions(kappa=41))
    with pytest.raises(FeatureError, match="level 1: expected"):
        search_finite(query, [neighbours[0], neighbours[1][:1]], SearchOptions())
    query[0].flat[0] = np.nan
    with pytest.raises(FeatureError, match="level 0 of the query: expected finite"):
        search_finite(query, neighbours, SearchOptions())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_escaped_the_checks_do_not_pass_for_distances(engine: Any, value: float) -> None:
    query, neighbours = make(GOOD_SHAPES, 2)
    neighbours[0][:] = value
    with pytest.raises(FeatureError, match="expected values whose squared distances fit float32"):
        search_finite(query, neighbours, SearchOptions(engine=engine, device="cpu"))
