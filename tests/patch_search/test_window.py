"""The window engine, on the CPU and by torch: each must equal the oracle; and what a window means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike

from spade_faiss.errors import FeatureError, OptionError
from spade_faiss.options import SearchOptions
from spade_faiss.patch_search.gpu import search as pyramid_torch
from spade_faiss.patch_search.search import search_finite, search_levels, search_patches
from spade_faiss.patch_search.settings import SearchSettings, first_places
from spade_faiss.patch_search.window import search as engine
from tests import reference
from tests.helpers.patches import GRIDS, assert_equals_oracle, assert_same, assert_says, make, make_ties

pytestmark = pytest.mark.usefixtures("float32_products")

Search = Callable[..., tuple[Any, Any]]


@pytest.fixture(
    scope="module",
    params=[
        *("cpu", "threads", "torch", "tensors"),
        *(pytest.param(name, marks=pytest.mark.cuda) for name in ("cuda", "cuda-tensors")),
    ],
)
def search(request: pytest.FixtureRequest) -> Search:
    """`search_patches` by one variant of the window engine."""
    variant = request.param

    def bound(query: Sequence[Any], neighbours: Sequence[Any], **options: Any) -> tuple[Any, Any]:
        device = "cuda" if variant.startswith("cuda") else "cpu"
        options = {"device": device, **options}
        arrays = isinstance(query[0], np.ndarray)
        if variant.endswith("tensors") and arrays:
            sides = query, neighbours
            query, neighbours = ([torch.tensor(level, device=device) for level in side] for side in sides)
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            if variant in ("torch", "tensors"):  # what runs on a GPU; torch has the CPU by this name
                patch.setattr("spade_faiss.patch_search.search.torch_device", lambda _: "cpu:0")
            torch.set_num_threads(3 if variant == "threads" else 1)
            try:
                sq_distances, matches = search_patches(query, neighbours, **options)
            finally:
                torch.set_num_threads(threads)
        if arrays and isinstance(matches, torch.Tensor):
            return sq_distances.cpu().numpy(), matches.cpu().numpy()
        return sq_distances, matches

    return bound


def most(shapes: Sequence[tuple[int, int, int]], k: int, window: Any) -> int:
    """The number of candidates of a corner."""
    height, width = shapes[0][1:]
    rows, columns = reference.window_radii(window, (height, width))
    return k * min(height, rows + 1) * min(width, columns + 1)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("window", [0, 1, 3, 0.3])
@pytest.mark.parametrize("name", GRIDS)
def test_equals_oracle(search: Search, name: str, window: Any, dtype: DTypeLike) -> None:
    shapes = GRIDS[name]
    window = min(window, max(shapes[0][1:]) - 1)
    query, neighbours = make(shapes, 4, dtype)
    kappa = min(3, most(shapes, 4, window))
    found = search(query, neighbours, kappa=kappa, window=window)
    assert_equals_oracle(found, query, neighbours, kappa, window=window)
    one = search(query, neighbours, window=window)
    assert_same((one[0][..., 0], one[1][..., 0, :]), (found[0][..., 0], found[1][..., 0, :]))


@pytest.mark.parametrize("window", [0, 2, 0.2])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_cosine_equals_oracle(search: Search, window: Any, dtype: DTypeLike) -> None:
    query, neighbours = make([(4, 7, 5), (3, 7, 5)], 3, dtype)
    query[1][:], neighbours[1][:] = query[1] * 50, neighbours[1] * 50  # norms are over both levels
    found = search(query, neighbours, kappa=3, window=window, metric="cosine")
    assert_equals_oracle(found, query, neighbours, 3, "cosine", window)


@settings(max_examples=15)
@given(data=st.data())
def test_equals_oracle_at_any_shape(search: Search, data: st.DataObject) -> None:
    channels, sides = st.integers(1, 9), st.integers(1, 7)
    shapes = [(data.draw(channels), data.draw(sides), data.draw(sides))]
    _, height, width = shapes[0]
    metric = data.draw(st.sampled_from(["l2", "cosine"]))
    if metric == "l2" and data.draw(st.booleans()):
        shapes.append((data.draw(channels), data.draw(st.integers(1, height)), data.draw(st.integers(1, width))))
    k = data.draw(st.integers(1, 5))
    window = data.draw(st.one_of(st.integers(0, max(height, width) - 1), st.floats(0.01, 1)))
    kappa = data.draw(st.integers(1, most(shapes, k, window)))
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    query, neighbours = make(shapes, k, dtype, seed=data.draw(st.integers(0, 2**16)))
    found = search(query, neighbours, kappa=kappa, window=window, metric=metric)
    assert_equals_oracle(found, query, neighbours, kappa, metric, window)


@pytest.mark.parametrize("kappa", [1, 4])
@pytest.mark.parametrize("shapes", [[(2, 7, 5)], [(1, 4, 6)], [(2, 6, 4), (1, 3, 2)]], ids=str)
def test_ties_are_in_the_order_of_neighbour_row_column(search: Search, shapes: Any, kappa: int) -> None:
    query, neighbours = make_ties(shapes, 5)
    for window in (1, 2, 0.5):
        expected = reference.search_patches(query, neighbours, kappa, window=window)
        assert_same(search(query, neighbours, kappa=kappa, window=window), expected)


@pytest.mark.parametrize("kappa", [1, 3])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_where_an_image_is_repeated_its_first_copy_is_matched(search: Search, metric: str, kappa: int) -> None:
    query, neighbours = make([(300, 4, 5)], 6)
    neighbours = [np.repeat(neighbours[0][:1], 6, axis=0)]
    found = search(query, neighbours, kappa=kappa, window=1, metric=metric)
    np.testing.assert_array_equal(found[1][..., 0], np.broadcast_to(np.arange(kappa), (4, 5, kappa)))
    assert (found[0] == found[0][..., :1]).all()


def test_rounding_does_not_choose_among_equal_distances(search: Search) -> None:
    # the same values in another order of channels: float32 sums differ, the distances do not
    rng = np.random.default_rng(0)
    values = rng.normal(size=200).astype(np.float32)
    shuffled = [rng.permutation(values) for _ in range(3 * 4 * 5)]
    neighbours = np.array(shuffled).reshape(3, 4, 5, 200).transpose(0, 3, 1, 2)
    sq_distances, matches = search([np.zeros((200, 4, 5), np.float32)], [neighbours], kappa=2, window=1)
    assert (sq_distances == sq_distances[0, 0, 0]).all()
    expected = first_places(np.arange(20), 2, (4, 5), (1, 1))
    np.testing.assert_array_equal((matches @ [20, 5, 1]).reshape(20, 2), expected)


def test_constant_levels_match_the_first_candidates(search: Search) -> None:
    query, neighbours = [np.full((5, 3, 4), 0.1, np.float32)], [np.full((3, 5, 3, 4), 0.7, np.float32)]
    sq_distances, matches = search(query, neighbours, kappa=5, window=1)
    assert (sq_distances == sq_distances[0, 0, 0]).all()
    expected = first_places(np.arange(12), 5, (3, 4), (1, 1))
    np.testing.assert_array_equal((matches @ [12, 4, 1]).reshape(12, 5), expected)


def test_an_image_among_its_neighbours_is_at_zero(search: Search) -> None:
    for shapes, metric in (([(6, 5, 8), (3, 2, 3)], "l2"), ([(6, 5, 8)], "cosine")):
        _, neighbours = make(shapes, 4, np.float16, scale=50)
        sq_distances, matches = search([level[2] for level in neighbours], neighbours, window=1, metric=metric)
        assert (sq_distances == 0).all()
        assert (matches[..., 0, 0] == 2).all()
        np.testing.assert_array_equal(matches[..., 0, 1:], np.stack(np.indices((5, 8)), axis=-1))


@pytest.mark.parametrize("shapes", [[(6, 5, 8)], [(6, 5, 8), (4, 3, 3)]], ids=["one-level", "two-levels"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_small_differences_on_a_large_offset(search: Search, shapes: Any, dtype: DTypeLike) -> None:
    query, neighbours = make(shapes, 3, np.float64, scale=0.01)
    query, neighbours = ([(1000 + level).astype(dtype) for level in side] for side in (query, neighbours))
    found = search(query, neighbours, kappa=3, window=1)
    assert_equals_oracle(found, query, neighbours, 3, window=1)


@pytest.mark.parametrize("scale", [1e-30, 3e-23, 1e-17, 1e15])
def test_values_near_the_ends_of_float32(search: Search, scale: float) -> None:
    query, neighbours = make([(200, 5, 6)], 3, np.float32, scale=scale)
    expected = reference.search_patches(query, neighbours, 2, window=1)[0]
    found = search(query, neighbours, kappa=2, window=1)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1.5e-45)  # the least number above 0
    assert_equals_oracle(
        search(query, neighbours, kappa=2, window=1, metric="cosine"), query, neighbours, 2, "cosine", 1
    )


def test_bands_and_chunks_of_any_size(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    query, neighbours = make([(5, 9, 7)], 4)
    expected = search(query, neighbours, kappa=3, window=2)
    monkeypatch.setattr(engine, "TOGETHER_SUMS", 0)  # neighbour by neighbour
    for cells, sums in ((1, 2**17), (20, 2**17), (512, 1)):
        monkeypatch.setattr(engine, "BAND_CELLS", cells)
        monkeypatch.setattr(engine, "BAND_SUMS", sums)
        monkeypatch.setattr(pyramid_torch, "PART", cells * 700)
        monkeypatch.setattr(pyramid_torch, "VALUES", cells * 300)
        assert_same(search(query, neighbours, kappa=3, window=2), expected)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("channels", [3, 4, 32, 70])
def test_by_pieces_or_by_neighbours(
    metric: Any, dtype: DTypeLike, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As levels are stored, however many are compared together, or one neighbour loaded after the other."""
    query, neighbours = make([(channels, 6, 11)], 7, dtype)
    neighbours[0][3:, :, 2] = query[0][:, 2]  # exact matches, of which the first count
    neighbours[0][5, :, :, 4] = 0
    expected = reference.search_patches(query, neighbours, 3, metric=metric, window=1)
    sums = 66 * 9
    for together, pending in ((0, 0), (sums, 1), (3 * sums, 1), (3 * sums, 2**17), (2**16, 2**17)):
        monkeypatch.setattr(engine, "TOGETHER_SUMS", together)
        monkeypatch.setattr(engine, "PENDING", pending)
        found = search_patches(query, neighbours, 3, metric=metric, window=1, device="cpu")
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-7)
        assert_equals_oracle(found, query, neighbours, 3, metric, 1)


