"""Outlines of masks: polygons with holes that have few corners and the same pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError

Ring = NDArray[np.float64]  # (n, 2) corners (x, y), not closed; (0, 0) is the image's top left corner

# An outline crosses the line between the centres of two neighbours, one inside and one outside, in its middle. One that
# crosses the same lines elsewhere has the same pixels.
TOLERANCE = 0.45  # px to both sides
# pycocotools rounds corners to fifths of a pixel, and so moves outlines by up to 0.1.
COCO_TOLERANCE = 0.35
COMPILED = 100_000  # corners of a part that are worth compiled code
BELOW_HALF = 0.499  # of the step from 0 to 1: pixels that touch at a corner are connected, as in regions


def outlines(inside: NDArray[np.bool_], left: int = 0, top: int = 0, tolerance: float = TOLERANCE) -> list[list[Ring]]:
    """Return the outlines of an (h, w) mask: for each 8-connected part its outer ring, then its holes.

    A pixel is in the mask if and only if its centre lies inside an odd number of rings. Corners that are not needed
    for this are left out: from each corner the ring goes straight on as far as it can.

    Args:
        inside: the mask: bool, or integers of which 0 is outside.
        left: x of its first column in the image.
        top: y of its first row.
        tolerance: pixels that a ring may move by along a row or a column, below 0.5; 0: leave out only corners on a
            straight line.

    Returns:
        parts, each a list of rings: (n, 2) float64 corners (x, y) in pixels, where (0, 0) is the image's top left
        corner and a pixel's centre lies at (0.5, 0.5). None for an empty mask.

    Raises:
        OptionError: contourpy is not installed, no mask, or a tolerance out of range.

    >>> from spade_faiss.labels import outlines
    >>> mask = np.zeros((4, 5), bool)
    >>> mask[1, 2] = True
    >>> outlines(mask)[0][0].tolist()
    [[2.0, 1.5], [2.5, 1.0], [3.0, 1.5], [2.5, 2.0]]
    """
    if not 0 <= tolerance < 0.5:
        raise OptionError(f"tolerance: expected pixels from 0 to below 0.5, found {tolerance!r}")
    inside = np.asarray(inside)
    if inside.ndim != 2 or inside.dtype.kind not in "biu":
        raise OptionError(
            f"inside: expected an (h, w) mask of bool, found {inside.shape} {inside.dtype}; compare scores with "
            "a threshold, as scores > 0.5"
        )
    contourpy = _contourpy()
    generator = contourpy.contour_generator(
        z=np.pad(inside != 0, 1).astype(np.float64), name="serial", fill_type=contourpy.FillType.OuterOffset
    )
    # Corners lie halfway between two pixels, which the level just below a half moves a little. Padding moved all by 1.
    shift = np.array([left - 0.5, top - 0.5])
    return [
        [ring + shift for ring in _simplified(corners, offsets.astype(np.int64), tolerance)]
        for corners, offsets in zip(*generator.filled(BELOW_HALF, 2), strict=True)
    ]


def _contourpy() -> Any:
    try:
        import contourpy
    except ImportError as error:
        raise OptionError(
            f"outlines: expected the package contourpy, found none ({error}); pip install 'spade-faiss[labels]'"
        ) from error
    return contourpy


def joined(rings: list[Ring]) -> Ring:
    """Return an outer ring and its holes as one ring, for formats that have no holes.

    A cut goes from each hole to the nearest corner of the outer ring, and back: it has no area, so that the ring's
    inside is the same.

    Args:
        rings: the outer ring, then its holes, each (n, 2) corners (x, y), as a part of outlines().

    Returns:
        (n, 2) float64 corners (x, y), not closed.

    >>> from spade_faiss.labels import joined, outlines
    >>> mask = np.ones((5, 5), bool)
    >>> mask[2, 2] = False
    >>> [len(ring) for ring in outlines(mask)[0]], len(joined(outlines(mask)[0]))
    ([4, 4], 10)
    """
    from scipy.spatial import cKDTree

    outer, holes = rings[0], rings[1:]
    if not holes:
        return outer
    tree, pieces = cKDTree(outer), [[corner] for corner in outer[:, None]]
    for hole in holes:
        distances, nearest = tree.query(hole)
        start = int(distances.argmin())
        corner = int(nearest[start])
        around = np.roll(hole, -start, axis=0)
        pieces[corner] += [around, around[:1], outer[corner : corner + 1]]
    return np.concatenate([part for piece in pieces for part in piece])


def _simplified(corners: Any, offsets: NDArray[np.int64], tolerance: float) -> list[Ring]:
    """Leave out corners of closed rings; between two that stay, a ring crosses the lines that it crossed before.

    Args:
        corners: (n, 2) of all rings, each of which ends where it began.
        offsets: of the rings among them.
        tolerance: as for outlines.
    """
    starts = offsets - np.arange(len(offsets))  # the last corner of each ring is its first once more
    points: Ring = np.rint(np.delete(corners, offsets[1:] - 1, axis=0) * 2) / 2
    kept, gates = np.zeros(len(points), np.bool_), _gates(points, starts, tolerance)
    if len(points) >= COMPILED:
        _compiled()(points, gates, starts, kept)
    else:
        some = [0] * len(points)
        _keep(points.tolist(), gates.tolist(), starts.tolist(), some)  # which Python reads faster than arrays
        kept[:] = some
    return [points[first:last][kept[first:last]] for first, last in pairwise(starts)]


@cache
def _compiled() -> Callable[..., None]:
    """Return _keep as machine code."""
    from ..patch_search.compiled import jit  # here, as it takes numba

    return jit(_keep)


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
