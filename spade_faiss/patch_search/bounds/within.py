"""Comparing where something is known of every query patch: what is too far is never looked at one by one."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import address_of, jit
from .boxes import AXES, BOX_FLOATS, SLACK, TOGETHER, boxes_within
from .loading import prefetch
from .measure import about, doubt_of, half_limit, measure, offer
from .panels import patch_at
from .products import multiply_of_within
from .products_tiles import GROUP, LINE, NEAR, NEAR_STRIDE, TILE_ROWS, group_within
from .simd import LOOK, ROWS, TILES, WIDTH, at_most, float_at, highest, int_at, lowest, rows_within

FEW_NEAR = 10  # panels whose products with ROWS patches stay in a core's nearest cache; products_bytes.MOST at most
FEW_STRIDE = FEW_NEAR * WIDTH + LOOK  # between rows of these
LISTED = 4096  # patches that are measured together, so that memory is asked for them at once
NOTHING = np.float32(np.nan)  # a limit: no value is at most this
PANEL = np.uint64(2**WIDTH - 1)  # those of LOOK bits that are a panel's
ASKED_LINES = 8  # of a cache, at most, that are asked for of each


def lists_of(q: int) -> tuple[Any, ...]:
    """Return memory for q query patches: hits, limits of both kinds, and a list to measure, see search_within."""
    limits, farthest = np.empty((2, q + TILE_ROWS), np.float32)  # the last block of either kind is padded
    rows, places = np.empty((2, LISTED), np.int64)
    return np.empty(max(NEAR, FEW_NEAR), np.uint64), limits, farthest, rows, places, np.empty(LISTED, np.float32)


@jit
def search_within(
    query: Any, operand: Any, norms: Any, theirs: Any, products: Any, span: Any, sorting: Any, most: Any, figures: Any,
    slack: Any, found: Any, scratch: Any,
) -> int:  # fmt: skip
    """Measure the patches of a neighbour that can be among the nearest, where every reach is finite, and keep those.

    Args:
        query: see kernels.compare.
        operand: see there.
        norms: see there.
        theirs: see kernels.search_row.
        products: their kind, address of the panels, bytes of one, words of a patch, and its terms, see
            simd.multiply.
        span: the first of the patches, their number, the position of the neighbour's first, and whether that has one
            match at most.
        sorting: addresses of the neighbour's boxes and of the order of its patches, 0 if that is their own, and corners
            of the query's, see boxes.
        most: largest norm of these patches.
        figures: see `compare`.
        slack: see search_row.
        found: best, best_at, reach, near, near_at, see search_row.
        scratch: out and hits, see multiply_tiles_within; limits (q,) float32, and those of boxes, padded to whole
            blocks; (LISTED,) int64 rows and places, and float32 halves; and that of search_row.

    Returns:
        number of patches that were measured.
    """
    kind, panels_at, panel_bytes, words, terms = products
    start, count, first, _ = span
    out, hits, limits, farthest, rows, places, halves, _ = scratch
    boxes_at, order_at, corners = sorting
    channels, base, length, _, mix, _ = theirs
    rows_of, stride, near, group = ROWS, FEW_STRIDE, FEW_NEAR, ROWS
    if kind == TILES:
        rows_of, stride, near, group = TILE_ROWS, NEAR_STRIDE, NEAR, GROUP
    elif boxes_at != 0:
        near = TOGETHER
    panels, measured, listed = -(-count // WIDTH), 0, np.int64(0)  # of one type: measure_listed is compiled once
    lines = 0 if len(mix[0]) > 0 else min(ASKED_LINES, 1 + channels // LINE)
    values, limits_at, hits_at, across = address_of(out), address_of(limits), address_of(hits), np.int64(stride)
    operand_at, block_bytes = address_of(operand), 4 * operand.shape[1] * operand.shape[2]  # an array counts who has it
    set_limits(norms, most, figures, first, found, limits, farthest)
    corners_at, farthest_at = address_of(corners), address_of(farthest)
    for panel in range(0, panels, near):
        number, after = min(near, panels - panel), min(near, panels - panel - near) * panel_bytes // (4 * LINE)
        asked = -(-after // len(operand))
        for block in range(len(operand)):
            for line in range(block * asked, min(block * asked + asked, after)):  # of the panels after these
                prefetch(out, panels_at + (panel + near) * panel_bytes, np.int64(line * LINE))
            begin, end = 0, number
            if boxes_at != 0:
                which = boxes_within(
                    boxes_at + 4 * BOX_FLOATS * (panel // near), corners_at + 4 * AXES * ROWS * block,
                    farthest_at + 4 * ROWS * block,
                )  # fmt: skip
                if which == np.uint64(0):
                    continue
                begin, end = lowest(which), min(highest(which) + 1, number)  # all are within an infinite limit
                if begin >= end:
                    continue
            addresses = (
                operand_at + block_bytes * block, panels_at + (panel + begin) * panel_bytes, values,
                limits_at + 4 * rows_of * block, hits_at,
            )  # fmt: skip
            multiply_of_within(kind, addresses, terms, words, across, np.int64((end - begin) * WIDTH))
            for one in range(end - begin):
                if hits[one] == 0:
                    continue
                if listed > LISTED - TILE_ROWS * WIDTH:
                    measured += measure_listed(query, norms, theirs, listed, span, most, figures, slack, found, scratch)
                    listed = np.int64(0)
                at, here = (panel + begin + one) * WIDTH, values + 4 * one * WIDTH
                for r in range(0, rows_of, group):
                    if hits[one] >> np.uint64(2 * r) & np.uint64(0xFFFF) == 0:
                        continue
                    row, some, own = block * rows_of + r, here + 4 * stride * r, addresses[3] + 4 * r
                    which = group_within(some, across, own) if kind == TILES else rows_within(some, across, own)
                    while which != np.uint64(0):
                        i = lowest(which)
                        which &= which - np.uint64(1)
                        values_at = some + 4 * stride * i
                        bits = at_most(values_at, limits[row + i]) & PANEL
                        while bits != np.uint64(0):
                            column = lowest(bits)
                            bits &= bits - np.uint64(1)
                            if at + column >= count:
                                continue
                            place = start + at + column
                            if order_at != 0:
                                place = int_at(order_at + 8 * place)
                            rows[listed], places[listed] = row + i, place
                            halves[listed] = float_at(values_at + 4 * column)
                            listed += 1
                            for line in range(lines):
                                prefetch(halves, base + 4 * length * place, np.int64(line * LINE))
        measured += measure_listed(query, norms, theirs, listed, span, most, figures, slack, found, scratch)
        listed = np.int64(0)
    return measured


@jit
def set_limits(norms: Any, most: Any, figures: Any, first: int, found: Any, out: Any, farthest: Any) -> None:
    """Set what no half of a neighbour's patch is above that can be among the nearest of each row, float32.

    `farthest` is the same for squared distances in some coordinates. Where none can be, that is NOTHING.
    """
    best, best_at, reach, _, _ = found
    for row in range(len(norms)):
        top, norm = min(best[row, 0], reach[row]), norms[row]
        out[row] = half_limit(top, figures[0], norm * norm, doubt_of(norm, most, figures))
        beyond = (SLACK + 8 * figures[1]) * (norm + most) ** 2  # each coordinate is a sum of products, too
        farthest[row] = (norm * norm + 2 * np.float64(out[row])) * (1 + SLACK) + beyond
        if best[row, 0] == 0 and best_at[row, 0] < first:  # settled by exact matches
            out[row] = farthest[row] = NOTHING
    out[len(norms) :] = NOTHING  # what pads a block
    farthest[len(norms) :] = NOTHING


@jit
def measure_listed(
    query: Any, norms: Any, theirs: Any, listed: int, span: Any, most: Any, figures: Any, slack: Any, found: Any,
    scratch: Any,
) -> int:  # fmt: skip
    """Measure the first `listed` patches of the list whose halves are still within their limits; see search_within."""
    _, _, first, distinct = span
    channels, base, length, own_cells, mix, parts = theirs
    _, _, limits, _, rows, places, halves, (_, _, made, made_of) = scratch
    best, best_at, reach, near, near_at = found
    mine, is_mixed, measured, anywhere = address_of(query), len(mix[0]) > 0, 0, np.iinfo(np.int64).max
    for item in range(listed):
        row, at = rows[item], places[item]
        place = first + at
        is_done = near[row] == 0 and place > near_at[row] if distinct else best[row, 0] == 0 and place > best_at[row, 0]
        if is_done or not halves[item] <= limits[row]:
            continue
        measured += 1
        patch = base + 4 * length * at
        if is_mixed and made_of[at] != first:
            patch_at(own_cells, at, channels, mix, made[at])
            made_of[at] = first
        bound = min(best[row, 0], reach[row])
        if distinct:
            bound = np.float32(min(np.float64(bound), near[row]))
        own, limit = mine + 4 * channels * row, np.float32(bound * slack[0] + slack[1])
        if about(own, patch, parts, limit) > limit:
            continue
        distance = np.float64(np.float32(measure(own, patch, channels, distinct)))  # as ties go by
        if not distinct:
            offer(best[row], best_at[row], np.float32(distance), place, anywhere)
        elif distance < near[row] or (distance == near[row] and place < near_at[row]):
            near[row], near_at[row] = distance, place
            offer(best[row], best_at[row], np.float32(distance), place, first)
        reach[row] = min(reach[row], best[row, 0])
        top = min(np.float64(reach[row]), near[row]) if distinct else np.float64(reach[row])
        limits[row] = half_limit(top, figures[0], norms[row] ** 2, doubt_of(norms[row], most, figures))
    return measured
