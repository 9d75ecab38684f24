"""Compiled loops of the window engine, and of the directions that cosine compares.

A level is (c, >= pad + m + pad) float32: m = h * w cells in rows, channels one after the other, with padding before the
cells, at least as much as the window has columns on a side, and after them. An offset (dy, dx) leads from a query patch
to the gallery patch dy rows below it and dx columns right of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .pyramid_kernels import sink
from .pyramid_simd import jit

CHANNELS = 4  # taken at a time: sums are loaded and stored once for all of them


@jit
def add_squares(query: Any, level: Any, pad: int, grid: Any, radius: Any, band: Any, sums: Any) -> None:
    """Set sums to the squared distances of a band of query patches from the gallery patch at each offset.

    The loops over cells run over contiguous memory, so that they become vectors: where an offset leads past the end of
    a row they go on in the next row, or in the padding, and that sum means nothing. Three offsets beside each other
    share what is loaded from the query. Differences are taken directly: small distances keep all their digits.

    Args:
        query: a level (c, n) float32.
        level: the neighbour's (c, n) float32.
        pad: cells before the first of a level.
        grid: (h, w).
        radius: rows and columns on either side.
        band: first row of query patches, and the end.
        sums: (o, cells of the band) float32, offsets ascending; 0 where an offset leads out of the rows.
    """
    height, width = grid
    first, end = band
    rows, columns = radius
    channels, across = len(query), 2 * columns + 1
    whole, grouped = channels - channels % CHANNELS, across - across % 3
    sums[:] = 0
    for channel in range(0, whole, CHANNELS):
        q0, q1, q2, q3 = query[channel], query[channel + 1], query[channel + 2], query[channel + 3]
        g0, g1, g2, g3 = level[channel], level[channel + 1], level[channel + 2], level[channel + 3]
        for dy in range(-rows, rows + 1):
            top, bottom = max(first, -dy), min(end, height - dy)
            if top >= bottom:
                continue
            n, start, out = (bottom - top) * width, (top - first) * width, (dy + rows) * across
            a, b = pad + top * width, pad + (top + dy) * width - columns
            m0, m1, m2, m3 = q0[a : a + n], q1[a : a + n], q2[a : a + n], q3[a : a + n]
            for x in range(0, grouped, 3):
                s0, s1 = sums[out + x, start : start + n], sums[out + x + 1, start : start + n]
                s2, c, d = sums[out + x + 2, start : start + n], b + x, b + x + n + 2
                t0, t1, t2, t3 = g0[c:d], g1[c:d], g2[c:d], g3[c:d]
                for i in range(n):
                    u0, u1, u2, u3 = m0[i], m1[i], m2[i], m3[i]
                    d0, d1, d2, d3 = u0 - t0[i], u1 - t1[i], u2 - t2[i], u3 - t3[i]
                    s0[i] += d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3
                    d0, d1, d2, d3 = u0 - t0[i + 1], u1 - t1[i + 1], u2 - t2[i + 1], u3 - t3[i + 1]
                    s1[i] += d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3
                    d0, d1, d2, d3 = u0 - t0[i + 2], u1 - t1[i + 2], u2 - t2[i + 2], u3 - t3[i + 2]
                    s2[i] += d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3
            for x in range(grouped, across):
                s0, c, d = sums[out + x, start : start + n], b + x, b + x + n
                t0, t1, t2, t3 = g0[c:d], g1[c:d], g2[c:d], g3[c:d]
                for i in range(n):
                    d0, d1, d2, d3 = m0[i] - t0[i], m1[i] - t1[i], m2[i] - t2[i], m3[i] - t3[i]
                    s0[i] += d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3
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
                    # Below the least normal number sums lose their digits. What comes after an exact match loses.
                    elif value <= heap[lane, 0] * (1 + slack) + 2.0**-110 and best[lane, 0] > 0:
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
