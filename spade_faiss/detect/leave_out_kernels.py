"""Compiled loops of the choice of neighbours that are left out: maps without some of them, and how high these rise.

The levels of a query are one after the other: `near` (cells, n) float32 has the squared distances of each cell to its n
nearest neighbours, ascending, and `at` (cells, n) int32 which these are, of K. `known` (K,) bool has those that are
known as normal: where one is the nearest that stays, its distance alone counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..patch_search.compiled import jit

ONE = np.float32(1)


@jit
def _distance(near: Any, at: Any, cell: int, out: Any, row: int, spare: int, kappa: int, known: Any) -> Any:
    """Return a cell's mean distance to its nearest kappa without a row of `out`, and `spare` of its own."""
    total, found = np.float32(0), 0
    for number in range(near.shape[1]):
        one = at[cell, number]
        if out[row, one]:
            continue
        if known[one]:
            if found == 0:
                return near[cell, number]
        elif spare:
            spare -= 1
            continue
        total += near[cell, number]
        found += 1
        if found == kappa:
            break
    return np.divide(total, np.float32(kappa))


@jit
def without_sets(
    near: Any, at: Any, out: Any, spare: int, kappa: int, known: Any, factors: Any, most: Any, scores: Any
) -> None:
    """Compute the score of each cell without each set of neighbours.

    Args:
        near: see above.
        at: see above.
        out: (sets, K) bool.
        spare: neighbours that each cell does without besides: the nearest of its own that are not known.
        kappa: number of neighbours that a distance is the mean of.
        known: see above.
        factors: (cells,) float32, what the root of a distance is multiplied by.
        most: that a score can be.
        scores: (sets, cells) float32, written.
    """
    for cell in range(len(near)):
        of_all, last = np.float32(-1), np.float32(0)
        for number in range(len(out)):
            moves = spare > 0
            for one in range(kappa):
                moves |= out[number, at[cell, one]]
            if moves or of_all < 0:
                distance = _distance(near, at, cell, out, number, spare, kappa, known)
                last = min(np.sqrt(distance) * factors[cell], most)
                if not moves:
                    of_all = last
            scores[number, cell] = last if moves else of_all


@jit
def without_each(
    near: Any, at: Any, out: Any, rows: Any, kappa: int, known: Any, factors: Any, most: Any, scores: Any
) -> None:
    """Compute the score of each cell without a set of neighbours, and without each of some others besides.

    Args:
        near: see above; kappa + 1 at least are not in the set.
        at: see above.
        out: (K,) bool, the set.
        rows: (K,) of `scores` for each neighbour, from 1; 0: it stays.
        kappa: as for without_sets, and so on.
        known: likewise.
        factors: likewise.
        most: likewise.
        scores: (rows, cells) float32, written; the first is without the set alone.
    """
    stay = np.zeros(kappa + 1, np.int64)  # the nearest kappa that are not out, and the one that follows them
    for cell in range(len(near)):
        found = 0
        for number in range(near.shape[1]):
            stay[found] = number
            found += 1 - out[at[cell, number]]
            if found > kappa:
                break
        for one in range(kappa, -1, -1):  # first without the one that follows
            row, nearest = rows[at[cell, stay[one]]], stay[0 if one else 1]
            if one < kappa and row == 0:
                continue
            distance = np.float32(0)
            for other in range(kappa + 1):
                distance += near[cell, stay[other]] if other != one else np.float32(0)
            distance = np.divide(distance, np.float32(kappa))
            if known[at[cell, nearest]]:
                distance = near[cell, nearest]
            score = min(np.sqrt(distance) * factors[cell], most)
            if one < kappa:
                scores[row, cell] = score
            else:
                scores[:, cell] = score