def test_levels_that_are_not_compared_as_they_are_stored() -> None:
    """Big-endian, strided and wide values, and several levels, are the same search."""
    query, neighbours = make([(9, 6, 7)], 5, np.float32)
    expected = search_patches(query, neighbours, 2, window=1)
    level = neighbours[0]
    for other in (
        level.astype(">f4"),
        level[:, ::-1].copy()[:, ::-1],
        level.astype(np.float64),
        level[..., ::-1][..., ::-1],
    ):
        assert_same(search_patches(query, [other], 2, window=1), expected)
    halves = [level[:, :4].copy(), level[:, 4:].copy()]
    found = search_patches([query[0][:4], query[0][4:]], halves, 2, window=1)
    assert_same(found, expected)


# --- zero vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [1, 4])
def test_zero_vectors_are_at_one_from_everything(search: Search, kappa: int) -> None:
    query, neighbours = make([(3, 4, 5), (2, 4, 5)], 3)
    for level in (*query, *neighbours):
        level[..., 1:3, 2:4] = 0
    neighbours[1][:, :, 0] = 0  # only one of the two levels
    found = search(query, neighbours, kappa=kappa, window=1, metric="cosine")
    assert_equals_oracle(found, query, neighbours, kappa, "cosine", 1)
    assert (found[0][1:3, 2:4] == 1).all()
    places = first_places(np.array([7, 8, 12, 13]), kappa, (4, 5), (1, 1))
    np.testing.assert_array_equal((found[1] @ [20, 5, 1])[1:3, 2:4].reshape(4, kappa), places)
    neighbours = [np.zeros_like(level) for level in neighbours]
    assert (search(query, neighbours, kappa=kappa, window=1, metric="cosine")[0] == 1).all()


