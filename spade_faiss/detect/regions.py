"""Connected regions of a map above a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

if TYPE_CHECKING:
    pass


EIGHT_CONNECTED = np.ones((3, 3), int)


@dataclass(frozen=True)
class Region:
    """Connected pixels above the pixel threshold."""

    box: tuple[int, int, int, int]  # (left, top, right, bottom), half-open, pixels of the image
    area: int  # pixels
    peak: float  # largest pixel score


def find_regions(anomaly_map: NDArray[np.float32], threshold: float, min_region: int = 1) -> list[Region]:
    """Return the 8-connected regions of an (H, W) map above a threshold, of min_region pixels at least, worst first."""
    labels, count = ndimage.label(anomaly_map > threshold, EIGHT_CONNECTED)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    regions = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        if areas[number] >= min_region:
            peak = float(anomaly_map[rows, columns][labels[rows, columns] == number].max())
            regions.append(Region((columns.start, rows.start, columns.stop, rows.stop), int(areas[number]), peak))
    return sorted(regions, key=lambda region: -region.peak)
