"""What a report says of the run as a whole: what was compared with what, and by which settings."""

from __future__ import annotations

from dataclasses import dataclass

from ..detect.detector import Detector
from ..detect.settings import UNNAMED
from ..images.view import View
from .page import figure

IMAGE_SCORES = {
    "knn": "mean distance to the nearest",
    "map_max": "the map's maximum",
    "map": "the map's maximum or mean",
    "map_top": "the mean of the map's highest 1 %",
}


@dataclass(frozen=True)
class RunFacts:
    """The facts of a run that do not change with its images."""

    view: View  # what the network saw of an image
    lines: tuple[tuple[str, object], ...]  # name and value, for the head of the page

    @classmethod
    def of(cls, detector: Detector) -> RunFacts:
        """Collect them from the detector that queries the images."""
        gallery, search, calibration = detector.gallery, detector.search, detector.calibration
        lines: list[tuple[str, object]] = [
            ("compared with", f"{len(gallery)} normal {'images' if gallery.spec.tile is None else 'tiles'}"),
            ("extractor", gallery.spec.name),
            ("recipe", gallery.recipe.name if gallery.recipe else "none"),
            ("K", detector.k),
            ("kappa", search.kappa),
            *((name, value) for name, value in detector.settings().items() if name in UNNAMED),
            ("image score", IMAGE_SCORES[detector.score.image_score or "knn"]),
        ]
        if calibration:
            lines += [
                ("image threshold", figure(calibration.image_threshold)),
                ("false alarms", f"at most {100 * calibration.false_alarms:g} %"),
            ]
        else:
            lines += [("verdicts", "none: not calibrated")]
        return cls(gallery.spec.view, tuple(lines))
