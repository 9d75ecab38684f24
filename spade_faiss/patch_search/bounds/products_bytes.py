"""Products of int8 with sums of int16: as many in one instruction as of int16 in two, on any processor with AVX2.

Let u = s u' + e and v = t v' + f, where u' and v' are integers. Then <u, v> <= s t (<u', v'> + |e| / s * |v| / t +
|u'| * |f| / t). The steps t are a panel's; |v| / t and |f| / t of each of its patches are noted with it as integers, so
that what is within a row's limit is found out by comparing integers, patches of a panel at once. Floats are made where
some are. No sum overflows: steps are so long that |u'| |v'| fits int16.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..compiled import jit
from .panels import LEAST_STEP, RAISED, halves
from .simd import FLOAT, FLOATS, INT, ROWS, SHORT, WIDTH, WORD, repeat

BYTE_ROWS = 3  # of a panel after its words, see pack_bytes
BYTE_TERMS = 2  # rows of a query's block after its words, see pack_query_bytes
STEPS, OWN_STEPS = 127, 63  # that a coordinate has at most: sums of two products of these and of 255 fit int16
LONGEST, OWN_LONGEST = 270.0, 120.0  # patches in their steps, rounded: the product of both fits int16
LENGTH, LOST = 128, 1024  # integers in a step: of a patch's length, and of the length of what rounding takes from it
MOST_LOST = 63.0  # steps that rounding takes from a patch, where what it can do is known: fits in these integers
UNIT = 0.57  # of a panel's steps squared, that half a squared norm has fewer of than int16 holds, without its sign
SHORTER = 8.0  # times than the longest of a query's patches: steps are as for such, at least
TOGETHER = 2  # panels that are multiplied at once
MOST = 16  # panels that a call may mark
TERMS = 8 + WIDTH // 2  # words of each of these, see _set_terms

_FEATURES = binding.get_host_cpu_features()
HAS_BYTES = bool(_FEATURES.get("avx2"))
_CHUNK = 64 if _FEATURES.get("avx512bw") else 32  # bytes of a register
_NAMES = {32: "llvm.x86.avx2.pmadd.ub.sw", 64: "llvm.x86.avx512.pmaddubs.w.512"}
BYTE = ir.IntType(8)
SUMS, UNITS = ir.VectorType(SHORT, WIDTH), ir.VectorType(BYTE, 2 * WIDTH)
EIGHT, EIGHT_INTS = ir.VectorType(FLOAT, 8), ir.VectorType(INT, 8)  # of a block's rows, and two numbers after them
BOTH = 0x10001  # times an int16: twice the same in one word


@jit
def pack_bytes(operand: Any, channels: int, sq_norms: Any, largest: Any, panels: Any, units: Any) -> None:
    """Do as `panels.pack`, with four channels as int8 in each word: in steps of each panel.

    A word's first half has two channels of each patch, and its second half the two after them.

    Args:
        operand: as for pack.
        channels: as for pack.
        sq_norms: as for pack.
        largest: as for pack.
        panels: (s, panels, words + BYTE_ROWS, WIDTH) float32, set; words are a quarter of the channels, rounded up. The
            first half of the row after them holds half squared norms, as uint16 in UNIT squares of a step, rounded
            down; its second half begins with the step, its reciprocal, and what is added to limits: 0, or infinity
            where it is not known what rounding can do. The next row has half squared norms. The last has lengths of
            patches, as uint16 in steps of 1 / LENGTH, and of what rounding takes from them, of 1 / LOST, rounded up.
        units: the same memory, (s, panels, words + BYTE_ROWS, 4 * WIDTH) uint8: 128 more than the patches' integers.
    """
    n, words, wide = operand.shape[2], panels.shape[2] - BYTE_ROWS, panels.shape[3]
    squares, lost = np.empty(wide, np.float32), np.empty(wide, np.float64)
    for number in range(len(operand)):
        for panel in range(panels.shape[1]):
            target, figures, start = units[number, panel], panels[number, panel, words, wide // 2 :], panel * wide
            end = max(0, min(wide, n - start)) if largest[number, 0] > 0 else 0
            squares[:], lost[:], target[:words] = 0, 0, 128
            most = np.float32(0)
            for channel in range(channels):
                source = operand[number, channel]
                for i in range(end):
                    most = max(most, abs(source[start + i]))
                    squares[i] += source[start + i] * source[start + i]
            longest = np.sqrt(squares.max()) * RAISED
            step = step_of(most / np.float32(STEPS), longest, LONGEST, channels)
            inverse = 1 / step
            for channel in range(channels):
                source, row = operand[number, channel], target[channel // 4]
                first = 2 * wide * (channel % 4 // 2) + channel % 2
                for i in range(end):
                    unit = np.rint(source[start + i] * inverse)
                    error = np.float64(source[start + i]) - np.float64(unit) * np.float64(step)
                    lost[i] += error * error
                    row[first + 2 * i] = np.uint8(np.int32(unit) + 128)
            is_known = largest[number, 0] > 0 and np.sqrt(lost.max()) * inverse * RAISED <= MOST_LOST
            figures[0], figures[1], figures[2] = step, inverse, np.float32(0 if is_known else np.inf)
            halves(sq_norms[number], start, largest[number, 0], panels[number, panel, words + 1])
            for i in range(wide):
                half = np.float64(panels[number, panel, words + 1, i]) * np.float64(inverse) ** 2 / UNIT
                set_code(max(0.0, half * (1 - 1e-6)), target[words], i)
                set_code(np.ceil(np.sqrt(squares[i]) * RAISED * inverse * LENGTH), target[words + 2], i)
                set_code(np.ceil(np.sqrt(lost[i]) * RAISED * inverse * LOST), target[words + 2], wide + i)


@jit
def set_code(value: Any, out: Any, at: int) -> None:
    """Write a value that is not negative to a place of out, bytes, as uint16."""
    code = np.int32(min(value, 65535.0))
    out[2 * at], out[2 * at + 1] = np.uint8(code & 255), np.uint8(code >> 8)


@jit
def step_of(least: Any, length: Any, longest: float, channels: int) -> Any:
    """Return a step of at least so much, in which patches of this length are not `longest` when they are rounded."""
    return max(max(least, np.float32(length / (longest - 1 - 0.5 * np.sqrt(channels)))), LEAST_STEP)


@jit
def pack_query_bytes(operand: Any, out: Any, units: Any) -> None:
    """Set out (blocks, 2 * words + BYTE_TERMS, ROWS) float32 to what panels of pack_bytes are multiplied by.

    Of four channels, the first two are in one row, twice, and the others in the next. After these: twice an int16 that
    takes back what 128 adds to the sum of products; and of the block: the step, its reciprocal, what is added to limits
    as for pack_bytes; and twice in a word the uint16 that lengths of a panel's patches, and what rounding takes from
    these, are multiplied by to be 2**16 times what rounding can do to a sum of products.

    Args:
        operand: (width, q) float32, C-contiguous.
        out: zeros, the last block padded.
        units: the same memory, (blocks, 2 * words + BYTE_TERMS, 4 * ROWS) int8.
    """
    width, q = operand.shape
    after, codes, lengths = out.shape[1] - BYTE_TERMS, out.view(np.int32), np.zeros(q, np.float64)
    for channel in range(width):
        for i in range(q):
            lengths[i] += np.float64(operand[channel, i]) ** 2
    shortest = np.sqrt(lengths.max()) / SHORTER
    for block in range(len(out)):
        first, end = block * ROWS, min(q, block * ROWS + ROWS)
        most = np.float32(0)
        for channel in range(width):
            for i in range(first, end):
                most = max(most, abs(operand[channel, i]))
        longest = np.float32(max(np.sqrt(lengths[first:end].max()), shortest)) * RAISED
        step = step_of(most / np.float32(OWN_STEPS), longest, OWN_LONGEST, width)
        inverse, most_lost, most_left = 1 / step, 0.0, 0.0
        for i in range(first, end):
            row, squares, lost, total = i - first, 0.0, 0.0, np.int64(0)
            for channel in range(width):
                unit = np.rint(operand[channel, i] * inverse)
                error = np.float64(operand[channel, i]) - np.float64(unit) * np.float64(step)
                squares += np.float64(unit) ** 2
                lost += error * error
                total += np.int64(unit)
                for twice in range(2):
                    units[block, channel // 2, 4 * row + 2 * twice + channel % 2] = np.int8(unit)
            begin = (-128 * total) & 0xFFFF
            codes[block, after, row] = np.int32(np.uint32(begin * BOTH))
            most_lost, most_left = max(most_lost, np.sqrt(lost) * inverse * RAISED), max(most_left, np.sqrt(squares))
        is_known = most_lost <= MOST_LOST
        figures = out[block, after + 1]
        figures[0], figures[1], figures[2] = step, inverse, np.float32(0 if is_known else np.inf)
        for at, factor in enumerate((most_lost * 65536 / LENGTH if is_known else 0.0, most_left * 65536 / LOST)):
            codes[block, after + 1, 3 + at] = np.int32(np.ceil(factor)) * BOTH


def _add_bytes(builder: Any, total: Any, mine: Any, theirs: Any) -> Any:
    """Return total + the sums of the products of two neighbouring integers, theirs without a sign."""
    lanes, parts, undefined = _CHUNK // 2, [], ir.Constant(UNITS, ir.Undefined)
    sums, bytes_of = ir.VectorType(SHORT, lanes), ir.VectorType(BYTE, _CHUNK)
    kind = ir.FunctionType(sums, [bytes_of, bytes_of])
    function = cgutils.get_or_insert_function(builder.module, kind, _NAMES[_CHUNK])
    for start in range(0, 2 * WIDTH, _CHUNK):
        some = ir.Constant(ir.VectorType(INT, _CHUNK), list(range(start, start + _CHUNK)))
        sides = [builder.shuffle_vector(side, undefined, some) for side in (theirs, mine)]
        parts.append(builder.call(function, sides))
    found = parts[0]
    if len(parts) == 2:
        found = builder.shuffle_vector(*parts, ir.Constant(ir.VectorType(INT, WIDTH), list(range(WIDTH))))
    return builder.add(total, found)


def _splat(builder: Any, word: Any, kind: Any) -> Any:
    """Repeat a word of four bytes, as a vector of this kind."""
    count = kind.count * kind.element.width // 32
    words = ir.VectorType(INT, count)
    undefined = ir.Constant(words, ir.Undefined)
    one = builder.insert_element(undefined, word, INT(0))
    return builder.bitcast(builder.shuffle_vector(one, undefined, ir.Constant(words, [0] * count)), kind)


def _upper(builder: Any, one: Any, other: Any) -> Any:
    """Return the upper halves of products of uint16."""
    wide = ir.VectorType(INT, WIDTH)
    product = builder.mul(builder.zext(one, wide), builder.zext(other, wide))
    return builder.trunc(builder.lshr(product, ir.Constant(wide, [16] * WIDTH)), SUMS)


class _Block:
    """A block of the query's patches, as generated code finds it."""

    def __init__(self, builder: Any, query: Any, words: Any) -> None:
        after = builder.mul(words, WORD(2 * ROWS))
        terms = [builder.load(builder.gep(query, [builder.add(after, WORD(at))]), align=4) for at in range(ROWS + 5)]
        self.begins = [_splat(builder, builder.bitcast(term, INT), SUMS) for term in terms[:ROWS]]
        self.step, self.inverse, self.raised = terms[ROWS : ROWS + 3]
        self.factors = [_splat(builder, builder.bitcast(term, INT), SUMS) for term in terms[ROWS + 3 :]]


