"""Metrics over a labelled set: every test image is queried, scored and counted, one at a time."""

from __future__ import annotations

import csv
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .datasets.category import Category, Sample, few
from .detect.detection import Detection
from .detect.detector import Detector
from .detect.query_files import query_files
from .errors import ImageError, OptionError
from .gallery.gallery import Gallery
from .images.decode import read_file
from .images.sources import ImageFile
from .ingest.pipeline import Skipped
from .metrics.curves import Curve, all_curves, write_curves
from .metrics.image import IMAGE_METRICS, image_metrics
from .metrics.pixel import INTEGRATION_LIMIT, PIXEL_METRICS, PixelMetrics, check_limit
from .metrics.ranking import Metrics
from .options import is_count
from .report.report import Report
from .store.snapshot import TEXTS_TOGETHER
from .store.source_images import content_digest
from .system.atomic_files import output_errors
from .system.prefetch import batched

METRICS = (*IMAGE_METRICS, *PIXEL_METRICS)


@dataclass(frozen=True)
class EvaluationOptions:
    """How a labelled set is evaluated."""

    integration_limit: float = INTEGRATION_LIMIT  # of AUPRO, on the false-positive rate
    metrics_size: int | None = None  # px, maps and masks are resized to this square; None: the image's own size
    skip_bad_masks: bool = False  # leave an image whose mask is missing or of another size out of the pixel metrics
    maps: Path | None = None  # write float maps as TIFF here, at the paths that MVTec's evaluation script reads

    def __post_init__(self) -> None:
        # Before the queries, which may take hours.
        check_limit(self.integration_limit)
        if self.metrics_size is not None and not is_count(self.metrics_size):
            raise OptionError(f"metrics_size: expected pixels >= 1, found {self.metrics_size!r}")


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
    in_gallery: list[str] = field(default_factory=list)  # keys of test images whose content the gallery has too
    seconds: float = 0.0
    curves: list[Curve] = field(default_factory=list)  # ROC and PRO, where they are defined

    def take(self, found: Metrics) -> None:
        """Add the metrics of images, or of pixels."""
        self.metrics |= found.values
        self.reasons |= found.reasons
        self.error_bounds |= found.error_bounds

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, but for the curves; see curves.write_curves."""
        skipped = [{"path": str(item.path), "reason": item.reason} for item in self.skipped_masks]
        values = {name: value for name, value in self.__dict__.items() if name != "curves"}
        return {**values, "skipped_masks": skipped}


def evaluate(
    detector: Detector,
    category: Category,
    options: EvaluationOptions | None = None,
    progress: bool = False,
    report: Report | None = None,
) -> Evaluation:
    """Query the test images of a category and compute its metrics.

    Memory does not grow with the number of images. All test images count in the pixel metrics, normal ones with an
    empty mask. Test images that are in the gallery as well are named in a warning: such figures say too much.

    Args:
        detector: over a gallery of the category's normal images.
        category: a labelled set with masks, or without: then there are image metrics only.
        options: sizes, limits, what to do about bad masks.
        progress: a bar on stderr, where that is a terminal.
        report: takes every image, and is closed with the metrics.

    Raises:
        ImageError: a test image that cannot be read; a mask that is missing or of another size, unless skipped.
    """
    options, start = options or EvaluationOptions(), time.perf_counter()
    maps = _map_paths(options.maps, category) if options.maps else {}
    known = _in_gallery(detector.gallery, category)
    pixel = PixelMetrics() if category.masks else None
    scores: list[float] = []
    skipped: list[Skipped] = []
    files = [ImageFile(sample.path, sample.key) for sample in category.test]
    notes: list[str] = []
    found = query_files(detector, files, progress=progress, notes=notes, with_pixels=report is not None)
    for sample, (_, pixels, detection) in zip(category.test, found, strict=True):
        scores.append(detection.image_score)
        if maps:
            _write_map(maps[sample.key], detection)
        mask = _mask_of(category, sample, detection, options, skipped) if pixel else None
        if pixel and mask is not None:
            pixel.add(*_at_size(detection.anomaly_map, mask, options.metrics_size), name=str(sample.path))
        if report:
            report.add(sample.key, pixels, detection, mask, sample.kind)
    for note in notes:
        warnings.warn(f"{category.name}: {note}", stacklevel=2)
    labels = [sample.anomalous for sample in category.test]
    result = Evaluation(category.name, labels.count(False), labels.count(True), dict.fromkeys(METRICS), {}, skipped)
    result.in_gallery = known
    if not pixel:
        result.reasons |= dict.fromkeys(PIXEL_METRICS, "the set has no masks")
    result.take(image_metrics(scores, labels))
    if pixel:
        result.take(pixel.result(options.integration_limit))
    result.curves = all_curves(scores, labels, pixel, options.integration_limit)
    if report:
        notes = [f"No {metric}: {reason}." for metric, reason in result.reasons.items()]
        report.close(result.metrics, result.curves, notes)
    result.seconds = round(time.perf_counter() - start, 2)
    return result


def _mask_of(
    category: Category, sample: Sample, detection: Detection, options: EvaluationOptions, skipped: list[Skipped]
) -> NDArray[np.bool_] | None:
    """Return the mask of a sample; None where it does not fit and such may be skipped, which `skipped` receives."""
    try:
        return category.mask_of(sample, detection.anomaly_map.shape)
    except ImageError as error:
        if not options.skip_bad_masks:
            raise
        skipped.append(Skipped(sample.path, str(error)))
        return None


def _at_size(
    scores: NDArray[np.float32], mask: NDArray[np.bool_], size: int | None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    if size is None:
        return scores, mask
    square = (size, size)
    resized = np.asarray(Image.fromarray(scores).resize(square, Image.Resampling.BILINEAR))
    return resized, np.asarray(Image.fromarray(mask).resize(square, Image.Resampling.NEAREST))


def _in_gallery(gallery: Gallery, category: Category) -> list[str]:
    """Return the keys of the test images that are in the gallery too, by their content; warns where there are any."""
    generation = gallery.snapshot()
    tested = [(sample.key, content_digest(read_file(sample.path))) for sample in category.test]
    wanted, found = {digest for _, digest in tested}, set[str]()
    for ids in batched(generation.ids().tolist(), TEXTS_TOGETHER):
        found |= wanted.intersection(generation.digests(ids))
    known = [key for key, digest in tested if digest in found]
    if known:
        warnings.warn(
            f"{category.name}: {len(known)} of {len(category.test)} test images are in {gallery.path} too "
            f"({few(known)}): the figures say too much; build it from the training images only, with build --dataset",
            stacklevel=3,
        )
    return known


def _map_paths(folder: Path, category: Category) -> dict[str, Path]:
    """Return where each test image's map goes: FOLDER/CATEGORY/test/KIND/NAME.tiff in MVTec's layout, others alike.

    Raises:
        ImageError: two maps would go to one place.
    """
    paths: dict[str, Path] = {}
    owners: dict[Path, Path] = {}
    for sample in category.test:
        path = paths[sample.key] = (folder / category.name / sample.key).with_suffix(".tiff")
        other = owners.setdefault(path, sample.path)
        if other != sample.path:
            raise ImageError(f"{sample.path}: expected a name of its own for its map, found {path} of {other}")
    return paths


def _write_map(path: Path, detection: Detection) -> None:
    with output_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(detection.anomaly_map).save(path)


def write_results(folder: Path, evaluations: Sequence[Evaluation], settings: dict[str, Any]) -> None:
    """Write metrics.json, results.csv with a row a category and a row of means, and the points of the curves.

    Raises:
        OutputError: the folder cannot be written.
    """
    with output_errors(f"cannot write {folder}"):
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
    write_curves(folder, {one.category: one.curves for one in evaluations})


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
