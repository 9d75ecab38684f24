"""The innermost loops of the window engine, in explicit vectors.

The compiler's own vectors are half as long where a processor has those of 512 bits, and it multiplies and adds apart.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from numba.core import cgutils, types
from numba.extending import intrinsic

from ..bounds.loading import load_values
from ..compiled import FLOAT, FLOATS, VECTOR, WORD

CHANNELS = 4  # taken at a time: sums are loaded and stored once for all of them


def _load(builder: Any, base: Any, offset: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(base, [offset]), FLOATS.as_pointer()), align=4)


def _store(builder: Any, value: Any, base: Any, offset: Any) -> None:
    builder.store(value, builder.bitcast(builder.gep(base, [offset]), FLOATS.as_pointer()), align=4)


def _add_squares(offsets: int, context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Compile what the intrinsics below do for so many offsets."""
    query, level, sums = (builder.inttoptr(each, FLOAT.as_pointer()) for each in args[:3])
    own_stride, other_stride, sums_stride, n = args[3:]
    with cgutils.for_range_slice(builder, WORD(0), n, WORD(VECTOR), inc=True) as (i, _):
        own = [
            _load(builder, query, builder.add(i, builder.mul(own_stride, WORD(channel)))) for channel in range(CHANNELS)
        ]
        for offset in range(offsets):
            total = None
            for channel, mine in enumerate(own):
                at = builder.add(i, builder.add(WORD(offset), builder.mul(other_stride, WORD(channel))))
                difference = builder.fsub(mine, _load(builder, level, at))
                square = builder.fmul(difference, difference, flags=("contract",))
                total = square if total is None else builder.fadd(total, square, flags=("contract",))
            at = builder.add(i, builder.mul(sums_stride, WORD(offset)))
            _store(builder, builder.fadd(_load(builder, sums, at), total), sums, at)
    return context.get_dummy_value()


_KINDS = [types.int64] * 7


@intrinsic  # type: ignore[untyped-decorator]
def add_squares_1(
    context: Any, query: Any, level: Any, sums: Any, own_stride: Any, other_stride: Any, sums_stride: Any, n: Any
) -> Any:
    """Add to n sums the squares of the differences of CHANNELS channels.

    Args:
        context: the compiler's.
        query: address of the first channel's first value.
        level: likewise.
        sums: address of the first.
        own_stride: values from a channel of the query to the next.
        other_stride: likewise of the level.
        sums_stride: values from the sums of an offset to those of the next.
        n: a multiple of VECTOR.
    """
    return types.void(*_KINDS), partial(_add_squares, 1)


@intrinsic  # type: ignore[untyped-decorator]
def add_squares_3(
    context: Any, query: Any, level: Any, sums: Any, own_stride: Any, other_stride: Any, sums_stride: Any, n: Any
) -> Any:
    """Do as add_squares_1 for three offsets: the level's first value, and the two that follow."""
    return types.void(*_KINDS), partial(_add_squares, 3)


@intrinsic  # type: ignore[untyped-decorator]
def widen(context: Any, kind: Any, source: Any, offset: Any, target: Any, n: Any) -> Any:
    """Set n float32 at an address to values of an array like `kind`, see bounds.loading.value_of.

    Args:
        context: the compiler's.
        kind: an array of their dtype: float32, or uint16, the bits of float16.
        source: its address.
        offset: the first value.
        target: the address of the first float32.
        n: a multiple of VECTOR.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, source, offset, target, n = args
        out = builder.inttoptr(target, FLOAT.as_pointer())
        with cgutils.for_range_slice(builder, WORD(0), n, WORD(VECTOR), inc=True) as (i, _):
            _store(builder, load_values(builder, kind, source, builder.add(offset, i), VECTOR), out, i)
        return context.get_dummy_value()

    return types.void(kind, *_KINDS[:4]), generate
