"""Metrics over a labelled set: every test image is queried, scored and counted, one at a time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .datasets.category import Category, Sample, few
from .datasets.check import Checked, check_category
from .datasets.given import GivenSamples, Labelled
from .datasets.masks import Marks
from .detect.detection import Detection
from .detect.detector import Detector
from .detect.query_files import query_files, query_given
from .errors import ImageError, OptionError
from .gallery.reader import GalleryReader
from .images.sources import ImageFile
from .ingest.pipeline import Skipped
from .metrics.curves import Curve, all_curves, write_curves
from .metrics.image import IMAGE_METRICS, image_metrics
from .metrics.pixel import INTEGRATION_LIMIT, PIXEL_METRICS, PixelMetrics, check_limit
from .metrics.ranking import Metrics
from .options import is_count, make_plain
from .report.output_files import map_paths, remove_files, write_map
from .report.report import Report
from .store.snapshot import TEXTS_TOGETHER
from .store.source_images import content_digest
from .system.atomic_files import output_errors, write_csv, write_json
from .system.prefetch import batched

METRICS = (*IMAGE_METRICS, *PIXEL_METRICS)
NAMED = 10  # files that one error names


@dataclass(frozen=True)
class EvaluationOptions:
    """How a labelled set is evaluated."""

    integration_limit: float = INTEGRATION_LIMIT  # of AUPRO, on the false-positive rate
    metrics_size: int | None = None  # px, maps and masks are resized to this square; None: the image's own size
    skip_bad_masks: bool = False  # leave an image whose mask is missing or of another size out of the pixel metrics
    maps: Path | None = None  # write float maps as TIFF here, at the paths that MVTec's evaluation script reads
    skip_bad_images: bool = False  # leave a test image that cannot be read out of all metrics
    ignore_label: int | None = None  # pixels whose mask has this value count in no pixel metric, as 255 in Cityscapes

    def __post_init__(self) -> None:
        make_plain(self)
        # Before the queries, which may take hours.
        check_limit(self.integration_limit)
        if self.metrics_size is not None and not is_count(self.metrics_size):
            raise OptionError(f"metrics_size: expected pixels >= 1, found {self.metrics_size!r}")
        if self.ignore_label not in (None, 0) and not is_count(self.ignore_label):
            raise OptionError(f"ignore_label: expected a value of masks >= 0, found {self.ignore_label!r}")


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
    skipped_images: list[Skipped] = field(default_factory=list)  # left out of all metrics

    def take(self, found: Metrics) -> None:
        """Add the metrics of images, or of pixels."""
        self.metrics |= found.values
        self.reasons |= found.reasons
        self.error_bounds |= found.error_bounds

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, but for the curves; see curves.write_curves."""
        values = {name: value for name, value in self.__dict__.items() if name != "curves"}
        for name in ("skipped_masks", "skipped_images"):
            values[name] = [{"path": str(item.path), "reason": item.reason} for item in values[name]]
        return values


class _Tally:
    """Counts detections as they come, in bounded memory."""

    def __init__(self, name: str, options: EvaluationOptions, masks: bool) -> None:
        self.result = Evaluation(name, 0, 0, dict.fromkeys(METRICS), {})
        self._options, self._start = options, time.perf_counter()
        self._pixel = PixelMetrics() if masks else None
        self._scores: list[float] = []
        self._labels: list[bool] = []

    def add(self, name: str, anomalous: bool, detection: Detection, marks: Marks | None) -> None:
        """Count an image; without marks, it has no part in the pixel metrics."""
        self._scores.append(detection.image_score)
        self._labels.append(anomalous)
        if self._pixel and marks is not None:
            at_size = _at_size(detection.anomaly_map, marks, self._options.metrics_size)
            self._pixel.add(at_size[0], at_size[1].anomalous, name, at_size[1].ignored)

    def close(self, masks: bool = True) -> Evaluation:
        """Return the metrics; without masks, those of images alone."""
        result, pixel, limit = self.result, self._pixel if masks else None, self._options.integration_limit
        result.normal, result.anomalous = self._labels.count(False), self._labels.count(True)
        result.take(image_metrics(self._scores, self._labels))
        if pixel:
            result.take(pixel.result(limit))
        else:
            result.reasons |= dict.fromkeys(PIXEL_METRICS, "the set has no masks")
        result.curves = all_curves(self._scores, self._labels, pixel, limit)
        result.seconds = round(time.perf_counter() - self._start, 2)
        return result