class _Panel:
    """A panel of a neighbour's patches, likewise."""

    def __init__(self, builder: Any, cells: Any, first: Any, words: Any) -> None:
        self.builder, self.first = builder, first
        self.number = builder.udiv(first, WORD(WIDTH))
        size = builder.mul(builder.add(words, WORD(BYTE_ROWS)), WORD(WIDTH))
        self.start = builder.gep(cells, [builder.mul(self.number, size)])
        self.after = builder.gep(self.start, [builder.mul(words, WORD(WIDTH))])

    def units(self, word: Any, half: int) -> Any:
        """Return two channels of all patches."""
        at = self.builder.add(self.builder.mul(word, WORD(WIDTH)), WORD(half * WIDTH // 2))
        return self._vector(self.builder.gep(self.start, [at]), UNITS)

    def norms(self) -> Any:
        """Return half squared norms as integers."""
        return self._vector(self.after, SUMS)

    def halves(self) -> Any:
        """Return half squared norms."""
        return self._vector(self.builder.gep(self.after, [WORD(WIDTH)]), FLOATS)

    def figure(self, number: int) -> Any:
        """Return the step, its reciprocal, or what is added to limits."""
        return self.builder.load(self.builder.gep(self.after, [WORD(WIDTH // 2 + number)]), align=4)

    def doubts(self, block: _Block) -> Any:
        """Return what rounding both sides can do to the sums of products of each patch."""
        lengths = self.builder.gep(self.after, [WORD(2 * WIDTH)])
        lost = self.builder.gep(lengths, [WORD(WIDTH // 2)])
        pairs = zip((self._vector(at, SUMS) for at in (lengths, lost)), block.factors, strict=True)
        total = self.builder.add(*(_upper(self.builder, *pair) for pair in pairs))
        return self.builder.add(total, ir.Constant(SUMS, [2] * WIDTH))  # each product was rounded down

    def _vector(self, at: Any, kind: Any) -> Any:
        return self.builder.load(self.builder.bitcast(at, kind.as_pointer()), align=4)


def _set_terms(builder: Any, block: _Block, panel: _Panel, limits: Any, out: Any) -> None:
    """Write what sums of products are raised by, and what is compared with them then.

    They are raised by each row's limit as int16, twice in a word. Where it is NaN, no sum is large enough. The last of
    eight words tells whether a row's is more than int16 holds: then all may be within its limit. After these: half
    squared norms as int16, less what rounding can do to a sum.
    """
    values = builder.fmul(limits, repeat(builder, panel.figure(1), 8))
    raised = builder.fadd(builder.fadd(panel.figure(2), block.raised), ir.Constant(FLOAT, 2.0))
    values = builder.fadd(values, repeat(builder, raised, 8))
    low, high = (ir.Constant(EIGHT, [bound] * 8) for bound in (-32768.0, 32767.0))
    values = builder.select(builder.fcmp_ordered(">", values, low), values, low)
    is_less = builder.fcmp_ordered("<", values, high)
    whole = builder.and_(builder.fptosi(builder.select(is_less, values, high), EIGHT_INTS), _eight(0xFFFF))
    rows = ir.IntType(8)(2**ROWS - 1)
    is_more = builder.icmp_unsigned("!=", builder.and_(builder.bitcast(is_less, ir.IntType(8)), rows), rows)
    words = builder.insert_element(builder.mul(whole, _eight(BOTH)), builder.zext(is_more, INT), INT(7))
    builder.store(words, builder.bitcast(out, EIGHT_INTS.as_pointer()), align=4)
    ratio = builder.fmul(builder.fmul(panel.figure(0), block.inverse), ir.Constant(FLOAT, UNIT * 65536))
    most = ir.Constant(FLOAT, 32767.0)
    ratio = builder.fptosi(builder.select(builder.fcmp_ordered("<", ratio, most), ratio, most), INT)
    norms = _upper(builder, panel.norms(), _splat(builder, builder.mul(ratio, INT(BOTH)), SUMS))
    at = builder.bitcast(builder.gep(out, [WORD(8)]), SUMS.as_pointer())
    builder.store(builder.sub(norms, panel.doubts(block)), at, align=4)


def _eight(value: int) -> Any:
    """Return eight times an integer."""
    return ir.Constant(EIGHT_INTS, [value] * 8)


def _is_within(builder: Any, sums: list[Any], terms: Any) -> Any:
    """Return whether one of a panel's patches may be within its row's limit; see _set_terms."""
    norms = builder.load(builder.bitcast(builder.gep(terms, [WORD(8)]), SUMS.as_pointer()), align=4)
    kind, above = ir.FunctionType(SUMS, [SUMS, SUMS]), []
    saturating = cgutils.get_or_insert_function(builder.module, kind, f"llvm.sadd.sat.v{WIDTH}i16")
    for row, total in enumerate(sums):
        own = _splat(builder, builder.load(builder.gep(terms, [WORD(row)]), align=4), SUMS)
        above.append(builder.icmp_signed(">", norms, builder.call(saturating, [total, own])))
    lanes, always = ir.IntType(WIDTH), builder.load(builder.gep(terms, [WORD(7)]), align=4)
    some = builder.icmp_unsigned("!=", builder.bitcast(reduce(builder.and_, above), lanes), lanes(-1))
    return builder.or_(some, builder.icmp_unsigned("!=", always, INT(0)))


def _store(builder: Any, block: _Block, panel: _Panel, sums: list[Any], out: Any, minima: list[Any]) -> None:
    """Write a panel's values to out, an address and the length of a row; take them into minima, if there are some."""
    address, stride = out
    scale = repeat(builder, builder.fmul(block.step, panel.figure(0)))
    halves, doubts, wide = panel.halves(), panel.doubts(block), ir.VectorType(INT, WIDTH)
    for row, total in enumerate(sums):
        products = builder.add(*(builder.sext(part, wide) for part in (total, doubts)))
        values = builder.fsub(halves, builder.fmul(builder.sitofp(products, FLOATS), scale))
        at = builder.gep(address, [builder.add(builder.mul(WORD(row), stride), panel.first)])
        builder.store(values, builder.bitcast(at, FLOATS.as_pointer()), align=4)
        if minima:
            before = builder.load(minima[row])
            builder.store(builder.select(builder.fcmp_ordered("<", values, before), values, before), minima[row])


def _multiply(builder: Any, args: Any, marks: bool) -> None:
    """Generate the products of one block of the query with all panels; see `_multiplier`."""
    addresses, _, words, stride, n = args
    query, cells, out, *others = (
        builder.inttoptr(address, FLOAT.as_pointer()) for address in cgutils.unpack_tuple(builder, addresses)
    )
    block, minima = _Block(builder, query, words), list[Any]()
    terms = builder.bitcast(cgutils.alloca_once(builder, INT, size=WORD(TERMS * MOST)), INT.as_pointer())

    def terms_of(panel: _Panel) -> Any:
        return builder.gep(terms, [builder.mul(panel.number, WORD(TERMS))])

    if marks:
        given = builder.load(builder.bitcast(others[0], EIGHT.as_pointer()), align=4)
        given = builder.fmul(given, repeat(builder, block.inverse, 8))
        with cgutils.for_range_slice(builder, WORD(0), n, WORD(WIDTH), inc=True) as (i, _):
            panel = _Panel(builder, cells, i, words)
            _set_terms(builder, block, panel, given, terms_of(panel))
    else:
        infinite = ir.Constant(FLOATS, [float("inf")] * WIDTH)
        minima = [cgutils.alloca_once_value(builder, infinite) for _ in range(ROWS)]
    sums = [[cgutils.alloca_once(builder, SUMS) for _ in range(ROWS)] for _ in range(TOGETHER)]
    last = builder.sub(n, WORD(WIDTH))
    with cgutils.for_range_slice(builder, WORD(0), n, WORD(TOGETHER * WIDTH), inc=True) as (i, _):
        firsts = [i]
        for at in range(1, TOGETHER):  # of an odd number, the last is multiplied twice
            after = builder.add(i, WORD(at * WIDTH))
            firsts.append(builder.select(builder.icmp_signed("<", after, last), after, last))
        panels = [_Panel(builder, cells, first, words) for first in firsts]
        for each in sums:
            for begin, one in zip(block.begins, each, strict=True):
                builder.store(begin, one)
        with cgutils.for_range(builder, words) as loop:
            for half in range(2):
                theirs = [panel.units(loop.index, half) for panel in panels]
                first = builder.mul(builder.add(builder.shl(loop.index, WORD(1)), WORD(half)), WORD(ROWS))
                for row in range(ROWS):
                    word = builder.load(builder.gep(query, [builder.add(first, WORD(row))]), align=4)
                    mine = _splat(builder, builder.bitcast(word, INT), UNITS)
                    for units, each in zip(theirs, sums, strict=True):
                        builder.store(_add_bytes(builder, builder.load(each[row]), mine, units), each[row])
        for panel, each in zip(panels, sums, strict=True):
            totals = [builder.load(one) for one in each]
            if not marks:
                _store(builder, block, panel, totals, (out, stride), minima)
                continue
            some = _is_within(builder, totals, terms_of(panel))
            hit = builder.bitcast(builder.gep(others[1], [builder.shl(panel.number, WORD(1))]), WORD.as_pointer())
            builder.store(builder.zext(some, WORD), hit, align=8)
            with builder.if_then(some, likely=False):
                _store(builder, block, panel, totals, (out, stride), [])
    for row, low in enumerate(minima):
        at = builder.gep(others[0], [WORD(row * WIDTH)])
        builder.store(builder.load(low), builder.bitcast(at, FLOATS.as_pointer()), align=4)


def _multiplier(marks: bool) -> Any:
    """Return `multiply`, which does as those of simd; what takes minima, or marks panels."""

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply(context: Any, addresses: Any, terms: Any, words: Any, stride: Any, n: Any) -> Any:
        """Multiply one block of the query with all panels.

        Args:
            context: the compiler's.
            addresses: those of query (2 * words + BYTE_TERMS, ROWS), see pack_query_bytes, cells (panels, words +
                BYTE_ROWS, WIDTH), see pack_bytes, and the others as for simd.multiply. For marks, of eight
                limits, of which ROWS count; a panel that is marked may have no value within them, and of the others
                nothing is written to out.
            terms: ignored.
            words: of a patch, at least 1.
            stride: length of a row of out.
            n: how many cells count, a multiple of WIDTH.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if HAS_BYTES:
                _multiply(builder, args, marks)
            return context.get_dummy_value()

        return types.void(addresses, terms, words, stride, n), generate

    return multiply


multiply_bytes, multiply_bytes_within = _multiplier(False), _multiplier(True)
