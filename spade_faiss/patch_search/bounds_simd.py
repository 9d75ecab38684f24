"""The innermost loop of the search by bounds, in explicit vectors: products of a few query patches with many others.

A product of matrices would be written to memory and read again for its least value. Here both are done at once, with
the accumulators in registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

ROWS = 6  # query patches multiplied at a time
# Patches multiplied at a time: with ROWS accumulators of that length, 12 registers of AVX-512 or of AVX2.
WIDTH = 32 if binding.get_host_cpu_features().get("avx512f") else 16
LOOK = 64  # values that are compared with a limit at a time

FLOAT, WORD = ir.FloatType(), ir.IntType(64)
FLOATS = ir.VectorType(FLOAT, WIDTH)


def _load(builder: Any, base: Any, offset: Any) -> Any:
    """Load WIDTH floats."""
    return builder.load(builder.bitcast(builder.gep(base, [offset]), FLOATS.as_pointer()), align=4)


def _repeat(builder: Any, value: Any) -> Any:
    """Repeat one float."""
    undefined = ir.Constant(FLOATS, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH))


@intrinsic  # type: ignore[untyped-decorator]
def multiply(context: Any, addresses: Any, channels: Any, stride: Any, n: Any) -> Any:
    """Set out[r, i] = cells[channels, i] - sum over channels of query[channel, r] * cells[channel, i]; take minima.

    Args:
        context: the compiler's.
        addresses: those of query (channels, ROWS) float32, cells (channels + 1, stride) float32, out (ROWS, stride)
            float32, and least (ROWS, WIDTH) float32, set to the least of every WIDTH-th value of out.
        channels: number of channels, at least 1.
        stride: length of a row of cells and of out.
        n: how many of them count, a multiple of WIDTH.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        addresses, channels, stride, n = args
        query, cells, out, least = (
            builder.inttoptr(builder.extract_value(addresses, number), FLOAT.as_pointer()) for number in range(4)
        )
        infinite = ir.Constant(FLOATS, [float("inf")] * WIDTH)
        minima = [cgutils.alloca_once_value(builder, infinite) for _ in range(ROWS)]
        sums = [cgutils.alloca_once(builder, FLOATS) for _ in range(ROWS)]
        panel = builder.mul(builder.add(channels, WORD(1)), WORD(WIDTH))
        with cgutils.for_range_slice(builder, WORD(0), n, WORD(WIDTH), inc=True) as (i, _):
            here = builder.gep(cells, [builder.mul(builder.udiv(i, WORD(WIDTH)), panel)])
            start = _load(builder, here, builder.mul(channels, WORD(WIDTH)))
            for each in sums:
                builder.store(start, each)
            with cgutils.for_range(builder, channels) as loop:
                theirs = _load(builder, here, builder.mul(loop.index, WORD(WIDTH)))
                first = builder.mul(loop.index, WORD(ROWS))
                for row, each in enumerate(sums):
                    mine = _repeat(builder, builder.load(builder.gep(query, [builder.add(first, WORD(row))])))
                    part = builder.fmul(mine, theirs, flags=("contract",))
                    builder.store(builder.fsub(builder.load(each), part, flags=("contract",)), each)
            for row, (each, low) in enumerate(zip(sums, minima, strict=True)):
                total, before = builder.load(each), builder.load(low)
                at = builder.gep(out, [builder.add(builder.mul(WORD(row), stride), i)])
                builder.store(total, builder.bitcast(at, FLOATS.as_pointer()), align=4)
                builder.store(builder.select(builder.fcmp_ordered("<", total, before), total, before), low)
        for row, low in enumerate(minima):
            at = builder.gep(least, [WORD(row * WIDTH)])
            builder.store(builder.load(low), builder.bitcast(at, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(addresses, channels, stride, n), generate


@intrinsic  # type: ignore[untyped-decorator]
def some_at_most(context: Any, address: Any, limit: Any) -> Any:
    """Return whether one of LOOK float32 values at an address is at most a float32 limit."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = builder.inttoptr(args[0], FLOAT.as_pointer())
        low = _load(builder, values, WORD(0))
        for start in range(WIDTH, LOOK, WIDTH):
            part = _load(builder, values, WORD(start))
            low = builder.select(builder.fcmp_ordered("<", part, low), part, low)
        limits = _repeat(builder, args[1])
        bits = builder.bitcast(builder.fcmp_ordered("<=", low, limits), ir.IntType(WIDTH))
        return builder.icmp_unsigned("!=", bits, ir.IntType(WIDTH)(0))

    return types.boolean(types.int64, types.float32), generate
