"""The innermost loops of the search by bounds, in explicit vectors: products of a few query patches with many others.

A product of matrices would be written to memory and read again for its least value. Here both are done at once, with
the accumulators in registers. Pairs of 16-bit integers are multiplied and added in one instruction, so that these
products take three fifths of the time of float32. Where a processor does so with four of 8 bits, it takes half of that.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

# Products of float32, int16, bfloat16 by tile registers, and int8 with sums of int32 and of int16.
SINGLE, PAIRS, TILES, QUADS, BYTES = range(5)
ROWS = 6  # query patches multiplied at a time
# Patches multiplied at a time: with ROWS accumulators of that length, 12 registers of AVX-512 or of AVX2.
WIDTH = 32 if binding.get_host_cpu_features().get("avx512f") else 16
HAS_QUADS = WIDTH == 32 and bool(binding.get_host_cpu_features().get("avx512vnni"))
if HAS_QUADS:
    binding.initialize_native_asmparser()  # for their instruction, of which LLVM has changed the name
QUAD_TERMS = 4  # words of a query patch after its QUADS, see panels.pack_query_quads
QUAD_ROWS = 2  # and rows of a panel: each patch's step, and half its squared norm
LOOK = 64  # values that are compared with a limit at a time
CHANNELS = 128  # of a part: WIDTH patches of them stay in a core's nearest cache
STEP = 8  # channels of which differences are summed at a time

FLOAT, INT, WORD, SHORT = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(16)
FLOATS, INTS = ir.VectorType(FLOAT, WIDTH), ir.VectorType(INT, WIDTH)
SHORTS, WIDE = ir.VectorType(SHORT, 2 * WIDTH), ir.VectorType(INT, 2 * WIDTH)


def _load(builder: Any, base: Any, offset: Any) -> Any:
    """Load WIDTH floats."""
    return builder.load(builder.bitcast(builder.gep(base, [offset]), FLOATS.as_pointer()), align=4)


def repeat(builder: Any, value: Any, lanes: int = WIDTH) -> Any:
    """Repeat one float, or integer."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, value, INT(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(INT, lanes), [0] * lanes))


def _subtract(builder: Any, total: Any, mine: Any, theirs: Any) -> Any:
    """Return total - mine * theirs, floats."""
    return builder.fsub(total, builder.fmul(mine, theirs, flags=("contract",)), flags=("contract",))


def _add_pairs(builder: Any, total: Any, mine: Any, theirs: Any) -> Any:
    """Return total + the sums of the products of neighbouring integers; LLVM finds the instruction that does it."""
    wide = (builder.sext(builder.bitcast(side, SHORTS), WIDE) for side in (mine, theirs))
    products = builder.mul(*wide, flags=("nsw",))
    undefined = ir.Constant(WIDE, ir.Undefined)
    even, odd = (
        builder.shuffle_vector(products, undefined, ir.Constant(INTS, list(range(side, 2 * WIDTH, 2))))
        for side in (0, 1)
    )
    return builder.add(total, builder.add(even, odd))


def _add_quads(builder: Any, total: Any, mine: Any, theirs: Any) -> Any:
    """Return total + the sums of the products of four neighbouring integers, theirs without a sign."""
    lanes = WIDTH // 2
    kind = ir.VectorType(INT, lanes)
    sides = [builder.bitcast(side, INTS) for side in (total, theirs, mine)]
    undefined, halves = ir.Constant(INTS, ir.Undefined), []
    for start in (0, lanes):
        some = ir.Constant(kind, list(range(start, start + lanes)))
        args = [builder.shuffle_vector(side, undefined, some) for side in sides]
        halves.append(
            builder.asm(ir.FunctionType(kind, [kind] * 3), "vpdpbusd $3, $2, $0", "=v,0,v,v", args, side_effect=False)
        )
    return builder.shuffle_vector(*halves, ir.Constant(INTS, list(range(WIDTH))))


