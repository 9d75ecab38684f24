"""Outlines of regions with few corners, which enclose the same pixels as their masks do."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..detect.regions import Labels

Corners = NDArray[np.float64]  # (n, 2): x and y

JOINED = 0.499  # level of the contour: below a half, so that pixels that touch at a corner are joined
REACH = 0.45  # px that an outline may move to either side between two centres; what is left to a half is for rounding
SMALL = 1e-9  # in place of 0, where a chord lies along a row or a column


def polygons(labels: Labels | None, count: int) -> list[list[list[float]]]:
    """Return the outline of each of the first regions: [x, y] corners in pixels; 0, 0 is the image's top left corner.

    A pixel of the region, or of a hole in it, has its centre inside; every other pixel has it outside.

    Args:
        labels: (H, W) number of the region that each pixel is in, from 1.
        count: how many regions.
    """
    if labels is None or not count:
        return []
    from scipy import ndimage  # here: only answers with regions need it

    found: list[list[list[float]]] = []
    for number, box in enumerate(ndimage.find_objects(labels, count), start=1):
        if box is None:
            found.append([])
            continue
        corners, _ = outline(labels[box] == number)
        found.append(np.round(corners + np.array([box[1].start, box[0].start]), 2).tolist())
    return found


def outline(mask: NDArray[np.bool_]) -> tuple[Corners, bool]:
    """Return the outline of an 8-connected (h, w) mask, the last corner as the first, and whether it has holes."""
    import contourpy

    inside = np.pad(mask, 1).astype(np.float64)
    lines: Any = contourpy.contour_generator(z=inside, name="serial").lines(JOINED)
    outer: Corners = max(lines, key=lambda line: np.ptp(line[:, 0]) * np.ptp(line[:, 1]))  # the others are holes
    return simplified(outer) - 0.5, len(lines) > 1  # padding moved it by 1, centres lie at half pixels


def simplified(ring: Corners) -> Corners:
    """Leave out corners of a contour, by Douglas and Peucker, such that it passes between the same pixels' centres.

    Each corner of a contour lies between the centres of a pixel inside and of one outside, in one row or one column. A
    chord may replace the corners between its ends if it passes between the same two centres, for each of them. So the
    distance from a corner to the chord is measured along the row or the column.

    Args:
        ring: (n, 2), closed; centres are at whole numbers.
    """
    in_row = np.abs(ring[:, 0] - np.rint(ring[:, 0])) > np.abs(ring[:, 1] - np.rint(ring[:, 1]))
    far = int(np.square(ring - ring[0]).sum(axis=1).argmax())
    kept, spans = {0, far, len(ring) - 1}, [(0, far), (far, len(ring) - 1)]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        chord, between = ring[last] - ring[first], slice(first + 1, last)
        x, y = (ring[between] - ring[first]).T
        step = np.abs(np.where(in_row[between], chord[1], chord[0]))  # twice the triangle over the chord, for 1 px
        moved = np.abs(chord[0] * y - chord[1] * x) / np.maximum(step, SMALL)
        if moved.max() > REACH:
            middle = first + 1 + int(moved.argmax())
            kept.add(middle)
            spans += [(first, middle), (middle, last)]
    return ring[sorted(kept)]
