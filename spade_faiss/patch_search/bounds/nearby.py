"""A first bound of how far the nearest patches are, before any neighbour is looked at as a whole.

Until something is known of a patch, all of a neighbour have to be looked at. Its kappa nearest are not farther than the
kappa nearest of some patches of all neighbours, each the likeliest of its neighbour: of the panels whose boxes are
nearest, or where neighbours are not sorted, around the patch's own place, as images of one kind resemble each other
most at the same places.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import address_of, jit
from ..heaps import sink_pair
from .boxes import AXES, TOGETHER, nearest_box
from .measure import measure
from .panels import LARGEST
from .products import multiply_of, panel_bytes_of
from .simd import ROWS, WIDTH, at_most, float_at, int_at, lowest

NEARBY = 32 // WIDTH  # panels of a neighbour that are looked at; LOOK patches at most
ABOVE = np.float32(1 + 2.0**-22)  # times a distance, rounded to float32, is not below it


@jit
def look_nearby(
    operand: Any, theirs: Any, products: Any, terms: Any, sorting: Any, place: Any, likely: Any, likely_at: Any,
    scratch: Any,
) -> None:  # fmt: skip
    """Find what is likeliest in a few panels of each of some neighbours, for each patch of a query.

    Args:
        operand: (blocks, ..., ROWS) of the query's patches, see kernels.compare; not of tiles.
        theirs: position of the first patch of these neighbours, and number of patches of each.
        products: their kind, addresses (s,) of panels, and words of a patch.
        terms: the largest norm of the query's patches, and (s, 3) float32, see prepared.Prepared.
        sorting: (s, 2) int64 and corners, see kernels.compare.
        place: of the first query patch among all of the query's, and the number of these.
        likely: (q, kappa) float32 heaps of the least lower bounds, each of another neighbour.
        likely_at: (q, kappa) int64, the positions of these patches.
        scratch: (ROWS, >= LOOK), of which LOOK values are read, and (ROWS, WIDTH) float32.
    """
    out, least = scratch
    kind, panels_at, words = products
    start, n = theirs
    longest, largest = terms
    first, of_all = place
    stride, panels, number = np.int64(out.shape[1]), -(-n // WIDTH), min(NEARBY, -(-n // WIDTH))
    panel_bytes, padded, block_bytes = panel_bytes_of(kind, words), np.int64(number * WIDTH), 4 * operand[0].size
    operand_at, values, least_at = address_of(operand), address_of(out), address_of(least)
    sorted_at, corners = sorting
    distances, middles = np.empty(-(-panels // TOGETHER) * TOGETHER, np.float32), middles_of(corners)
    middles_at = address_of(middles)
    for neighbour in range(len(panels_at)):
        boxes_at, order_at = sorted_at[neighbour]
        sizes = largest[neighbour]
        scales = np.float32(longest * sizes[0] / (LARGEST * LARGEST)), sizes[1], sizes[2]
        for block in range(len(operand)):
            panel = (first + block * ROWS) * n // of_all // WIDTH - number // 2
            if boxes_at != 0:
                panel = nearest_panels(boxes_at, middles_at + 4 * AXES * block, number, panels, distances)
            panel = max(0, min(panels - number, panel))
            count = min(n - panel * WIDTH, number * WIDTH)
            here = panels_at[neighbour] + panel * panel_bytes
            addresses = operand_at + block_bytes * block, here, values, least_at
            multiply_of(kind, addresses, scales, words, stride, padded)
            for r in range(min(ROWS, len(likely) - block * ROWS)):
                keys, at, low = likely[block * ROWS + r], -1, np.float32(np.inf)
                bits = at_most(values + 4 * stride * r, keys[0])
                while bits != np.uint64(0):
                    i = lowest(bits)
                    bits &= bits - np.uint64(1)
                    value = float_at(values + 4 * (stride * r + i))
                    if i < count and value < low:
                        low, at = value, i
                if low < keys[0]:
                    at += panel * WIDTH
                    if order_at != 0:
                        at = int_at(order_at + 8 * at)
                    sink_pair(keys, likely_at[block * ROWS + r], 0, low, start + neighbour * n + at)


@jit
def nearest_panels(boxes_at: int, own: Any, number: int, panels: int, distances: Any) -> Any:
    """Return the first of `number` panels, one or two side by side, whose boxes are nearest to a point.

    Args:
        boxes_at: address of boxes, see boxes.Sorted.
        own: that of the point, (AXES,) float32.
        number: of panels.
        panels: how many there are, at least 2.
        distances: for as many, in whole groups, overwritten.
    """
    nearest = nearest_box(boxes_at, own, np.int64(len(distances) // TOGETHER), address_of(distances))
    if number == 1 or nearest == 0:
        return nearest
    is_next = nearest + 1 < panels and distances[nearest + 1] < distances[nearest - 1]
    return nearest if is_next else nearest - 1


@jit
def middles_of(corners: Any) -> Any:
    """Return the means (blocks, AXES) of corners (blocks, AXES, ROWS)."""
    found = np.zeros(corners.shape[:2], np.float32)
    for row in range(corners.shape[2]):
        found += corners[:, :, row]
    return found / np.float32(corners.shape[2])


@jit
def farthest_of(query: Any, cells_at: Any, sizes: Any, likely_at: Any, out: Any) -> None:
    """Lower out (q,) float32 to the squared distance of the farthest of some patches, where all are there.

    Args:
        query: (q, c) float32.
        cells_at: (K,) addresses of the neighbours' patches.
        sizes: number of patches of a neighbour, and the distance between them.
        likely_at: (q, kappa) int64 positions; -1: there is none.
        out: float32, bounds.
    """
    n, length = sizes
    mine, channels = address_of(query), query.shape[1]
    for row in range(len(query)):
        farthest = np.float32(0)
        for at in likely_at[row]:
            if at < 0:
                farthest = np.float32(np.inf)
                break
            patch = cells_at[at // n] + 4 * length * (at % n)
            distance = np.float32(measure(mine + 4 * channels * row, patch, channels, True)) * ABOVE
            farthest = max(farthest, distance) if distance < np.inf else np.float32(np.inf)
        out[row] = min(out[row], farthest)
