"""Outlines of masks: polygons with holes that have few corners and the same pixels."""

from __future__ import annotations

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
BELOW_HALF = 0.499  # of the step from 0 to 1: pixels that touch at a corner are connected, as in regions


def outlines(inside: NDArray[np.bool_], left: int = 0, top: int = 0, tolerance: float = TOLERANCE) -> list[list[Ring]]:
    """Return the outlines of an (h, w) mask: for each 8-connected part its outer ring, then its holes.

    A pixel is in the mask if and only if its centre lies inside an odd number of rings. Corners that are not needed
    for this are left out: from each corner the ring goes straight on as far as it can.

    Args:
        inside: the mask.
        left: x of its first column in the image.
        top: y of its first row.
        tolerance: pixels that a ring may move by along a row or a column, below 0.5; 0: leave out only corners on a
            straight line.

    Returns:
        parts, each a list of rings: (n, 2) float64 corners (x, y) in pixels, where (0, 0) is the image's top left
        corner and a pixel's centre lies at (0.5, 0.5). None for an empty mask.

    Raises:
        OptionError: contourpy is not installed, or a tolerance out of range.
    """
    if not 0 <= tolerance < 0.5:
        raise OptionError(f"tolerance: expected pixels from 0 to below 0.5, found {tolerance!r}")
    contourpy = _contourpy()
    generator = contourpy.contour_generator(
        z=np.pad(inside, 1).astype(np.float64), name="serial", fill_type=contourpy.FillType.OuterOffset
    )
    parts: Any = zip(*generator.filled(BELOW_HALF, 2), strict=True)
    # Corners lie halfway between two pixels, which the level just below a half moves a little. Padding moved all by 1.
    shift = np.array([left - 0.5, top - 0.5])
    return [
        [
            _simplified(np.rint(corners[first : last - 1] * 2) / 2, tolerance) + shift
            for first, last in pairwise(offsets)
        ]
        for corners, offsets in parts
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


def _simplified(ring: Ring, tolerance: float) -> Ring:
    """Leave out corners of a closed ring; between two that stay, it crosses the lines that it crossed before."""
    points = [(float(x), float(y)) for x, y in ring]
    gates = _gates(ring, tolerance)
    kept = [0]
    while kept[-1] < len(points):
        kept.append(_farthest(kept[-1], points, gates))
    return ring[kept[:-1]]


def _gates(ring: Ring, tolerance: float) -> list[tuple[float, float]]:
    """Return, for each corner of a padded ring, how far the ring may go to its left: (x, y), and as far to its right.

    Centres have integer coordinates here, so that a corner lies in a row of centres or in a column of them. What is
    inside lies on the same side of all of a ring.
    """
    ahead = np.roll(ring, -1, axis=0) - np.roll(ring, 1, axis=0)
    in_row = (ring[:, 1] % 1 == 0)[:, None]
    left = np.sign(np.stack([-ahead[:, 1], ahead[:, 0]], axis=1)) * tolerance
    gates = np.where(np.concatenate([in_row, ~in_row], axis=1), left, 0)
    return [(float(x), float(y)) for x, y in gates]


def _farthest(first: int, points: list[tuple[float, float]], gates: list[tuple[float, float]]) -> int:
    """Return the last corner that a straight line from the first one reaches through the gates of all between.

    The directions that pass all gates so far are a wedge from (rx, ry) on its right to (lx, ly) on its left. The last
    corner is the first one again, as number len(points).
    """
    count, (x0, y0), reached = len(points), points[first], first + 1
    rx = ry = lx = ly = 0.0
    for number in range(first + 1, count + 1):
        (x, y), (gate_x, gate_y) = points[number % count], gates[number % count]
        x, y = x - x0, y - y0
        if rx * y - ry * x >= 0 and x * ly - y * lx >= 0:  # it lies in the wedge, or there is none yet
            reached = number
        to_right, to_left = (x - gate_x, y - gate_y), (x + gate_x, y + gate_y)
        if number == first + 1:
            (rx, ry), (lx, ly) = to_right, to_left
        if rx * to_right[1] - ry * to_right[0] > 0:
            rx, ry = to_right
        if to_left[0] * ly - to_left[1] * lx > 0:
            lx, ly = to_left
        if rx * ly - ry * lx < 0:
            break
    return reached
