"""The innermost loop of the pyramid engine, in explicit vectors.

LLVM's vectoriser turns the same loop, written in Python, into code that takes over three times as long: it chooses
narrower vectors, and loads twice what two gallery patches share. Vectors of VECTOR floats are legal on every machine:
LLVM splits them where the registers are narrower.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..compiled import BITS, FLOAT, FLOATS, HALF, INT, INTS, VECTOR, WORD

PAIR = 2  # gallery patches compared at a time; they share what is loaded from the coarser levels
TAPS = 3  # columns of a coarser level under such a pair: upsampling never skips one


def _load_floats(builder: Any, base: Any, offset: Any, kind: Any) -> Any:
    """Load VECTOR float32, or the bits of as many bfloat16, which are the upper half of a float32's."""
    address = builder.bitcast(builder.gep(base, [offset]), ir.VectorType(kind, VECTOR).as_pointer())
    values = builder.load(address, align=2 if kind is HALF else 4)
    if kind is not HALF:
        return values
    return builder.bitcast(builder.shl(builder.zext(values, INTS), ir.Constant(INTS, [16] * VECTOR)), FLOATS)


def _splat(builder: Any, base: Any, number: int) -> Any:
    """Load one float and repeat it."""
    return _spread(builder, builder.load(builder.gep(base, [WORD(number)])))


def _spread(builder: Any, value: Any) -> Any:
    """Repeat one float."""
    undefined = ir.Constant(FLOATS, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(undefined, value, INT(0)), undefined, ir.Constant(INTS, [0] * VECTOR)
    )


@intrinsic  # type: ignore[untyped-decorator]
def compare_pair(context: Any, kind: Any, grids: Any, stride: Any, addresses: Any, n: Any) -> Any:
    """Complete the inner products of n query patches with two gallery patches; return whether one passes its bound.

    For member g of the pair: out[g, i] = products[g, i] + sum over the taps t of weights[g, t] * coarse[taps[t] + i].
    The result is true if out[g, i] + bounds[i] >= limits[g] for any g and i.

    Args:
        context: the compiler's.
        kind: an array of the dtype of products: float32, or uint16, the bits of a bfloat16.
        grids: a tuple with one entry per coarser level; its length is fixed when this is compiled.
        stride: number of values from products of the pair's first member to those of its second.
        addresses: those of products (2, n), coarse float32, taps (levels * TAPS,) int64, weights (2, levels * TAPS)
            float32, bounds (n,) float32, limits (2,) float32, out (2, n) float32.
        n: number of query patches, a multiple of VECTOR.
    """
    narrow, steps = kind.dtype == types.uint16, range(len(grids) * TAPS)
    kinds = [HALF if narrow else FLOAT, FLOAT, WORD, FLOAT, FLOAT, FLOAT, FLOAT]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, stride, addresses, n = args
        pointers = [
            builder.inttoptr(builder.extract_value(addresses, number), each.as_pointer())
            for number, each in enumerate(kinds)
        ]
        products, coarse, taps, weights, bounds, limits, out = pointers
        starts = [builder.load(builder.gep(taps, [WORD(step)])) for step in steps]
        shares = [[_splat(builder, weights, g * len(steps) + step) for step in steps] for g in range(PAIR)]
        least = [_splat(builder, limits, g) for g in range(PAIR)]
        found = cgutils.alloca_once_value(builder, ir.Constant(BITS, [0] * VECTOR))
        with cgutils.for_range_slice(builder, WORD(0), n, WORD(VECTOR), inc=True) as (i, _):
            loaded = [_load_floats(builder, coarse, builder.add(start, i), FLOAT) for start in starts]
            bound = _load_floats(builder, bounds, i, FLOAT)
            for g in range(PAIR):
                at = builder.add(builder.mul(WORD(g), stride), i)
                total = _load_floats(builder, products, at, kinds[0])
                for share, values in zip(shares[g], loaded, strict=True):
                    part = builder.fmul(share, values, flags=("contract",))
                    total = builder.fadd(total, part, flags=("contract",))
                row = builder.gep(out, [builder.add(builder.mul(WORD(g), n), i)])
                builder.store(total, builder.bitcast(row, FLOATS.as_pointer()), align=4)
                passed = builder.fcmp_ordered(">=", builder.fadd(total, bound), least[g])
                builder.store(builder.or_(builder.load(found), passed), found)
        return builder.icmp_unsigned("!=", builder.bitcast(builder.load(found), HALF), HALF(0))

    return types.boolean(kind, grids, stride, addresses, n), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def blend(context: Any, narrow: Any, addresses: Any, n: Any, weight: Any, other: Any) -> Any:
    """Set out[i] = weight * first[i] + other * second[i] for n values.

    Args:
        context: the compiler's.
        narrow: a literal: first and second are the bits of bfloat16, not float32.
        addresses: those of out float32, first, second.
        n: a multiple of VECTOR.
        weight: weight of first.
        other: weight of second.
    """
    kind = HALF if narrow.literal_value else FLOAT

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, *sources = (
            builder.inttoptr(builder.extract_value(args[1], number), each.as_pointer())
            for number, each in enumerate((FLOAT, kind, kind))
        )
        weights = [_spread(builder, value) for value in args[3:]]
        with cgutils.for_range_slice(builder, WORD(0), args[2], WORD(VECTOR), inc=True) as (i, _):
            parts = [
                builder.fmul(weight, _load_floats(builder, source, i, kind), flags=("contract",))
                for weight, source in zip(weights, sources, strict=True)
            ]
            target = builder.bitcast(builder.gep(out, [i]), FLOATS.as_pointer())
            builder.store(builder.fadd(*parts, flags=("contract",)), target, align=4)
        return context.get_dummy_value()

    return types.void(narrow, addresses, n, types.float32, types.float32), generate
