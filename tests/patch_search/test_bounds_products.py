"""That products of rounded patches are bounds: what rounding can do is counted, and no more."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch

from spade_faiss.patch_search.bounds import plan as bounds_plan
from spade_faiss.patch_search.bounds.panels import LARGEST
from spade_faiss.patch_search.bounds.prepared import packed, packed_query
from spade_faiss.patch_search.bounds.products_bytes import HAS_BYTES, multiply_bytes, multiply_bytes_within
from spade_faiss.patch_search.bounds.products_tiles import begin_tiles, end_tiles, has_tiles, multiply_tiles
from spade_faiss.patch_search.bounds.simd import (
    BYTES,
    HAS_QUADS,
    PAIRS,
    QUADS,
    TILES,
    WIDTH,
    multiply_quads,
    multiply_quads_within,
)
from tests.helpers.bounds import halves_of_bfloat16, halves_of_bytes, halves_of_int8


def packed_products(width: int, kind: int) -> tuple[Any, Any, Any, Any, Any]:
    """Both sides of the products of 90 patches with themselves, their true halves, the doubt, and what is largest."""
    rng = np.random.default_rng(6)
    patches = torch.from_numpy((rng.normal(size=(20, 90)) * np.geomspace(1, 1e-3, 20)[:, None]).astype(np.float32))
    projection = bounds_plan.Projection(20, None if width == 20 else bounds_plan.principal(patches)[:width], kind)
    wide = patches.double().numpy()
    sq_norms = np.square(wide).sum(axis=0)
    longest = float(np.sqrt(sq_norms.max()))
    along = projection.along(patches[None], slice(None))
    coordinates = projection.joined([along], torch.from_numpy(sq_norms.astype(np.float32))[None, None])
    largest = np.full((1, 3), longest, np.float32)
    norms = sq_norms.astype(np.float32)[None], np.zeros((1, 90), np.float32)
    panels = packed(projection, coordinates.numpy(), norms, largest)[0]
    true = (np.square(wide[:, :, None] - wide[:, None]).sum(axis=0) - sq_norms[:, None]) / 2
    doubt = projection.doubt * (np.sqrt(sq_norms)[:, None] + longest) ** 2 + projection.coarseness * longest**2
    return panels, packed_query(projection, coordinates[0], longest), true, doubt, largest[0]


@pytest.mark.parametrize("width", [3, 6, 20])
def test_products_of_16_bits_are_bounds(width: int) -> None:
    """Half squared distances by them are never above the true ones by more than their doubt, and some are above."""
    panels, mine, true, doubt, (longest, *_) = packed_products(width, PAIRS)
    words = panels.shape[1] - 1
    theirs = np.moveaxis(panels[:, :words].view(np.int16).reshape(len(panels), words, -1, 2), 1, 2)
    theirs = theirs.reshape(-1, 2 * words)[:90].astype(np.int64)
    mine = mine.view(np.int16).reshape(len(mine), words, -1, 2).transpose(0, 2, 1, 3).reshape(-1, 2 * words)[:90]
    halves = panels[:, words].reshape(-1)[:90] - (longest / LARGEST) ** 2 * (mine.astype(np.int64) @ theirs.T)
    assert (halves - doubt <= true).all()
    assert (halves > true).any()


@pytest.mark.parametrize("width", [3, 6, 20])
def test_products_of_8_bits_are_bounds(width: int) -> None:
    """What rounding can do is in the sum that a patch's products begin with; and what it takes is little."""
    panels, mine, true, doubt, (longest, *largest) = packed_products(width, QUADS)
    halves = halves_of_int8(panels, mine, largest)[:90, :90]
    assert (halves - doubt <= true).all()
    if width == 20:  # directions leave more
        assert (true - halves <= 2.0**-4 * longest**2).all()


