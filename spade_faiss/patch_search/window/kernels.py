"""Compiled loops of the window engine, and of the directions that cosine compares.

A level is (c, >= pad + m + pad) float32: m = h * w cells in rows, channels one after the other, with padding before the
cells, at least as much as the window has columns on a side, and after them. An offset (dy, dx) leads from a query patch
to the gallery patch dy rows below it and dx columns right of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import VECTOR, address_of, jit
from ..heaps import sink
from .simd import CHANNELS, add_squares_1, add_squares_3

TINY = 2.0**-110  # below the least normal number sums lose their digits


@jit
def add_squares(query: Any, level: Any, pad: int, grid: Any, radius: Any, band: Any, sums: Any) -> None:
    """Add to sums the squared distances of a band of query patches from the gallery patch at each offset.

    The loops over cells run over contiguous memory, in vectors: where an offset leads past the end of a row they go on
    in the next row, or in the padding, and that sum means nothing. Three offsets beside each other share what is loaded
    from the query. Differences are taken directly: small distances keep all their digits.

    Args:
        query: a level (c, n) float32.
        level: the neighbour's (c, n) float32.
        pad: cells before the first of a level.
        grid: (h, w).
        radius: rows and columns on either side.
        band: first row of query patches, and the end.
        sums: (o, cells of the band) float32, offsets ascending; unchanged where an offset leads out of the rows.
    """
    height, width = grid
    first, end = band
    rows, columns = radius
    channels, across = len(query), 2 * columns + 1
    whole, grouped = channels - channels % CHANNELS, across - across % 3
    own_row, row, sums_row = query.strides[0] // 4, level.strides[0] // 4, sums.strides[0] // 4
    for channel in range(0, whole, CHANNELS):
        for dy in range(-rows, rows + 1):
            top, bottom = max(first, -dy), min(end, height - dy)
            if top >= bottom:
                continue
            n, start, out = (bottom - top) * width, (top - first) * width, (dy + rows) * across
            a, b, vectors = pad + top * width, pad + (top + dy) * width - columns, n - n % VECTOR
            mine = address_of(query) + 4 * (channel * own_row + a)
            theirs = address_of(level) + 4 * (channel * row + b)
            to = address_of(sums) + 4 * (out * sums_row + start)
            for x in range(0, grouped, 3):
                add_squares_3(mine, theirs + 4 * x, to + 4 * x * sums_row, own_row, row, sums_row, vectors)
            for x in range(grouped, across):
                add_squares_1(mine, theirs + 4 * x, to + 4 * x * sums_row, own_row, row, sums_row, vectors)
            for x in range(across):
                for i in range(vectors, n):
                    total = np.float32(0)  # rounded apart, as vectors are
                    for one in range(channel, channel + CHANNELS):
                        difference = query[one, a + i] - level[one, b + x + i]
                        total += difference * difference
                    sums[out + x, start + i] += total
    for channel in range(whole, channels):
        mine, theirs = query[channel], level[channel]
        for dy in range(-rows, rows + 1):
            top, bottom = max(first, -dy), min(end, height - dy)
            if top >= bottom:
                continue
            n, start, out = (bottom - top) * width, (top - first) * width, (dy + rows) * across
            a, b = pad + top * width, pad + (top + dy) * width - columns
            m0 = mine[a : a + n]
            for x in range(across):
                s0, t0 = sums[out + x, start : start + n], theirs[b + x : b + x + n]
                for i in range(n):
                    difference = m0[i] - t0[i]
                    s0[i] += difference * difference


@jit
def choose(
    sums: Any, grid: Any, offsets: Any, band: Any, place: int, state: Any, slack: float, lanes: Any, places: Any
) -> Any:
    """Choose the pairs that may be among the nearest.

    Args:
        sums: from add_squares.
        grid: (h, w).
        offsets: (o, 2) int64, ascending.
        band: first row of query patches, and the end.
        place: position of the neighbour's first patch.
        state: the kappa least sums so far (m, kappa) float32, and the kappa least squared distances so far (m, kappa)
            float32; in both the greatest is the first.
        slack: a sum is off by less than half of this, relatively.
        lanes: (>= o * cells of the band,) int64, set to query patches.
        places: likewise, set to positions of gallery patches.

    Returns:
        the number of pairs.
    """
    height, width = grid
    first, end = band
    heap, best = state
    count = 0
    for counting in (True, False):  # first the least sums, then all that come near them
        for number in range(len(offsets)):
            dy, dx = offsets[number]
            for y in range(max(first, -dy), min(end, height - dy)):
                for x in range(max(0, -dx), min(width, width - dx)):
                    lane = y * width + x
                    value = sums[number, lane - first * width]
                    if counting:
                        if value < heap[lane, 0]:
                            sink(heap[lane], value)
                    # What comes after an exact match loses.
                    elif value <= heap[lane, 0] * (1 + slack) + TINY and best[lane, 0] > 0:
                        lanes[count], places[count] = lane, place + (y + dy) * width + x + dx
                        count += 1
    return count


@jit
def measure(query: Any, level: Any, pad: int, lanes: Any, cells: Any, sums: Any) -> None:
    """Set sums (n,) float64 to the squared distances of n query patches from as many gallery patches of a level.

    Args:
        query: a level (c, n) float32.
        level: the neighbour's (c, n) float32.
        pad: cells before the first of a level.
        lanes: (n,) int64 cells of the query.
        cells: (n,) int64 cells of the level.
        sums: (n,) float64.
    """
    sums[:] = 0
    for channel in range(len(query)):
        mine, theirs = query[channel], level[channel]
        for i in range(len(sums)):
            difference = np.float64(mine[pad + lanes[i]]) - np.float64(theirs[pad + cells[i]])
            sums[i] += difference * difference


@jit
def normalise(level: Any, pad: int, m: int) -> Any:
    """Divide the m cells of a level by their norms; its last channel becomes 1 where there is no direction, else 0.

    Norms are float64, in which no float32 overflows when squared, and none vanishes.

    Args:
        level: (c + 1, n) float32.
        pad: cells before the first.
        m: number of cells.

    Returns:
        whether some cell is a zero vector.
    """
    channels = len(level) - 1
    factors = np.zeros(m, np.float64)
    for channel in range(channels):
        row = level[channel, pad : pad + m]
        for i in range(m):
            factors[i] += np.float64(row[i]) * np.float64(row[i])
    some, last = False, level[channels, pad : pad + m]
    for i in range(m):
        nothing = factors[i] == 0
        last[i] = 1 if nothing else 0
        factors[i] = 0 if nothing else 1 / np.sqrt(factors[i])
        some = some or nothing
    for channel in range(channels):
        row = level[channel, pad : pad + m]
        for i in range(m):
            row[i] = row[i] * factors[i]
    return some
