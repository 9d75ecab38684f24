"""What searches prepare of neighbours serves later ones: it takes memory within a bound, and changes no answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import spade_faiss as sf
from spade_faiss.patch_search.bounds import boxes, kept
from spade_faiss.patch_search.bounds import plan as bounds_plan
from spade_faiss.patch_search.bounds import rows as bounds_rows
from spade_faiss.patch_search.bounds import search as bounds
from spade_faiss.patch_search.bounds import workers as bounds_workers
from spade_faiss.patch_search.bounds.gallery import BoundsGallery
from spade_faiss.patch_search.bounds.kept import KeptNeighbours
from spade_faiss.patch_search.bounds.plan import Projection
from spade_faiss.patch_search.bounds.products_bytes import HAS_BYTES
from spade_faiss.patch_search.bounds.products_tiles import has_tiles
from spade_faiss.patch_search.bounds.simd import SINGLE
from spade_faiss.patch_search.spacing import search_spaced

SHAPE = 12, 7, 9  # of a level


@pytest.fixture(params=["pairs", "bytes", "tiles"], autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds, with directions or without, where there are tiles."""
    if request.param == "tiles" and not has_tiles():
        pytest.skip("no tile registers here")
    if request.param == "bytes" and not HAS_BYTES:
        pytest.skip("no products of int8 in sums of int16 here")
    monkeypatch.setattr(bounds_plan, "has_tiles", lambda: request.param == "tiles")
    monkeypatch.setattr(bounds_plan, "HAS_BYTES", request.param == "bytes")
    monkeypatch.setattr(bounds, "WORTH", -1)
    monkeypatch.setattr(bounds_workers, "CROWD", 100)  # what is left always takes long on so small a grid


@pytest.fixture(params=[0, 10**6], ids=["sorted", "as they come"], autouse=True)
def panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours of which patches are sorted, and such as are too small for that."""
    monkeypatch.setattr(boxes, "PANELS", request.param)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of neighbours that were prepared, one after the other."""
    found: list[int] = []
    prepare = BoundsGallery._prepare

    def noted(self: Any, some: range, *args: Any, **options: Any) -> Any:
        found.append(len(some))
        return prepare(self, some, *args, **options)

    monkeypatch.setattr(BoundsGallery, "_prepare", noted)
    return found


def images(number: int, seed: int = 0, dtype: str = "float16", offset: float = 5) -> np.ndarray:
    """Levels (number, c, h, w) that lie near four directions."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(4, SHAPE[0]))
    values = rng.normal(size=(number, *SHAPE[1:], 4)) @ basis + 0.05 * rng.normal(size=(number, *SHAPE[1:], SHAPE[0]))
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2) + offset).astype(dtype)


def search(levels: np.ndarray, query: int, others: list[int], store: KeptNeighbours | None = None) -> Any:
    """Search one image of some among others, by number; `store` knows them by that."""
    own = None if store is None else store.levels(others, 1)[0]
    return search_spaced(levels[query].reshape(SHAPE[0], -1), levels[others], 3, kept=own)


def assert_equal(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_answers_are_those_without_it(prepared: list[int], dtype: str) -> None:
    levels, store = images(20, dtype=dtype), KeptNeighbours(2**20)
    for query, others in [(0, [5, 3, 8, 9, 4]), (1, [3, 4, 5]), (2, [9, 12, 3, 11, 8, 5]), (0, [5, 3, 8, 9, 4])]:
        assert_equal(search(levels, query, others, store), search(levels, query, others))
    before = len(prepared)
    search(levels, 1, [4, 9, 8], store)
    assert (len(prepared) == before) == (dtype != "float64")  # of which float32 holds the last digits by a shift


def test_only_what_is_new_is_prepared(prepared: list[int]) -> None:
    levels, store = images(20), KeptNeighbours(2**20)
    search(levels, 0, [5, 3, 8, 9, 4], store)
    assert len(store) == 5
    prepared.clear()
    search(levels, 1, [3, 7, 5, 6], store)
    assert prepared == [1, 1]
    assert len(store) == 7


def test_the_least_recent_give_way() -> None:
    levels, store = images(30), KeptNeighbours(2**20)
    search(levels, 0, [1, 2, 3], store)
    of_one = store.bytes // 3
    store = KeptNeighbours(of_one * 8)
    for first in range(1, 20, 3):
        others = [first, first + 1, first + 2, 1]
        assert_equal(search(levels, 0, others, store), search(levels, 0, others))
        assert store.bytes <= store.limit
    assert len(store) == 8


def test_neighbours_that_do_not_fit_are_not_kept() -> None:
    levels, store = images(12), KeptNeighbours(1000)
    assert_equal(search(levels, 0, list(range(1, 12)), store), search(levels, 0, list(range(1, 12))))
    assert len(store) == store.bytes == 0


@pytest.mark.parametrize("offset", [-400, 5, 3000])
@pytest.mark.parametrize("factor", [1e-3, 1, 1e2])
def test_images_of_another_kind_are_found_as_well(offset: float, factor: float) -> None:
    """What the first image's neighbours were prepared for need not suit others."""
    store = KeptNeighbours(2**20)
    levels = np.concatenate([images(6), images(6, 1, "float32", offset) * np.float32(factor)]).astype(np.float32)
    for query, others in [(0, [1, 2, 3]), (6, [7, 8, 9]), (6, [2, 8, 9, 1]), (0, [7, 1, 10])]:
        assert_equal(search(levels, query, others, store), search(levels, query, others))


