"""Products on the tile registers of a processor that has them (AMX), in bfloat16.

A tile holds 16 rows of 64 bytes, and one instruction adds the product of two tiles to a third. Let u' be u after
rounding to bfloat16. Then <u, v> <= <u', v'> + |u - u'| |v| + |u'| |v - v'|. Both products of lengths are two more
coordinates, so that what rounding can do is counted for each pair of patches, in the product itself.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from .simd import FLOATS, WIDTH, WORD, repeat, rows_finder

TILE_ROWS = 32  # query patches multiplied at a time: two tiles, with two of the gallery's, and four of sums
STEP = 16  # words, of two coordinates each, multiplied at a time
TILE_WIDTH = 32  # patches of a panel
GROUP = 8  # of these, in which values within limits are looked for together
LINE = 16  # float32 of a line of the cache
NEAR = 5  # panels whose products with TILE_ROWS patches stay in a core's nearest cache
NEAR_STRIDE = NEAR * TILE_WIDTH + 3 * LINE  # between rows of these: LOOK values may be read where a panel begins

_FEATURES = binding.get_host_cpu_features()
_HAS_INSTRUCTIONS = WIDTH == TILE_WIDTH and all(_FEATURES.get(f"amx-{part}", False) for part in ("tile", "bf16"))
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64

BYTE = ir.IntType(8)
ADDRESS = BYTE.as_pointer()
# Palette 1, then for each of eight tiles its bytes a row from byte 16 on, and its rows from byte 48 on.
_CONFIGURATION = bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])


@cache
def has_tiles() -> bool:
    """Return whether the processor has tile registers, and the system lets this process use them; it is asked once."""
    if not _HAS_INSTRUCTIONS or not sys.platform.startswith("linux"):
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def lined_up(shape: tuple[int, ...], value: float | None = None) -> NDArray[np.float32]:
    """Return memory for float32 that begins with a line of the cache: rows of tiles that lie in two take twice as long.

    Args:
        shape: of the array.
        value: that it is filled with; None: with nothing.
    """
    size = int(np.prod(shape))
    raw = np.empty(size + LINE, np.float32)
    first = -raw.ctypes.data // 4 % LINE
    found = raw[first : first + size].reshape(shape)
    if value is not None:
        found[:] = value
    return found


def _call(builder: Any, name: str, *args: Any) -> None:
    """Call one of LLVM's intrinsics for tiles."""
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


@intrinsic  # type: ignore[untyped-decorator]
def begin_tiles(context: Any, saved: Any) -> Any:
    """Configure this thread's tiles; what they were is written to 64 bytes at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _HAS_INSTRUCTIONS:
            wanted = cgutils.global_constant(builder, "tiles", cgutils.make_bytearray(_CONFIGURATION))
            _call(builder, "sttilecfg", builder.inttoptr(args[0], ADDRESS))
            _call(builder, "ldtilecfg", builder.bitcast(wanted, ADDRESS))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def end_tiles(context: Any, saved: Any) -> Any:
    """Configure this thread's tiles as they were."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _HAS_INSTRUCTIONS:
            _call(builder, "ldtilecfg", builder.inttoptr(args[0], ADDRESS))
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _along(builder: Any, base: Any, count: Any, size: int) -> Any:
    """Return the address `count` times `size` bytes on."""
    return builder.gep(base, [builder.mul(count, WORD(size))])


def _values(builder: Any, base: Any, count: Any) -> Any:
    """Return where WIDTH floats begin, `count` floats on."""
    return builder.bitcast(_along(builder, base, count, 4), FLOATS.as_pointer())