@pytest.mark.skipif(not HAS_QUADS, reason="no products of int8 here")
@pytest.mark.parametrize("width", [3, 6, 20])
def test_quads_are_multiplied_as_integers_are(width: int) -> None:
    panels, mine, _, _, (longest, *largest) = packed_products(width, QUADS)
    expected, words = halves_of_int8(panels, mine, largest), panels.shape[1] - 2
    out, least = np.empty((6, 96), np.float32), np.empty((6, 32), np.float32)
    marked, hits, limits = np.empty((6, 96), np.float32), np.empty(3, np.uint64), np.empty(6, np.float32)

    @numba.njit
    def multiply(at: Any, others: Any, terms: Any) -> None:
        multiply_quads(at, terms, np.int64(words), np.int64(96), np.int64(96))
        multiply_quads_within(others, terms, np.int64(words), np.int64(96), np.int64(96))

    for block in range(len(mine)):
        rows = expected[6 * block : 6 * block + 6]
        limits[:] = np.sort(rows[:, :90], axis=1)[:, 1]
        addresses = [
            tuple(np.int64(array.ctypes.data) for array in (mine[block], panels, *arrays))
            for arrays in ((out, least), (marked, limits, hits))
        ]
        multiply(*addresses, (np.float32(1), *largest))
        np.testing.assert_allclose(out[:, :90], rows[:, :90], atol=1e-6 * longest**2)
        assert (out[:, 90:] == np.inf).all()
        np.testing.assert_array_equal(marked, out)
        np.testing.assert_array_equal(least, out.reshape(6, 3, 32).min(axis=1))
        within = (out <= limits[:, None]).reshape(6, 3, 32).any(axis=(0, 2))
        np.testing.assert_array_equal(hits != 0, within)


@pytest.mark.parametrize("width", [3, 6, 20])
def test_products_of_8_bits_in_sums_of_16_are_bounds(width: int) -> None:
    panels, mine, true, doubt, (longest, *_) = packed_products(width, BYTES)
    halves = halves_of_bytes(panels, mine)[:90, :90]
    assert (halves - doubt <= true).all()
    if width == 20:  # directions leave more
        assert (true - halves <= 2.0**-3 * longest**2).all()


