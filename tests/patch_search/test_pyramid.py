"""What the pyramid engine has to itself; that it equals the oracle is in test_patch_search.py."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spade_faiss.errors import FeatureError
from spade_faiss.patch_search import compiled
from spade_faiss.patch_search.pyramid import search as pyramid
from spade_faiss.patch_search.pyramid.plan import Plan, doubts, rounded
from spade_faiss.patch_search.pyramid.search import search_pyramid
from spade_faiss.patch_search.search import search_patches
from spade_faiss.system.threads import single_threads
from tests import reference

Levels = list[np.ndarray]
SHAPES = [(24, 14, 12), (40, 7, 6), (30, 4, 3)]


@pytest.fixture(params=["float32", "bfloat16"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The products' type."""
    monkeypatch.setattr(pyramid, "bfloat16_pays", lambda: request.param == "bfloat16")
    return str(request.param)


def plain_background(noise: float, k: int, dtype: type = np.float16) -> tuple[Levels, Levels]:
    """Query and neighbours that differ in their right half, and by little in their left."""
    rng = np.random.default_rng(0)
    levels = []
    for c, h, w in SHAPES:
        maps = rng.normal(size=(k + 1, c, h, w))
        left = rng.normal(size=(1, c, 1, 1)) + noise * rng.normal(size=(k + 1, c, h, w))
        levels.append(np.where(np.arange(w) < w // 2, left, maps).astype(dtype))
    return [level[0] for level in levels], [level[1:] for level in levels]


def assert_nearest(found: tuple[np.ndarray, np.ndarray], query: Levels, neighbours: Levels, kappa: int) -> None:
    h, w = query[0].shape[1:]
    expected, _ = reference.search_patches(query, neighbours, kappa)
    np.testing.assert_allclose(found[0].reshape(h, w, kappa), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("noise", [0, 1e-3, 1e-2])
@pytest.mark.parametrize("kappa", [1, 4])
def test_plain_backgrounds(
    products: str, kappa: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:  # more candidates than there is room for, in a region that products cannot tell apart
    monkeypatch.setattr(pyramid, "CANDIDATES", 1)
    monkeypatch.setattr(pyramid, "TOO_MANY", 50)
    query, neighbours = plain_background(noise, 6)
    assert_nearest(search_pyramid(query, neighbours, kappa), query, neighbours, kappa)


def test_undecided_patches_are_searched_for_anew_from_among_them(
    products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyramid, "CANDIDATES", 1)
    monkeypatch.setattr(pyramid, "TOO_MANY", 50)
    query, neighbours = plain_background(1e-3, 6)
    measured: list[int] = []
    measure = pyramid.Worker.measure

    def counted(self: pyramid.Worker, some: pyramid.Candidates) -> np.ndarray:
        measured.append(len(some))
        return measure(self, some)

    monkeypatch.setattr(pyramid.Worker, "measure", counted)
    search_pyramid(query, neighbours, 1)
    assert sum(measured) < 20 * 14 * 12  # of 6 * 14 * 12 / 2 in the background alone, each as near as products tell


@pytest.mark.parametrize("kappa", [1, 3])
def test_number_of_threads_does_not_change_the_answer(products: str, kappa: int) -> None:
    query, neighbours = plain_background(1e-3, 5)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(search_pyramid(query, neighbours, kappa))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        np.testing.assert_array_equal(other[0], found[0][0])
        np.testing.assert_array_equal(other[1], found[0][1])


def test_torch_computes_with_one_thread_in_each_search_thread() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for number in (1, 4):
            gate = threading.Barrier(number)

            def compute(_: int, gate: threading.Barrier = gate) -> int:
                torch.mm(torch.ones(300, 300), torch.ones(300, 300))
                gate.wait()
                return torch.get_num_threads()

            assert list(single_threads(number).map(compute, range(number))) == [1] * number
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_searches_at_the_same_time_leave_torch_its_threads(products: str) -> None:
    query, neighbours = plain_background(1, 3)
    alone, before = search_pyramid(query, neighbours, 1), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: (*search_pyramid(query, neighbours, 1), torch.get_num_threads()), range(8)))
    finally:
        torch.set_num_threads(before)
    for sq_distances, matches, threads in found:
        np.testing.assert_array_equal(sq_distances, alone[0])
        np.testing.assert_array_equal(matches, alone[1])
        assert threads == 3


@pytest.mark.parametrize("kappa", [1, 4])
def test_every_way_of_upsampling(products: str, kappa: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, neighbours = plain_background(1, 3)
    for lifts in (False, True):
        monkeypatch.setattr("spade_faiss.patch_search.pyramid.plan._lifts", lambda *_, lifts=lifts: lifts)
        assert_nearest(search_pyramid(query, neighbours, kappa), query, neighbours, kappa)


def test_blocks_and_bands_of_any_size(products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, neighbours = plain_background(1, 3)
    for block, tile in ((1, 1), (1, 2**20), (10**6, 3000), (40, 30000)):
        monkeypatch.setattr("spade_faiss.patch_search.pyramid.plan.BLOCK_PATCHES", block)
        monkeypatch.setattr(pyramid, "TILE_BYTES", tile)
        assert_nearest(search_pyramid(query, neighbours, 2), query, neighbours, 2)


@pytest.mark.parametrize("scale", [1e-17, 1e15])
def test_values_near_the_ends_of_float32(products: str, scale: float) -> None:
    query, neighbours = plain_background(1, 2, np.float32)
    query, neighbours = ([(scale * level).astype(np.float32) for level in levels] for levels in (query, neighbours))
    found = search_pyramid(query, neighbours, 1)
    expected, _ = reference.search_patches(query, neighbours, 1)
    np.testing.assert_allclose(found[0].reshape(expected.shape), expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3])
def test_distances_that_do_not_fit_float32_are_refused(products: str, number: int) -> None:
    query, neighbours = plain_background(1, 4, np.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(number)
        for factor in (1e25, 1e37):
            with pytest.raises(FeatureError, match="fit float32"):
                search_patches([factor * level for level in query], neighbours, 1, "pyramid", "cpu")
            with pytest.raises(FeatureError, match="fit float32"):
                search_patches(query, [factor * level for level in neighbours], 1, "pyramid", "cpu")
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**16), cells=st.integers(1, 40), channels=st.integers(1, 300), skew=st.floats(0, 2.0**-7))
def test_rounding_takes_no_more_than_the_doubt(seed: int, cells: int, channels: int, skew: float) -> None:
    rng = np.random.default_rng(seed)
    # values that all lie the same way between two bfloat16 are rounded the same way: errors add up
    levels = [
        (2.0 ** rng.integers(-3, 4, (channels, cells)) * (1 + skew) * rng.choice([-1, 1], (channels, 1))).astype(
            np.float32
        )
        for _ in range(2)
    ]
    operands, both = [], []
    for level in levels:
        operand, sums = rounded(level, cells, np.zeros(channels, np.float32), 1, True)
        operands.append(operand)
        both.append(doubts(np.stack([sums[0], sums[0], sums[0], sums[5]]), channels).astype(np.float64))
    products = (operands[0].t() @ operands[1]).double().numpy()
    exact = levels[0].T.astype(np.float64) @ levels[1].astype(np.float64)
    assert (np.abs(products - exact) <= both[0][:, None] + both[1]).all()


def test_float32_products_that_torch_may_round_are_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    query, _ = plain_background(1, 1)
    trusted = Plan.make(query, False).doubts
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    plan = Plan.make(query, False)
    assert (plan.doubts >= 2.0**-8 * plan.sq_norms).all()
    assert (plan.doubts > 100 * trusted).all()


def test_compiles_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = compiled.numba.njit

    def nowhere(**options: bool) -> object:
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return compile_(**options)

    monkeypatch.setattr(compiled.numba, "njit", nowhere)
    assert compiled.jit(lambda a, b: a + b)(1, 2) == 3


def test_more_levels_than_usual(products: str) -> None:
    rng = np.random.default_rng(0)
    shapes = [(3, 9, 7), (2, 8, 7), (4, 5, 6), (2, 9, 7), (3, 2, 3), (2, 1, 1)]
    query = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    neighbours = [rng.normal(size=(3, *shape)).astype(np.float32) for shape in shapes]
    assert_nearest(search_pyramid(query, neighbours, 3), query, neighbours, 3)