def test_directions_that_are_opposite_are_at_two(search: Search) -> None:
    query, _ = make([(7, 3, 4)], 1)
    assert (search(query, [-query[0][None]], window=0, metric="cosine")[0] == 2).all()


# --- what a window is ------------------------------------------------------------------------------------------------


def test_a_window_leaves_out_what_is_farther_away_in_rows_or_in_columns(search: Search) -> None:
    query, neighbours = [np.zeros((1, 6, 8), np.float32)], [np.ones((1, 1, 6, 8), np.float32)]
    neighbours[0][0, 0, 3, 4] = 0
    for window, rows, columns in ((1, 1, 1), (2, 2, 2), (0.25, 2, 2), (0.2, 1, 2), (0.05, 0, 0), (0.3, 2, 2)):
        found = search(query, neighbours, window=window)[0][..., 0] == 0
        expected = np.zeros((6, 8), bool)
        expected[3 - rows : 4 + rows, 4 - columns : 5 + columns] = True
        np.testing.assert_array_equal(found, expected)


def test_windows_that_leave_nothing_out_are_a_search_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    query, neighbours = make([(4, 5, 7)], 3)
    expected = search_patches(query, neighbours, 2)
    monkeypatch.delattr(engine, "search_window")  # it would take longer
    for window in (None, "all", 6, 1.0, np.float32(1), np.int64(6)):
        assert_same(search_patches(query, neighbours, 2, window=window), expected)