@pytest.mark.skipif(not HAS_BYTES, reason="no products of int8 in sums of int16 here")
@pytest.mark.parametrize("channels", [1, 3, 4, 9, 31, 300])
@pytest.mark.parametrize("size", [1e-4, 1, 300])
@pytest.mark.parametrize("offset", [0, 3])
def test_bytes_are_multiplied_as_integers_are(channels: int, size: float, offset: float) -> None:
    """Whatever is within a limit is in a panel that is marked, whichever side's patches are the longer."""
    rng, n = np.random.default_rng(channels), 5 * WIDTH - 3
    theirs = (rng.normal(size=(channels, n)) + offset) * np.repeat(rng.uniform(0.1, 3, 5), WIDTH)[:n]
    own = (rng.normal(size=(channels, 15)) + offset) * size * rng.uniform(0.01, 1, 15)
    theirs[:, 5], own[:, 3] = 0, 0
    operand = theirs[None].astype(np.float32)
    sq_norms, projection = np.square(operand).sum(axis=1), bounds_plan.Projection(channels, None, BYTES)
    largest = np.full((1, 3), np.sqrt(sq_norms.max()), np.float32)
    panels = packed(projection, operand, (sq_norms, np.zeros_like(sq_norms)), largest)[0]
    query = torch.from_numpy(own.astype(np.float32))
    mine = packed_query(projection, query, float(query.square().sum(dim=0).max().sqrt()))
    expected, padded = halves_of_bytes(panels, mine), np.int64(5 * WIDTH)
    true = np.square(operand[0].astype(np.float64)).sum(axis=0) / 2 - query.double().numpy().T @ operand[0]
    assert (expected[:15, :n] <= true + 1e-6 * np.abs(true).max()).all()
    out, least = np.empty((6, 5 * WIDTH), np.float32), np.empty((6, WIDTH), np.float32)
    marked, hits, limits = np.empty_like(out), np.empty(5, np.uint64), np.full(8, np.nan, np.float32)

    @numba.njit
    def multiply(at: Any, others: Any) -> None:
        terms, words = (np.float32(0), np.float32(0), np.float32(0)), np.int64(-(-channels // 4))
        multiply_bytes(at, terms, words, padded, padded)
        multiply_bytes_within(others, terms, words, padded, padded)

    for block, rows in enumerate(expected.reshape(-1, 6, 5 * WIDTH)):
        atol = 1e-5 * np.abs(expected[:, :n]).max()
        for nth in (0, 1, n // 2, n - 1, None, np.inf):  # of the values; none are within NaN, and all within infinity
            if isinstance(nth, int):
                limits[:6] = np.sort(rows[:, :n], axis=1)[:, nth] + atol
            else:
                limits[:6] = np.nan if nth is None else nth
            marked[:] = np.nan
            multiply(*(
                tuple(np.int64(array.ctypes.data) for array in (mine[block], panels, *arrays))
                for arrays in ((out, least), (marked, limits, hits))
            ))  # fmt: skip
            np.testing.assert_allclose(out[:, :n], rows[:, :n], atol=atol)
            np.testing.assert_array_equal(least, out.reshape(6, 5, WIDTH).min(axis=1))
            within = (rows <= limits[:6, None]).reshape(6, 5, WIDTH).any(axis=(0, 2))
            assert ((hits != 0) >= within).all()
            assert (hits == 0).all() or nth is not None
            panels_of = marked.reshape(6, 5, WIDTH)[:, hits != 0]
            np.testing.assert_array_equal(panels_of, out.reshape(6, 5, WIDTH)[:, hits != 0])


@pytest.mark.skipif(not HAS_BYTES, reason="no products of int8 in sums of int16 here")
def test_few_panels_are_marked_that_have_nothing_within() -> None:
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(20, 300)).astype(np.float32)
    sq_norms, projection = np.square(patches).sum(axis=0), bounds_plan.Projection(20, None, BYTES)
    largest = np.full((1, 3), np.sqrt(sq_norms.max()), np.float32)
    panels = packed(projection, patches[None], (sq_norms[None], np.zeros((1, 300), np.float32)), largest)[0][:8]
    mine = packed_query(projection, torch.from_numpy(patches), float(largest[0, 0]))
    limits, hits = np.full(len(mine) * 6 + 8, np.nan, np.float32), np.empty(8, np.uint64)
    limits[:300] = -0.45 * sq_norms  # a tenth of a patch's own squared norm
    out, words, wide = np.empty((6, 8 * WIDTH), np.float32), np.int64(5), np.int64(8 * WIDTH)

    @numba.njit
    def multiply(at: Any) -> None:
        multiply_bytes_within(at, (np.float32(0), np.float32(0), np.float32(0)), words, wide, wide)

    number = 0
    for block in range(len(mine)):
        arrays = mine[block], panels, out, limits[6 * block :], hits
        multiply(tuple(np.int64(array.ctypes.data) for array in arrays))
        number += int((hits != 0).sum())
    assert 8 * WIDTH / 6 <= number < 0.2 * 8 * len(mine)  # of a patch with itself


@pytest.mark.parametrize("width", [3, 6, 20])
def test_products_of_bfloat16_are_bounds(width: int) -> None:
    """What rounding can do is in the product, so that nothing is above; and what it takes is little."""
    panels, mine, true, doubt, (longest, *_) = packed_products(width, TILES)
    halves = halves_of_bfloat16(panels, mine)[:90, :90]
    assert (halves - doubt <= true).all()
    if width == 20:  # directions leave more
        assert (true - halves <= 2.0**-7 * longest**2).all()


@pytest.mark.skipif(not has_tiles(), reason="no tile registers here")
def test_tiles_multiply_as_bfloat16_does() -> None:
    """In a thread whose tiles nobody has configured, and that has them as before when it is done."""
    panels, mine, _, _, (longest, *_) = packed_products(20, TILES)
    expected, words = halves_of_bfloat16(panels, mine), panels.shape[1]
    out, least = np.empty((32, 96 + 16), np.float32), np.empty((32, 32), np.float32)

    @numba.njit
    def multiply(at: Any) -> Any:
        before, after = np.zeros(64, np.uint8), np.ones(64, np.uint8)
        begin_tiles(before.ctypes.data)
        multiply_tiles(at, np.int64(words), np.int64(112), np.int64(96))
        end_tiles(before.ctypes.data)
        begin_tiles(after.ctypes.data)
        end_tiles(before.ctypes.data)
        return before, after

    for block in range(len(mine)):
        arrays = mine[block], panels, out, least
        before, after = multiply(tuple(np.int64(array.ctypes.data) for array in arrays))
        rows = expected[32 * block : 32 * block + 32]
        np.testing.assert_allclose(out[:, :90], rows[:, :90], atol=1e-6 * longest**2)
        assert (out[:, 90:96] == np.inf).all()
        np.testing.assert_array_equal(least, out[:, :96].reshape(32, 3, 32).min(axis=1))
        np.testing.assert_array_equal(before, after)