def _multiply(builder: Any, args: Any, use: Callable[..., None]) -> None:
    """Generate the products of one block of the query with all panels; `use` looks at those of each panel."""
    addresses, words, stride, n = args
    query, cells, out, *others = (
        builder.inttoptr(address, ADDRESS) for address in cgutils.unpack_tuple(builder, addresses)
    )
    row, across = builder.mul(words, WORD(4)), builder.mul(stride, WORD(4))
    tiles = [(2 * r + side, r, side) for r in range(2) for side in range(2)]  # sums, and what they are sums of
    if use is _take_minima:
        for r in range(TILE_ROWS):
            builder.store(_floats(float("inf")), _values(builder, others[0], WORD(r * WIDTH)), align=4)
    size = builder.mul(words, WORD(WIDTH))
    with cgutils.for_range_slice(builder, WORD(0), n, WORD(WIDTH), inc=True) as (i, _):
        panel = builder.udiv(i, WORD(WIDTH))
        here = _along(builder, cells, builder.mul(panel, size), 4)
        for number, _, _ in tiles:
            _call(builder, "tilezero", BYTE(number))
        with cgutils.for_range_slice(builder, WORD(0), words, WORD(STEP), inc=True) as (word, _):
            mine, theirs = _along(builder, query, word, 4), _along(builder, here, word, 4 * WIDTH)
            for r in range(2):
                place = _along(builder, mine, builder.mul(words, WORD(16 * r)), 4)
                _call(builder, "tileloadd64", BYTE(4 + r), place, row)
            for side in range(2):
                _call(builder, "tileloadd64", BYTE(6 + side), _along(builder, theirs, WORD(side), 64), WORD(4 * WIDTH))
            for number, r, side in tiles:
                _call(builder, "tdpbf16ps", BYTE(number), BYTE(4 + r), BYTE(6 + side))
        first = _along(builder, out, i, 4)
        for number, r, side in tiles:
            place = _along(builder, _along(builder, first, builder.mul(stride, WORD(16 * r)), 4), WORD(side), 64)
            _call(builder, "tilestored64", BYTE(number), place, across)
        totals = [_values(builder, first, builder.mul(stride, WORD(r))) for r in range(TILE_ROWS)]
        use(builder, totals, panel, *others)


def _take_minima(builder: Any, totals: Sequence[Any], panel: Any, least: Any) -> None:
    """Lower the least of every WIDTH-th value of each row."""
    for r, place in enumerate(totals):
        total = builder.load(place, align=4)
        before = builder.load(_values(builder, least, WORD(r * WIDTH)), align=4)
        low = builder.select(builder.fcmp_ordered("<", total, before), total, before)
        builder.store(low, _values(builder, least, WORD(r * WIDTH)), align=4)


def _mark_hits(builder: Any, totals: Sequence[Any], panel: Any, limits: Any, hits: Any) -> None:
    """Note whether a value is within the limit of its row."""
    lanes = WIDTH // 2  # of a register: masks of two would have to be put together
    one = ir.VectorType(ir.FloatType(), lanes)
    none = [ir.Constant(ir.VectorType(ir.IntType(1), lanes), [1] * lanes)] * (TILE_ROWS // GROUP)
    for at, group in product(range(GROUP), range(len(none))):  # in turns: none waits for the one before
        r = GROUP * group + at
        limit = builder.load(builder.bitcast(_along(builder, limits, WORD(r), 4), one.element.as_pointer()), align=4)
        repeated = repeat(builder, limit, lanes)
        for side in range(2):
            half = builder.gep(builder.bitcast(totals[r], one.as_pointer()), [WORD(side)])
            above = builder.fcmp_unordered(">", builder.load(half, align=4), repeated)
            none[group] = builder.and_(none[group], above)
    found = ir.Constant(ir.VectorType(ir.IntType(lanes), len(none)), ir.Undefined)
    for group, each in enumerate(none):
        some = builder.not_(builder.bitcast(each, ir.IntType(lanes)))
        found = builder.insert_element(found, some, ir.IntType(32)(group))
    builder.store(found, builder.bitcast(_along(builder, hits, panel, 8), found.type.as_pointer()), align=8)


def _multiplier(use: Callable[..., None]) -> Any:
    """Return `multiply_tiles`, which sets out[r, i] = the sum over words of query[r, word] * cells[word, i].

    `use` looks at the products of each panel: it takes minima, or marks where values are within limits.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply_tiles(context: Any, addresses: Any, words: Any, stride: Any, n: Any) -> Any:
        """Multiply one block of the query with all panels.

        Args:
            context: the compiler's.
            addresses: those of query (TILE_ROWS, words), two bfloat16 in each word; cells (panels, words, WIDTH), the
                same; out (TILE_ROWS, stride) float32. For minima: of least (TILE_ROWS, WIDTH) float32, set to the least
                of every WIDTH-th value of out. For marks: of limits (TILE_ROWS,) float32; and hits (panels,) uint64, 16
                bits for each GROUP of rows: 0 where no value of a panel is at most its row's limit.
            words: a multiple of STEP.
            stride: length of a row of out.
            n: how many cells count, a multiple of WIDTH.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if _HAS_INSTRUCTIONS:
                _multiply(builder, args, use)
            return context.get_dummy_value()

        return types.void(addresses, words, stride, n), generate

    return multiply_tiles


multiply_tiles, multiply_tiles_within = _multiplier(_take_minima), _multiplier(_mark_hits)
group_within = rows_finder(GROUP)


def _floats(value: float, kind: Any = FLOATS.element) -> Any:
    return ir.Constant(ir.VectorType(kind, WIDTH), [value] * WIDTH)


def _constant(value: int, lanes: int) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), lanes), [value] * lanes)


