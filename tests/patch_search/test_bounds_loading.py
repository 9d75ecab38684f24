"""How the search by bounds reads neighbours: whole or by stripes, and that what it makes of them are bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import spade_faiss as sf
from spade_faiss import arrays
from spade_faiss.patch_search import cost_model, levels
from spade_faiss.patch_search.bounds import gallery as bounds_gallery
from spade_faiss.patch_search.bounds import plan as bounds_plan
from spade_faiss.patch_search.bounds import search as bounds
from spade_faiss.patch_search.bounds import sources
from spade_faiss.patch_search.bounds import stripes as bounds_stripes
from spade_faiss.patch_search.bounds import workers as bounds_workers
from spade_faiss.patch_search.bounds.gallery import BoundsGallery
from spade_faiss.patch_search.bounds.loading import interpolate
from spade_faiss.patch_search.bounds.plan import Projection
from spade_faiss.patch_search.bounds.prepared import packed_query
from spade_faiss.patch_search.bounds.products_tiles import has_tiles
from spade_faiss.patch_search.bounds.simd import BYTES, HAS_QUADS, PAIRS, QUADS, SINGLE, TILES
from spade_faiss.patch_search.spacing import search_spaced
from tests.helpers.bounds import expected_of, halves_of_bfloat16, halves_of_bytes, halves_of_int8, low_rank

needs_tiles = pytest.mark.skipif(not has_tiles(), reason="no tile registers here")
needs_quads = pytest.mark.skipif(not HAS_QUADS, reason="no products of int8 here")
KINDS = [SINGLE, PAIRS, BYTES, pytest.param(QUADS, marks=needs_quads), pytest.param(TILES, marks=needs_tiles)]


def pyramid(shapes: list[tuple[int, int, int]], k: int, dtype: Any) -> tuple[list[Any], list[Any]]:
    """Levels of a query and of k neighbours, near three directions."""
    every = []
    for number, (c, h, w) in enumerate(shapes):
        level = low_rank(c, k + 1, max(h, w), 0, 0.1, seed=number)[1][:, :, :h, :w]
        every.append(np.ascontiguousarray(level.astype(dtype)))
    return [level[0] for level in every], [level[1:] for level in every]


@pytest.fixture
def by_stripes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compare all neighbours by the smallest stripes; the numbers of those that are."""
    monkeypatch.setattr(bounds_gallery, "LARGE", 0)
    monkeypatch.setattr(bounds_stripes, "STRIPE_BYTES", 1)
    monkeypatch.setattr(bounds, "GUESSES", 0)  # which are prepared as a whole
    taken: list[int] = []
    stripes = bounds_stripes.Striper.stripes

    def noted(self: Any, some: range, projection: Projection) -> Any:
        taken.extend(some)
        return stripes(self, some, projection)

    monkeypatch.setattr(bounds_stripes.Striper, "stripes", noted)
    return taken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [0, 5])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shapes", [[(40, 7, 9)], [(16, 10, 8), (130, 10, 8)]], ids=["partial", "two-levels"])
@pytest.mark.parametrize("kappa", [1, 3])
def test_stripes_find_what_whole_neighbours_do(
    by_stripes: list[int], monkeypatch: pytest.MonkeyPatch, kind: int, m: int, dtype: Any, shapes: Any, kappa: int
) -> None:
    query, neighbours = pyramid(shapes, 13, dtype)

    def found() -> Any:
        gallery = BoundsGallery(neighbours, query)
        gallery.projections = [Projection(gallery.depth, gallery.directions[:m] if m else None, kind)]
        return bounds.search_prepared(gallery, query, kappa)

    striped = found()
    assert by_stripes
    monkeypatch.setattr(bounds_gallery, "LARGE", np.inf)
    by_stripes.clear()
    for ours, whole in zip(striped, found(), strict=True):
        np.testing.assert_array_equal(ours, whole)
    assert not by_stripes
    patches = [np.concatenate([level.reshape(len(level), -1) for level in query])]
    flat = np.concatenate(neighbours, axis=1)
    np.testing.assert_array_equal(striped[1], expected_of(patches[0], flat, kappa, False)[1])


