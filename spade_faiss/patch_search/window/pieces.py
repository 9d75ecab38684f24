"""Compiled loops of the window engine on levels as they are stored, some channels of some neighbours at a time.

A neighbour's patches as float32 and the query's do not lie in a core's cache together. So a piece of their channels is
converted, compared with the same channels of the query, and overwritten by that of the next neighbour.

A level is given by its address: (c, m) float32, or float16, channels one after the other. Of cosine, `factors` are the
reciprocals of norms; the query has one channel more then, see cosine.fill_directions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..bounds.loading import value_of
from ..compiled import VECTOR, address_of, jit
from ..heaps import keep_nearest, sink
from .kernels import TINY, add_squares
from .simd import widen

PIECE = 32  # channels, a multiple of simd.CHANNELS


@jit
def load_row(kind: Any, at: int, first: int, row: Any) -> None:
    """Set row (n,) float32 to n stored values from the first on."""
    vectors = len(row) - len(row) % VECTOR
    widen(kind, at, first, address_of(row), vectors)
    for i in range(vectors, len(row)):
        row[i] = value_of(kind, at, first + i)


@jit
def set_factors(kind: Any, at: Any, channels: int, row: Any, factors: Any) -> None:
    """Set factors to 1 over the norm of each patch, or 0 where it is 0; see kernels.normalise.

    Args:
        kind: as for add_pieces.
        at: likewise.
        channels: of the levels.
        row: (m,) float32, to work in.
        factors: (s, m) float64.
    """
    factors[:] = 0
    for number in range(len(at)):
        mine = factors[number]
        for channel in range(channels):
            load_row(kind, at[number], channel * len(row), row)
            for i in range(len(row)):
                value = np.float64(row[i])
                mine[i] += value * value
        for i in range(len(row)):
            mine[i] = 0 if mine[i] == 0 else 1 / np.sqrt(mine[i])


@jit
def add_pieces(
    query: Any, kind: Any, at: Any, pad: int, grid: Any, radius: Any, factors: Any, piece: Any, sums: Any
) -> None:
    """Set sums to the squared distances of query patches from the patch of each neighbour at each offset.

    Args:
        query: (c, n) float32, or (c + 1, n), see kernels.
        kind: an array of the dtype of the neighbours' values: float32, or uint16, the bits of float16.
        at: (s,) int64 addresses of the neighbours' levels.
        pad: cells before the first in the query and the piece.
        grid: (h, w).
        radius: rows and columns on either side.
        factors: (s, m) float64; of L2 (s, 0).
        piece: (PIECE, n) float32, 0 in the padding.
        sums: (s, o, m) float32, offsets ascending.
    """
    height, width = grid
    cells, is_cosine = height * width, factors.shape[1] > 0
    channels = len(query) - is_cosine
    sums[:] = 0
    for start in range(0, channels, PIECE):
        some = min(PIECE, channels - start)
        for number in range(len(at)):
            for channel in range(some):
                row, first = piece[channel, pad : pad + cells], (start + channel) * cells
                load_row(kind, at[number], first, row)
                if is_cosine:
                    for i in range(cells):
                        row[i] = row[i] * factors[number, i]
            add_squares(query[start : start + some], piece[:some], pad, grid, radius, (0, height), sums[number])
    if is_cosine:
        for number in range(len(at)):
            for i in range(cells):
                piece[0, pad + i] = 1 if factors[number, i] == 0 else 0
            add_squares(query[channels:], piece[:1], pad, grid, radius, (0, height), sums[number])


@jit
def keep_sums(
    sums: Any, grid: Any, offsets: Any, first: int, state: Any, slack: float, pending: Any, count: int
) -> Any:
    """Keep the least sums of neighbours, and note the pairs that may be among the nearest; returns their number.

    Args:
        sums: of add_pieces.
        grid: (h, w).
        offsets: (o, 2) int64, ascending.
        first: the first neighbour.
        state: the kappa least sums so far (m, kappa) float32, and the kappa least squared distances so far (m, kappa)
            float32; in both the greatest is the first.
        slack: see kernels.choose.
        pending: cells of the query (n,) int64, positions in the gallery (n,) int64 and sums (n,) float32 of pairs, with
            room for all of these neighbours.
        count: number of pairs before.
    """
    height, width = grid
    heap, best = state
    lanes, places, values = pending
    for number in range(len(sums)):
        place = (first + number) * height * width
        for offset in range(len(offsets)):
            dy, dx = offsets[offset]
            for y in range(max(0, -dy), min(height, height - dy)):
                for x in range(max(0, -dx), min(width, width - dx)):
                    lane = y * width + x
                    value = sums[number, offset, lane]
                    # What comes after an exact match loses.
                    if value <= heap[lane, 0] * (1 + slack) + TINY and best[lane, 0] > 0:
                        lanes[count], places[count], values[count] = lane, place + (y + dy) * width + x + dx, value
                        count += 1
                        if value < heap[lane, 0]:
                            sink(heap[lane], value)
    return count


@jit
def keep_pairs(
    query: Any, kind: Any, at: Any, pad: int, factors: Any, state: Any, slack: float, pending: Any, count: int
) -> None:
    """Measure the noted pairs whose sums are still among the least, and keep the nearest.

    Args:
        query: as for add_pieces.
        kind: likewise.
        at: (K,) int64 addresses of all neighbours' levels.
        pad: as for add_pieces.
        factors: (K, m) float64; of L2 (K, 0).
        state: the kappa least sums, and the squared distances and positions of the nearest so far, (m, kappa) each.
        slack: see kernels.choose.
        pending: as for keep_sums; of a neighbour one after the other.
        count: number of pairs.
    """
    heap, best, best_at = state
    lanes, places, values = pending
    cells, left = len(heap), 0
    for i in range(count):
        if values[i] <= heap[lanes[i], 0] * (1 + slack) + TINY:
            lanes[left], places[left] = lanes[i], places[i]
            left += 1
    exact, start = np.zeros(left, np.float64), 0
    while start < left:
        neighbour, end = places[start] // cells, start + 1
        while end < left and places[end] // cells == neighbour:
            end += 1
        pairs = lanes[start:end], places[start:end] - neighbour * cells, cells
        measure_stored(query, kind, at[neighbour], pad, factors[neighbour], pairs, exact[start:end])
        start = end
    keep_nearest(lanes[:left], places[:left], exact.astype(np.float32), best, best_at)


@jit
def measure_stored(query: Any, kind: Any, at: int, pad: int, factors: Any, pairs: Any, sums: Any) -> None:
    """Add to sums (n,) float64 the squared distances of n query patches from as many patches of a stored level.

    Args:
        query: as for add_pieces.
        kind: likewise.
        at: address of the level.
        pad: cells before the first of the query.
        factors: (m,) float64; of L2 (0,).
        pairs: (n,) int64 cells of the query, (n,) those of the level, and the number of these.
        sums: (n,) float64.
    """
    lanes, places, cells = pairs
    is_cosine = len(factors) > 0
    channels = len(query) - is_cosine
    for channel in range(channels):
        mine = query[channel]
        for i in range(len(sums)):
            theirs = value_of(kind, at, channel * cells + places[i])
            if is_cosine:
                theirs = np.float32(theirs * factors[places[i]])
            difference = np.float64(mine[pad + lanes[i]]) - np.float64(theirs)
            sums[i] += difference * difference
    if is_cosine:
        for i in range(len(sums)):
            is_none = np.float64(1 if factors[places[i]] == 0 else 0)
            difference = np.float64(query[channels, pad + lanes[i]]) - is_none
            sums[i] += difference * difference
