"""Compiled loops of the search by bounds. All arrays are C-contiguous.

The `half` of a query patch a and another patch b is (sq_distance - |a|^2) / 2, at the scale of the products.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .bounds_simd import LOOK, ROWS, multiply, some_at_most
from .pyramid_kernels import sink_pair
from .pyramid_simd import jit

BLOCK = 16  # cells that are turned into patches together: a line of a cache of each channel
TILE_BYTES = 2**18  # cells multiplied at a time: they stay in a core's cache until all of the query has met them


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})  # type: ignore[untyped-decorator]
def about(mine: Any, theirs: Any) -> Any:
    """Return the sum of squared differences of two (c,) float32 patches, in float32 and any order."""
    total = np.float32(0)
    for channel in range(len(mine)):
        difference = mine[channel] - theirs[channel]
        total += difference * difference
    return total


@jit
def sq_distance(mine: Any, theirs: Any) -> float:
    """Return the sum of squared differences of two (c,) float32 patches, in float64."""
    total = 0.0
    for channel in range(len(mine)):
        difference = np.float64(mine[channel]) - np.float64(theirs[channel])
        total += difference * difference
    return total


@jit
def are_equal(mine: Any, theirs: Any) -> bool:
    """Return whether two patches are."""
    for channel in range(len(mine)):  # noqa: SIM110 - numba compiles no generators
        if mine[channel] != theirs[channel]:
            return False
    return True


@jit
def prepare(values: Any, scale: Any, centre: Any, patches: Any, sq_norms: Any, largest: Any) -> None:
    """Turn neighbours' levels into patches, and the levels into what is multiplied.

    Args:
        values: (s, c, n) float32 levels, scaled and moved to the centre in place.
        scale: float32.
        centre: (c,) float32, at scale.
        patches: (s, n, c) float32, set to the levels as they were.
        sq_norms: (s, 1, n) float32, set to squared norms about the centre, at scale.
        largest: (s,) float32, set to the largest norm of each neighbour.
    """
    channels, n = values.shape[1:]
    for number in range(len(values)):
        norms = sq_norms[number, 0]
        norms[:] = 0
        for start in range(0, n, BLOCK):
            for i in range(start, min(start + BLOCK, n)):
                for channel in range(channels):
                    patches[number, i, channel] = values[number, channel, i]
        for channel in range(channels):
            row, middle = values[number, channel], centre[channel]
            for i in range(n):
                moved = row[i] * scale - middle
                row[i] = moved
                norms[i] += moved * moved
        largest[number] = np.sqrt(norms.max())


@jit
def pack(operand: Any, sq_norms: Any, largest: Any, panels: Any) -> None:
    """Cut operands into panels, with half squared norms as the last of the channels.

    Args:
        operand: (s, channels, n) float32.
        sq_norms: (s, 1, n) float32.
        largest: (s,) float32 largest norms; where one is not finite it is set to 0, and all patches will be measured.
        panels: (s, panels, channels + 1, WIDTH) float32, set; what is padded is infinitely far away.
    """
    channels, n = operand.shape[1:]
    wide = panels.shape[3]
    for number in range(len(operand)):
        known = np.isfinite(largest[number])
        largest[number] = largest[number] if known else np.float32(0)
        for panel in range(panels.shape[1]):
            target, start = panels[number, panel], panel * wide
            end = min(wide, n - start)
            for channel in range(channels):
                source = operand[number, channel]
                for i in range(end):
                    target[channel, i] = source[start + i] if known else np.float32(0)
                for i in range(end, wide):
                    target[channel, i] = 0
            for i in range(end):
                target[channels, i] = sq_norms[number, 0, start + i] / 2 if known else -np.inf
            for i in range(end, wide):
                target[channels, i] = np.inf


@jit
def offer(keys: Any, at: Any, value: Any, place: int, first: int) -> None:
    """Put a patch into a heap (kappa,), if it is among the nearest.

    Args:
        keys: float32.
        at: int64 positions.
        value: float32 squared distance.
        place: position.
        first: an entry at this position or after it is replaced, if it is farther; beyond all positions: none is.
    """
    here = 0
    for entry in range(len(keys) if first <= place else 0):
        if at[entry] >= first:
            here = entry
            break
    if value < keys[here] or (value == keys[here] and place < at[here]):
        sink_pair(keys, at, here, value, place)


@jit
def kth(values: Any, n: int, keys: Any, at: Any) -> Any:
    """Return the least but kappa - 1 of n values, or infinity; keys and at (kappa,) are overwritten."""
    keys[:] = np.inf
    for i in range(n):
        if values[i] < keys[0]:
            sink_pair(keys, at, 0, values[i], 0)
    return keys[0]


@jit
def half_limit(reach: float, square: float, sq_norm: float, doubt: float) -> Any:
    """Return what no half of a patch within `reach` is above."""
    limit = (reach * (1 + 1e-6) * square - sq_norm) / 2 + doubt
    return np.float32(limit + abs(limit) * 2.0**-23)  # float32, so that a loop over halves compares without converting


@jit
def search_row(
    mine: Any, theirs: Any, values: Any, span: Any, terms: Any, slack: Any,
    best: Any, best_at: Any, reach: Any, near: Any, near_at: Any, keys: Any, keys_at: Any, low: float,
) -> int:  # fmt: skip
    """Measure the patches that can be among the nearest of one query patch, and keep those that are.

    Args:
        mine: (c,) float32 patch.
        theirs: (n, c) float32 patches of a neighbour.
        values: float32 lower bounds of the halves of some of them, off by no more than the doubt.
        span: the first of these, their number, the position of the neighbour's first patch, and whether it has one
            match at most.
        terms: scale of the halves squared, the patch's squared norm, and the doubt.
        slack: what a float32 sum of squares can be off by, as a factor and on top.
        best: (kappa,) float32 heap.
        best_at: (kappa,) int64.
        reach: (1,) float32 bound of the kappa-th nearest.
        near: (1,) float64 the neighbour's nearest so far.
        near_at: (1,) int64 its position.
        keys: (kappa,) float32, overwritten.
        keys_at: (kappa,) int64, overwritten.
        low: the least of the values.

    Returns:
        number of patches that were measured.
    """
    start, cells, first, distinct = span
    square, sq_norm, doubt = terms
    measured, before = 0, near[0]
    fills = near[0] == np.inf if distinct else best[0] == np.inf
    likely = np.float32(low)  # the likeliest come first: after them, few are left that can be nearer
    if fills and not distinct and len(best) > 1:
        likely = np.float32(kth(values, cells, keys, keys_at))
    address = np.int64(values.ctypes.data)
    last, last_rough, last_distance = -1, np.float32(-1), 0.0
    for turn in range(0 if fills else 1, 2):
        bound = min(best[0], reach[0])
        if distinct:
            bound = np.float32(min(np.float64(bound), near[0]))
        limit = likely if turn == 0 else half_limit(bound, square, sq_norm, doubt)
        above = likely if fills and turn == 1 else np.float32(np.nan)  # what has been measured
        for at in range(0, cells, LOOK):
            if not some_at_most(address + 4 * at, limit):
                continue
            for i in range(at, min(at + LOOK, cells)):
                if not values[i] <= limit or values[i] <= above:
                    continue
                cell = start + i
                place = first + cell
                if distinct and near[0] == 0 and place > near_at[0]:
                    break
                if not distinct and best[0] == 0 and place > best_at[0]:
                    break
                measured += 1
                rough = about(mine, theirs[cell])
                if rough > bound * slack[0] + slack[1]:
                    continue
                if not (rough == last_rough and are_equal(theirs[last], theirs[cell])):  # copies are common
                    last, last_rough, last_distance = cell, rough, sq_distance(mine, theirs[cell])
                if distinct:
                    if last_distance < near[0] or (last_distance == near[0] and place < near_at[0]):
                        near[0], near_at[0] = last_distance, place
                        bound = np.float32(min(np.float64(bound), near[0]))
                else:
                    offer(best, best_at, np.float32(last_distance), place, np.iinfo(np.int64).max)
                    bound = min(best[0], reach[0])
                if turn == 1:
                    limit = half_limit(bound, square, sq_norm, doubt)
    if distinct and near[0] < before:
        offer(best, best_at, np.float32(near[0]), near_at[0], first)
    reach[0] = min(reach[0], best[0])
    return measured


@jit
def compare(
    query: Any, operand: Any, sq_norms: Any, patches: Any, panels: Any, largest: Any,
    place: int, figures: Any, distinct: bool, best: Any, best_at: Any, reach: Any, scratch: Any,
) -> Any:  # fmt: skip
    """Compare all query patches with those of some neighbours, and keep the nearest.

    Args:
        query: (q, c) float32 patches.
        operand: (blocks, channels, ROWS) float32 of theirs, the last block padded.
        sq_norms: (q,) float64 squared norms, at scale.
        patches: (s, n, c) float32 patches of s neighbours.
        panels: (s, panels, channels + 1, WIDTH) float32 operands: the last of the channels are half squared norms,
            infinite for what is padded.
        largest: (s,) float32 largest norm of each, at scale.
        place: position of the first patch.
        figures: scale of the products squared, and the doubt of half a squared distance, relative to the square of the
            sum of both norms.
        distinct: whether each neighbour has one match at most.
        best: (q, kappa) float32 heaps of the nearest.
        best_at: (q, kappa) int64, their positions.
        reach: (q,) float32, a bound of the kappa-th nearest, shared by all threads.
        scratch: (ROWS, >= n) and (ROWS, WIDTH) float32; (kappa,) float32 and int64; (q,) float64 and int64.

    Returns:
        number of patches that were measured.
    """
    out, least, keys, keys_at, near, near_at = scratch
    channels, (neighbours, n, depth) = operand.shape[1], patches.shape
    wide, (square, relative) = panels.shape[3], figures
    slack, tiny = np.float32(1 + 2.0**-22 * (depth + 8)), np.float32(depth * 2.0**-140)
    step = max(1, TILE_BYTES // (4 * (channels + 1) * wide))
    measured = 0
    for number in range(neighbours):
        near[:] = np.inf
        first = place + number * n
        theirs = patches[number]
        for panel in range(0, panels.shape[1], step):
            start = panel * wide
            cells = min(n - start, step * wide)
            padded = np.int64((min(panel + step, panels.shape[1]) - panel) * wide)
            for block in range(len(operand)):
                multiply(
                    (
                        np.int64(operand[block].ctypes.data),
                        np.int64(panels[number, panel].ctypes.data),
                        np.int64(out.ctypes.data),
                        np.int64(least.ctypes.data),
                    ),
                    np.int64(channels),
                    np.int64(out.shape[1]),
                    padded,
                )
                for r in range(min(ROWS, len(query) - block * ROWS)):
                    row = block * ROWS + r
                    low = least[r, 0]
                    for i in range(1, wide):
                        if least[r, i] < low:
                            low = least[r, i]
                    top = min(best[row, 0], reach[row])
                    doubt = relative * (np.sqrt(sq_norms[row]) + largest[number]) ** 2
                    is_settled = best[row, 0] == 0 and best_at[row, 0] < first  # by exact matches
                    if is_settled or low > half_limit(top, square, sq_norms[row], doubt):
                        continue
                    measured += search_row(
                        query[row], theirs, out[r], (start, cells, first, distinct), (square, sq_norms[row], doubt),
                        (slack, tiny), best[row], best_at[row], reach[row : row + 1], near[row : row + 1],
                        near_at[row : row + 1], keys, keys_at, low,
                    )  # fmt: skip
    return measured
