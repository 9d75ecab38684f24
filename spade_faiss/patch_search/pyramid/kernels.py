"""Compiled loops of the pyramid engine.

All arrays are C-contiguous. The `half` of a query patch a and a gallery patch is (sq_distance - |a|^2) / 2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import as_bits, as_float, jit
from ..heaps import sink
from .simd import PAIR, TAPS, blend, compare_pair

SQUARES, RIGHT, BELOW, DIAGONAL, ANTIDIAGONAL, RESIDUALS = range(6)  # rows of `sums`


@jit
def prepare(level: Any, width: int, shift: Any, scale: float, narrow: bool, cross: bool, out: Any, sums: Any) -> None:
    """Shift and scale the cells of a level, round them for the product, and sum what norms need over the channels.

    Args:
        level: (c, m) float32, m cells in rows of `width`.
        width: number of cells in a row.
        shift: (c,) float32, subtracted from the values.
        scale: factor of the shifted values.
        narrow: whether to round to bfloat16.
        cross: whether to sum the products of neighbouring cells too.
        out: (c, >= m) float32, or uint16 for the bits of bfloat16.
        sums: (6, m) float32, set to: the cells' squared norms; their products with the next cell, with the cell below,
            with the one right of that; the next cell's with the cell below; squared norms of the rounding errors.
    """
    m = level.shape[1]
    cell = np.zeros(m + width + 2, np.float32)  # past the end: never used, its weight is 0
    sums[:] = 0
    for channel in range(len(level)):
        source, target, taken = level[channel], out[channel], shift[channel]
        for i in range(m):
            cell[i] = (source[i] - taken) * scale
        squares = sums[SQUARES]
        for i in range(m):
            squares[i] += cell[i] * cell[i]
        if cross:
            right, below, diagonal, anti = sums[RIGHT], sums[BELOW], sums[DIAGONAL], sums[ANTIDIAGONAL]
            for i in range(m):
                right[i] += cell[i] * cell[i + 1]
                below[i] += cell[i] * cell[i + width]
                diagonal[i] += cell[i] * cell[i + width + 1]
                anti[i] += cell[i + 1] * cell[i + width]
        if narrow:
            residuals = sums[RESIDUALS]
            for i in range(m):
                bits = as_bits(cell[i])
                bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                target[i] = bits
                residual = as_float(bits << np.uint32(16)) - cell[i]
                residuals[i] += residual * residual
        else:
            for i in range(m):
                target[i] = cell[i]


@jit
def add_norms(
    sums: Any, columns: int, rows: Any, row_weights: Any, across: Any, weights: Any, narrow: bool, out: Any
) -> None:
    """Add one level's part of the norms of upsampled patches to `out`.

    Args:
        sums: from prepare, (6, rows of the level * columns).
        columns: number of columns of the level.
        rows: (h, 2) rows of the level under each row of patches.
        row_weights: (h, 2) their weights.
        across: (w, 2) columns of the level under each column of patches.
        weights: (w, 2) their weights.
        narrow: whether the level was rounded to bfloat16.
        out: (4, h, w) float32: squared norms; upsampled squared norms, an upper bound of these; of levels that were
            rounded only, upsampled squared norms and upsampled residuals.
    """
    squares, right, below = sums[SQUARES], sums[RIGHT], sums[BELOW]
    diagonal, anti, residuals = sums[DIAGONAL], sums[ANTIDIAGONAL], sums[RESIDUALS]
    for y in range(len(rows)):
        first, second = rows[y, 0] * columns, rows[y, 1] * columns
        a0, a1 = row_weights[y, 0], row_weights[y, 1]
        for x in range(len(across)):
            x0, x1, b0, b1 = across[x, 0], across[x, 1], weights[x, 0], weights[x, 1]
            i00, i01, i10, i11 = first + x0, first + x1, second + x0, second + x1
            upper = b0 * b0 * squares[i00] + b1 * b1 * squares[i01] + 2 * b0 * b1 * right[i00]
            lower = b0 * b0 * squares[i10] + b1 * b1 * squares[i11] + 2 * b0 * b1 * right[i10]
            both = b0 * b0 * below[i00] + b1 * b1 * below[i01] + b0 * b1 * (diagonal[i00] + anti[i00])
            out[0, y, x] += a0 * a0 * upper + a1 * a1 * lower + 2 * a0 * a1 * both
            mean0, mean1 = b0 * squares[i00] + b1 * squares[i01], b0 * squares[i10] + b1 * squares[i11]
            out[1, y, x] += a0 * mean0 + a1 * mean1
            if not narrow:
                continue
            out[2, y, x] += a0 * mean0 + a1 * mean1
            mean0, mean1 = b0 * residuals[i00] + b1 * residuals[i01], b0 * residuals[i10] + b1 * residuals[i11]
            out[3, y, x] += a0 * mean0 + a1 * mean1


@jit
def drop_hopeless(lanes: Any, places: Any, lows: Any, highs: Any, count: Any, bounds: Any) -> None:
    """Drop those of `count[0]` candidates that no longer pass their query patch's bound."""
    kept = 0
    for i in range(count[0]):
        if lows[i] <= bounds[lanes[i]]:
            lanes[kept], places[kept], lows[kept], highs[kept] = lanes[i], places[i], lows[i], highs[i]
            kept += 1
    count[0] = kept