def evaluate(
    detector: Detector,
    category: Category | Iterable[Labelled],
    options: EvaluationOptions | None = None,
    progress: bool = False,
    report: Report | None = None,
    checked: Checked | None = None,
) -> Evaluation:
    """Query the test images of a category, or those that an iterable gives, and compute the metrics.

    Memory does not grow with the number of images. All test images count in the pixel metrics, normal ones with an
    empty mask. All images and masks are read before the first query, see check_categories. Test images that are in the
    gallery as well are named in a warning: such figures say too much.

    Args:
        detector: over a gallery of the category's normal images.
        category: a labelled set with masks, or without: then there are image metrics only. Or an iterable of
            (image, label, mask): an image as Detector.query takes it; whether it is anomalous; its mask, which is a
            path, a PIL image, an (H, W) array, or None. It is read once, so that what is wrong with an image or a mask
            is raised, or skipped, at its turn. Report, maps and `checked` are for a category.
        options: sizes, limits, what to do about bad images and masks.
        progress: a bar on stderr, where that is a terminal.
        report: takes every image, and is closed with the metrics.
        checked: what check_categories found; None: the category is checked first.

    Returns:
        the metrics by name, as image_AUROC and pixel_AUPRO, each None with a reason where it is not defined.

    Raises:
        ImageError: test images that cannot be read, or masks that are missing or of another size, unless skipped.
        OptionError: report, maps or `checked` with an iterable; or a detector that searches suspicious images alone.
    """
    options = options or EvaluationOptions()
    if detector.search.localise == "suspicious":
        raise OptionError("localise: expected 'all', as metrics take the map of every image, found 'suspicious'")
    if not isinstance(category, Category):
        if report is not None or checked is not None or options.maps is not None:
            raise OptionError("report, maps, checked: expected a Category, whose images have names, found an iterable")
        return _evaluate_given(detector, category, options, progress)
    maps = map_paths(options.maps, category) if options.maps else {}
    if checked is None:
        [checked] = check_categories([category], options, progress, [detector.gallery.spec.bits])
    remove_files(maps.values())  # also those of images that are skipped now
    tally = _Tally(category.name, options, category.masks)
    result = tally.result
    result.in_gallery = _in_gallery(detector.gallery, category.name, checked.digests, "category.normal")
    samples = {sample.key: sample for sample in category.test if sample.key not in checked.bad_images}
    skipped = [Skipped(one.path, checked.bad_images[one.key]) for one in category.test if one.key not in samples]
    files = [ImageFile(sample.path, key) for key, sample in samples.items()]
    late = skipped if options.skip_bad_images else None  # images that have gone since they were checked
    notes: list[str] = []
    found = query_files(detector, files, late, progress, notes, with_pixels=report is not None)
    for file, pixels, detection in found:
        sample = samples[file.key]
        if maps:
            write_map(maps[sample.key], detection.anomaly_map)
        marks = _marks_of(category, sample, detection, options, result.skipped_masks) if category.masks else None
        tally.add(str(sample.path), sample.anomalous, detection, marks)
        if report:
            report.add(sample.key, pixels, detection, marks.anomalous if marks else None, sample.kind)
    for note in notes:
        warnings.warn(f"{category.name}: {note}", stacklevel=2)
    result.skipped_images = skipped
    tally.close()
    if report:
        notes = [f"No {metric}: {reason}." for metric, reason in result.reasons.items()]
        report.close(result.metrics, result.curves, notes)
    return result


