"""Compiled loops of the pyramid engine. All arrays are C-contiguous; `half` is (sq_distance - |a|^2) / 2 of a pair."""

from __future__ import annotations

from typing import Any

import numpy as np

from .vectors import PAIR, TAPS, VECTOR, as_bits, as_float, compare_pair, jit

SQUARES, RIGHT, BELOW, DIAGONAL, ANTIDIAGONAL, RESIDUALS = range(6)  # rows of `sums`


@jit
def prepare(level: Any, width: int, shift: Any, scale: float, narrow: bool, cross: bool, out: Any, sums: Any) -> None:
    """Shift and scale the cells of a level, round them for the product, and sum over the channels what norms need.

    Args:
        level: (c, m) float32, m cells in rows of `width`.
        width: cells a row.
        shift: (c,) float32, taken from the values.
        scale: what they are multiplied by then.
        narrow: round to bfloat16.
        cross: sum also the products of neighbouring cells.
        out: (c, >= m) float32, or uint16 for the bits of bfloat16.
        sums: (6, m) float32, set to: the cells' squared norms; their products with the next cell, with the cell below,
            with the one right of that; the next cell's with the cell below; squared norms of what rounding took.
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
def add_norms(sums: Any, columns: int, rows: Any, row_weights: Any, across: Any, weights: Any, out: Any) -> None:
    """Add to `out` what one level gives to the norms of upsampled patches.

    Args:
        sums: of prepare, (6, rows of the level * columns).
        columns: of the level.
        rows: (h, 2) rows of the level under each row of patches.
        row_weights: likewise.
        across: (w, 2) columns of the level under each column of patches.
        weights: likewise.
        out: (3, h, w) float32: squared norms; upsampled squared norms, an upper bound of these; upsampled residuals.
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
            mean0, mean1 = b0 * residuals[i00] + b1 * residuals[i01], b0 * residuals[i10] + b1 * residuals[i11]
            out[2, y, x] += a0 * mean0 + a1 * mean1


@jit
def sink(keys: Any, value: float) -> None:
    """Replace the greatest of a heap, keys[0], by a smaller value."""
    at, size = 0, len(keys)
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and keys[child + 1] > keys[child]:
            child += 1
        if keys[child] <= value:
            break
        keys[at] = keys[child]
        at = child
    keys[at] = value


@jit
def drop_hopeless(lanes: Any, places: Any, lows: Any, highs: Any, count: Any, bounds: Any) -> None:
    """Keep of the `count[0]` candidates those that still pass their query patch's bound."""
    kept = 0
    for i in range(count[0]):
        if lows[i] <= bounds[lanes[i]]:
            lanes[kept], places[kept], lows[kept], highs[kept] = lanes[i], places[i], lows[i], highs[i]
            kept += 1
    count[0] = kept


@jit
def _blend(out: Any, first: Any, second: Any, weight: float, other: float) -> None:
    for i in range(len(out)):
        out[i] = weight * first[i] + other * second[i]