@jit
def scan(
    products: Any, sources: Any, grids: Any, plan: Any, band: Any, tile: Any, state: Any, found: Any, scratch: Any
) -> Any:
    """Compare a block of query patches with a band of gallery patches; keep every pair that may be among the nearest.

    Args:
        products: (rows * w + 1, n) float32 or bits of bfloat16: the finest level's inner products.
        sources: (L, 2) int64, per coarser level: the address of its inner products with the query's upsampled patches,
            (rows of the level in the band * columns, n), and whether they are bits of bfloat16.
        grids: a tuple with one entry per coarser level.
        plan: upsampling of the coarser levels: rows (L, h, 2) under each row of patches; their weights; for each pair
            of columns of patches, cells (pairs, L * TAPS) of the stacked columns and weights (pairs, 2, L * TAPS);
            columns (L,).
        band: the gallery's: first row in each coarser level (L,), limits (rows, 2 * pairs), doubts (rows, 2 * pairs),
            position of the first patch.
        tile: w, first row of the band, number of rows, first query patch, number of query patches, row of the band to
            resume at.
        state: the query patches' bounds (q + VECTOR,), doubts (q,) and heap (q, kappa).
        found: candidates so far: query patches, positions, lower and upper bounds of half, and their number.
        scratch: the blended coarser products of a row of patches (cells * n), the pair's results (2 * n).

    Returns:
        -1 when done; the row of the band to resume at if there was no room for more candidates.
    """
    rows, row_weights, cells, shares, columns = plan
    firsts, limits, doubts, place = band
    width, top, count, start, wide, resume = tile
    bounds, own_doubts, heap = state
    lanes, places, lows, highs, number = found
    blended, out = scratch
    n, levels, pairs, size = products.shape[1], len(grids), len(cells), products.itemsize
    offsets = cells * n
    for y in range(resume, count):
        if number[0] + 2 * pairs * wide > len(places):
            drop_hopeless(lanes, places, lows, highs, number, bounds)
            if number[0] + 2 * pairs * wide > len(places) // 2:
                return y
        base = 0
        for level in range(levels):
            address, half_size = sources[level, 0], 2 if sources[level, 1] else 4
            line = columns[level] * n
            first = np.int64(address + (rows[level, top + y, 0] - firsts[level]) * line * half_size)
            second = np.int64(address + (rows[level, top + y, 1] - firsts[level]) * line * half_size)
            addresses = (np.int64(blended.ctypes.data + base * n * 4), first, second)
            weight, other = row_weights[level, top + y, 0], row_weights[level, top + y, 1]
            if sources[level, 1]:
                blend(True, addresses, np.int64(line), weight, other)
            else:
                blend(False, addresses, np.int64(line), weight, other)
            base += columns[level]
        for pair in range(pairs):
            column = pair * PAIR
            line = y * width + column
            passed = compare_pair(
                products,
                grids,
                np.int64(n),
                (
                    np.int64(products.ctypes.data + line * n * size),
                    np.int64(blended.ctypes.data),
                    np.int64(offsets.ctypes.data + pair * levels * TAPS * 8),
                    np.int64(shares.ctypes.data + pair * levels * TAPS * PAIR * 4),
                    np.int64(bounds.ctypes.data + start * 4),
                    np.int64(limits.ctypes.data + (y * pairs + pair) * PAIR * 4),
                    np.int64(out.ctypes.data),
                ),
                np.int64(n),
            )
            if not passed:
                continue
            for g in range(PAIR):
                limit, doubt = limits[y, column + g], doubts[y, column + g]
                for i in range(wide):
                    if not out[g * n + i] + bounds[start + i] >= limit:
                        continue
                    lane, k = start + i, number[0]
                    low = limit - out[g * n + i]
                    high = low + 2 * doubt
                    lanes[k], places[k], lows[k], highs[k] = lane, place + line + g, low, high
                    number[0] = k + 1
                    if high < heap[lane, 0]:
                        sink(heap[lane], high)
                        bounds[lane] = min(bounds[lane], heap[lane, 0] + 2 * own_doubts[lane])
    return -1


@jit
def add_differences(
    query: Any, level: Any, shift: Any, taps: Any, weights: Any, others: Any, shares: Any, out: Any
) -> None:
    """Add the squared differences of upsampled patches, summed over the channels of one level, to out.

    The arithmetic is the same on both sides: the distance of equal patches is exactly 0.

    Args:
        query: (c, cells) float32, shifted.
        level: (c, cells) float32, the neighbour's, not shifted.
        shift: (c,) float32.
        taps: (4, m) cells of the query's level under each of m patches.
        weights: (4, m) weights of `taps`.
        others: (4, m) cells of the neighbour's level under the patches to compare with.
        shares: (4, m) weights of `others`.
        out: (m,) float64.
    """
    m = len(out)
    row = np.empty(level.shape[1], np.float32)
    for channel in range(len(query)):
        mine, theirs, taken = query[channel], level[channel], shift[channel]
        for i in range(len(row)):
            row[i] = theirs[i] - taken
        for i in range(m):
            a = (
                weights[0, i] * mine[taps[0, i]]
                + weights[1, i] * mine[taps[1, i]]
                + weights[2, i] * mine[taps[2, i]]
                + weights[3, i] * mine[taps[3, i]]
            )
            b = (
                shares[0, i] * row[others[0, i]]
                + shares[1, i] * row[others[1, i]]
                + shares[2, i] * row[others[2, i]]
                + shares[3, i] * row[others[3, i]]
            )
            out[i] += np.float64(a - b) * np.float64(a - b)


@jit
def rank(lanes: Any, size: int) -> Any:
    """Number the candidates of each query patch in their order, from 0."""
    seen, result = np.zeros(size, np.int64), np.empty(len(lanes), np.int64)
    for i in range(len(lanes)):
        result[i] = seen[lanes[i]]
        seen[lanes[i]] += 1
    return result
