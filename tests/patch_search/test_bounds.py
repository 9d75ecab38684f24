"""What the search by bounds has to itself; that it equals the oracle at any shape is in the suites of all engines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import spade_faiss as sf
from spade_faiss.patch_search import cost_model
from spade_faiss.patch_search.bounds import plan as bounds_plan
from spade_faiss.patch_search.bounds import search as bounds
from spade_faiss.patch_search.bounds import workers as bounds_workers
from spade_faiss.patch_search.bounds.products_bytes import HAS_BYTES
from spade_faiss.patch_search.bounds.products_tiles import has_tiles
from spade_faiss.patch_search.bounds.search import search_bounds
from spade_faiss.patch_search.bounds.simd import BYTES, HAS_QUADS, PAIRS, QUADS, SINGLE, TILES
from spade_faiss.patch_search.distinct import search_distinct
from spade_faiss.patch_search.spacing import search_spaced
from tests import reference
from tests.helpers.bounds import expected_of, low_rank


@pytest.fixture(params=["pairs", "bytes", "quads", "tiles"])
def directions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let few directions be chosen early and whatever they cost; their numbers are noted."""
    if request.param == "tiles" and not has_tiles():
        pytest.skip("no tile registers here")
    if request.param == "quads" and not HAS_QUADS:
        pytest.skip("no products of int8 here")
    if request.param == "bytes" and not HAS_BYTES:
        pytest.skip("no products of int8 in sums of int16 here")
    monkeypatch.setattr(bounds_plan, "has_tiles", lambda: request.param == "tiles")
    monkeypatch.setattr(bounds_plan, "HAS_QUADS", request.param == "quads")
    monkeypatch.setattr(bounds_plan, "HAS_BYTES", request.param == "bytes")
    chosen: list[int] = []
    fitted = bounds_plan.fitted

    def noted(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bounds_plan, "has_tiles", lambda: False)  # all channels of these tests are one step of tiles
            for name in ("HAS_QUADS", "HAS_BYTES"):  # and four words
                patch.setattr(bounds_plan, name, False)
            projections, a_pair = fitted(*args)
        kind = {"pairs": PAIRS, "bytes": BYTES, "quads": QUADS, "tiles": TILES}[request.param]
        projections = [replace(each, kind=kind if each.kind == PAIRS else each.kind) for each in projections]
        chosen.extend(0 if each.directions is None else len(each.directions) for each in projections)
        return projections, a_pair

    monkeypatch.setattr(bounds, "WORTH", -1)
    monkeypatch.setattr(bounds, "FIRST", 1)
    monkeypatch.setattr(bounds, "CHUNK_BYTES", 1)
    monkeypatch.setattr(bounds, "fitted", noted)
    monkeypatch.setattr(bounds_plan, "EXPLAINED", 0)
    monkeypatch.setattr(bounds_plan, "counts", lambda: (2, 3, 5))
    monkeypatch.setattr(bounds_plan, "MEASURE", 0)
    monkeypatch.setattr(bounds_plan, "MEASURE_CHANNEL", 0.1)
    return chosen


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize(("noise", "kappa"), [(0.01, 1), (0.01, 3), (0.5, 2), (0, 2)])
def test_directions_lose_nothing(directions: list[int], distinct: bool, noise: float, kappa: int) -> None:
    query, neighbours = low_rank(16, 9, 7, 40, noise)
    found = search_bounds(query, neighbours, kappa, distinct)
    expected = expected_of(query, neighbours, kappa, distinct)
    assert any(directions)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("distinct", [True, False])
def test_noise_is_searched_by_all_channels(directions: list[int], distinct: bool) -> None:
    rng = np.random.default_rng(0)
    query, neighbours = rng.normal(size=(16, 40)), rng.normal(size=(9, 16, 7, 7))
    np.testing.assert_array_equal(
        search_bounds(query, neighbours, 2, distinct)[1], expected_of(query, neighbours, 2, distinct)[1]
    )
    assert set(directions) == {0}


