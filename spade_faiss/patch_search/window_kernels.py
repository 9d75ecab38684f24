"""Compiled loops of the window engine, and of the directions that cosine compares.

A level is (c, >= m) float32: m = h * w cells in rows, channels one after the other, padding after the cells. An offset
(dy, dx) leads from a query patch to the gallery patch dy rows below it and dx columns right of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .pyramid_kernels import sink
from .pyramid_simd import jit

CHANNELS = 4  # taken at a time: sums are loaded and stored once for all of them


@jit
def add_squares(query: Any, level: Any, grid: Any, offsets: Any, band: Any, sums: Any) -> None:
    """Set sums to the squared distances of a band of query patches from the gallery patch at each offset.

    The loop over cells runs over contiguous memory, so that it becomes vectors: where an offset leads past the end of
    a row it goes on in the next row, and that sum means nothing. Differences are taken directly: small distances keep
    all their digits.

    Args:
        query: (c, >= m) float32.
        level: (c, >= m) float32, the neighbour's.
        grid: (h, w).
        offsets: (o, 2) int64.
        band: first row of query patches, and the end.
        sums: (o, >= cells of the band) float32; left alone where an offset leads out of the grid.
    """
    height, width = grid
    first, end = band
    channels, start = len(query), first * width
    whole = channels - channels % CHANNELS
    sums[:] = 0
    for channel in range(0, whole, CHANNELS):
        for number in range(len(offsets)):
            dy, dx = offsets[number]
            shift = dy * width + dx
            a = max(max(first, -dy) * width, -shift)
            b = min(min(end, height - dy) * width, height * width - shift)
            if a >= b:
                continue
            out = sums[number, a - start : b - start]
            q0, q1, q2, q3 = query[channel], query[channel + 1], query[channel + 2], query[channel + 3]
            g0, g1, g2, g3 = level[channel], level[channel + 1], level[channel + 2], level[channel + 3]
            q0, q1, q2, q3 = q0[a:b], q1[a:b], q2[a:b], q3[a:b]
            a, b = a + shift, b + shift
            g0, g1, g2, g3 = g0[a:b], g1[a:b], g2[a:b], g3[a:b]
            for i in range(len(out)):
                d0, d1, d2, d3 = q0[i] - g0[i], q1[i] - g1[i], q2[i] - g2[i], q3[i] - g3[i]
                out[i] += d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3
    for channel in range(whole, channels):
        for number in range(len(offsets)):
            dy, dx = offsets[number]
            shift = dy * width + dx
            a = max(max(first, -dy) * width, -shift)
            b = min(min(end, height - dy) * width, height * width - shift)
            if a >= b:
                continue
            out, mine, theirs = sums[number, a - start : b - start], query[channel, a:b], level[channel]
            theirs = theirs[a + shift : b + shift]
            for i in range(len(out)):
                difference = mine[i] - theirs[i]
                out[i] += difference * difference


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
def measure(query: Any, level: Any, lanes: Any, cells: Any, sums: Any) -> None:
    """Set sums (n,) float64 to the squared distances of n query patches from as many gallery patches of a level.

    Args:
        query: (c, >= m) float32.
        level: (c, >= m) float32, the neighbour's.
        lanes: (n,) int64 cells of the query.
        cells: (n,) int64 cells of the level.
        sums: (n,) float64.
    """
    sums[:] = 0
    for channel in range(len(query)):
        mine, theirs = query[channel], level[channel]
        for i in range(len(sums)):
            difference = np.float64(mine[lanes[i]]) - np.float64(theirs[cells[i]])
            sums[i] += difference * difference


@jit
def normalise(level: Any) -> Any:
    """Divide the cells of (c + 1, m) float32 by their norms; the last channel is 1 where there is no direction, else 0.

    Norms are float64, in which no float32 overflows when squared, and none vanishes.

    Returns:
        whether some cell is a zero vector.
    """
    channels, m = len(level) - 1, level.shape[1]
    factors = np.zeros(m, np.float64)
    for channel in range(channels):
        row = level[channel]
        for i in range(m):
            factors[i] += np.float64(row[i]) * np.float64(row[i])
    some, last = False, level[channels]
    for i in range(m):
        nothing = factors[i] == 0
        last[i] = 1 if nothing else 0
        factors[i] = 0 if nothing else 1 / np.sqrt(factors[i])
        some = some or nothing
    for channel in range(channels):
        row = level[channel]
        for i in range(m):
            row[i] = row[i] * factors[i]
    return some