def test_a_window_in_cells_covers_all_of_coarser_levels() -> None:
    query, neighbours = make([(4, 8, 9), (5, 2, 3)], 3)
    found = search_levels(query, neighbours, 2, window=2)
    for number, window in ((0, 2), (1, None)):
        assert_equals_oracle(
            found[number], query[number : number + 1], neighbours[number : number + 1], 2, "l2", window
        )


@pytest.mark.parametrize("window", [-1, True, False, np.True_, 0.0, -0.5, 1.5, np.nan, np.inf, "near", "", (1, 1)])
def test_bad_windows(window: Any) -> None:
    query, neighbours = make([(4, 5, 7)], 2)
    for call in (search_patches, search_levels):
        with pytest.raises(OptionError) as caught:
            call(query, neighbours, window=window)
        assert_says(
            caught.value, "^window: expected cells >= 0, a share of each side above 0 and at most 1.0, or all, "
        )
    with pytest.raises(OptionError, match="window: expected cells >= 0"):
        SearchOptions(window=window)


@pytest.mark.parametrize("shapes", [[(4, 5, 7)], [(2, 3, 3), (4, 5, 7)]], ids=["one-level", "coarsest-first"])
def test_windows_as_large_as_the_largest_grid(shapes: Any) -> None:
    query, neighbours = make(shapes, 2)
    search_levels(query, neighbours, window=6)
    for window in (7, 100):
        with pytest.raises(OptionError) as caught:
            search_levels(query, neighbours, window=window)
        assert_says(
            caught.value, "^window: expected fewer", "5 x 7", f"found {window}; window='all' searches everywhere"
        )


def test_more_matches_than_a_corner_has_candidates() -> None:
    query, neighbours = make([(4, 5, 7)], 2)
    for window, number in ((0, 2), (1, 8), (5, 60), (0.2, 8)):
        search_patches(query, neighbours, number, window=window)
        with pytest.raises(OptionError) as caught:
            search_patches(query, neighbours, number + 1, window=window)
        assert_says(caught.value, f"^kappa: expected 1 to {number}, ", "corner", "5 x 7", f"found {number + 1}")


