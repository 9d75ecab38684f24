"""Outlines of masks: polygons with holes that have few corners and the same pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..detect.regions import EIGHT_CONNECTED
from ..errors import OptionError

Ring = NDArray[np.float64]  # (n, 2) corners (x, y), not closed; (0, 0) is the image's top left corner
Ints = NDArray[np.int64]

# An outline crosses the line between the centres of two neighbours, one inside and one outside, in its middle. One that
# crosses the same lines elsewhere has the same pixels.
TOLERANCE = 0.45  # px to both sides
# pycocotools rounds corners to fifths of a pixel, and so moves outlines by up to 0.1.
COCO_TOLERANCE = 0.35
COMPILED = 100_000  # corners in one process that are worth compiled code
# The side of a pixel at which a ring has a corner: above, to the right, below, to the left.
SIDES = np.array([(0, -1), (1, 0), (0, 1), (-1, 0)])  # (x, y)
TRACED = 2  # value of an inside pixel whose upper side is in a ring


def outlines(inside: NDArray[np.bool_], left: int = 0, top: int = 0, tolerance: float = TOLERANCE) -> list[list[Ring]]:
    """Return the outlines of an (h, w) mask: for each 8-connected part its outer ring, then its holes.

    A pixel is in the mask if and only if its centre lies inside an odd number of rings. Corners that are not needed
    for this are left out: from each corner the ring goes straight on as far as it can.

    Args:
        inside: the mask; any value but 0 is in it.
        left: x of its first column in the image.
        top: y of its first row.
        tolerance: pixels that a ring may move by along a row or a column, below 0.5; 0: leave out only corners on a
            straight line.

    Returns:
        parts, each a list of rings: (n, 2) float64 corners (x, y) in pixels, where (0, 0) is the image's top left
        corner and a pixel's centre lies at (0.5, 0.5). None for an empty mask.

    Raises:
        OptionError: a mask that is not (h, w), or a tolerance out of range.

    >>> [[ring]] = outlines(np.ones((2, 3)), tolerance=0.25)
    >>> ring.min(axis=0).tolist(), ring.max(axis=0).tolist()
    ([0.0, 0.0], [3.0, 2.0])
    """
    if not 0 <= tolerance < 0.5:
        raise OptionError(f"tolerance: expected pixels from 0 to below 0.5, found {tolerance!r}")
    if inside.ndim != 2:
        raise OptionError(f"inside: expected an (h, w) mask, found an array of {inside.shape}")
    points, starts, parts = _traced(inside.astype(np.bool_, copy=False))
    kept, gates = np.zeros(len(points), np.bool_), _gates(points, starts, tolerance)
    if _KERNELS.compiled:
        _compiled(_keep)(points, gates, starts, kept)
    else:
        some = [0] * len(points)
        _keep(points.tolist(), gates.tolist(), starts.tolist(), some)  # which Python reads faster than arrays
        kept[:] = some
    shift = np.array([left + 0.5, top + 0.5])  # from centres at integers
    found: list[list[Ring]] = [[] for _ in range(parts.max(initial=-1) + 1)]
    for part, (first, last) in zip(parts, pairwise(starts), strict=True):
        found[part].append(points[first:last][kept[first:last]] + shift)
    return found


def joined(rings: list[Ring]) -> Ring:
    """Return an outer ring and its holes as one ring, for formats that have no holes.

    A cut goes from each hole to the nearest corner of the outer ring, and back: it has no area, so that the ring's
    inside is the same.
    """
    outer, holes = rings[0], rings[1:]
    if not holes:
        return outer
    from scipy.spatial import cKDTree

    sizes, points = np.array([len(hole) for hole in holes]), np.concatenate(rings)
    starts = np.cumsum(sizes) - sizes  # of the holes among their points
    distances, nearest = cKDTree(outer).query(points[len(outer) :])
    begins = np.lexsort((distances, np.repeat(np.arange(len(holes)), sizes)))[starts]  # the point of each to cut to
    order = np.argsort(nearest[begins], kind="stable")
    corners, sizes, starts, begins = nearest[begins][order], sizes[order], starts[order], begins[order]
    loops = sizes + 2  # around the hole to where it begins, and back to the outer ring's corner
    step = np.arange(loops.sum()) - np.repeat(np.cumsum(loops) - loops, loops)
    around = np.repeat(starts, loops) + (np.repeat(begins - starts, loops) + step) % np.repeat(sizes, loops)
    cut = np.where(step > np.repeat(sizes, loops), np.repeat(corners, loops), around + len(outer))
    joint: Ring = points[np.insert(np.arange(len(outer)), np.repeat(corners + 1, loops), cut)]
    return joint


def _traced(inside: NDArray[np.bool_]) -> tuple[Ring, Ints, Ints]:
    """Return all corners of all rings, clockwise around pixels that are inside.

    Returns:
        (n, 2) corners (x, y), where pixels' centres lie at integers, ring by ring; the rings' starts, and n; the number
        of each ring's part, whose outer ring comes before its holes.
    """
    cells = np.pad(inside, 1).view(np.uint8)
    width, flat = cells.shape[1], cells.ravel()
    tops = np.flatnonzero(flat[width:] > flat[:-width]) + width  # each ring passes above at least one pixel
    # As many corners lie below pixels as above them.
    corners = 2 * len(tops) + np.count_nonzero(flat[1:] != flat[:-1])
    places, starts = np.zeros(corners, np.int64), np.zeros(len(tops) + 1, np.int64)
    steps = SIDES @ (1, width)  # from a pixel to those at its sides
    if _KERNELS.compiled_for(corners):
        rings = _compiled(_trace)(flat, steps, tops, places, starts)
    else:
        listed, begun = [0] * corners, [0] * len(starts)
        rings = _trace(bytearray(flat), steps.tolist(), tops.tolist(), listed, begun)
        places[:], starts[:] = listed, begun
    starts, (cell, side) = starts[: rings + 1], np.divmod(places, 4)
    row, column = np.divmod(cell, width)
    points: Ring = np.stack([column, row], axis=1) - 1 + SIDES[side] / 2
    # Rows that a ring passes below minus rows that it passes above: the area within, negative around a hole.
    areas = np.add.reduceat(np.where(side == 2, row + 1, np.where(side == 0, -row, 0)), starts[:-1])
    parts = np.zeros(rings, np.int64)
    if np.count_nonzero(areas > 0) > 1:
        from scipy import ndimage  # here, as in baseline.py

        labels, _ = ndimage.label(inside, EIGHT_CONNECTED)
        first = starts[:-1]
        parts = labels[row[first] - 1, column[first] - 1] - 1
    return points, starts, parts


class _Kernels:
    """Whether compiled code is worth its compilation: from so many corners in this process on."""

    def __init__(self) -> None:
        self.corners = 0

    def compiled_for(self, corners: int) -> bool:
        """Count more corners, and return whether they and what follows are for compiled code."""
        self.corners += corners
        return self.compiled

    @property
    def compiled(self) -> bool:
        return self.corners >= COMPILED


_KERNELS = _Kernels()


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function as machine code."""
    from ..patch_search.pyramid_simd import jit  # here, as it takes numba

    return jit(function)