@pytest.mark.parametrize("distinct", [True, False])
def test_what_the_sample_did_not_show(directions: list[int], distinct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many patches are left, all channels take over."""
    query, neighbours = low_rank(16, 30, 7, 40, 0.01)
    rng = np.random.default_rng(1)
    neighbours[:] = np.where(rng.random((30, 1, 7, 7)) < 0.9, neighbours[0, :, 2, 3].reshape(1, -1, 1, 1), neighbours)
    neighbours += (1e-7 * rng.normal(size=neighbours.shape)).astype(np.float32)
    monkeypatch.setattr(bounds_workers, "CROWD", 0)
    np.testing.assert_allclose(
        search_bounds(query, neighbours, 2, distinct)[0], expected_of(query, neighbours, 2, distinct)[0], rtol=1e-5
    )


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("apart", [0, 1e-4])
def test_more_patches_are_as_near_as_another_than_are_listed_at_a_time(
    directions: list[int], distinct: bool, apart: float
) -> None:
    """Products cannot tell them apart, so that all of them are measured."""
    rng = np.random.default_rng(4)
    patch, neighbours = rng.normal(size=9), rng.normal(size=(7, 9, 12, 15))
    neighbours[2:] = patch.reshape(-1, 1, 1) + apart * rng.normal(size=(5, 9, 12, 15))
    query = (patch[:, None] + apart * rng.normal(size=(9, 75))).astype(np.float32)
    found = search_bounds(query, neighbours.astype(np.float32), 3, distinct)
    expected = expected_of(query, neighbours.astype(np.float32), 3, distinct)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-12)
    if apart == 0:
        np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1, 1e15])
@pytest.mark.parametrize("offset", [0, 1e3])
def test_hairs_breadths_and_sizes(distinct: bool, scale: float, offset: float) -> None:
    rng = np.random.default_rng(2)
    neighbours = (scale * (offset + rng.normal(size=(6, 5, 4, 9)))).astype(np.float32)
    query = (scale * (offset + rng.normal(size=(5, 13)))).astype(np.float32)
    found, expected = search_bounds(query, neighbours, 3, distinct), expected_of(query, neighbours, 3, distinct)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-44)
    if scale > 1e-20:  # else all distances are 0 in float32
        np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("value", [0, 1, -7.5])
def test_constant_patches_are_matched_in_order(directions: list[int], distinct: bool, value: float) -> None:
    neighbours, query = np.full((6, 8, 3, 4), value, np.float16), np.full((8, 7), value + 1, np.float16)
    query[:, 3] = value
    for sides in ((query, neighbours), (query[:, 3:4], neighbours)):
        found, expected = search_bounds(*sides, 4, distinct), expected_of(*sides, 4, distinct)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("kappa", [1, 4])
def test_copies_tie_in_the_order_of_positions(directions: list[int], distinct: bool, kappa: int) -> None:
    query, neighbours = low_rank(16, 3, 5, 20, 0.01)
    neighbours = np.concatenate([neighbours] * 4)
    query[:, :5] = neighbours[2, :, 1, :]
    np.testing.assert_array_equal(
        search_bounds(query, neighbours, kappa, distinct)[1], expected_of(query, neighbours, kappa, distinct)[1]
    )


@pytest.mark.parametrize("distinct", [True, False])
def test_neighbours_of_several_tiles(distinct: bool) -> None:
    rng = np.random.default_rng(3)
    neighbours, query = rng.normal(size=(3, 8, 90, 90)), rng.normal(size=(8, 9))
    neighbours[1] = neighbours[0]
    neighbours[:, :, 80:] = neighbours[:, :, :10]  # copies in another tile
    np.testing.assert_array_equal(
        search_bounds(query, neighbours, 3, distinct)[1], expected_of(query, neighbours, 3, distinct)[1]
    )


@pytest.mark.parametrize("distinct", [True, False])
def test_one_neighbour_of_another_size_altogether(distinct: bool) -> None:
    """The squares of its patches do not fit float32: they are measured."""
    rng = np.random.default_rng(4)
    neighbours, query = rng.normal(size=(5, 4, 3, 3)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32)
    neighbours[2] *= 1e25
    neighbours[2, :, 1, 1] = query[:, 0]
    found, expected = search_bounds(query, neighbours, 2, distinct), expected_of(query, neighbours, 2, distinct)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])


def test_more_threads_find_the_same(two_threads: None, directions: list[int]) -> None:
    query, neighbours = low_rank(16, 21, 7, 40, 0.05)
    for distinct in (True, False):
        np.testing.assert_array_equal(
            search_bounds(query, neighbours, 3, distinct)[1], expected_of(query, neighbours, 3, distinct)[1]
        )


def test_distances_that_no_float32_holds_are_refused() -> None:
    with pytest.raises(sf.FeatureError, match="squared distances fit float32"):
        search_bounds(np.full((2, 1), 3e30), np.full((2, 2, 1, 1), -3e30), 1)


def test_projections_are_bounds() -> None:
    """Exactly, when what rounding can do is counted."""
    rng = np.random.default_rng(5)
    patches = torch.from_numpy((rng.normal(size=(20, 300)) * np.geomspace(1, 1e-3, 20)[:, None]).astype(np.float32))
    projection = bounds_plan.Projection(20, bounds_plan.principal(patches)[:6], SINGLE)
    wide = patches.double()
    sq_norms = wide.square().sum(dim=0)
    along = projection.along(patches[None], slice(None))
    coordinates = projection.joined([along], sq_norms.float()[None, None])[0].double()
    half = sq_norms / 2 - coordinates[:, :1].T @ coordinates  # of all patches, seen from the first
    doubt = projection.doubt * (sq_norms[0].sqrt() + sq_norms.sqrt()) ** 2
    true = ((wide - wide[:, :1]).square().sum(dim=0) - sq_norms[0]) / 2
    assert (half - doubt <= true).all()
    gap = (true - half).mean() / (true + sq_norms[0] / 2).mean()
    assert gap < 0.1  # and few are far below


def test_matches_and_spacing_of_one_preparation_are_those_of_two() -> None:
    query, neighbours = low_rank(16, 9, 7, 40, 0.1)
    sq_distances, places, found = search_spaced(query, neighbours, 5)
    expected, expected_places = search_distinct(query, neighbours, 5)
    np.testing.assert_array_equal(sq_distances, expected)
    np.testing.assert_array_equal(places, expected_places)
    matches = np.stack(np.unravel_index(places[None, :, 0], (9, 7, 7)), axis=-1).astype(np.int32)
    np.testing.assert_allclose(found, reference.spacing(neighbours, matches, 3)[0], rtol=1e-5)


@pytest.mark.parametrize("shapes", [[(16, 7, 6)], [(9, 7, 6), (7, 4, 3)]], ids=["one-level", "two-levels"])
@pytest.mark.parametrize("noise", [0.01, 3])
def test_auto_takes_bounds_where_they_pay_and_hands_over_where_they_do_not(
    monkeypatch: pytest.MonkeyPatch, float32_products: None, shapes: list[tuple[int, int, int]], noise: float
) -> None:
    monkeypatch.setattr(cost_model, "BOUNDS_LEAST", 0)
    monkeypatch.setattr(cost_model, "BOUNDS_CHANNEL", 0)
    monkeypatch.setattr(cost_model, "BOUNDS_CHANNEL_NARROW", 0)
    monkeypatch.setattr(cost_model, "FLAT_PAIR", 1e9)
    monkeypatch.setattr(bounds, "WORTH", -1)
    monkeypatch.setattr(bounds, "LOAD", 0)
    monkeypatch.setattr(bounds_plan, "MEASURE", 1e9 if noise == 3 else 0)
    rng = np.random.default_rng(7)
    every = [low_rank(c, 9, 7, 0, noise, seed=c)[1][:, :, :h, :w] for c, h, w in shapes]
    query = [(level[3] + 1e-4 * rng.normal(size=level[3].shape)).astype(np.float32) for level in every]
    asked: list[bool] = []
    by_bounds = bounds.search_levels_by_bounds

    def noted(*args: Any) -> Any:
        asked.append(False)
        found = by_bounds(*args)
        asked[-1] = True
        return found

    monkeypatch.setattr(bounds, "search_levels_by_bounds", noted)
    kappa = 9 * 7 * 6 // 2 if noise == 3 else 1  # half of all patches count
    found, expected = sf.search_patches(query, every, kappa), sf.search_patches(query, every, kappa, "pyramid", "cpu")
    assert asked == [noise != 3]
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_auto_leaves_bounds_alone_where_flat_is_faster_than_pyramid() -> None:
    """Its distances differ in the last digits."""
    shapes = [(64, 28, 28)]
    few, many = (cost_model.bounds_budget(shapes, 50, kappa) for kappa in (1, 5000))
    assert cost_model.faster(shapes, 50, 1) == "pyramid"
    assert cost_model.faster(shapes, 50, 5000) == "flat"
    assert few > 0 == many


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    "shapes", [[(150, 5, 9)], [(9, 5, 8), (130, 5, 8)], [(12, 6, 7), (5, 6, 7), (9, 3, 2)]], ids=["one", "two", "mixed"]
)
def test_distances_are_those_of_pyramid_bit_for_bit(
    directions: list[int], float32_products: None, monkeypatch: pytest.MonkeyPatch,
    shapes: list[tuple[int, int, int]], dtype: type,
) -> None:  # fmt: skip
    """So an answer by "auto" depends on the images alone, however they are shared out among galleries."""
    monkeypatch.setattr(bounds_plan, "MEASURE_CHANNEL", 10)
    monkeypatch.setattr(bounds_plan, "counts", lambda: (5, 9))
    rng = np.random.default_rng(8)
    every = [low_rank(c, 9, 7, 0, 0.05, seed=c)[1].repeat(2, axis=3)[:, :, :h, :w] for c, h, w in shapes]
    every = [(level * rng.normal(1, 0.01, level.shape)).astype(dtype) for level in every]
    query, neighbours = [level[0] for level in every], [level[1:] for level in every]
    found = sf.search_patches(query, neighbours, 4, "bounds", "cpu")
    expected = sf.search_patches(query, neighbours, 4, "pyramid", "cpu")
    assert any(directions)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_what_only_noise_can_be_is_handed_over_before_a_neighbour_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "WORTH", -1)
    monkeypatch.setattr(bounds_workers.Worker, "run", lambda *_: pytest.fail("a neighbour was compared"))
    query, *neighbours = np.random.default_rng(9).normal(size=(7, 200, 8, 8))
    with pytest.raises(bounds.TooMuchLeftError):
        bounds.search_levels_by_bounds([query], [np.stack(neighbours)], 1, budget=8**4 * 6 * 0.5)


def test_nearest_of_more_patches_are_expected_closer_where_features_have_few_dimensions() -> None:
    rng = np.random.default_rng(10)
    shrunk = []
    for dimensions in (2, 200):
        sample, query = (torch.from_numpy(rng.normal(size=(dimensions, n))) for n in (512, 32))
        near = torch.cdist(query.T, sample.T).square().amin(dim=1)
        shrunk.append(float((bounds_plan.likely_reach(sample, query, 512 * 64) / near).mean()))
    assert shrunk[0] < 0.1 < 0.7 < shrunk[1] < 1


def test_directions_are_not_projected_where_channels_hardly_differ() -> None:
    parts = {(0, 2): 2.0, (2, 2): 2.0, (4, 2): 1e-3, (6, 2): 8.0}
    kept, share = bounds_plan.trimmed(torch.eye(8)[[7, 6, 4]], 4.0, parts)
    np.testing.assert_array_equal(kept, torch.eye(8)[[7, 6, 4]] * torch.tensor([1.0, 1, 1, 1, 0, 0, 1, 1]))
    assert share == 6 / 8


def test_bounds_are_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spade_faiss.patch_search.search.torch_device", lambda _: "cuda:0")
    with pytest.raises(sf.OptionError, match="engine: expected pyramid or flat on cuda:0, found bounds"):
        sf.search_patches([np.ones((2, 3, 3))], [np.ones((3, 2, 3, 3))], 1, "bounds", "cuda:0")