@pytest.mark.parametrize("name", ["flat", "pyramid"])
def test_engines_that_know_no_windows(name: str) -> None:
    query, neighbours = make([(4, 5, 7)], 2)
    search_patches(query, neighbours, engine=name, window="all")
    for call in (search_patches, search_levels):
        with pytest.raises(OptionError) as caught:
            call(query, neighbours, engine=name, window=1)
        assert_says(caught.value, "^engine: expected auto", "window", name, "leave out one")


def test_first_places_are_those_of_the_oracle() -> None:
    zeros = [np.zeros((1, 4, 3))], [np.zeros((3, 1, 4, 3))]
    for window in (0, 1, 2, 0.5, None):
        radius = SearchSettings(1, "auto", None, 1, "l2", window).radius((4, 3))
        kappa = most([(1, 4, 3)], 3, window)
        _, expected = reference.search_patches(*zeros, kappa, window=window)
        places = first_places(np.arange(12), kappa, (4, 3), radius)
        np.testing.assert_array_equal(places, (expected @ [12, 3, 1]).reshape(12, kappa))


# --- arrays in, arrays out -------------------------------------------------------------------------------------------


def test_tensors_in_tensors_out(search: Search) -> None:
    query, neighbours = make(GRIDS["halved"], 3)
    expected = search(query, neighbours, kappa=2, window=1)
    tensors = [[torch.from_numpy(level) for level in side] for side in (query, neighbours)]
    sq_distances, matches = search(*tensors, kappa=2, window=1)
    assert (sq_distances.dtype, matches.dtype) == (torch.float32, torch.int32)
    assert_same((sq_distances.cpu().numpy(), matches.cpu().numpy()), expected)
    narrow = [[level.bfloat16().requires_grad_() for level in side] for side in tensors]
    wide = [[level.detach().float().numpy() for level in side] for side in narrow]
    assert_same([part.cpu().numpy() for part in search(*narrow, window=1)], search(*wide, window=1))


def test_inputs_are_left_alone_whatever_their_layout(search: Search) -> None:
    query, neighbours = make([(5, 4, 6)], 3)
    for metric in ("l2", "cosine"):
        expected = search(query, neighbours, kappa=2, window=1, metric=metric)
        strided = [np.asfortranarray(query[0])], [np.repeat(neighbours[0], 2, axis=3)[..., ::2]]
        for side in strided:
            side[0].flags.writeable = False
        assert_same(search(*strided, kappa=2, window=1, metric=metric), expected)
        turned = [query[0][::-1, :, ::-1].copy()[::-1, :, ::-1].astype(">f4")]
        assert_same(search([turned[0].astype("=f4")], neighbours, kappa=2, window=1, metric=metric), expected)
    again = make([(5, 4, 6)], 3)
    np.testing.assert_array_equal(query[0], again[0][0])
    np.testing.assert_array_equal(neighbours[0], again[1][0])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_escaped_the_checks_do_not_pass_for_distances(value: float, metric: Any) -> None:
    query, neighbours = make([(4, 5, 7)], 2)
    neighbours[0][:] = value
    with pytest.raises(FeatureError, match="expected values whose squared distances fit float32"):
        search_finite(query, neighbours, SearchOptions(window=1, metric=metric, device="cpu"))


def test_distances_that_do_not_fit_float32_are_refused(search: Search) -> None:
    query, neighbours = make([(4, 5, 7)], 2, np.float32, scale=1e25)
    with pytest.raises(FeatureError, match="fit float32"):
        search(query, neighbours, window=1)


def test_checked_levels_are_searched_by_all_options() -> None:
    query, neighbours = make([(4, 5, 7)], 3)
    options = SearchOptions(kappa=2, metric="cosine", window=0.3, device="cpu")
    expected = search_patches(query, neighbours, 2, metric="cosine", window=0.3, device="cpu")
    assert_same(search_finite(query, neighbours, options), expected)