def _evaluate_given(
    detector: Detector, samples: Iterable[Labelled], options: EvaluationOptions, progress: bool
) -> Evaluation:
    """Do as evaluate for images that an iterable gives."""
    tally = _Tally("images", options, masks=True)
    given = GivenSamples(samples, options.ignore_label, options.skip_bad_masks)
    masked, ignoring = 0, False
    result, notes, digests = tally.result, list[str](), dict[str, str]()
    skipped = result.skipped_images if options.skip_bad_images else None
    for image, detection in query_given(detector, given.images(), skipped, progress, notes):
        name, anomalous, mask = given.of(image.file.key)
        digests[name] = image.digest
        marks = None
        try:
            marks = given.marks(name, anomalous, mask, detection.anomaly_map.shape)
        except ImageError as error:
            if not options.skip_bad_masks:
                raise
            result.skipped_masks.append(Skipped(image.file.path, str(error)))
        if mask is not None and marks is not None:
            masked, ignoring = masked + 1, ignoring or bool(np.any(marks.ignored))
        tally.add(name, anomalous, detection, marks)
    if given.masked:
        bare = [Skipped(Path(name), f"{name}: expected a mask, as later images have one") for name in given.bare]
        result.skipped_masks[:0] = bare
    result.in_gallery = _in_gallery(detector.gallery, result.category, digests, "training images")
    for note in notes:
        warnings.warn(note, stacklevel=3)
    _warn_of_label(masked, ignoring, options)
    return tally.close(bool(given.masked))


def check_categories(
    categories: Sequence[Category],
    options: EvaluationOptions | None = None,
    progress: bool = False,
    bits: Sequence[int | None] | None = None,
) -> list[Checked]:
    """Read all test images and masks of some categories, and warn of what looks wrong.

    Args:
        categories: all that will be evaluated.
        options: what to do about bad images and masks.
        progress: a bar on stderr, where that is a terminal.
        bits: of each category's gallery, as `gallery.spec.bits`: images are read as the queries will read them. None:
            the galleries chose none.

    Returns:
        what was found, by category; for `evaluate`.

    Raises:
        ImageError: test images that cannot be read, or masks that do not fit, unless they may be skipped. All are
            counted, the first of them named.
    """
    options = options or EvaluationOptions()
    chosen = bits or [None] * len(categories)
    checks = [
        check_category(one, content_digest, options.ignore_label, progress, own)
        for one, own in zip(categories, chosen, strict=True)
    ]
    total = sum(len(category.test) for category in categories)
    problems = []
    for what, skips, allowed, reasons in (
        ("test images cannot be read", "skip_bad_images=True", options.skip_bad_images, [c.bad_images for c in checks]),
        (
            "test images have no mask that fits",
            "skip_bad_masks=True",
            options.skip_bad_masks,
            [c.bad_masks for c in checks],
        ),
    ):
        found = [reason for by_key in reasons for reason in by_key.values()]
        if found and not allowed:
            more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
            problems.append(
                f"{len(found)} of {total} {what} ({skips} leaves them out): {'; '.join(found[:NAMED])}{more}"
            )
    if problems:
        raise ImageError("; ".join(problems))
    for category, checked in zip(categories, checks, strict=True):
        _warn_of_masks(category, checked, options)
    masked = sum(sample.mask is not None for category in categories for sample in category.test)
    _warn_of_label(masked, any(checked.ignoring for checked in checks), options)
    return checks


def _warn_of_label(masked: int, ignoring: bool, options: EvaluationOptions) -> None:
    """Warn if a label is to be ignored that none of the masks has."""
    if masked and not ignoring and options.ignore_label is not None:
        warnings.warn(
            f"ignore_label={options.ignore_label}: expected masks with pixels of this value, found none in {masked} "
            "masks: nothing is ignored; is it another value?",
            stacklevel=4,
        )


