"""Pictures of anomaly maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .images import Pixels

# Nine stops of matplotlib's inferno: dark to bright with even steps of lightness, so it also reads in grey.
_INFERNO = np.array(
    [
        (0, 0, 4),
        (31, 12, 72),
        (85, 15, 109),
        (136, 34, 106),
        (186, 54, 85),
        (227, 89, 51),
        (249, 140, 10),
        (249, 201, 50),
        (252, 255, 164),
    ]
)
OPACITY = 0.85  # of the brightest colour over the image
OUTLINE = (64, 224, 255)  # cyan: in no stop of the colour scale


@dataclass(frozen=True)
class Scale:
    """The pixel scores at which colour begins and at which it is brightest: one for all images, never per image."""

    low: float
    high: float

    @classmethod
    def from_normal(cls, maps: list[NDArray[np.float32]]) -> Scale:
        """Begin to colour at half of the maximum that a map of a normal image has, the median one; end at twice."""
        worst = float(np.median([scores.max() for scores in maps]))
        return cls(worst / 2, 2 * worst or 1.0)

    def apply(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map pixel scores to [0, 1]."""
        scaled: NDArray[np.float32] = np.clip((scores - self.low) / (self.high - self.low), 0, 1)
        return scaled


def colours(values: NDArray[np.float32]) -> Pixels:
    """Colour values in [0, 1]: (H, W) -> (H, W, 3) uint8."""
    stops = np.linspace(0, 1, len(_INFERNO))
    table = np.stack([np.interp(np.linspace(0, 1, 256), stops, channel) for channel in _INFERNO.T], axis=1)
    picked: Pixels = np.rint(table).astype(np.uint8)[np.rint(values * 255).astype(np.uint8)]
    return picked


def overlay(image: Pixels, scores: NDArray[np.float32], scale: Scale) -> Pixels:
    """Lay a map over its image: the higher the score, the less of the image shows through.

    Args:
        image: (H, W, 3) uint8.
        scores: (H, W) pixel scores.
        scale: which scores are coloured how.
    """
    values = scale.apply(scores)
    opacity = (OPACITY * np.sqrt(values))[..., None]
    blended: Pixels = np.rint(image * (1 - opacity) + colours(values) * opacity).astype(np.uint8)
    return blended


def outline(image: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """Draw the border of a mask, just outside it, two pixels wide."""
    grown = _dilate(_dilate(mask))
    drawn: Pixels = image.copy()
    drawn[grown & ~mask] = OUTLINE
    return drawn


def _dilate(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(mask, 1)
    grown: NDArray[np.bool_] = mask.copy()
    for neighbour in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        grown |= neighbour
    return grown