def _trace(cells: Any, steps: Any, tops: Any, places: Any, starts: Any) -> Any:
    """Follow each ring from the first pixel that it passes above, with the inside to its right.

    Args:
        cells: (h * width,) 1 in the mask, 0 elsewhere, and all around; those that a ring passes above become TRACED.
        steps: from a pixel to those at its sides.
        tops: the pixels with none above them, in order.
        places: (n,) zeros, which become 4 * pixel + side, corner by corner; see SIDES.
        starts: zeros, which become the rings' starts, and n.

    Returns:
        the number of rings.
    """
    corner = ring = 0
    for top in tops:
        if cells[top] == TRACED:
            continue
        starts[ring] = corner
        ring += 1
        at, side = top, 0
        while True:
            places[corner] = 4 * at + side
            corner += 1
            if side == 0:
                cells[at] = TRACED
            ahead = at + steps[(side + 1) % 4]
            if cells[ahead + steps[side]]:  # pixels that touch at a corner are connected, as in regions
                at, side = ahead + steps[side], (side + 3) % 4
            elif cells[ahead]:
                at = ahead
            else:
                side = (side + 1) % 4
            if at == top and side == 0:
                break
    starts[ring] = corner
    return ring


def _gates(points: Ring, starts: NDArray[np.int64], tolerance: float) -> Ring:
    """Return, for each corner of padded rings, how far the ring may go to its left: (x, y), and as far to its right.

    Centres have integer coordinates here, so that a corner lies in a row of centres or in a column of them. What is
    inside lies on the same side of all of a ring.
    """
    after = np.arange(1, len(points) + 1)
    after[starts[1:] - 1] = starts[:-1]
    before = np.empty_like(after)
    before[after] = np.arange(len(points))
    ahead = points[after] - points[before]
    in_row = (points[:, 1] % 1 == 0)[:, None]
    left = np.sign(np.stack([-ahead[:, 1], ahead[:, 0]], axis=1)) * tolerance
    return np.where(np.concatenate([in_row, ~in_row], axis=1), left, 0)


def _keep(points: Any, gates: Any, starts: Any, kept: Any) -> None:
    """Mark the corners that stay: from each, the last that a straight line reaches through the gates of all between.

    The directions that pass all gates so far are a wedge from (rx, ry) on its right to (lx, ly) on its left.

    Args:
        points: (n, 2) corners of all rings; lists or arrays, as all arguments are.
        gates: (n, 2) of the corners.
        starts: of the rings, and n.
        kept: (n,), zeros, which get a one at each corner that stays.
    """
    for ring in range(len(starts) - 1):
        start, end = starts[ring], starts[ring + 1]
        corner = start
        while corner < end:
            kept[corner] = 1
            x0, y0 = points[corner][0], points[corner][1]
            rx = ry = lx = ly = 0.0
            reached = corner + 1
            for number in range(corner + 1, end + 1):
                at = number if number < end else start  # the last corner is the first one again
                x, y = points[at][0] - x0, points[at][1] - y0
                if rx * y - ry * x >= 0 and x * ly - y * lx >= 0:  # it lies in the wedge, or there is none yet
                    reached = number
                right_x, right_y = x - gates[at][0], y - gates[at][1]
                left_x, left_y = x + gates[at][0], y + gates[at][1]
                if number == corner + 1:
                    rx, ry, lx, ly = right_x, right_y, left_x, left_y
                if rx * right_y - ry * right_x > 0:
                    rx, ry = right_x, right_y
                if left_x * ly - left_y * lx > 0:
                    lx, ly = left_x, left_y
                if rx * ly - ry * lx < 0:
                    break
            corner = reached