@jit
def scan(
    products: Any, coarse: Any, grids: Any, plan: Any, band: Any, tile: Any, state: Any, found: Any, scratch: Any
) -> Any:
    """Compare the query patches of a tile with its gallery patches, and keep every one that may be among the nearest.

    Args:
        products: ((rows * w) + 1, lanes) float32 or bits of bfloat16: the finest level's inner products.
        coarse: flat float32: of each coarser level the inner products, upsampled along the query's columns:
            (gallery rows of the band, gallery columns, query rows, w).
        grids: a tuple with as many entries as there are coarser levels.
        plan: what is the same for every tile: rows (L, h, 2) of each level under each row of patches, their weights;
            of each pair of columns the cells (pairs, L * TAPS) of the stacked levels and (pairs, 2, L * TAPS) weights;
            of each level (L, 2): its columns and its rows.
        band: of each level (L, 2): where it starts in coarse, and its first row there; limits (rows, 2 * pairs) and
            doubts likewise; the first position (neighbour, row, column) of the tile's first row.
        tile: w; first gallery row in the image, in the band, and their number; first and last query row, query rows a
            block; where to resume: query row, gallery row.
        state: bounds (h * w + VECTOR,), doubts (h * w,), heap (h * w, kappa) of the query patches.
        found: candidates so far: query patch, position, lower and upper bound of half, and their number.
        scratch: two rows of every level (2, cells, lanes of a block), their blend (cells, lanes), out (2, lanes).

    Returns:
        -1, or where to resume when there is room for candidates again: query row * h + gallery row.
    """
    rows, row_weights, cells, shares, sizes = plan
    starts, limits, doubts, place = band
    width, top, top_in_band, count, first, last, step, resume, resume_row = tile
    bounds, own_doubts, heap = state
    lanes_found, places, lows, highs, number = found
    height, levels = rows.shape[1], len(grids)
    pairs = len(cells)
    held = np.empty((max(levels, 1), 2), np.int64)
    offsets = np.empty_like(cells)
    for above in range(max(first, resume), last, step):
        wide = (min(above + step, last) - above) * width
        n = (wide + VECTOR - 1) // VECTOR * VECTOR
        start = above * width
        two_rows, blended, out = scratch[0], scratch[1], scratch[2]
        held[:] = -1
        for pair in range(pairs):
            for tap in range(levels * TAPS):
                offsets[pair, tap] = cells[pair, tap] * n
        for y in range(resume_row if above == resume else 0, count):
            if number[0] + 2 * pairs * wide > len(places):
                drop_hopeless(lanes_found, places, lows, highs, number, bounds)
                if number[0] + 2 * pairs * wide > len(places) // 2:
                    return above * height + y
            base = 0
            for level in range(levels):
                columns, tall = sizes[level, 0], sizes[level, 1]
                for side in range(2):
                    row = rows[level, top + y, side]
                    if held[level, row & 1] == row:
                        continue
                    held[level, row & 1] = row
                    at = starts[level, 0] + (row - starts[level, 1]) * columns * tall * width
                    for column in range(columns):
                        target = two_rows[row & 1, (base + column) * n : (base + column + 1) * n]
                        for lane in range(wide // width):
                            upper = at + (column * tall + rows[level, above + lane, 0]) * width
                            lower = at + (column * tall + rows[level, above + lane, 1]) * width
                            _blend(
                                target[lane * width : (lane + 1) * width],
                                coarse[upper : upper + width],
                                coarse[lower : lower + width],
                                row_weights[level, above + lane, 0],
                                row_weights[level, above + lane, 1],
                            )
                _blend(
                    blended[base * n : (base + columns) * n],
                    two_rows[rows[level, top + y, 0] & 1, base * n : (base + columns) * n],
                    two_rows[rows[level, top + y, 1] & 1, base * n : (base + columns) * n],
                    row_weights[level, top + y, 0],
                    row_weights[level, top + y, 1],
                )
                base += columns
            lane0 = start - first * width
            for pair in range(pairs):
                column = pair * PAIR
                line = y * width + column
                passed = compare_pair(
                    products,
                    grids,
                    np.int64(products.shape[1]),
                    (
                        np.int64(products.ctypes.data + (line * products.shape[1] + lane0) * products.itemsize),
                        np.int64(blended.ctypes.data),
                        np.int64(offsets.ctypes.data + pair * levels * TAPS * 8),
                        np.int64(shares.ctypes.data + pair * levels * TAPS * PAIR * 4),
                        np.int64(bounds.ctypes.data + start * 4),
                        np.int64(limits.ctypes.data + ((top_in_band + y) * pairs + pair) * PAIR * 4),
                        np.int64(out.ctypes.data),
                    ),
                    np.int64(n),
                )
                if not passed:
                    continue
                for g in range(PAIR):
                    limit, doubt = limits[top_in_band + y, column + g], doubts[top_in_band + y, column + g]
                    for i in range(wide):
                        if not out[g * n + i] + bounds[start + i] >= limit:
                            continue
                        lane = start + i
                        low, k = limit - out[g * n + i], number[0]
                        high = low + 2 * doubt
                        lanes_found[k], places[k], lows[k], highs[k] = lane, place + line + g, low, high
                        number[0] = k + 1
                        if high < heap[lane, 0]:
                            sink(heap[lane], high)
                            bounds[lane] = min(bounds[lane], heap[lane, 0] + 2 * own_doubts[lane])
    return -1


@jit
def add_differences(
    query: Any, level: Any, shift: Any, taps: Any, weights: Any, others: Any, shares: Any, out: Any
) -> None:
    """Add the squared differences of upsampled patches in one level, the sums over its channels, to out.

    The same arithmetic on both sides: patches that are equal are at exactly 0.

    Args:
        query: (c, cells) float32, shifted.
        level: (c, cells) float32 of the neighbour, not shifted.
        shift: (c,) float32.
        taps: (4, m) cells of the query's level under each of m patches.
        weights: of these.
        others: (4, m) cells of the neighbour's level under the patches to compare with.
        shares: of these.
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
def keep_nearest(lanes: Any, places: Any, sq_distances: Any, best: Any, best_at: Any) -> None:
    """Put candidates into the heaps best (h * w, kappa) float32 and best_at int64: the last in order is on top."""
    for i in range(len(lanes)):
        keys, at = best[lanes[i]], best_at[lanes[i]]
        value, place = sq_distances[i], places[i]
        if not (value < keys[0] or (value == keys[0] and place < at[0])):
            continue
        here, size = 0, len(keys)
        while True:
            child = 2 * here + 1
            if child >= size:
                break
            other = child + 1
            if other < size and (keys[other] > keys[child] or (keys[other] == keys[child] and at[other] > at[child])):
                child = other
            if keys[child] < value or (keys[child] == value and at[child] < place):
                break
            keys[here], at[here] = keys[child], at[child]
            here = child
        keys[here], at[here] = value, place


@jit
def rank(lanes: Any, size: int) -> Any:
    """Number the candidates of each query patch in their order."""
    seen, result = np.zeros(size, np.int64), np.empty(len(lanes), np.int64)
    for i in range(len(lanes)):
        result[i] = seen[lanes[i]]
        seen[lanes[i]] += 1
    return result