def _multiply(builder: Any, args: Any, kind: int, marks: bool) -> None:
    """Generate the products of one block of the query with all panels; see `_multiplier`."""
    addresses, terms, words, stride, n = args
    query, cells, out, *others = (
        builder.inttoptr(address, FLOAT.as_pointer()) for address in cgutils.unpack_tuple(builder, addresses)
    )
    scale, longest, roughest = cgutils.unpack_tuple(builder, terms)
    after = builder.mul(words, WORD(ROWS))

    def term(number: int, row: int) -> Any:
        return builder.load(builder.gep(query, [builder.add(after, WORD(number * ROWS + row))]))

    if kind == QUADS:
        scales = [repeat(builder, term(1, row)) for row in range(ROWS)]
        begins = []
        for row in range(ROWS):
            doubt = builder.fadd(builder.fmul(term(2, row), longest), builder.fmul(term(3, row), roughest))
            begin = builder.add(builder.bitcast(term(0, row), INT), builder.add(builder.fptosi(doubt, INT), INT(1)))
            begins.append(builder.bitcast(repeat(builder, builder.bitcast(begin, FLOAT)), INTS))
    else:
        scales = [repeat(builder, scale)] * ROWS
        begins = [ir.Constant(INTS, [0] * WIDTH)] * ROWS
    add = {SINGLE: _subtract, PAIRS: _add_pairs, QUADS: _add_quads}[kind]
    last = WORD(QUAD_ROWS - 1 if kind == QUADS else 0)
    infinite, limits, minima = ir.Constant(FLOATS, [float("inf")] * WIDTH), [], []
    if marks:
        limits = [repeat(builder, builder.load(builder.gep(others[0], [WORD(row)]))) for row in range(ROWS)]
    else:
        minima = [cgutils.alloca_once_value(builder, infinite) for _ in range(ROWS)]
    sums = [cgutils.alloca_once(builder, FLOATS if kind == SINGLE else INTS) for _ in range(ROWS)]
    size = builder.mul(builder.add(builder.add(words, last), WORD(1)), WORD(WIDTH))
    with cgutils.for_range_slice(builder, WORD(0), n, WORD(WIDTH), inc=True) as (i, _):
        panel = builder.udiv(i, WORD(WIDTH))
        here = builder.gep(cells, [builder.mul(panel, size)])
        start = _load(builder, here, builder.mul(builder.add(words, last), WORD(WIDTH)))
        for begin, each in zip(begins, sums, strict=True):
            builder.store(start if kind == SINGLE else begin, each)
        with cgutils.for_range(builder, words) as loop:
            theirs = _load(builder, here, builder.mul(loop.index, WORD(WIDTH)))
            first = builder.mul(loop.index, WORD(ROWS))
            for row, each in enumerate(sums):
                mine = repeat(builder, builder.load(builder.gep(query, [builder.add(first, WORD(row))])))
                builder.store(add(builder, builder.load(each), mine, theirs), each)
        totals = [builder.load(each) for each in sums]
        if kind != SINGLE:
            totals = [builder.sitofp(total, FLOATS) for total in totals]
            if kind == QUADS:
                steps = _load(builder, here, builder.mul(words, WORD(WIDTH)))
                totals = [builder.fmul(total, steps) for total in totals]
            totals = [_subtract(builder, start, *pair) for pair in zip(scales, totals, strict=True)]
        for row, total in enumerate(totals):
            at = builder.gep(out, [builder.add(builder.mul(WORD(row), stride), i)])
            builder.store(total, builder.bitcast(at, FLOATS.as_pointer()), align=4)
        if marks:
            above = [builder.fcmp_unordered(">", *pair) for pair in zip(totals, limits, strict=True)]
            bits = builder.bitcast(reduce(builder.and_, above), ir.IntType(WIDTH))
            some = builder.icmp_unsigned("!=", bits, ir.IntType(WIDTH)(-1))
            place = builder.bitcast(builder.gep(others[1], [builder.shl(panel, WORD(1))]), WORD.as_pointer())
            builder.store(builder.zext(some, WORD), place, align=8)
        for total, low in zip(totals if minima else [], minima, strict=True):
            before = builder.load(low)
            builder.store(builder.select(builder.fcmp_ordered("<", total, before), total, before), low)
    for row, low in enumerate(minima):
        at = builder.gep(others[0], [WORD(row * WIDTH)])
        builder.store(builder.load(low), builder.bitcast(at, FLOATS.as_pointer()), align=4)


