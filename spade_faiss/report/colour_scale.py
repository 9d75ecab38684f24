"""The one colour scale of a run's maps."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..arrays import Pixels
from ..detect.calibration import Calibration
from ..detect.detector import Detector
from ..errors import NotEnoughImagesError

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
SCALE_IMAGES = 8  # normal images from which the colour scale is taken if there is no calibration


@dataclass(frozen=True)
class Scale:
    """The pixel scores at which colour begins and at which it is brightest: one for all images, never per image."""

    low: float
    high: float
    pixel_threshold: float | None = None  # above it a pixel is anomalous, where the gallery is calibrated
    basis: str = field(default="", compare=False)  # where the two ends come from, for a legend

    @classmethod
    def from_calibration(cls, calibration: Calibration) -> Scale:
        """Begin to colour at half of the median maximum of the normal maps; end at twice the pixel threshold."""
        threshold = calibration.pixel_threshold
        low = float(np.median(calibration.map_maxima)) / 2
        basis = f"half the median maximum of {len(calibration.map_maxima)} normal maps to twice the pixel threshold"
        return cls(low, 2 * threshold or 1.0, threshold, basis)

    @classmethod
    def from_normal(cls, maps: list[NDArray[np.float32]]) -> Scale:
        """Begin to colour at half of the maximum that a map of a normal image has, the median one; end at twice."""
        worst = float(np.median([scores.max() for scores in maps]))
        return cls(worst / 2, 2 * worst or 1.0, basis=f"half to twice the median maximum of {len(maps)} normal maps")

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


def css_colours() -> list[str]:
    """Return the colours from low to high, evenly spaced, as CSS writes them."""
    return [f"rgb({red} {green} {blue})" for red, green, blue in _INFERNO.tolist()]


def colour_scale(detector: Detector) -> Scale:
    """Take the colour scale of a run from the calibration; without one, from a few normal images among the others."""
    if detector.calibration:
        return Scale.from_calibration(detector.calibration)
    ids = detector.gallery.snapshot().ids()
    if len(ids) < 2:
        return Scale(0.0, 1.0)
    run = detector.pipeline(doubts=False)  # what an audit shows goes by none, and for colours they need not be known
    chosen = np.random.default_rng(0).choice(ids, min(SCALE_IMAGES, len(ids)), replace=False)
    try:
        return Scale.from_normal([found.anomaly_map for found in run.leave_one_out(chosen.tolist())])
    except NotEnoughImagesError:  # all are copies of one
        return Scale(0.0, 1.0)