def _warn_of_masks(category: Category, checked: Checked, options: EvaluationOptions) -> None:
    masked, total = sum(sample.mask is not None for sample in category.test), len(category.test)
    for keys, text in (
        (checked.nearly_all, f"of {masked} masks mark nearly all of their image; are they inverted, or photos?"),
        (checked.only_ignored, f"of {masked} masks mark nothing but ignore_label={options.ignore_label}"),
        (checked.two_valued, f"of {total} test images have two values only, as masks have; are they annotations?"),
    ):
        if keys:
            warnings.warn(f"{category.name}: {len(keys)} {text} ({few(keys)})", stacklevel=4)


def _marks_of(
    category: Category, sample: Sample, detection: Detection, options: EvaluationOptions, skipped: list[Skipped]
) -> Marks | None:
    """Return what a sample's mask says; None where it does not fit and may be skipped, which `skipped` receives."""
    try:
        return category.marks_of(sample, detection.anomaly_map.shape, options.ignore_label)
    except ImageError as error:
        if not options.skip_bad_masks:
            raise
        skipped.append(Skipped(sample.path, str(error)))
        return None


def _at_size(scores: NDArray[np.float32], marks: Marks, size: int | None) -> tuple[NDArray[np.float32], Marks]:
    """Resize a map and what its mask says to a square."""
    if size is None:
        return scores, marks
    square = (size, size)
    resized = np.asarray(Image.fromarray(scores).resize(square, Image.Resampling.BILINEAR))
    masks = [
        None if mask is None else np.asarray(Image.fromarray(mask).resize(square, Image.Resampling.NEAREST))
        for mask in (marks.anomalous, marks.ignored)
    ]
    assert masks[0] is not None
    return resized, Marks(masks[0], masks[1])


def _in_gallery(gallery: GalleryReader, name: str, digests: dict[str, str], normal: str) -> list[str]:
    """Return the keys of the test images that are in the gallery too, by their content; warns where there are any."""
    snapshot = gallery.snapshot()
    wanted, found = set(digests.values()), set[str]()
    for ids in batched(snapshot.ids().tolist(), TEXTS_TOGETHER):
        found |= wanted.intersection(snapshot.digests(ids))
    known = [key for key, digest in digests.items() if digest in found]
    if known:
        warnings.warn(
            f"{name}: {len(known)} of {len(digests)} test images are in {gallery.path} too "
            f"({few(known)}): the figures say too much; build it from {normal} alone",
            stacklevel=3,
        )
    return known


def write_results(folder: Path, evaluations: Sequence[Evaluation], settings: Sequence[dict[str, Any]]) -> None:
    """Write metrics.json, results.csv with a row a category and a row of means, and the points of the curves.

    Args:
        folder: to write to.
        evaluations: of the categories.
        settings: of each of them.

    Raises:
        OutputError: the folder cannot be written.
    """
    with output_errors(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        values = {**with_settings([one.to_json() for one in evaluations], settings), "mean": means(evaluations)}
        write_json(folder / "metrics.json", values, indent=1)
        rows = [(one.category, one.metrics) for one in evaluations] + [("Mean", means(evaluations))]
        figures = [
            (name, *("" if (m := metrics[one]) is None else f"{m:.6f}" for one in METRICS)) for name, metrics in rows
        ]
        write_csv(folder / "results.csv", [("category", *METRICS), *figures])
    write_curves(folder, {one.category: one.curves for one in evaluations})


def with_settings(categories: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return categories as metrics.json has them, each with its settings, and the settings that all have in common."""
    common = {
        name: value
        for name, value in settings[0].items()
        if all(name in one and one[name] == value for one in settings)
    }
    each = [{**category, "settings": own} for category, own in zip(categories, settings, strict=True)]
    return {"settings": common, "categories": each}


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
    return [known[name] for name in dict.fromkeys(names)] if names else list(categories)