def _multiplier(kind: int, marks: bool) -> Any:
    """Return `multiply`, which sets out[r, i] = cells[words, i] - sum over words of query[word, r] * cells[word, i].

    It takes minima, or marks where values are within limits. PAIRS: with two int16 in each word of query and cells,
    but for the last of cells, and the sum scaled. QUADS: with four int8, see panels.pack_quads. No sum may leave
    int32, and they are exact before they are scaled.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply(context: Any, addresses: Any, terms: Any, words: Any, stride: Any, n: Any) -> Any:
        """Multiply one block of the query with all panels.

        Args:
            context: the compiler's.
            addresses: those of query (words, ROWS) float32, cells (panels, words + 1, WIDTH) float32, and out (ROWS,
                stride) float32. For minima: of least (ROWS, WIDTH) float32, set to the least of every WIDTH-th value of
                out. For marks: of limits (ROWS,) float32; and hits (panels,) uint64: 0 where no value of a panel is at
                most its row's limit.
            terms: float32: what sums of PAIRS are scaled by; for QUADS, see panels.pack_quads, the largest
                length of a patch, and of what rounding takes from one, in its steps.
            words: of a patch, at least 1.
            stride: length of a row of out.
            n: how many cells count, a multiple of WIDTH.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if kind != QUADS or HAS_QUADS:
                _multiply(builder, args, kind, marks)
            return context.get_dummy_value()

        return types.void(addresses, terms, words, stride, n), generate

    return multiply


multiply, multiply_pairs, multiply_quads = (_multiplier(kind, False) for kind in (SINGLE, PAIRS, QUADS))
multiply_within, multiply_pairs_within, multiply_quads_within = (
    _multiplier(kind, True) for kind in (SINGLE, PAIRS, QUADS)
)


@intrinsic  # type: ignore[untyped-decorator]
def project(context: Any, addresses: Any, channels: Any) -> Any:
    """Add to sums[r, i] the sum over channels of directions[channel, r] * patches[channel, i].

    Args:
        context: the compiler's.
        addresses: those of directions (channels, ROWS), patches (channels, WIDTH) and sums (ROWS, WIDTH), float32.
        channels: how many.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        directions, patches, out = (
            builder.inttoptr(builder.extract_value(args[0], number), FLOAT.as_pointer()) for number in range(3)
        )
        places = [builder.bitcast(builder.gep(out, [WORD(row * WIDTH)]), FLOATS.as_pointer()) for row in range(ROWS)]
        sums = [cgutils.alloca_once_value(builder, builder.load(place, align=4)) for place in places]
        with cgutils.for_range(builder, args[1]) as loop:
            theirs = _load(builder, patches, builder.mul(loop.index, WORD(WIDTH)))
            first = builder.mul(loop.index, WORD(ROWS))
            for row, each in enumerate(sums):
                mine = repeat(builder, builder.load(builder.gep(directions, [builder.add(first, WORD(row))])))
                product = builder.fmul(mine, theirs, flags=("contract",))
                builder.store(builder.fadd(builder.load(each), product, flags=("contract",)), each)
        for place, each in zip(places, sums, strict=True):
            builder.store(builder.load(each), place, align=4)
        return context.get_dummy_value()

    return types.void(addresses, channels), generate


@intrinsic  # type: ignore[untyped-decorator]
def at_most(context: Any, address: Any, limit: Any) -> Any:
    """Return which of LOOK float32 values at an address are at most a float32 limit, as the bits of a uint64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, limits = builder.inttoptr(args[0], FLOAT.as_pointer()), repeat(builder, args[1])
        result = WORD(0)
        for start in range(0, LOOK, WIDTH):
            passed = builder.fcmp_ordered("<=", _load(builder, values, WORD(start)), limits)
            bits = builder.zext(builder.bitcast(passed, ir.IntType(WIDTH)), WORD)
            result = builder.or_(result, builder.shl(bits, WORD(start)))
        return result

    return types.uint64(types.int64, types.float32), generate


