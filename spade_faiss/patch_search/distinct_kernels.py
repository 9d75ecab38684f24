"""Compiled loops of the search for the nearest patch of each neighbour. All arrays are C-contiguous."""

from __future__ import annotations

from typing import Any

import numpy as np

from .pyramid_simd import jit

BLOCK = 64  # cells that are looked at together
UNDECIDED, HOPELESS = -1, -2  # in the place of a cell


@jit
def least(products: Any, doubts: Any, highs: Any, halves: Any, at: Any) -> None:
    """Find the least value of each row, and where it is unless another is within twice the doubt.

    Args:
        products: (m, n) float32, of one neighbour.
        doubts: (m,) float32.
        highs: (m, kappa) float32, the least upper bounds of the neighbours so far: kept.
        halves: (m,) float32, set to the least values.
        at: (m,) int64, set to the columns of the least values; UNDECIDED: rounding could have hidden another;
            HOPELESS: kappa neighbours are nearer.
    """
    n = products.shape[1]
    for row in range(len(products)):
        values = products[row]
        lanes = np.full(BLOCK, np.inf, np.float32)
        whole = n - n % BLOCK
        for start in range(0, whole, BLOCK):
            for i in range(BLOCK):
                value = values[start + i]
                lanes[i] = value if value < lanes[i] else lanes[i]
        smallest = np.float32(np.inf)
        for i in range(BLOCK):
            smallest = min(smallest, lanes[i])
        for i in range(whole, n):
            smallest = min(smallest, values[i])
        halves[row] = smallest
        last = 0
        for i in range(1, highs.shape[1]):
            if highs[row, i] > highs[row, last]:
                last = i
        if smallest - doubts[row] > highs[row, last]:
            at[row] = HOPELESS
            continue
        highs[row, last] = min(highs[row, last], smallest + doubts[row])
        limit, count, first = smallest + 2 * doubts[row], 0, -1
        for start in range(0, n, BLOCK):
            end, hits = min(start + BLOCK, n), 0
            for i in range(start, end):
                hits += values[i] <= limit
            if hits:
                count += hits
                for i in range(start, end):
                    if first < 0 and values[i] <= limit:
                        first = i
                if count > 1:
                    break
        at[row] = first if count == 1 else UNDECIDED


@jit
def measure(query: Any, cells: Any, lanes: Any, at: Any, sq_distances: Any) -> None:
    """Measure as sums of squares, in float64.

    Args:
        query: (m, c) float32 patches.
        cells: (c, n) float32 patches of a neighbour.
        lanes: (p,) rows of the query.
        at: (p,) int64 columns of the cells; where it is negative all are measured, and the first nearest is set.
        sq_distances: (p,) float64, set.
    """
    c, n = cells.shape
    sums = np.empty(n, np.float64)
    for pair in range(len(lanes)):
        mine = query[lanes[pair]]
        if at[pair] >= 0:
            total = 0.0
            for channel in range(c):
                difference = np.float64(mine[channel]) - np.float64(cells[channel, at[pair]])
                total += difference * difference
            sq_distances[pair] = total
            continue
        sums[:] = 0
        for channel in range(c):
            value, theirs = np.float64(mine[channel]), cells[channel]
            for i in range(n):
                difference = value - np.float64(theirs[i])
                sums[i] += difference * difference
        nearest = 0
        for i in range(n):
            if sums[i] < sums[nearest]:
                nearest = i
        at[pair], sq_distances[pair] = nearest, sums[nearest]