@pytest.mark.parametrize("kappa", [1, 4])
def test_stripes_find_the_nearest_of_each_neighbour(by_stripes: list[int], two_threads: None, kappa: int) -> None:
    [query], [neighbours] = pyramid([(24, 9, 9)], 21, np.float32)
    neighbours[7] = neighbours[3]
    neighbours[5, :, 8, 8] = query[:, 0, 0]
    found = bounds.search_bounds(query.reshape(24, -1), neighbours, kappa, True)
    expected = expected_of(query.reshape(24, -1), neighbours, kappa, True)
    assert set(by_stripes) == set(range(21))
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(np.float16, np.float16), (np.float32, np.float16), (np.float16, np.float32), (np.float64, np.float64)]
)
def test_few_neighbours_are_copied_at_a_time(by_stripes: list[int], dtypes: Any, turned: bool) -> None:
    query, neighbours = pyramid([(24, 7, 7), (10, 7, 7)], 40, np.float16)
    neighbours = [
        level.astype(dtype, order="F" if turned else "C") for level, dtype in zip(neighbours, dtypes, strict=True)
    ]
    longest = max(map(len, BoundsGallery(neighbours, query).chunks(1, 2, 4)))
    assert (longest == 1) == (turned or dtypes != (np.float16, np.float16))
    found = sf.search_patches(query, neighbours, 2, "bounds", "cpu")
    expected = sf.search_patches(query, neighbours, 2, "pyramid", "cpu")
    np.testing.assert_array_equal(found[1], expected[1])
    assert set(by_stripes) == set(range(40))