@jit
def fuse(scores: Any, grids: Any, taps: Any, weights: Any, floor: Any, power: int, maps: Any, tops: Any) -> None:
    """Make maps of levels' scores, and measure their tops.

    Args:
        scores: (n, cells) float32.
        grids: (levels, 2) rows and columns; maps are on the first, the finest.
        taps: (levels, 2, longest side of the finest, 2): of which two rows, and columns, of a level each of the finest
            grid is interpolated.
        weights: (levels, 2, longest side, 2) float32, of these.
        floor: below which no score is.
        power: of the mean of levels, 0, -1 or -2; see level_matches.POWERS.
        maps: (n, cells of the finest) float32, written.
        tops: (n, t): the highest t values of each map are put there, ascending; then their mean over the mean of the
            map is in the first.
    """
    height, width = grids[0]
    line = np.empty(grids[:, 1].max(), np.float32)  # who brings features may have a level that is wider than the first
    wide = np.empty(width, np.float32)
    for number in range(len(scores)):
        values, first = maps[number], 0
        values[:] = 0
        for level in range(len(grids)):
            rows, columns = grids[level]
            for y in range(height):
                above, below = first + columns * taps[level, 0, y, 0], first + columns * taps[level, 0, y, 1]
                upper, lower = weights[level, 0, y, 0], weights[level, 0, y, 1]
                for x in range(columns):
                    line[x] = upper * scores[number, above + x] + lower * scores[number, below + x]
                for x in range(width):
                    left, right = weights[level, 1, x, 0], weights[level, 1, x, 1]
                    wide[x] = max(floor, left * line[taps[level, 1, x, 0]] + right * line[taps[level, 1, x, 1]])
                _add(wide, power, values[y * width : (y + 1) * width])
            first += rows * columns
        _mean(values, len(grids), power)
        _top(values, tops[number])


@jit
def _add(scores: Any, power: int, sums: Any) -> None:
    """Add the powers of scores to sums, 0: their logarithms."""
    for cell in range(len(scores)):
        if power == -2:
            sums[cell] += np.divide(ONE, scores[cell] * scores[cell])
        elif power == -1:
            sums[cell] += np.divide(ONE, scores[cell])
        else:
            sums[cell] += np.log(scores[cell])


@jit
def _mean(values: Any, levels: int, power: int) -> None:
    """Turn sums over levels into their power mean."""
    for cell in range(len(values)):
        mean = np.divide(values[cell], np.float32(levels))
        if power == -2:
            values[cell] = np.divide(ONE, np.sqrt(mean))
        elif power == -1:
            values[cell] = np.divide(ONE, mean)
        else:
            values[cell] = np.exp(mean)


@jit
def _top(values: Any, top: Any) -> None:
    """Put the mean of the highest values over the mean of all into the first of `top`, by its length."""
    top[:] = -np.inf
    total = 0.0
    for value in values:
        total += value
        if value > top[0]:
            place = 1
            while place < len(top) and top[place] < value:
                top[place - 1] = top[place]
                place += 1
            top[place - 1] = value
    top[0] = top.mean() / (total / len(values))


@jit
def put_last(near: Any, matches: Any, out: Any, kappa: int) -> None:
    """Move the matches of neighbours that are out behind all others, in cells that have one among the nearest kappa.

    Args:
        near: (cells, n) float32 squared distances, changed in place.
        matches: (cells, n, 3) int32: neighbour, row and column, changed in place.
        out: (K,) bool.
        kappa: number of neighbours.
    """
    n = near.shape[1]
    distances, places = np.empty(n, np.float32), np.empty((n, 3), np.int32)
    for cell in range(len(near)):
        moves = False
        for number in range(kappa):
            moves |= out[matches[cell, number, 0]]
        if not moves:
            continue
        for number in range(n):
            distances[number] = near[cell, number]
            for axis in range(3):
                places[number, axis] = matches[cell, number, axis]
        end = 0
        for turn in range(2):
            for number in range(n):
                if out[places[number, 0]] == (turn == 1):
                    near[cell, end] = distances[number]
                    for axis in range(3):
                        matches[cell, end, axis] = places[number, axis]
                    end += 1
