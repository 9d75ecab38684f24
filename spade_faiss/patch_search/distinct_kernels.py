"""Compiled loops of the search for the nearest patch of each neighbour. All arrays are C-contiguous."""

from __future__ import annotations

from typing import Any

import numpy as np

from .pyramid_simd import jit

BLOCK = 64  # cells that are looked at together
HOPELESS = -1  # in the place of a cell


@jit
def sq_distance(mine: Any, theirs: Any) -> float:
    """Return the sum of squared differences of two (c,) float32 patches, in float64."""
    total = 0.0
    for channel in range(len(mine)):
        difference = np.float64(mine[channel]) - np.float64(theirs[channel])
        total += difference * difference
    return total


@jit
def least(products: Any, doubts: Any, query: Any, cells: Any, highs: Any, halves: Any, at: Any) -> None:
    """Find the cell with the least product of each row; those within twice the doubt are measured, the first wins.

    Args:
        products: (m, n) float32, of one neighbour.
        doubts: (m,) float32.
        query: (m, c) float32 patches.
        cells: (n, c) float32 patches of the neighbour.
        highs: (m, kappa) float32, the least upper bounds of the neighbours so far: kept.
        halves: (m,) float32, the least product of each row.
        at: (m,) int64, set to the nearest cells; HOPELESS: kappa neighbours are nearer.
    """
    n = products.shape[1]
    for row in range(len(products)):
        values, smallest = products[row], halves[row]
        last = 0
        for i in range(1, highs.shape[1]):
            if highs[row, i] > highs[row, last]:
                last = i
        if smallest - doubts[row] > highs[row, last]:
            at[row] = HOPELESS
            continue
        highs[row, last] = min(highs[row, last], smallest + doubts[row])
        limit, nearest, best, alone = smallest + 2 * doubts[row], -1, np.inf, True
        for start in range(0, n, BLOCK):
            end, hits = min(start + BLOCK, n), 0
            for i in range(start, end):
                hits += values[i] <= limit
            if hits:
                for i in range(start, end):
                    if not values[i] <= limit:
                        continue
                    if nearest < 0:
                        nearest = i
                        continue
                    if alone:  # only now is the first one measured
                        best, alone = sq_distance(query[row], cells[nearest]), False
                    found = sq_distance(query[row], cells[i]) if best > 0 else np.inf
                    if found < best:
                        nearest, best = i, found
                if best == 0:
                    break
        at[row] = max(nearest, 0)  # none: overflow, which the distances show


@jit
def measure(query: Any, cells: Any, lanes: Any, at: Any, sq_distances: Any) -> None:
    """Measure pairs as sums of squares, in float64.

    Args:
        query: (m, c) float32 patches.
        cells: (n, c) float32 patches of a neighbour.
        lanes: (p,) rows of the query.
        at: (p,) int64 rows of the cells.
        sq_distances: (p,) float64, set.
    """
    for pair in range(len(lanes)):
        sq_distances[pair] = sq_distance(query[lanes[pair]], cells[at[pair]])