def rounded_pair(builder: Any, even: Any, odd: Any, errors: Any) -> tuple[Any, Any]:
    """Round two vectors of floats to bfloat16; returns the words of both, and `errors` with squares of what it takes.

    Halves are rounded away from 0, as that takes fewer instructions.
    """
    lanes, bits = even.type.count, []
    for value in (even, odd):
        kind = ir.VectorType(ir.IntType(32), lanes)
        raised = builder.add(builder.bitcast(value, kind), _constant(0x8000, lanes))
        bits.append(builder.and_(raised, _constant(0xFFFF0000, lanes)))
        error = builder.fsub(value, builder.bitcast(bits[-1], value.type))
        errors = builder.fadd(errors, builder.fmul(error, error, flags=("contract",)), flags=("contract",))
    return builder.or_(builder.lshr(bits[0], _constant(16, lanes)), bits[1]), errors


@intrinsic  # type: ignore[untyped-decorator]
def round_pairs(context: Any, addresses: Any, pairs: Any) -> Any:
    """Round float32 to bfloat16, two channels in each word.

    Args:
        context: the compiler's.
        addresses: those of values (2 * pairs, WIDTH) float32; of words (pairs, WIDTH), set; and of errors (WIDTH,)
            float32: squares of what rounding takes are added.
        pairs: of channels.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, words, errors = (
            builder.inttoptr(builder.extract_value(args[0], number), FLOATS.as_pointer()) for number in range(3)
        )
        total = cgutils.alloca_once_value(builder, builder.load(errors, align=4))
        with cgutils.for_range(builder, args[1]) as loop:
            first = builder.shl(loop.index, WORD(1))
            even, odd = (builder.load(builder.gep(values, [builder.add(first, WORD(i))]), align=4) for i in (0, 1))
            word, added = rounded_pair(builder, even, odd, builder.load(total))
            builder.store(builder.bitcast(word, FLOATS), builder.gep(words, [loop.index]), align=4)
            builder.store(added, total)
        builder.store(builder.load(total), errors, align=4)
        return context.get_dummy_value()

    return types.void(addresses, pairs), generate


@intrinsic  # type: ignore[untyped-decorator]
def project_tiles(context: Any, addresses: Any, words: Any) -> Any:
    """Add to sums[r, i] the sum over channels of directions[r, channel] * patches[channel, i], all bfloat16.

    Args:
        context: the compiler's.
        addresses: those of directions (TILE_ROWS, words), patches (words, WIDTH), and sums (TILE_ROWS, WIDTH) float32.
        words: of two channels, a multiple of STEP.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _HAS_INSTRUCTIONS:
            _project(builder, args)
        return context.get_dummy_value()

    return types.void(addresses, words), generate


def _project(builder: Any, args: Any) -> None:
    addresses, words = args
    directions, patches, sums = (
        builder.inttoptr(builder.extract_value(addresses, number), ADDRESS) for number in range(3)
    )
    row, line = builder.mul(words, WORD(4)), WORD(4 * WIDTH)
    tiles = [(2 * r + side, r, side) for r in range(2) for side in range(2)]
    places = {number: builder.gep(sums, [WORD(4 * WIDTH * 16 * r + 64 * side)]) for number, r, side in tiles}
    for number, place in places.items():
        _call(builder, "tileloadd64", BYTE(number), place, line)
    with cgutils.for_range_slice(builder, WORD(0), words, WORD(STEP), inc=True) as (word, _):
        for r in range(2):
            first = builder.add(builder.mul(row, WORD(16 * r)), builder.mul(word, WORD(4)))
            _call(builder, "tileloadd64", BYTE(4 + r), builder.gep(directions, [first]), row)
        for side in range(2):
            place = builder.gep(patches, [builder.add(builder.mul(word, line), WORD(64 * side))])
            _call(builder, "tileloadd64", BYTE(6 + side), place, line)
        for number, r, side in tiles:
            _call(builder, "tdpbf16ps", BYTE(number), BYTE(4 + r), BYTE(6 + side))
    for number, place in places.items():
        _call(builder, "tilestored64", BYTE(number), place, line)
