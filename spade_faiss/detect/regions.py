"""Connected regions of a map above a threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EIGHT_CONNECTED = np.ones((3, 3), int)

Labels = NDArray[np.unsignedinteger]  # (H, W): 1 where the first region of a list is, 2 the second, ...; 0 elsewhere


@dataclass(frozen=True)
class Region:
    """Connected pixels above the pixel threshold.

    Attributes:
        box: (left, top, right, bottom), half-open, pixels of the image.
        area: pixels.
        peak: largest pixel score.

    >>> sf.Region(box=(10, 20, 14, 22), area=7, peak=3.5).area
    7
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float


def find_regions(
    anomaly_map: NDArray[np.float32], threshold: float, min_region: int = 1
) -> tuple[list[Region], Labels]:
    """Find the 8-connected regions of an (H, W) map above a threshold.

    Args:
        anomaly_map: (H, W) pixel scores.
        threshold: pixels above it belong to a region.
        min_region: pixels; smaller regions are left out.

    Returns:
        The regions, highest peak first, and their labels: see Labels.
    """
    from scipy import ndimage  # here, as in baseline.py

    found, count = ndimage.label(anomaly_map > threshold, EIGHT_CONNECTED)
    areas = np.bincount(found.ravel(), minlength=count + 1)
    numbered = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(found), start=1):
        if areas[number] >= min_region:
            peak = float(anomaly_map[rows, columns][found[rows, columns] == number].max())
            box = columns.start, rows.start, columns.stop, rows.stop
            numbered.append((number, Region(box, int(areas[number]), peak)))
    numbered.sort(key=lambda pair: -pair[1].peak)
    ranks = np.zeros(count + 1, np.min_scalar_type(len(numbered)))  # a byte a pixel, as a rule
    ranks[[number for number, _ in numbered]] = np.arange(1, len(numbered) + 1)
    labels: Labels = ranks[found]
    return [region for _, region in numbered], labels
