"""ROC and PRO curves: as points, as files, as lines to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ..system.atomic_files import output_errors, write_csv, write_json
from .pixel import PixelMetrics
from .ranking import Reals

DIGITS = 6  # decimals in files


@dataclass(frozen=True)
class Curve:
    """A curve over the false-positive rate, from (0, 0) to (1, 1)."""

    name: str  # image_ROC, pixel_ROC or pixel_PRO
    fpr: Reals  # (points,), ascending
    value: Reals  # (points,), ascending: the true-positive rate, or the mean overlap with the regions
    limit: float | None = None  # FPR up to which the area under it is the metric; None: 1

    @property
    def metric(self) -> str:
        """Name of the metric that is the area under the curve."""
        return self.name.replace("_", "_AU")

    def path(self, width: float, height: float) -> str:
        """Return the curve as the `d` of an SVG path, (0, 0) at the top left, rounded to a tenth of a unit."""
        points = np.round(np.column_stack([self.fpr * width, (1 - self.value) * height]), 1)
        new = np.r_[True, (np.diff(points, axis=0) != 0).any(axis=1)]
        return "M" + "L".join(f"{x:g} {y:g}" for x, y in points[new])


def image_roc(scores: ArrayLike, labels: ArrayLike) -> Curve | None:
    """Return the ROC curve of image scores, in which equal scores pass together; None if there is one class only.

    Args:
        scores: (n,) finite, higher is more anomalous.
        labels: (n,) bool, True where anomalous.
    """
    labels = np.asarray(labels, bool)
    distinct, group = np.unique(np.asarray(scores, np.float64), return_inverse=True)
    fpr, tpr = (
        np.r_[0, np.cumsum(np.bincount(group[labels == label], minlength=len(distinct))[::-1])] for label in (0, 1)
    )
    return Curve("image_ROC", fpr / fpr[-1], tpr / tpr[-1]) if fpr[-1] and tpr[-1] else None


def all_curves(
    scores: Sequence[float], labels: Sequence[bool], pixel: PixelMetrics | None, integration_limit: float
) -> list[Curve]:
    """Return the image and pixel curves of an evaluation whose metrics are not None."""
    image = image_roc(scores, labels)
    found = [image] if image else []
    if pixel and (curves := pixel.curves()):
        found.append(Curve("pixel_ROC", curves.fpr, curves.tpr))
        found.append(Curve("pixel_PRO", curves.fpr, curves.pro, integration_limit))
    return found


def write_curves(folder: Path, categories: Mapping[str, Sequence[Curve]]) -> None:
    """Write the points of all curves as curves.json and curves.csv.

    Raises:
        OutputError: the folder cannot be written.
    """
    rounded = {
        (category, curve.name): (curve.fpr.round(DIGITS).tolist(), curve.value.round(DIGITS).tolist())
        for category, curves in categories.items()
        for curve in curves
    }
    values: dict[str, dict[str, dict[str, list[float]]]] = {category: {} for category in categories}
    for (category, name), (fpr, value) in rounded.items():
        values[category][name] = {"fpr": fpr, "value": value}
    with output_errors(f"cannot write {folder}"):
        write_json(folder / "curves.json", values)
        rows = [
            (category, name, *point)
            for (category, name), points in rounded.items()
            for point in zip(*points, strict=True)
        ]
        write_csv(folder / "curves.csv", [("category", "curve", "fpr", "value"), *rows])
