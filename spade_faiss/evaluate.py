"""Metrics over a labelled set: every test image is queried, scored and counted, one at a time."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from .datasets import Category, Sample
from .detector import Detection, Detector
from .errors import ImageError, OptionError
from .ingest import Skipped
from .metrics import IMAGE_METRICS, INTEGRATION_LIMIT, PIXEL_METRICS, PixelMetrics, image_metrics
from .storage import storage_errors

METRICS = (*IMAGE_METRICS, *PIXEL_METRICS)


@dataclass(frozen=True)
class EvaluationOptions:
    """How a labelled set is evaluated."""

    integration_limit: float = INTEGRATION_LIMIT  # of AUPRO, on the false-positive rate
    metrics_size: int | None = None  # px, maps and masks are resized to this square; None: the image's own size
    skip_bad_masks: bool = False  # leave an image whose mask is missing or of another size out of the pixel metrics
    maps: Path | None = None  # write float maps as TIFF here, at the paths that MVTec's evaluation script reads


@dataclass
class Evaluation:
    """The metrics of one category."""

    category: str
    normal: int  # test images without a defect
    anomalous: int
    metrics: dict[str, float | None]
    reasons: dict[str, str]  # for each metric that is None, why
    skipped_masks: list[Skipped] = field(default_factory=list)  # left out of the pixel metrics
    error_bounds: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        skipped = [{"path": str(item.path), "reason": item.reason} for item in self.skipped_masks]
        return {**self.__dict__, "skipped_masks": skipped}


def evaluate(
    detector: Detector, category: Category, options: EvaluationOptions | None = None, progress: bool = False
) -> Evaluation:
    """Query the test images of a category and compute its metrics.

    Memory does not grow with the number of images. All test images count in the pixel metrics, normal ones with an
    empty mask.

    Args:
        detector: over a gallery of the category's normal images.
        category: a labelled set with masks, or without: then there are image metrics only.
        options: sizes, limits, what to do about bad masks.
        progress: a bar on stderr, where that is a terminal.

    Raises:
        ImageError: a test image that cannot be read; a mask that is missing or of another size, unless skipped.
    """
    options, start = options or EvaluationOptions(), time.perf_counter()
    pixel = PixelMetrics() if category.masks else None
    scores: list[float] = []
    skipped: list[Skipped] = []
    paths = (sample.path for sample in category.test)
    found = zip(category.test, detector.stream(paths), strict=True)
    for sample, detection in tqdm(found, total=len(category.test), unit="image", disable=None if progress else True):
        scores.append(detection.image_score)
        if options.maps:
            _write_map(options.maps, category, sample, detection)
        if pixel is None:
            continue
        try:
            mask = category.mask_of(sample, detection.anomaly_map.shape)
        except ImageError as error:
            if not options.skip_bad_masks:
                raise
            skipped.append(Skipped(sample.path, str(error)))
            continue
        pixel.add(*_at_size(detection.anomaly_map, mask, options.metrics_size), name=str(sample.path))
    labels = [sample.anomalous for sample in category.test]
    parts = [image_metrics(scores, labels)] + ([pixel.result(options.integration_limit)] if pixel else [])
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    reasons = {} if pixel else dict.fromkeys(PIXEL_METRICS, "the set has no masks")
    bounds: dict[str, float] = {}
    for part in parts:
        metrics.update(part.values)
        reasons.update(part.reasons)
        bounds.update(part.error_bounds)
    return Evaluation(
        category.name, labels.count(False), labels.count(True), metrics, reasons, skipped, bounds,
        round(time.perf_counter() - start, 2),
    )  # fmt: skip


def _at_size(
    scores: NDArray[np.float32], mask: NDArray[np.bool_], size: int | None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    if size is None:
        return scores, mask
    square = (size, size)
    resized = np.asarray(Image.fromarray(scores).resize(square, Image.Resampling.BILINEAR))
    return resized, np.asarray(Image.fromarray(mask).resize(square, Image.Resampling.NEAREST))


def _write_map(folder: Path, category: Category, sample: Sample, detection: Detection) -> None:
    path = folder / category.name / "test" / sample.kind / f"{Path(sample.key).stem}.tiff"
    with storage_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(detection.anomaly_map).save(path)


def write_results(folder: Path, evaluations: Sequence[Evaluation], settings: dict[str, Any]) -> None:
    """Write metrics.json, and results.csv with a row a category and a row of means.

    Raises:
        GalleryError: the folder cannot be written.
    """
    with storage_errors(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "settings": settings,
            "categories": [one.to_json() for one in evaluations],
            "mean": means(evaluations),
        }
        (folder / "metrics.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["category", *METRICS])
            for name, metrics in [(one.category, one.metrics) for one in evaluations] + [("Mean", means(evaluations))]:
                rows.writerow([name, *("" if metrics[m] is None else f"{metrics[m]:.6f}" for m in METRICS)])


def means(evaluations: Sequence[Evaluation]) -> dict[str, float | None]:
    """Return the mean of each metric over the categories; None where a category has none."""
    found: dict[str, float | None] = {}
    for name in METRICS:
        values = [one.metrics[name] for one in evaluations]
        known = [value for value in values if value is not None]
        found[name] = float(np.mean(known)) if len(known) == len(values) and known else None
    return found


def choose(categories: Sequence[Category], names: Sequence[str]) -> list[Category]:
    """Return the categories of some names, or all where none is given.

    Raises:
        OptionError: there is no category of a name.
    """
    known = {category.name: category for category in categories}
    for name in names:
        if name not in known:
            raise OptionError(f"category: expected one of {', '.join(known)}, found {name!r}")
    return [known[name] for name in names] if names else list(categories)
