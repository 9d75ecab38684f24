"""Compiled loops that prepare neighbours for the search by bounds. All arrays are C-contiguous.

A neighbour's levels are kept with the channels of a cell side by side, one level after the other: its `cells`. A patch
is a cell, or cells of each level interpolated.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import address_of, as_bits, as_float, jit
from ..pyramid.kernels import ANTIDIAGONAL, BELOW, DIAGONAL, RIGHT, SQUARES
from .simd import QUAD_ROWS, ROWS, float_at, sq_difference, sq_distance

ABOVE = np.float32(1 + 2.0**-7)  # times a length, rounded to bfloat16, is never below it
MOST = np.uint32(0xFFFF0000)  # of the bits of a float32: what bfloat16 keeps of it
ONES = np.uint32(0x3F803F80)  # twice 1 as bfloat16
STEPS = 127  # of int8
LEAST_STEP = np.float32(1e-30)  # the reciprocal of which float32 holds; patches are near 1
RAISED = np.float32(1 + 2.0**-10)  # times a length, it is not less than that for having been summed in float32
LARGEST = 32_700  # that a coordinate becomes as int16, if it is as long as the largest patch


@jit
def sum_neighbouring(cells: Any, place: Any, width: int, scale: Any, sq_norms: Any, sums: Any) -> None:
    """Sum products of neighbouring cells of a level, by their distances: 2 <a, b> = |a|^2 + |b|^2 - |a - b|^2.

    Args:
        cells: (m,) float32 of a neighbour.
        place: where in them the level begins, and its number of channels.
        width: number of cells in a row.
        scale: of the sums, float32.
        sq_norms: (n,) float32, of the level's cells, at scale.
        sums: (6, n) float32, set, see pyramid.kernels.prepare.
    """
    n, channels = len(sq_norms), np.int64(place[1])
    base, square = address_of(cells) + 4 * place[0], scale * scale
    sums[:] = 0
    sums[SQUARES] = sq_norms
    for row, first, second in ((RIGHT, 0, 1), (BELOW, 0, width), (DIAGONAL, 0, width + 1), (ANTIDIAGONAL, 1, width)):
        for i in range(n - second):
            a, b = i + first, i + second
            apart = sq_difference(base + 4 * channels * a, base + 4 * channels * b, channels) * square
            sums[row, i] = (sq_norms[a] + sq_norms[b] - apart) / 2


@jit
def add_rests(coordinates: Any, sq_norms: Any, errors: Any, m: int, doubt: Any) -> None:
    """Set the row m of coordinates (s, > m, n) to the lengths that m directions leave of patches, rounded up.

    Args:
        coordinates: float32.
        sq_norms: (s, n) float32, of the patches.
        errors: (s, n) float32, lengths of what the patches that were projected differ by; see load_patches.
        m: number of directions.
        doubt: float32, what a length's square may be short of, relative to the patch's.
    """
    n = coordinates.shape[2]
    for number in range(len(coordinates)):
        rests, norms = coordinates[number, m], sq_norms[number]
        for i in range(n):
            longest = np.sqrt(norms[i]) + errors[number, i]
            rests[i] = longest * longest
        for row in range(m):
            along = coordinates[number, row]
            for i in range(n):
                rests[i] -= along[i] * along[i]
        for i in range(n):
            rests[i] = np.sqrt(max(rests[i], np.float32(0)) + norms[i] * doubt)


@jit
def pack(operand: Any, channels: int, sq_norms: Any, largest: Any, panels: Any) -> None:
    """Cut operands into panels, with half squared norms as the last of the words.

    Args:
        operand: (s, >= channels, n) float32.
        channels: how many count.
        sq_norms: (s, n) float32.
        largest: (s, 3) float32, first the largest norms; 0: not known, and all patches will be measured.
        panels: (s, panels, channels + 1, WIDTH) float32, set; what is padded is infinitely far away.
    """
    n, wide = operand.shape[2], panels.shape[3]
    for number in range(len(operand)):
        for panel in range(panels.shape[1]):
            target, start = panels[number, panel], panel * wide
            end = min(wide, n - start) if largest[number, 0] > 0 else 0
            for channel in range(channels):
                source = operand[number, channel]
                for i in range(end):
                    target[channel, i] = source[start + i]
                for i in range(end, wide):
                    target[channel, i] = 0
            halves(sq_norms[number], start, largest[number, 0], target[channels])


@jit
def pack_pairs(operand: Any, channels: int, sq_norms: Any, largest: Any, panels: Any, shorts: Any) -> None:
    """Do as `pack`, with two channels as int16 in each word.

    Args:
        operand: as for pack, none longer than `largest`.
        channels: as for pack.
        sq_norms: as for pack.
        largest: as for pack; LARGEST stands for it.
        panels: (s, panels, words + 1, WIDTH) float32, set; words are half the channels, rounded up.
        shorts: the same memory, (s, panels, words + 1, 2 * WIDTH) int16.
    """
    n, words, wide = operand.shape[2], panels.shape[2] - 1, panels.shape[3]
    for number in range(len(operand)):
        factor = np.float32(LARGEST / largest[number, 0]) if largest[number, 0] > 0 else np.float32(0)
        for panel in range(panels.shape[1]):
            target, start = shorts[number, panel], panel * wide
            end = min(wide, n - start) if largest[number, 0] > 0 else 0
            for word in range(words):
                even, odd = operand[number, 2 * word], operand[number, min(2 * word + 1, channels - 1)]
                other = factor if 2 * word + 1 < channels else np.float32(0)
                for i in range(end):
                    target[word, 2 * i] = np.int16(np.rint(even[start + i] * factor))
                    target[word, 2 * i + 1] = np.int16(np.rint(odd[start + i] * other))
                for i in range(2 * end, 2 * wide):
                    target[word, i] = 0
            halves(sq_norms[number], start, largest[number, 0], panels[number, panel, words])


@jit
def pack_quads(operand: Any, channels: int, sq_norms: Any, largest: Any, panels: Any, units: Any) -> None:
    """Do as `pack`, with four channels as int8 in each word: in steps of each patch's own, of which STEPS are its most.

    Let u = s u' + e, where s is the step of u, and v = t v' + f. Then <u, v> <= s t (<u', v'> + |e| / s * |v| / t +
    |u'| * |f| / t). The largest of |v| / t and |f| / t are noted, so that what rounding can do is one more integer that
    the sum of products begins with.

    Args:
        operand: as for pack.
        channels: as for pack.
        sq_norms: as for pack.
        largest: (s, 3) float32: largest norms as for pack; then set, the largest norm of a patch in its steps, and the
            largest length of what rounding takes from one, likewise.
        panels: (s, panels, words + QUAD_ROWS, WIDTH) float32, set; words are a quarter of the channels, rounded up. The
            row after them holds the steps, and the last half squared norms.
        units: the same memory, (s, panels, words + QUAD_ROWS, 4 * WIDTH) uint8: 128 more than the patches' integers.
    """
    n, words, wide = operand.shape[2], panels.shape[2] - QUAD_ROWS, panels.shape[3]
    steps, squares = np.empty(wide, np.float32), np.empty(wide, np.float32)
    inverses, lost = np.empty(wide, np.float32), np.empty(wide, np.float64)
    for number in range(len(operand)):
        largest[number, 1:] = 0
        for panel in range(panels.shape[1]):
            target, start = units[number, panel], panel * wide
            end = min(wide, n - start) if largest[number, 0] > 0 else 0
            steps[:], squares[:], lost[:], target[:words] = 0, 0, 0, 128
            for channel in range(channels):
                source = operand[number, channel]
                for i in range(end):
                    steps[i] = max(steps[i], abs(source[start + i]))
            for i in range(end):
                steps[i] = max(steps[i] / np.float32(STEPS), LEAST_STEP)
                inverses[i] = 1 / steps[i]
            for channel in range(channels):
                source, row, first = operand[number, channel], target[channel // 4], channel % 4
                for i in range(end):
                    value = source[start + i]
                    unit = np.rint(value * inverses[i])
                    error = np.float64(value) - np.float64(unit) * np.float64(steps[i])
                    squares[i] += value * value
                    lost[i] += error * error
                    row[4 * i + first] = np.uint8(np.int32(unit) + 128)
            for i in range(end):
                largest[number, 1] = max(largest[number, 1], np.sqrt(squares[i]) * inverses[i] * RAISED)
                largest[number, 2] = max(largest[number, 2], np.sqrt(lost[i]) * inverses[i] * RAISED)
            panels[number, panel, words] = steps
            halves(sq_norms[number], start, largest[number, 0], panels[number, panel, words + 1])


@jit
def pack_query_quads(operand: Any, out: Any, units: Any) -> None:
    """Set out (blocks, words + QUAD_TERMS, ROWS) float32 to what panels of pack_quads are multiplied by.

    After the words: the bits of an int32 that takes back what 128 adds to the sum of products, the patch's step, the
    length of what rounding takes from it, and its own after it, both in its steps.

    Args:
        operand: (width, q) float32, C-contiguous.
        out: zeros, the last block padded.
        units: the same memory, (blocks, words + QUAD_TERMS, 4 * ROWS) int8.
    """
    width, q = operand.shape
    words, codes = -(-width // 4), out.view(np.int32)
    for i in range(q):
        block, row = i // ROWS, i % ROWS
        most = np.float32(0)
        for channel in range(width):
            most = max(most, abs(operand[channel, i]))
        step = max(most / np.float32(STEPS), LEAST_STEP)
        inverse = 1 / step
        squares, lost, total = 0.0, 0.0, np.int32(0)
        for channel in range(width):
            value = operand[channel, i]
            unit = np.float64(np.rint(value * inverse))
            error = np.float64(value) - unit * np.float64(step)
            squares += unit * unit
            lost += error * error
            total += np.int32(unit)
            units[block, channel // 4, 4 * row + channel % 4] = np.int8(unit)
        codes[block, words, row] = -128 * total
        out[block, words + 1, row] = step
        out[block, words + 2, row] = np.sqrt(lost) * inverse * RAISED
        out[block, words + 3, row] = np.sqrt(squares) * RAISED


@jit
def to_bfloat16(value: Any) -> Any:
    """Return the bits of the float32 that is a float32 rounded to bfloat16."""
    bits = as_bits(value)
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & MOST


@jit
def pack_tiles(operand: Any, channels: int, sq_norms: Any, errors: Any, largest: Any, out: Any) -> None:
    """Do as `pack`, with two channels as bfloat16 in each word.

    Of the last word, the lower half is a patch's length, and the upper that of what rounding takes from it, here and
    before it was projected. The word before it holds half its squared norm: the lower half as bfloat16, rounded towards
    0, and the upper half what that leaves, likewise. No bound is too large for it.

    Args:
        operand: as for pack.
        channels: as for pack.
        sq_norms: as for pack.
        errors: (s, n) float32, see load_patches.
        largest: as for pack.
        out: (s, panels, words, WIDTH) uint32, set.
    """
    n, words, wide = operand.shape[2], out.shape[2], out.shape[3]
    lengths, lost, norms = np.empty(wide, np.float32), np.empty(wide, np.float32), np.empty(wide, np.float32)
    for number in range(len(operand)):
        for panel in range(out.shape[1]):
            target, start = out[number, panel], panel * wide
            end = min(wide, n - start) if largest[number, 0] > 0 else 0
            lengths[:], lost[:], target[:] = 0, 0, 0
            for channel in range(channels):
                source, word = operand[number, channel], target[channel // 2]
                shift = np.uint32(16 if channel % 2 == 0 else 0)
                for i in range(end):
                    value = source[start + i]
                    rounded = to_bfloat16(value)
                    error = value - as_float(rounded)
                    word[i] |= rounded >> shift
                    lengths[i] += value * value
                    lost[i] += error * error
            for i in range(end):
                length, error = np.sqrt(lengths[i]) * ABOVE, (np.sqrt(lost[i]) + errors[number, start + i]) * ABOVE
                target[words - 1, i] = (to_bfloat16(length) >> np.uint32(16)) | to_bfloat16(error)
            halves(sq_norms[number], start, largest[number, 0], norms)
            for i in range(wide):
                first = as_bits(norms[i]) & MOST
                rest = as_bits(norms[i] - as_float(first)) & MOST if abs(norms[i]) < np.inf else np.uint32(0)
                target[words - 2, i] = (first >> np.uint32(16)) | rest


@jit
def pack_query_tiles(operand: Any, out: Any) -> None:
    """Set out (blocks, rows, words) uint32 to what panels of pack_tiles are multiplied by: negative, in bfloat16.

    Args:
        operand: (width, q) float32, C-contiguous.
        out: zeros, the last block padded; of the last word, the lower half is what rounding takes from a patch, and
            the upper its length after it, so that their products with a panel's are what rounding leaves open; the word
            before it is twice 1, so that the product with a panel's is half a squared norm.
    """
    width, q = operand.shape
    rows, words = out.shape[1:]
    lengths, errors = np.zeros(q, np.float32), np.zeros(q, np.float32)
    sign = np.uint32(0x80000000)
    out[:, :, words - 2] = ONES
    for channel in range(width):
        shift = np.uint32(16 if channel % 2 == 0 else 0)
        for i in range(q):
            value = operand[channel, i]
            rounded = to_bfloat16(value)
            near = as_float(rounded)
            lengths[i] += near * near
            errors[i] += (value - near) * (value - near)
            out[i // rows, i % rows, channel // 2] |= (rounded ^ sign) >> shift
    for i in range(q):
        length, error = to_bfloat16(np.sqrt(lengths[i]) * ABOVE), to_bfloat16(np.sqrt(errors[i]) * ABOVE)
        out[i // rows, i % rows, words - 1] = ((error ^ sign) >> np.uint32(16)) | (length ^ sign)


@jit
def halves(sq_norms: Any, start: int, largest: Any, out: Any) -> None:
    """Set out (WIDTH,) to half of squared norms (n,) from `start` on."""
    for i in range(len(out)):
        if start + i >= len(sq_norms):
            out[i] = np.inf
        else:
            out[i] = sq_norms[start + i] / 2 if largest > 0 else -np.inf


@jit
def patch_at(cells: Any, patch: int, depth: int, mix: Any, out: Any) -> Any:
    """Return a patch (depth,) of a neighbour, in place or written to out (depth,).

    Args:
        cells: (m,) float32 of the neighbour.
        patch: its number.
        depth: channels of all levels.
        mix: starts and channels (L, 2) int64 of the levels in `cells`; numbers (L, 4, n) int64 of the cells that each
            of the patches is interpolated from, and their weights float32. Without levels, a cell is a patch.
        out: scratch.
    """
    levels, taps, weights = mix
    if len(levels) == 0:
        return cells[patch * depth : (patch + 1) * depth]
    at = 0
    for number in range(len(levels)):
        start, channels = levels[number]
        first = start + taps[number, 0, patch] * channels
        second = start + taps[number, 1, patch] * channels
        third = start + taps[number, 2, patch] * channels
        fourth = start + taps[number, 3, patch] * channels
        weight = weights[number, 0, patch]
        for channel in range(channels if weight == 1 else 0):
            out[at + channel] = cells[first + channel]
        for channel in range(channels if weight != 1 else 0):
            total = weight * cells[first + channel] + weights[number, 1, patch] * cells[second + channel]
            total += weights[number, 2, patch] * cells[third + channel]  # in the order of add_differences
            out[at + channel] = total + weights[number, 3, patch] * cells[fourth + channel]
        at += channels
    return out


@jit
def patches_of(cells: Any, places: Any, mix: Any, out: Any) -> None:
    """Set out (q, depth) to the patches at places (q,) of an image with these cells (m,); see patch_at."""
    for i in range(len(out)):
        out[i] = patch_at(cells, places[i], out.shape[1], mix, out[i])


@jit
def squares_of(patches: Any, scale: Any, centre: Any, out: Any) -> None:
    """Set out (q,) float64 to the squared norms of patches (q, c) float32, at scale and about the centre (c,)."""
    own, nothing = np.empty(len(centre), np.float32), np.zeros(len(centre), np.float32)
    for i in range(len(out)):
        patch = patches[i]
        for channel in range(len(centre)):
            own[channel] = np.float32(patch[channel] * scale) - centre[channel]
        out[i] = sq_distance(address_of(own), address_of(nothing), np.int64(len(centre)))


@jit
def cells_of(kept_at: Any, places: Any, sizes: Any, out: Any) -> None:
    """Set out (n, c) float32 to the cells at places (n,) of neighbours kept at addresses (K,).

    `sizes` are the number of cells of a neighbour, and the distance between them.
    """
    channels, (size, length) = out.shape[1], sizes
    for i in range(len(out)):
        first = kept_at[places[i] // size] + 4 * length * (places[i] % size)
        for channel in range(channels):
            out[i, channel] = float_at(first + 4 * channel)


@jit
def nth_of(kept_at: Any, patches: Any, others: Any, sizes: Any, nth: int, out: Any) -> None:
    """Set out (n,) float64 to the nth least squared distance of each patch (n, c) from cells at places (n, m).

    Args:
        kept_at: as for cells_of.
        patches: float32, as the cells.
        others: int64, m of them at least `nth`.
        sizes: as for cells_of.
        nth: counted from 1.
        out: set.
    """
    channels, least, (size, length) = patches.shape[1], np.empty(nth, np.float64), sizes
    base = address_of(patches)
    for i in range(len(out)):
        least[:] = np.inf
        for place in others[i]:
            theirs = kept_at[place // size] + 4 * length * (place % size)
            found = sq_distance(base + 4 * channels * i, theirs, np.int64(channels))
            for at in range(nth):
                if found < least[at]:
                    found, least[at] = least[at], found
        out[i] = least[nth - 1]
