"""Patches of a neighbour in an order in which those side by side are alike, and a box around those of each panel.

Of many panels, few hold any patch that can be near: none is nearer than the panel's box is, along the AXES that patches
differ most along. Patches are halved where one coordinate is in the middle, the halves likewise, until they fill a
panel: the leaves of a k-d tree (Bentley 1975). What rounding can do to a box is counted in `within.set_limits`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..compiled import jit
from .plan import Projection
from .products_tiles import lined_up
from .simd import FLOAT, INT, ROWS, TILES, WIDTH, WORD, repeat
from .sources import Floats, Ints

AXES = 4  # coordinates that patches are told apart by
TOGETHER = 8  # panels whose boxes are looked at in one go; within.FEW_NEAR at most
BOX_FLOATS = 2 * AXES * TOGETHER  # float32 of these: where boxes begin, and where they end
PANELS = 32  # of a neighbour, at least, that are worth it
SAMPLED = 16  # patches of a part, about, that tell along which axis it is halved
SPLITS = 64  # parts that wait to be halved, at most: twice as many as there are bits in a number of patches
SLACK = 2.0**-16  # relative to squared norms: what rounding can do to the distance of a box
NO_CORNERS = np.empty((0, AXES, ROWS), np.float32)
LANES, NUMBERS = ir.VectorType(FLOAT, TOGETHER), ir.VectorType(INT, TOGETHER)


@dataclass(frozen=True)
class Sorted:
    """The order of the patches of one neighbour's panels, and their boxes."""

    order: Ints  # (n,) numbers of the patches
    boxes: Floats  # (groups, 2, AXES, TOGETHER)

    @classmethod
    def of(cls, coordinates: Floats, projection: Projection, is_finite: bool) -> Sorted | None:
        """Sort patches by their coordinates (>= width, n), if they have axes and are many."""
        n = coordinates.shape[1]
        if projection.axes is None or n < PANELS * WIDTH:
            return None
        order, panels = np.arange(n), -(-n // WIDTH)
        boxes = lined_up((-(-panels // TOGETHER), 2, AXES, TOGETHER), np.inf)
        boxes[:, 1] = -np.inf  # of panels that are not there
        if is_finite:
            told_apart = along_axes(coordinates, projection)
            sort_patches(told_apart, WIDTH, order)
            set_boxes(told_apart, order, boxes)
        else:  # whatever is compared with them
            boxes[:, 0], boxes[:, 1] = -np.inf, np.inf
        return cls(order, boxes)


def with_axes(projection: Projection, directions: torch.Tensor) -> Projection:
    """Return the projection with axes, the first of principal directions (m, c), for patches to be sorted by."""
    if projection.kind == TILES or min(len(directions), projection.width - 1) < AXES:
        return projection
    return replace(projection, axes=directions[:AXES].contiguous())


def along_axes(coordinates: Floats, projection: Projection) -> Floats:
    """Return what patches with these coordinates (>= width, n) are told apart by, (AXES, n)."""
    if projection.directions is not None:  # which begin with them
        return np.ascontiguousarray(coordinates[:AXES])
    assert projection.axes is not None
    found: Floats = projection.axes.numpy() @ coordinates[: projection.channels]
    return found


@jit
def sort_patches(told_apart: Any, leaf: int, order: Any) -> None:
    """Sort the numbers of patches, so that those of each `leaf` are alike.

    Args:
        told_apart: (AXES, n) float32, finite.
        leaf: patches of a part that is not halved.
        order: (n,) int64, numbers of patches, permuted.
    """
    axes, n = told_apart.shape
    starts, ends, keys = np.empty(SPLITS, np.int64), np.empty(SPLITS, np.int64), np.empty(n, np.float32)
    starts[0], ends[0], waiting = 0, n, 1
    while waiting > 0:
        waiting -= 1
        start, end = starts[waiting], ends[waiting]
        parts = -(-(end - start) // leaf)
        if parts < 2:
            continue
        step, widest, axis = max(1, (end - start) // SAMPLED), np.float32(-1), 0
        for each in range(axes):
            low = high = told_apart[each, order[start]]
            for i in range(start, end, step):
                low, high = min(low, told_apart[each, order[i]]), max(high, told_apart[each, order[i]])
            if high - low > widest:
                widest, axis = high - low, each
        for i in range(start, end):
            keys[i] = told_apart[axis, order[i]]
        middle = start + parts // 2 * leaf
        halve(keys, order, start, end, middle)
        starts[waiting], ends[waiting] = start, middle
        starts[waiting + 1], ends[waiting + 1] = middle, end
        waiting += 2


@jit
def halve(keys: Any, order: Any, start: int, end: int, middle: int) -> None:
    """Move the patches with the least keys before the middle of a part, and their keys with them (quickselect)."""
    low, high = start, end
    while high - low > 1:
        one, other, third = keys[low], keys[(low + high) // 2], keys[high - 1]
        pivot = max(min(one, other), min(max(one, other), third))
        split = parted(keys, order, low, high, pivot, False)
        if split == low:  # the pivot is the least: those that equal it come first
            split = parted(keys, order, low, high, pivot, True)
            if middle <= split:
                return
        if middle == split:
            return
        if middle < split:
            high = split
        else:
            low = split


@jit
def parted(keys: Any, order: Any, low: int, high: int, pivot: Any, equal: bool) -> Any:
    """Move what is less than the pivot, or equals it, to the front; returns where the rest begins. Nothing branches."""
    split = low
    for i in range(low, high):
        key, number = keys[i], order[i]
        keys[i], order[i] = keys[split], order[split]
        keys[split], order[split] = key, number
        split += np.int64(key <= pivot if equal else key < pivot)
    return split


@jit
def set_boxes(coordinates: Any, order: Any, boxes: Any) -> None:
    """Set boxes (groups, 2, AXES, TOGETHER) to where panels begin and end, from infinity and its negative."""
    for i in range(len(order)):
        panel = i // WIDTH
        group, lane = panel // TOGETHER, panel % TOGETHER
        for axis in range(len(coordinates)):
            value = coordinates[axis, order[i]]
            boxes[group, 0, axis, lane] = min(boxes[group, 0, axis, lane], value)
            boxes[group, 1, axis, lane] = max(boxes[group, 1, axis, lane], value)


def corners_of(told_apart: Floats) -> Floats:
    """Return (AXES, q) of query patches by blocks, (blocks, AXES, ROWS), the last padded with the last patch."""
    q = told_apart.shape[1]
    at = np.minimum(np.arange(-(-q // ROWS) * ROWS), q - 1).reshape(-1, ROWS)
    return np.ascontiguousarray(told_apart[:, at].transpose(1, 0, 2))


def _sq_distances(builder: Any, boxes: Any, own: Any, row: int, rows: int) -> Any:
    """Return squared distances of the boxes of TOGETHER panels from one row of a block (AXES, rows)."""
    zero, total = ir.Constant(LANES, [0.0] * TOGETHER), ir.Constant(LANES, [0.0] * TOGETHER)

    def larger(one: Any, other: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", one, other), one, other)

    def corner(side: int, axis: int) -> Any:
        at = builder.gep(boxes, [WORD((side * AXES + axis) * TOGETHER)])
        return builder.load(builder.bitcast(at, LANES.as_pointer()), align=4)

    for axis in range(AXES):
        value = repeat(builder, builder.load(builder.gep(own, [WORD(axis * rows + row)]), align=4), TOGETHER)
        outside = larger(builder.fsub(corner(0, axis), value), builder.fsub(value, corner(1, axis)))
        gap = larger(outside, zero)
        total = builder.fadd(total, builder.fmul(gap, gap, flags=("contract",)), flags=("contract",))
    return total


@intrinsic  # type: ignore[untyped-decorator]
def boxes_within(context: Any, boxes: Any, own: Any, limits: Any) -> Any:
    """Return which boxes are within the limit of a row of a block, as bits of a uint64.

    Args:
        context: the compiler's.
        boxes: address of (2, AXES, TOGETHER) float32.
        own: that of (AXES, ROWS).
        limits: that of (ROWS,) squared distances; NaN: none is.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        theirs, mine, most = (builder.inttoptr(each, FLOAT.as_pointer()) for each in args)
        found = ir.Constant(ir.VectorType(ir.IntType(1), TOGETHER), [0] * TOGETHER)
        for row in range(ROWS):
            limit = repeat(builder, builder.load(builder.gep(most, [WORD(row)]), align=4), TOGETHER)
            passed = builder.fcmp_ordered("<=", _sq_distances(builder, theirs, mine, row, ROWS), limit)
            found = builder.or_(found, passed)
        return builder.zext(builder.bitcast(found, ir.IntType(TOGETHER)), WORD)

    return types.uint64(types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def nearest_box(context: Any, boxes: Any, own: Any, groups: Any, out: Any) -> Any:
    """Return the number of the box that is nearest to a point; the first of each lane that are.

    Args:
        context: the compiler's.
        boxes: address of (groups, 2, AXES, TOGETHER) float32.
        own: that of the point, (AXES,).
        groups: how many, at least 1.
        out: address of (groups, TOGETHER) float32, set to squared distances.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        theirs, mine, target = (builder.inttoptr(args[at], FLOAT.as_pointer()) for at in (0, 1, 3))
        infinite = ir.Constant(LANES, [float("inf")] * TOGETHER)
        best = cgutils.alloca_once_value(builder, infinite)
        best_at = cgutils.alloca_once_value(builder, ir.Constant(NUMBERS, [0] * TOGETHER))
        with cgutils.for_range(builder, args[2]) as loop:
            here = builder.gep(theirs, [builder.mul(loop.index, WORD(BOX_FLOATS))])
            values = _sq_distances(builder, here, mine, 0, 1)
            at = builder.gep(target, [builder.mul(loop.index, WORD(TOGETHER))])
            builder.store(values, builder.bitcast(at, LANES.as_pointer()), align=4)
            is_less = builder.fcmp_ordered("<", values, builder.load(best))
            group = repeat(builder, builder.trunc(loop.index, INT), TOGETHER)
            builder.store(builder.select(is_less, values, builder.load(best)), best)
            builder.store(builder.select(is_less, group, builder.load(best_at)), best_at)
        values, numbers = builder.load(best), builder.load(best_at)
        least, found = (builder.extract_element(side, INT(0)) for side in (values, numbers))
        found = builder.mul(found, INT(TOGETHER))
        for lane in range(1, TOGETHER):
            value, group = (builder.extract_element(side, INT(lane)) for side in (values, numbers))
            is_less = builder.fcmp_ordered("<", value, least)
            least = builder.select(is_less, value, least)
            found = builder.select(is_less, builder.add(builder.mul(group, INT(TOGETHER)), INT(lane)), found)
        return builder.sext(found, WORD)

    return types.int64(types.int64, types.int64, types.int64, types.int64), generate