def test_a_way_is_chosen_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """After some searches, and at once where much more is left to be measured than at first."""
    monkeypatch.setattr(kept, "AGAIN", 3)
    levels, store = images(20), KeptNeighbours(2**20)
    search(levels, 0, [5, 3, 8, 9, 4], store)
    first = store.way(0)
    assert first is not None
    assert first.share is not None
    for _ in range(3):
        search(levels, 0, [5, 3, 8, 9, 4], store)
    assert store.way(0) is not first
    later = store.way(0)
    assert later is not None
    store.tell(0, later, (later.share or 0) * kept.MORE * 1.01)
    assert store.way(0) is None


def test_a_way_that_comes_out_the_same_serves_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was prepared in it is prepared again each time that it is chosen anew."""
    monkeypatch.setattr(kept, "MOST", 4 * kept.AGAIN)
    levels, store = images(20), KeptNeighbours(2**20)
    first: kept.Way | None = None
    for until in (1, 2, 4, 4):
        search(levels, 0, [5, 3, 8, 9, 4], store)
        way = store.way(0)
        assert way is not None
        assert way is not first
        assert way.until == until * kept.AGAIN
        way.searches, first = way.until, way
    other = kept.Way(way.frame, Projection(SHAPE[0], None, SINGLE))
    store.choose(0, other)
    assert other.until == kept.AGAIN


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("crowd", [0, 100])
def test_threads_share_the_patches_of_a_query(crowd: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each meets all neighbours; where too much is left to be measured, neighbours are shared after all."""
    monkeypatch.setattr(bounds_workers, "CROWD", crowd)
    monkeypatch.setattr(bounds_rows, "PIECE", 1)
    done, by_rows = [], bounds_rows.by_rows

    def noted(*args: Any) -> Any:
        done.append((found := by_rows(*args))[2])
        return found

    monkeypatch.setattr(bounds, "by_rows", noted)
    levels, store, before = images(20), KeptNeighbours(2**20), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for query in range(3):
            others = [5, 3, 8, 9, 4, 11 + query]
            assert_equal(search(levels, query, others, store), search(levels, query, others))
    finally:
        torch.set_num_threads(before)
    assert any(done) == (crowd > 0)


def test_threads_share_it() -> None:
    levels, store = images(24), KeptNeighbours(2**18)
    wanted = [(query, [(query + step) % 24 for step in (1, 2, 5, 9)]) for query in range(24)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: search(levels, *one, store), wanted * 2))
    for one, expected in zip(found, [search(levels, *one) for one in wanted] * 2, strict=True):
        assert_equal(one, expected)
    assert store.bytes <= store.limit


def test_values_that_no_float32_holds_are_refused_as_without_it() -> None:
    levels, store = images(6).astype(np.float32), KeptNeighbours(2**20)
    search(levels, 0, [1, 2, 3], store)
    levels[4:] *= np.float32(1e30)
    with pytest.raises(sf.FeatureError, match="squared distances fit float32"):
        search(levels, 0, [4, 5], store)
    assert_equal(search(levels, 0, [1, 2, 3], store), search(levels, 0, [1, 2, 3]))
