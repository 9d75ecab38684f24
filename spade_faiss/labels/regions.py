"""An image and the regions that were found in it, as every format of a label tool takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..detect.regions import Labels, Region


@dataclass(frozen=True)
class RegionMask:
    """The pixels of one region: a crop of the image, and where it lies."""

    inside: NDArray[np.bool_]  # (h, w), True in the region
    left: int  # pixels of the image
    top: int
    size: tuple[int, int]  # (H, W) of the image


@dataclass(frozen=True)
class LabelledImage:
    """An image and its regions.

    Attributes:
        number: of the image within its file, from 1.
        name: of the image file, with forward slashes, as label tools find it.
        labels: (H, W); see detect.regions.Labels.
        regions: as `labels` numbers them.
        thresholds: "image", "pixel" and "false_alarms"; None where nothing was judged.
        facts: what else is known of the image, as JSON values: verdict, image_score, p_value, generation and others.

    >>> from spade_faiss.labels import LabelledImage
    >>> LabelledImage(1, "a/000.png", np.zeros((4, 5), np.uint8)).size
    (4, 5)
    """

    number: int
    name: str
    labels: Labels
    regions: Sequence[Region] = ()
    thresholds: Mapping[str, float | None] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        height, width = self.labels.shape
        return height, width

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The pixels of all regions, (H, W)."""
        return self.labels > 0

    def region_masks(self) -> Iterator[tuple[Region, RegionMask]]:
        """Yield each region with its pixels."""
        for number, region in enumerate(self.regions, start=1):
            left, top, right, bottom = region.box
            inside = self.labels[top:bottom, left:right] == number
            yield region, RegionMask(inside, left, top, self.size)