def rows_finder(rows: int) -> Any:
    """Return what tells which of so many rows have a value within their limits."""

    @intrinsic  # type: ignore[untyped-decorator]
    def rows_within(context: Any, values: Any, stride: Any, limits: Any) -> Any:
        """Return which rows have one, as bits of a uint64.

        Args:
            context: the compiler's.
            values: address of the rows' first WIDTH values.
            stride: between rows.
            limits: address of (rows,) float32.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            first, limits = (builder.inttoptr(args[at], FLOAT.as_pointer()) for at in (0, 2))
            found, lanes = WORD(0), ir.IntType(WIDTH)
            for r in range(rows):
                limit = repeat(builder, builder.load(builder.gep(limits, [WORD(r)]), align=4))
                passed = builder.fcmp_ordered("<=", _load(builder, first, builder.mul(args[1], WORD(r))), limit)
                is_in = builder.icmp_unsigned("!=", builder.bitcast(passed, lanes), lanes(0))
                found = builder.or_(found, builder.shl(builder.zext(is_in, WORD), WORD(r)))
            return found

        return types.uint64(types.int64, types.int64, types.int64), generate

    return rows_within


rows_within = rows_finder(ROWS)


@intrinsic  # type: ignore[untyped-decorator]
def lowest(context: Any, bits: Any) -> Any:
    """Return the number of the lowest bit of a uint64 that is set; one is."""
    return types.int64(types.uint64), lambda context, builder, signature, args: builder.cttz(args[0], ir.IntType(1)(1))


@intrinsic  # type: ignore[untyped-decorator]
def highest(context: Any, bits: Any) -> Any:
    """Return the number of the highest bit of a uint64 that is set; one is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sub(WORD(63), builder.ctlz(args[0], ir.IntType(1)(1)))

    return types.int64(types.uint64), generate


def _reader(kind: Any, stored: Any) -> Any:
    """Return what reads a value of a kind, stored as such, at an address."""

    @intrinsic  # type: ignore[untyped-decorator]
    def value_at(context: Any, address: Any) -> Any:
        """Return the value at an address."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(builder.inttoptr(args[0], stored.as_pointer()), align=4)

        return kind(types.int64), generate

    return value_at


float_at, int_at = _reader(types.float32, FLOAT), _reader(types.int64, WORD)


@intrinsic  # type: ignore[untyped-decorator]
def sq_difference(context: Any, mine: Any, theirs: Any, channels: Any) -> Any:
    """Return the sum of squared differences of two float32 patches at addresses, in float32 and any order."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _differences(builder, args, ir.FloatType(), 4)  # one sum would wait for each addition

    return types.float32(types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def sq_distance(context: Any, mine: Any, theirs: Any, channels: Any) -> Any:
    """Return the sum of squared differences of two float32 patches at addresses, in float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _differences(builder, args, ir.DoubleType(), 1)

    return types.float64(types.int64, types.int64, types.int64), generate


def _differences(builder: Any, args: Any, kind: Any, together: int) -> Any:
    """Sum squared differences in so many vectors of STEP at a time, and what is left one by one."""
    mine, theirs = (builder.inttoptr(address, FLOAT.as_pointer()) for address in args[:2])
    wide, vector = kind == ir.DoubleType(), ir.VectorType(kind, STEP)

    def squared(at: Any, of: Any) -> Any:
        sides = []
        for base in (mine, theirs):
            here = builder.gep(base, [at])
            if isinstance(of, ir.VectorType):
                here = builder.bitcast(here, ir.VectorType(FLOAT, STEP).as_pointer())
            value = builder.load(here, align=4)
            sides.append(builder.fpext(value, of) if wide else value)
        difference = builder.fsub(*sides)
        return builder.fmul(difference, difference, flags=("contract",))

    step = together * STEP
    most, whole = (builder.and_(args[2], WORD(-size)) for size in (step, STEP))
    sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * STEP)) for _ in range(together)]
    for start, end, some in ((WORD(0), most, sums), (most, whole, sums[:1])):
        with cgutils.for_range_slice(builder, start, end, WORD(len(some) * STEP), inc=True) as (at, _):
            for number, each in enumerate(some):
                part = squared(builder.add(at, WORD(number * STEP)), vector)
                builder.store(builder.fadd(builder.load(each), part, flags=("contract",)), each)
    loaded = [builder.load(each) for each in sums]
    while len(loaded) > 1:
        loaded = [builder.fadd(*pair) for pair in zip(loaded[::2], loaded[1::2], strict=True)]
    parts, half = loaded[0], STEP
    while half > 1:
        half //= 2
        undefined = ir.Constant(parts.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(parts, undefined, ir.Constant(ir.VectorType(INT, half), list(range(at, at + half))))
            for at in (0, half)
        )
        parts = builder.fadd(low, high)
    total = cgutils.alloca_once_value(builder, builder.extract_element(parts, INT(0)))
    with cgutils.for_range_slice(builder, whole, args[2], WORD(1), inc=True) as (at, _):
        builder.store(builder.fadd(builder.load(total), squared(at, kind), flags=("contract",)), total)
    return builder.load(total)
