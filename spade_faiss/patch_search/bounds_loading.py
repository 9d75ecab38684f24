"""Compiled loops that read a level of the finest grid once, and make of it all that the search by bounds needs.

For a few patches at a time, a block of their channels is converted, shifted and turned, its squares are summed, and it
is multiplied by the directions, all in a core's nearest cache. Step by step on a whole neighbour, each of these would
read memory again: for a transformer, whose patches are few and long, that took longer than all products.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic

from .bounds_simd import CHANNELS, FLOAT, INT, ROWS, WIDTH, WORD, address_of, project
from .pyramid_simd import jit

EIGHT = ir.VectorType(FLOAT, 8)  # patches, or channels, that are turned at a time

# Elsewhere no instruction converts float16, and the compiler has no function for it.
READS_HALVES = binding.get_host_cpu_features().get("f16c", False) or platform.machine() in ("arm64", "aarch64")


def _turned(builder: Any, rows: list[Any]) -> list[Any]:
    """Transpose 8 vectors of 8 floats."""

    def pairs(a: Any, b: Any, mask: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, 8), mask))

    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    first = [pairs(rows[i], rows[i + 1], mask) for i in (0, 2, 4, 6) for mask in (low, high)]
    low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    second = [pairs(first[i], first[i + 2], mask) for i in (0, 1, 4, 5) for mask in (low, high)]
    near, far = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    return [pairs(second[i], second[i + 4], mask) for mask in (near, far) for i in range(4)]


def _values(builder: Any, kind: Any, base: Any, offset: Any, wide: bool) -> Any:
    """Load one value or 8, as float32."""
    is_half = kind.dtype == types.uint16
    own = ir.HalfType() if is_half else FLOAT
    at = builder.gep(builder.inttoptr(base, own.as_pointer()), [offset])
    if wide:
        at = builder.bitcast(at, ir.VectorType(own, 8).as_pointer())
    value = builder.load(at, align=2 if is_half else 4)
    return builder.fpext(value, EIGHT if wide else FLOAT) if is_half else value


def _splat(builder: Any, value: Any) -> Any:
    """Repeat one float."""
    undefined = ir.Constant(EIGHT, ir.Undefined)
    one = builder.insert_element(undefined, value, INT(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(INT, 8), [0] * 8))


@intrinsic  # type: ignore[untyped-decorator]
def value_of(context: Any, kind: Any, address: Any, offset: Any) -> Any:
    """Return one value of an array like `kind`, float32 or the bits of float16 as uint16, at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _values(builder, kind, args[1], args[2], False)

    return types.float32(kind, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def turn_tile(context: Any, kind: Any, addresses: Any, strides: Any, scale: Any) -> Any:
    """Shift 8 channels of WIDTH patches, and turn them; scale and centre the same, and add their squares.

    Args:
        context: the compiler's.
        kind: an array of the values' dtype: float32, or uint16, the bits of float16.
        addresses: those of values (8, stride), shift (8,), centre (8,), cells (WIDTH, stride), moved (8, WIDTH) and
            squares (WIDTH,), the last four float32.
        strides: of values and of cells.
        scale: of the patches, float32.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, *bases = (builder.extract_value(args[1], number) for number in range(6))
        shift, centre, cells, moved, squares = (builder.inttoptr(base, FLOAT.as_pointer()) for base in bases)
        stride, length = (builder.extract_value(args[2], number) for number in range(2))
        scales = _splat(builder, args[3])

        def at(base: Any, offset: Any) -> Any:
            return builder.bitcast(builder.gep(base, [offset]), EIGHT.as_pointer())

        shifts, centres = (
            [_splat(builder, builder.load(builder.gep(base, [WORD(i)]))) for i in range(8)] for base in (shift, centre)
        )
        for start in range(0, WIDTH, 8):
            rows, total = [], builder.load(at(squares, WORD(start)), align=4)
            for i in range(8):
                offset = builder.add(builder.mul(stride, WORD(i)), WORD(start))
                row = builder.fsub(_values(builder, kind, source, offset, True), shifts[i])
                rows.append(row)
                own = builder.fsub(builder.fmul(row, scales, flags=("contract",)), centres[i], flags=("contract",))
                builder.store(own, at(moved, WORD(i * WIDTH + start)), align=4)
                total = builder.fadd(total, builder.fmul(own, own, flags=("contract",)), flags=("contract",))
            builder.store(total, at(squares, WORD(start)), align=4)
            for i, column in enumerate(_turned(builder, rows)):
                builder.store(column, at(cells, builder.mul(length, WORD(start + i))), align=4)
        return context.get_dummy_value()

    return types.void(kind, addresses, strides, scale), generate


@jit
def turn_rest(
    kind: Any, source: Any, span: Any, terms: Any, scale: Any, cells: Any, target: Any, moved: Any, squares: Any
) -> None:
    """Do as turn_tile for channels first to end of patches start to stop, one by one; see load_level.

    Args:
        kind: as for turn_tile.
        source: address and number of patches of the level.
        span: first and end, the channel that `moved` begins with, start and stop.
        terms: shift and centre.
        scale: of the patches.
        cells: see load_level.
        target: see load_level.
        moved: (CHANNELS, WIDTH).
        squares: (WIDTH,).
    """
    first, end, begin, start, stop = span
    base, n = source
    shift, centre = terms
    offset, length = target
    for channel in range(first, end):
        for i in range(start, stop):
            value = np.float32(value_of(kind, base, channel * n + i) - shift[channel])
            cells[offset + i * length + channel] = value
            own = np.float32(value * scale - centre[channel])
            moved[channel - begin, i - start] = own
            squares[i - start] += own * own


@jit
def load_level(
    kind: Any, source: Any, terms: Any, scale: Any, directions: Any, used: Any, cells: Any, target: Any, out: Any,
    row: int, norms: Any,
) -> None:  # fmt: skip
    """Turn a level of some neighbours, and add its part of the patches' coordinates and squared norms.

    Args:
        kind: an array of the level's dtype: float32, or uint16, the bits of float16.
        source: address of the levels (s, c, n), and n.
        terms: shift (c,) float32, subtracted; centre (c,) float32, at scale, subtracted of the products' side alone.
        scale: of the products, float32.
        directions: (blocks, c, ROWS) float32; of no blocks, coordinates are the channels at scale, about the centre.
        used: (parts,) which parts of CHANNELS channels have directions that are not 0.
        cells: (s, m) float32, where the shifted values are written with a patch's channels side by side.
        target: where in cells the first patch begins, and the distance between patches.
        out: (s, rows, n) float32: coordinates are added, or, if they are channels, set.
        row: the first of these rows.
        norms: (s, n) float32: squared norms are added.
    """
    for number in range(len(cells)):
        own = source[0] + number * len(terms[0]) * source[1] * kind.itemsize, source[1]
        load_one(kind, own, terms, scale, directions, used, cells[number], target, out[number], row, norms[number])


@jit
def load_one(
    kind: Any, source: Any, terms: Any, scale: Any, directions: Any, used: Any, cells: Any, target: Any, out: Any,
    first: int, norms: Any,
) -> None:  # fmt: skip
    """Do as load_level, for one neighbour."""
    base, n = source
    shift, centre = terms
    offset, length = target
    channels, blocks, size = len(shift), len(directions), kind.itemsize
    moved, squares = np.empty((CHANNELS, WIDTH), np.float32), np.empty(WIDTH, np.float32)
    sums = np.empty((blocks, ROWS, WIDTH), np.float32)
    shifts, centres, to = address_of(shift), address_of(centre), address_of(cells)
    ways, own, totals, sums_at = address_of(directions), address_of(moved), address_of(sums), address_of(squares)
    for start in range(0, n, WIDTH):
        stop = min(n, start + WIDTH)
        sums[:], squares[:] = 0, 0
        for begin in range(0, channels, CHANNELS):
            end = min(channels, begin + CHANNELS)
            whole = begin + (end - begin) // 8 * 8 if stop == start + WIDTH else begin
            for channel in range(begin, whole, 8):
                addresses = (
                    base + (channel * n + start) * size, shifts + channel * 4, centres + channel * 4,
                    to + (offset + start * length + channel) * 4, own + (channel - begin) * WIDTH * 4, sums_at,
                )  # fmt: skip
                turn_tile(kind, addresses, (n, length), scale)
            if whole < end:
                moved[whole - begin :] = 0
                turn_rest(kind, source, (whole, end, begin, start, stop), terms, scale, cells, target, moved, squares)
            for block in range(blocks if used[begin // CHANNELS] else 0):
                addresses_ = (
                    ways + (block * channels + begin) * ROWS * 4, own, totals + block * ROWS * WIDTH * 4
                )  # fmt: skip
                project(addresses_, np.int64(end - begin))
            if blocks == 0:
                for channel in range(begin, end):
                    for i in range(stop - start):
                        out[first + channel, start + i] = moved[channel - begin, i]
        for i in range(stop - start):
            norms[start + i] += squares[i]
        for block in range(blocks):
            for row in range(ROWS):
                for i in range(stop - start):
                    out[first + block * ROWS + row, start + i] += sums[block, row, i]