@pytest.mark.parametrize("threads", [1, 2, 16, 64])
def test_no_thread_prepares_many_large_neighbours_as_a_whole(
    by_stripes: list[int], monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Those whose likeliest patches are measured first are kept, so they are few, whatever the number of threads."""
    query, neighbours = pyramid([(24, 7, 7)], 150, np.float16)
    monkeypatch.setattr(bounds, "GUESSES", 2)
    monkeypatch.setattr(bounds, "CHUNK_BYTES", 1)
    monkeypatch.setattr(bounds, "torch_threads", lambda: threads)
    monkeypatch.setattr(bounds, "share_out", lambda work, workers: workers[0].run(iter(work)))
    gallery, whole = BoundsGallery(neighbours, query), []
    prepare = gallery._prepare

    def noted(some: range, *rest: Any) -> Any:
        whole.extend(some)
        return prepare(some, *rest)

    monkeypatch.setattr(gallery, "_prepare", noted)
    gallery.projections = [Projection(gallery.depth, gallery.directions[:5], PAIRS)]
    found = bounds.search_prepared(gallery, query, 1)
    assert set(whole) == set(range(min(150, 2 * threads)))
    matches = sf.search_patches(query, neighbours, 1, "flat", "cpu")[1]
    np.testing.assert_array_equal(found[1], (matches @ [49, 7, 1]).reshape(-1, 1))


@pytest.mark.parametrize("n", [31, 32, 100])
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_that_share_a_query_load_the_same(n: int, threads: int) -> None:
    rng = np.random.default_rng(5)
    query, neighbours = rng.normal(size=(150, n)).astype(np.float32), rng.normal(size=(4, 150, 2, n)).astype(np.float32)
    gallery = BoundsGallery([neighbours], [query])
    projection = Projection(150, bounds_plan.principal(gallery.centred_sample)[:7], SINGLE)
    alone = gallery.loaded([query], projection, False)
    gallery._threads = threads
    for one, other in zip(gallery.loaded([query], projection, True), alone, strict=True):
        np.testing.assert_array_equal(one, other)


def slack_of_bounds(gallery: BoundsGallery, query: list[Any], neighbours: list[Any], number: int) -> Any:
    """By how much projected halves of a neighbour are below the true ones, none by less than the doubt allows."""
    [projection] = gallery.projections
    search = bounds_workers.Search.of(gallery, query, False)
    theirs = gallery.prepared(range(number, number + 1), projection, gallery.room(1))
    largest = float(theirs.largest[0, 0])
    patches = torch.from_numpy(gallery.patches([level[number] for level in neighbours])).T * gallery.scale
    patches = (patches - torch.from_numpy(gallery.centre)[:, None]).double().numpy()
    sq_norms, words = np.square(patches).sum(axis=0), projection.words
    wide = search.own.double().numpy()
    true = (np.square(wide[:, :, None] - patches[:, None]).sum(axis=0) - np.square(search.norms)[:, None]) / 2
    [panels], mine = theirs.held[0], search.operand(projection)
    if projection.kind == PAIRS:
        np.testing.assert_allclose(panels[:, words].reshape(-1)[: gallery.n], sq_norms / 2, rtol=1e-4)
    assert largest == pytest.approx(np.sqrt(sq_norms.max()), rel=0.5)
    assert largest >= np.sqrt(sq_norms.max()) * (1 - 1e-5)
    if projection.kind == TILES:
        halves = halves_of_bfloat16(panels, mine)
    elif projection.kind == QUADS:
        halves = halves_of_int8(panels, mine, theirs.largest[0, 1:])
    elif projection.kind == BYTES:
        halves = halves_of_bytes(panels, mine)
    else:
        rows = panels[:, :words].view(np.int16).reshape(len(panels), words, -1, 2)
        rows = np.moveaxis(rows, 1, 2).reshape(-1, 2 * words).astype(np.int64)
        each = mine.view(np.int16).reshape(len(mine), words, -1, 2).transpose(0, 2, 1, 3).reshape(-1, 2 * words)
        factor = search.longest * largest / 32_700**2
        halves = panels[:, words].reshape(-1) - factor * (each.astype(np.int64) @ rows.T)
    halves = halves[: gallery.n, : gallery.n]
    doubt = projection.doubt * (search.norms[:, None] + largest) ** 2
    doubt = doubt + projection.coarseness * search.longest * largest
    assert (halves - doubt <= true).all()
    return (true - halves).mean() / (np.square(search.norms).mean() + sq_norms.mean())


@pytest.mark.parametrize("kind", [PAIRS, BYTES, QUADS, pytest.param(TILES, marks=needs_tiles)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("offset", [0, 30])
@pytest.mark.parametrize(
    "shapes",
    [[(40, 7, 9)], [(300, 8, 8)], [(140, 15, 23)], [(16, 8, 9), (150, 4, 5), (9, 2, 2)]],
    ids=["few", "many", "panels-apart", "mixed"],
)
def test_what_neighbours_become_are_bounds(kind: int, dtype: Any, offset: float, shapes: Any) -> None:
    """Halves of projected patches are never above the true ones by more than their doubt; norms are the patches'."""
    query, neighbours = pyramid(shapes, 4, dtype)
    neighbours = [(level + level.dtype.type(offset)).astype(dtype) for level in neighbours]
    gallery = BoundsGallery(neighbours, query)
    gallery.projections = [Projection(gallery.depth, gallery.directions[:5], kind)]
    for number in range(4):
        assert slack_of_bounds(gallery, query, neighbours, number) < 0.3  # and tell something


@needs_tiles
@pytest.mark.parametrize("whose", ["the query's", "the neighbours'"])
def test_what_rounding_takes_from_one_side_is_counted(whose: str) -> None:
    """The other side's patches lie in the directions, and bfloat16 holds them: no rest makes up for it."""
    rng = np.random.default_rng(0)
    exact = rng.integers(-8, 9, (40, 6, 6)).astype(np.float32)
    rounded = rng.normal(size=(40, 6, 6), scale=8).astype(np.float32)
    exact[6:], rounded[6:] = 0, 0
    query, theirs = (rounded, exact) if whose == "the query's" else (exact, rounded)
    neighbours = [np.stack([theirs, -theirs])]  # about 0
    gallery = BoundsGallery(neighbours, [query], distinct=True)
    gallery.projections = [Projection(40, torch.eye(40)[:6].contiguous(), TILES)]
    assert np.abs(gallery.centre).max() < 1e-7
    for number in range(2):
        slack_of_bounds(gallery, [query], neighbours, number)


@pytest.mark.parametrize("m", [1, 7, 60])
def test_directions_for_tiles_make_no_patch_longer(m: int) -> None:
    directions = torch.linalg.qr(torch.from_numpy(np.random.default_rng(0).normal(size=(200, m)))).Q.T.float()
    used = Projection(200, directions, TILES).used
    assert (used == used.bfloat16().float()).all()
    assert 0.99 < float(torch.linalg.matrix_norm(used.double(), 2)) <= 1
    assert Projection(200, directions, PAIRS).used is directions


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [5, 8, 16, 31, 40, 150])
@pytest.mark.parametrize("grid", [(7, 10), (20, 17)], ids=str)  # the second is read in three parts
@pytest.mark.parametrize("kind", KINDS)
def test_cells_are_the_values_of_levels_turned(dtype: Any, channels: int, grid: tuple[int, int], kind: int) -> None:
    """Whatever number of channels is left over, and of patches."""
    query, [level] = pyramid([(channels, *grid)], 3, dtype)
    gallery = BoundsGallery([level], query, distinct=True)
    directions = gallery.directions[:2] if channels > 5 else None
    found = gallery.prepared(range(1, 3), Projection(channels, directions, kind), gallery.room(2))
    cells = found.cells.reshape(2, gallery.n, -1)[:, :, :channels]
    expected = level[1:].reshape(2, channels, -1).transpose(0, 2, 1) - gallery.shift
    np.testing.assert_array_equal(cells, expected.astype(np.float32))


