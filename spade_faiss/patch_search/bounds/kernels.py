"""Compiled loops of the search by bounds. All arrays are C-contiguous.

The `half` of a query patch a and another patch b is (sq_distance - |a|^2) / 2, at the scale of the products.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import address_of, jit
from .measure import about, are_equal, doubt_of, half_limit, kth, measure, offer
from .panels import LARGEST, patch_at
from .products import multiply_of, panel_bytes_of
from .products_tiles import TILE_ROWS, begin_tiles, end_tiles
from .simd import LOOK, ROWS, TILES, WIDTH, at_most, float_at, lowest
from .stripes import load_stripe
from .within import search_within

TILE_BYTES = 2**18  # cells multiplied at a time: they stay in a core's cache until all of the query has met them


@jit
def search_row(
    mine: int, theirs: Any, values: int, span: Any, terms: Any, slack: Any,
    best: Any, best_at: Any, row: int, reach: Any, near: Any, near_at: Any, scratch: Any, low: float,
) -> int:  # fmt: skip
    """Measure the patches that can be among the nearest of one query patch, and keep those that are.

    Args:
        mine: address of the (c,) float32 patch.
        theirs: number of channels, address of a neighbour's patches and the distance between them, its cells, how
            patches are made of them (see panels.patch_at), and parts of the channels, see `compare`.
        values: address of float32 lower bounds of the halves of some of its patches, off by no more than the doubt.
        span: the first of these, their number, the position of the neighbour's first patch, whether it has one match
            at most, and whether only the likeliest are measured.
        terms: scale of the halves squared, the patch's squared norm, and the doubt.
        slack: what a float32 sum of squares can be off by, as a factor and on top.
        best: (q, kappa) float32 heaps.
        best_at: (q, kappa) int64.
        row: number of the patch.
        reach: (q,) float32 bounds of the kappa-th nearest.
        near: (q,) float64 the neighbour's nearest so far.
        near_at: (q,) int64 its position.
        scratch: (kappa,) float32 and int64, overwritten; patches (n, c) float32 that were made of several cells, and
            the positions (n,) of the first patch of the neighbour that they were made of, so that none is made twice.
        low: the least of the values.

    Returns:
        number of patches that were measured.
    """
    start, cells, first, distinct, guess = span
    square, sq_norm, doubt = terms
    channels, base, length, own_cells, mix, parts = theirs
    keys, keys_at, made, made_of = scratch
    measured, before = 0, near[row]
    nothing = np.float32(np.inf)
    heap, heap_at, kappa = best[row], best_at[row], best.shape[1]
    fills = guess or (near[row] == np.inf if distinct else heap[0] == nothing)
    likely = np.float32(low)  # the likeliest come first: after them, few are left that can be nearer
    if fills and not distinct and kappa > 1:
        likely = np.float32(kth(values, cells, keys, keys_at))
    is_mixed = len(mix[0]) > 0
    last, last_rough, last_distance = mine, np.float32(-1), 0.0
    for turn in range(0 if fills else 1, 1 if guess else 2):
        bound = min(heap[0], reach[row])
        if distinct:
            bound = np.float32(min(np.float64(bound), near[row]))
        limit = likely if turn == 0 else half_limit(bound, square, sq_norm, doubt)
        above = likely if fills and turn == 1 else np.float32(np.nan)  # what has been measured
        done = False
        for at in range(0, cells, LOOK):
            bits = at_most(values + 4 * at, limit)
            while bits != np.uint64(0) and not done:
                i = at + lowest(bits)
                bits &= bits - np.uint64(1)
                value = float_at(values + 4 * i)
                if i >= cells or not value <= limit or value <= above:
                    continue
                place = first + start + i
                done = near[row] == 0 and place > near_at[row] if distinct else heap[0] == 0 and place > heap_at[0]
                if done:
                    continue
                measured += 1
                patch = base + 4 * length * (start + i)
                if is_mixed and made_of[start + i] != first:
                    patch_at(own_cells, start + i, channels, mix, made[start + i])
                    made_of[start + i] = first
                most = np.float32(bound * slack[0] + slack[1])
                rough = about(mine, patch, parts, most)
                if rough > most:
                    continue
                if not (rough == last_rough and are_equal(last, patch, channels)):  # copies are common
                    last, last_rough = patch, rough
                    last_distance = np.float64(np.float32(measure(mine, patch, channels, distinct)))  # as ties go by
                if distinct:
                    if last_distance < near[row] or (last_distance == near[row] and place < near_at[row]):
                        near[row], near_at[row] = last_distance, place
                        bound = np.float32(min(np.float64(bound), near[row]))
                else:
                    offer(heap, heap_at, np.float32(last_distance), place, np.iinfo(np.int64).max)
                    bound = min(heap[0], reach[row])
                if turn == 1:
                    limit = half_limit(bound, square, sq_norm, doubt)
            if done:
                break
    if distinct and near[row] < before:
        offer(heap, heap_at, np.float32(near[row]), near_at[row], first)
    reach[row] = min(reach[row], heap[0])
    return measured


@jit
def least_of(values: Any) -> Any:
    """Return the least of some values."""
    low = values[0]
    for i in range(1, len(values)):
        low = min(low, values[i])
    return low


@jit
def compare(
    query: Any, operand: Any, norms: Any, cells: Any, cells_at: Any, mix: Any, parts: Any, panels_at: Any,
    stripes: Any, words: int, largest: Any, sorting: Any, place: int, figures: Any, flags: Any, best: Any, best_at: Any,
    reach: Any, scratch: Any,
) -> Any:  # fmt: skip
    """Compare all query patches with those of some neighbours, and keep the nearest.

    Args:
        query: (q, c) float32 patches.
        operand: (blocks, words, ROWS) float32 of theirs, or two int16 in each word; for tiles (blocks, TILE_ROWS,
            words), two bfloat16 in each; for QUADS see panels.pack_query_quads; the last block padded.
        norms: (q,) float64, at scale.
        cells: (s, m) float32 cells of s neighbours; if patches are cells, whatever holds these.
        cells_at: (s,) their addresses.
        mix: how patches are made of them, see panels.patch_at.
        parts: (p, 2) int64 first channels and numbers of channels, those that differ most first.
        panels_at: (s,) addresses of operands (panels, words + 1, WIDTH) float32: the last of the words are half squared
            norms, infinite for what is padded; for tiles (panels, words, WIDTH); for QUADS see
            panels.pack_quads.
        stripes: s neighbours that are not prepared, see load_stripe; None: they are, which is compiled apart: loading
            takes seconds to compile.
        words: of a patch.
        largest: (s, 3) float32, see prepared.Prepared.
        sorting: (s, 2) int64, see prepared.Prepared, and coordinates (blocks, AXES, ROWS) of theirs, see boxes.corners:
            needed where neighbours are sorted, and then all of `reach` is finite.
        place: position of the first patch.
        figures: scale of the products squared; the doubt of half a squared distance, relative to the square of the sum
            of both norms, and relative to the product of the largest norms; the query's largest norm.
        flags: number of patches of a neighbour, the distance between their cells, whether each neighbour has one match
            at most, the kind of products (see simd), and whether only the likeliest patches of each neighbour
            are measured.
        best: (q, kappa) float32 heaps of the nearest.
        best_at: (q, kappa) int64, their positions.
        reach: (q,) float32, a bound of the kappa-th nearest, shared by all threads.
        scratch: (rows, >= n) and (rows, WIDTH) float32, rows of a block; (q,) float64 and int64; hits, limits and lists
            of search_within; scratch of search_row.

    Returns:
        number of patches that were measured, and whether all norms are known to be finite.
    """
    out, least, near, near_at, lists, small = scratch
    n, length, distinct, kind, guess = flags
    depth, panels = query.shape[1], -(-n // WIDTH)
    panel_bytes = panel_bytes_of(kind, words)
    rows = TILE_ROWS if kind == TILES else ROWS
    square, longest, found = figures[0], figures[3], (best, best_at, reach, near, near_at)
    slack = np.float32(1 + 2.0**-22 * (depth + 8)), np.float32(depth * 2.0**-140)
    step, is_striped = max(1, TILE_BYTES // panel_bytes), False
    if stripes is not None:
        step, is_striped = stripes[6][0] // WIDTH, True
    measured, stride, mine, values = 0, np.int64(out.shape[1]), address_of(query), address_of(out)
    saved, is_finite = np.empty(64, np.uint8), bool((largest[:, 0] > 0).all()) or is_striped
    if kind == TILES:
        begin_tiles(address_of(saved))
    for number in range(len(cells_at)):
        near[:] = np.inf
        is_known = not guess and reach.max() < np.inf
        first = place + number * n
        base, between = cells_at[number], length
        if len(mix[0]) > 0:
            base, between = address_of(small[2]), depth
        panels_here, sizes = panels_at[number], largest[number]
        for panel in range(0, panels, step):
            start = panel * WIDTH
            count = min(n - start, step * WIDTH)
            padded = np.int64((min(panel + step, panels) - panel) * WIDTH)
            if stripes is not None:
                sizes = load_stripe(stripes, number, (start, start + count), n, kind, words)
                is_finite &= sizes[0] > 0
                base = address_of(stripes[7][0]) - 4 * length * start
                panels_here = address_of(stripes[7][2]) - panel * panel_bytes
            theirs = depth, base, between, cells[number if len(mix[0]) > 0 else 0], mix, parts
            most = sizes[0]
            terms = np.float32(longest * most / (LARGEST * LARGEST)), sizes[1], sizes[2]
            if is_known:
                measured += search_within(
                    query, operand, norms, theirs, (kind, panels_here + panel * panel_bytes, panel_bytes, words, terms),
                    (start, count, first, distinct), (sorting[0][number, 0], sorting[0][number, 1], sorting[1]),
                    most, figures, slack, found, (out, *lists, small),
                )  # fmt: skip
                continue
            for block in range(len(operand)):
                addresses = (
                    address_of(operand[block]),
                    panels_here + panel * panel_bytes,
                    values,
                    address_of(least),
                )
                multiply_of(kind, addresses, terms, words, stride, padded)
                for r in range(min(rows, len(query) - block * rows)):
                    row = block * rows + r
                    low = least_of(least[r])
                    top, sq_norm = min(best[row, 0], reach[row]), norms[row] ** 2
                    doubt = doubt_of(norms[row], most, figures)
                    is_settled = best[row, 0] == 0 and best_at[row, 0] < first  # by exact matches
                    if is_settled or low > half_limit(top, square, sq_norm, doubt):
                        continue
                    measured += search_row(
                        mine + 4 * depth * row, theirs, values + 4 * stride * r, (start, count, first, distinct, guess),
                        (square, sq_norm, doubt), slack, best, best_at, row, reach, near, near_at, small, low,
                    )  # fmt: skip
    if kind == TILES:
        end_tiles(address_of(saved))
    return measured, is_finite
