"""Compiled loops that read levels once, and make of them all that the search by bounds needs.

For a few patches at a time, a block of their channels is converted, shifted and turned, its squares are summed, and it
is multiplied by the directions, all in a core's nearest cache. Step by step on a whole neighbour, each of these would
read memory again: for a transformer, whose patches are few and long, that took longer than all products. Channels lie
far apart: what a few panels of patches need of the next block of channels is asked for meanwhile, line after line of a
channel, which memory gives twice as fast as one line of each.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..compiled import address_of, jit
from .products_tiles import LINE, TILE_ROWS, begin_tiles, end_tiles, project_tiles, round_pairs, rounded_pair
from .simd import CHANNELS, FLOAT, INT, ROWS, WIDTH, WORD, project, repeat

LANES = WIDTH // 2  # patches, and channels, that are turned at a time: a register of them
FEW = 8  # the same, for what channels are left
AHEAD = 8  # channels of which values are asked for before they are read
TOGETHER = max(1, 160 // WIDTH)  # panels that a block of channels is read for at a time
CACHE_LINE = 64  # bytes

# Elsewhere no instruction converts float16, and the compiler has no function for it.
READS_HALVES = binding.get_host_cpu_features().get("f16c", False) or platform.machine() in ("arm64", "aarch64")


def _turned(builder: Any, rows: list[Any]) -> list[Any]:
    """Transpose 8 vectors of 8 floats, or 16 of 16: within blocks of 4 floats, then the blocks."""
    lanes = len(rows)

    def both(a: Any, b: Any, *picks: list[int]) -> list[Any]:
        """Return what two picks take of a, whose places begin at 0, and b, whose places begin at `lanes`."""
        masks = (ir.Constant(ir.VectorType(INT, lanes), pick) for pick in picks)
        return [builder.shuffle_vector(a, b, mask) for mask in masks]

    def in_blocks(*places: int) -> list[int]:
        return [at + place for at in range(0, lanes, 4) for place in places]

    def every_other(first: int) -> list[int]:
        return [side + at + i for side in (0, lanes) for at in range(first, lanes, 8) for i in range(4)]

    def turned(some: Sequence[Any]) -> list[Any]:
        if len(some) == 1:
            return list(some)
        halves = [both(some[i], some[i + 1], every_other(0), every_other(4)) for i in range(0, len(some), 2)]
        sides = [turned([half[side] for half in halves]) for side in (0, 1)]
        return [block for pair in zip(*sides, strict=True) for block in pair]

    low, high = in_blocks(0, lanes, 1, lanes + 1), in_blocks(2, lanes + 2, 3, lanes + 3)
    near, far = in_blocks(0, 1, lanes, lanes + 1), in_blocks(2, 3, lanes + 2, lanes + 3)
    pairs = [both(rows[i], rows[i + 1], low, high) for i in range(0, lanes, 2)]
    fours = [
        [column for side in (0, 1) for column in both(pairs[i][side], pairs[i + 1][side], near, far)]
        for i in range(0, lanes // 2, 2)
    ]  # of 4 rows each, the 4 columns of all blocks
    columns = [turned([four[column] for four in fours]) for column in range(4)]
    return [columns[at % 4][at // 4] for at in range(lanes)]


def load_values(builder: Any, kind: Any, base: Any, offset: Any, lanes: int) -> Any:
    """Load so many values as float32; 0: one, and not a vector of it."""
    is_half = kind.dtype == types.uint16
    own = ir.HalfType() if is_half else FLOAT
    at = builder.gep(builder.inttoptr(base, own.as_pointer()), [offset])
    if lanes:
        at = builder.bitcast(at, ir.VectorType(own, lanes).as_pointer())
    value = builder.load(at, align=2 if is_half else 4)
    return builder.fpext(value, ir.VectorType(FLOAT, lanes) if lanes else FLOAT) if is_half else value


def _prefetch(builder: Any, kind: Any, base: Any, offset: Any) -> None:
    """Ask for the line of a value that will be needed soon."""
    at = builder.add(base, builder.mul(offset, WORD(kind.dtype.bitwidth // 8)))
    place = builder.inttoptr(at, ir.IntType(8).as_pointer())
    kinds = ir.FunctionType(ir.VoidType(), [place.type, INT, INT, INT])
    call = cgutils.get_or_insert_function(builder.module, kinds, "llvm.prefetch.p0i8")
    builder.call(call, [place, INT(0), INT(2), INT(1)])


@intrinsic  # type: ignore[untyped-decorator]
def value_of(context: Any, kind: Any, address: Any, offset: Any) -> Any:
    """Return one value of an array like `kind`, float32 or the bits of float16 as uint16, at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_values(builder, kind, args[1], args[2], 0)

    return types.float32(kind, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(context: Any, kind: Any, address: Any, offset: Any) -> Any:
    """Ask for the line of a value that will be needed soon, see value_of; it need not be there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _prefetch(builder, kind, args[1], args[2])
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.int64), generate


def _turner(lanes: int, rounds: bool = False) -> Any:
    """Return `turn_tile` for so many channels; if it rounds, `moved` are words of two channels as bfloat16."""

    @intrinsic  # type: ignore[untyped-decorator]
    def turn_tile(context: Any, kind: Any, addresses: Any, strides: Any, scale: Any) -> Any:
        """Shift channels of WIDTH patches, and turn them; scale and centre the same, and add their squares.

        Args:
            context: the compiler's.
            kind: an array of the values' dtype: float32, or uint16, the bits of float16.
            addresses: those of values (channels, stride), shift (channels,), centre (channels,), cells (WIDTH, stride),
                moved (channels, WIDTH), squares (WIDTH,) and errors (WIDTH,), the last five float32; errors are as for
                round_pairs.
            strides: of values and of cells.
            scale: of the patches, float32.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, *bases = (builder.extract_value(args[1], number) for number in range(7))
            shift, centre, cells, moved, squares, errors = (
                builder.inttoptr(base, FLOAT.as_pointer()) for base in bases
            )
            stride, length = (builder.extract_value(args[2], number) for number in range(2))
            scales = repeat(builder, args[3], lanes)

            def at(base: Any, offset: Any) -> Any:
                return builder.bitcast(builder.gep(base, [offset]), ir.VectorType(FLOAT, lanes).as_pointer())

            def each(base: Any, number: int) -> Any:  # loaded where it is used: there are not registers for all
                return repeat(builder, builder.load(builder.gep(base, [WORD(number)])), lanes)

            for start in range(0, WIDTH, lanes):
                rows, total = [], builder.load(at(squares, WORD(start)), align=4)
                before, lost = None, builder.load(at(errors, WORD(start)), align=4)
                for i in range(lanes):
                    offset = builder.add(builder.mul(stride, WORD(i)), WORD(start))
                    row = builder.fsub(load_values(builder, kind, source, offset, lanes), each(shift, i))
                    rows.append(row)
                    scaled = builder.fmul(row, scales, flags=("contract",))
                    own = builder.fsub(scaled, each(centre, i), flags=("contract",))
                    if not rounds:
                        builder.store(own, at(moved, WORD(i * WIDTH + start)), align=4)
                    elif i % 2 == 0:
                        before = own
                    else:
                        word, lost = rounded_pair(builder, before, own, lost)
                        place = at(moved, WORD(i // 2 * WIDTH + start))
                        builder.store(builder.bitcast(word, own.type), place, align=4)
                    total = builder.fadd(total, builder.fmul(own, own, flags=("contract",)), flags=("contract",))
                builder.store(total, at(squares, WORD(start)), align=4)
                builder.store(lost, at(errors, WORD(start)), align=4)
                for i, column in enumerate(_turned(builder, rows)):
                    builder.store(column, at(cells, builder.mul(length, WORD(start + i))), align=4)
            return context.get_dummy_value()

        return types.void(kind, addresses, strides, scale), generate

    return turn_tile


turn_tile, turn_few, turn_rounded = _turner(LANES), _turner(FEW), _turner(LANES, rounds=True)


@jit
def from_line(shape: Any) -> Any:
    """Return memory for float32 that begins with a line of the cache, as products_tiles.lined_up does."""
    size = 1
    for number in shape:
        size *= number
    raw = np.empty(size + LINE, np.float32)
    first = -address_of(raw) // 4 % LINE
    return raw[first : first + size].reshape(shape)


@jit
def interpolate(kind: Any, at: Any, n: int, shift: Any, taps: Any, weights: Any, first: int, out: Any) -> None:
    """Set columns of out (s * m, all channels) to m patches of a level of s neighbours, shifted.

    Args:
        kind: as for load_levels.
        at: addresses (s,) of the levels, (c, n) each.
        n: cells of a level.
        shift: (c,) float32, subtracted.
        taps: (t, m) int64, cells that each patch is interpolated from.
        weights: (t, m) float32 of these.
        first: of the columns.
        out: float32.
    """
    number = taps.shape[1]
    for neighbour in range(len(at)):
        for channel in range(len(shift)):
            for i in range(number):
                prefetch(kind, at[neighbour], (channel + AHEAD) * n + taps[0, i])
            for i in range(number):
                total = np.float32(0)
                for tap in range(len(taps)):
                    value = value_of(kind, at[neighbour], channel * n + taps[tap, i])
                    total += weights[tap, i] * np.float32(value - shift[channel])
                out[neighbour * number + i, first + channel] = total


@jit
def load_levels(
    kind: Any, source: Any, parts: Any, terms: Any, scale: Any, directions: Any, cells: Any, out: Any, norms: Any,
    errors: Any,
) -> None:  # fmt: skip
    """Turn levels of some neighbours, and find their patches' coordinates and squared norms.

    Args:
        kind: an array of the levels' dtype: float32, or uint16, the bits of float16.
        source: addresses (s, parts) of the parts of the levels, and n.
        parts: see load_patches.
        terms: likewise.
        scale: likewise.
        directions: likewise.
        cells: (s, m) float32, see load_patches.
        out: (s, rows, n) float32, likewise.
        norms: (s, n) float32, likewise.
        errors: (s, n) float32, likewise.
    """
    n, saved = source[1], np.empty(64, np.uint8)
    if len(directions[1]) > 0:
        begin_tiles(address_of(saved))
    for number in range(len(cells)):
        load_patches(
            kind, source_of(source[0], number, n), (np.int64(0), n), parts, terms, scale, directions, cells[number],
            out[number], norms[number], errors[number],
        )  # fmt: skip
    if len(directions[1]) > 0:
        end_tiles(address_of(saved))


@jit
def source_of(at: Any, number: int, n: int) -> Any:
    """Return what load_patches reads of a neighbour, and what is read after it; at: addresses (s, parts)."""
    return at[number], n, at[number + 1, 0] if number + 1 < len(at) else at[number, 0]


@jit
def load_patches(
    kind: Any, source: Any, span: Any, parts: Any, terms: Any, scale: Any, directions: Any, cells: Any, out: Any,
    norms: Any, errors: Any,
) -> None:  # fmt: skip
    """Turn some patches of a neighbour, and find their coordinates and squared norms; tiles are configured if needed.

    Args:
        kind: as for load_levels.
        source: addresses (parts,) of the parts of the levels, n, and the address of what is read after this neighbour.
        span: the first patch, and the end.
        parts: (parts, 4) int64: first channel, number of channels, where in `cells` they begin, and the distance there
            between patches.
        terms: shift (c,) float32, subtracted; centre (c,) float32, at scale, subtracted of the products' side alone.
        scale: of the products, float32.
        directions: see Projection.blocks; of no blocks, coordinates are the channels at scale, about the centre.
        cells: float32, where the shifted values are written with a patch's channels side by side.
        out: (rows, patches) float32, set.
        norms: (patches,) float32, set.
        errors: (patches,) float32, set: lengths of what rounding takes from a patch before it is projected.
    """
    at, n, after = source
    zero, last = span
    singles, pairs, used = directions
    blocks = max(singles.shape[1], pairs.shape[1])
    rows = ROWS if singles.shape[1] > 0 else TILE_ROWS
    most = min(TOGETHER, -(-(last - zero) // WIDTH))
    moved, (squares, lost) = from_line((CHANNELS, WIDTH)), np.empty((2, most * WIDTH), np.float32)
    halves, sums = from_line((CHANNELS // 2, WIDTH)), from_line((most, blocks, rows, WIDTH))
    is_rounded, words = pairs.shape[1] > 0, np.int64(CHANNELS // 2)
    own, near, totals = address_of(moved), address_of(halves), address_of(sums)
    for first in range(zero, last, most * WIDTH):
        end = min(last, first + most * WIDTH)
        panels = -(-(end - first) // WIDTH)
        sums[:], squares[:], lost[:] = 0, 0, 0
        for part in range(len(parts)):
            follows = part + 1 if part + 1 < len(parts) else 0
            begin = first if follows > 0 else end if end < n else 0
            address = after if follows == 0 and end == n else at[follows]
            ahead = address + begin * kind.itemsize, parts[follows, 1], min(n - begin, most * WIDTH)
            for panel in range(panels):
                start = first + panel * WIDTH
                stop, own_sums = min(end, start + WIDTH), slice(panel * WIDTH, (panel + 1) * WIDTH)
                turn_part(
                    kind, (at[part], n), (start, stop, zero), parts[part], terms, scale, cells, moved,
                    (squares[own_sums], lost[own_sums], halves, is_rounded and used[part]), (ahead, panel, panels),
                )  # fmt: skip
                for block in range(blocks if used[part] else 0):
                    target = totals + (panel * blocks + block) * rows * WIDTH * 4
                    if is_rounded:
                        project_tiles((address_of(pairs[part, block]), near, target), words)
                    else:
                        project((address_of(singles[part, block]), own, target), parts[part, 1])
                for channel in range(parts[part, 1] if blocks == 0 else 0):
                    for i in range(stop - start):
                        out[parts[part, 0] + channel, start - zero + i] = moved[channel, i]
        for i in range(end - first):
            norms[first - zero + i] = squares[i]
            errors[first - zero + i] = np.sqrt(lost[i])
        for panel in range(panels):
            start = first + panel * WIDTH
            for block in range(blocks):
                for row in range(rows):
                    for i in range(min(end - start, WIDTH)):
                        out[block * rows + row, start - zero + i] = sums[panel, block, row, i]


@jit
def turn_part(
    kind: Any, source: Any, span: Any, part: Any, terms: Any, scale: Any, cells: Any, moved: Any, sums: Any, ahead: Any
) -> None:
    """Turn a part of the channels of at most WIDTH patches.

    Args:
        kind: as for turn_tile.
        source: address of the part, and n.
        span: the first patch and the end, and the patch that cells begin with.
        part: (4,), see load_patches.
        terms: likewise.
        scale: likewise.
        cells: likewise.
        moved: (CHANNELS, WIDTH) float32, set; what is not there is 0.
        sums: (WIDTH,) float32 squares, to be added to, and the same of what rounding takes; (CHANNELS / 2, WIDTH) words
            of two channels as bfloat16; and whether these are wanted, in place of `moved`.
        ahead: what is asked for meanwhile: the address of other channels, their number, and how many values of each;
            and which share of that, of how many.
    """
    at, n = source
    start, stop, zero = span
    shift, centre = terms
    begin, number, offset, length = part
    squares, lost, halves, rounds = sums
    to, done = address_of(cells) + (offset + (start - zero) * length) * 4, 0
    shifts, centres, own = address_of(shift) + begin * 4, address_of(centre) + begin * 4, address_of(moved)
    (far, channels, values), share, shares = ahead
    asked = channels * share // shares
    is_whole, near = stop == start + WIDTH, address_of(halves)
    is_even = is_whole and number % LANES == 0
    while is_whole and done + FEW <= number:
        target = own + done * WIDTH * 4
        if rounds and is_even:
            target = near + done // 2 * WIDTH * 4
        addresses = (
            at + (done * n + start) * kind.itemsize, shifts + done * 4, centres + done * 4, to + done * 4, target,
            address_of(squares), address_of(lost),
        )  # fmt: skip
        if rounds and is_even:
            turn_rounded(kind, addresses, (n, length), scale)
            done += LANES
        elif done + LANES <= number:
            turn_tile(kind, addresses, (n, length), scale)
            done += LANES
        else:
            turn_few(kind, addresses, (n, length), scale)
            done += FEW
        wanted = channels * (share * number + done) // (shares * number)
        while asked < wanted:
            for value in range(0, values, CACHE_LINE // kind.itemsize):
                prefetch(kind, far, asked * n + value)
            asked += 1
    if rounds and is_even:
        halves[done // 2 :] = 0
        return
    moved[done:] = 0
    for channel in range(done, number):
        for i in range(start, stop):
            value = np.float32(value_of(kind, at, channel * n + i) - shift[begin + channel])
            cells[offset + (i - zero) * length + channel] = value
            mine = np.float32(value * scale - centre[begin + channel])
            moved[channel, i - start] = mine
            squares[i - start] += mine * mine
    if rounds:
        round_pairs((own, near, address_of(lost)), np.int64(CHANNELS // 2))