def test_a_patch_lies_over_the_cells_of_a_level() -> None:
    level = np.arange(24, dtype=np.float32).reshape(2, 3, 4)  # two neighbours, three channels
    taps, weights = np.array([[0, 3], [1, 3]]), np.array([[0.75, 1], [0.25, 0]], np.float32)
    out = np.full((4, 5), -1, np.float32)
    at = level.ctypes.data + np.arange(2) * level.strides[0]
    interpolate(level.reshape(-1)[:0], at, np.int64(4), np.float32([0, 1, 2]), taps, weights, 1, out)
    patches = (level[:, :, taps] * weights).sum(axis=2).transpose(0, 2, 1).reshape(4, 3)
    np.testing.assert_array_equal(out, np.pad(patches - [0, 1, 2], ((0, 0), (1, 1)), constant_values=-1))


@pytest.mark.parametrize("place", [(0, 0), (0, 12), (1, 5)], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("engine", ["bounds", "auto"])
@pytest.mark.parametrize("small", [True, False])
def test_what_is_not_finite_is_named_by_bounds_too(
    by_stripes: list[int], monkeypatch: pytest.MonkeyPatch, place: Any, value: float, engine: str, small: bool
) -> None:
    """They see it as they read, so that nothing is read twice."""
    monkeypatch.setattr(cost_model, "BOUNDS_LEAST", 0)
    monkeypatch.setattr(bounds_plan, "has_tiles", lambda: False)
    if not small:
        monkeypatch.setattr(bounds_gallery, "LARGE", np.inf)
    query, neighbours = pyramid([(16, 7, 6), (9, 7, 6)], 13, np.float16)
    level, neighbour = place
    neighbours[level][neighbour, 3, 6, 5] = value
    with pytest.raises(sf.FeatureError, match=f"^level {level} of the neighbours: expected finite values"):
        sf.search_patches(query, neighbours, 1, engine, "cpu")


@pytest.mark.parametrize("reads_halves", [True, False])
@pytest.mark.parametrize("query_dtype", [np.float16, np.float32])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_types_of_query_and_neighbours_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, query_dtype: Any, dtype: Any, reads_halves: bool
) -> None:
    """Of values that all of them hold, to distances and spacings; also on processors that cannot read float16."""
    [query], [neighbours] = pyramid([(6, 9, 8)], 7, np.float16)
    flat = query.reshape(6, -1)
    expected = search_spaced(flat.astype(np.float64), neighbours.astype(np.float64), 3)
    monkeypatch.setattr(sources, "READS_HALVES", reads_halves and sources.READS_HALVES)
    found = search_spaced(flat.astype(query_dtype), neighbours.astype(dtype), 3)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_zeros_are_finite() -> None:
    query, neighbours = [np.zeros((4, 3, 3))], [np.zeros((5, 4, 3, 3))]
    assert (sf.search_patches(query, neighbours, 2, "bounds", "cpu")[0] == 0).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("at", [0, 63, 64, 999])
def test_finite_is_found_out_piece_by_piece(monkeypatch: pytest.MonkeyPatch, dtype: Any, at: int) -> None:
    monkeypatch.setattr(arrays, "_PIECE", 64 * np.dtype(dtype).itemsize)
    monkeypatch.setattr(levels, "LARGE", 0)
    values = np.ones(1000, dtype).reshape(20, 50)
    assert arrays.all_finite(values)
    assert levels._is_finite(values)
    values.reshape(-1)[at] = -np.inf
    for array in (values, values.T, values[:, ::-1]):
        assert not arrays.all_finite(array)
        assert not levels._is_finite(array)


def test_a_query_is_packed_for_its_projection() -> None:
    """What a kind of products takes does not depend on how many directions there are."""
    for kind, shape in (
        (SINGLE, (2, 6, 6)),
        (PAIRS, (2, 3, 6)),
        (QUADS, (2, 6, 6)),
        (BYTES, (2, 6, 6)),
        (TILES, (1, 32, 16)),
    ):
        assert packed_query(Projection(20, torch.eye(20)[:5], kind), torch.ones(6, 9), 3.0).shape == shape
