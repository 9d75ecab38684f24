"""Evaluation over images that an iterable gives: the figures of the same images in a folder; wrong items."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.datasets import open_dataset
from spade_faiss.evaluate import EvaluationOptions, evaluate

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out

IMAGES = {
    "path": str,
    "PIL": Image.open,
    "array": lambda path: np.asarray(Image.open(path).convert("RGB")),
}
MASKS = {"path": str, "PIL": Image.open, "array": lambda path: np.asarray(Image.open(path)) > 0}


def samples(dataset: Path, way: str = "array") -> Iterator[tuple[Any, bool, Any]]:
    [category] = open_dataset(dataset)
    for sample in category.test:
        yield IMAGES[way](sample.path), sample.anomalous, MASKS[way](sample.mask) if sample.mask else None


@pytest.mark.parametrize("way", IMAGES)
def test_figures_equal_those_of_the_folder(way: str, detector: sf.Detector, dataset: Path) -> None:
    [category] = open_dataset(dataset)
    own, found = evaluate(detector, category), evaluate(detector, samples(dataset, way))
    assert (found.normal, found.anomalous, found.metrics) == (own.normal, own.anomalous, own.metrics)
    assert [curve.name for curve in found.curves] == [curve.name for curve in own.curves]
    assert found.reasons == {}


def test_at_a_fixed_size_and_with_an_ignored_label(detector: sf.Detector, dataset: Path) -> None:
    [category] = open_dataset(dataset)
    options = EvaluationOptions(metrics_size=24, integration_limit=0.2)
    assert evaluate(detector, samples(dataset), options).metrics == evaluate(detector, category, options).metrics

    def labelled() -> Iterator[tuple[Any, bool, Any]]:
        for image, label, mask in samples(dataset):
            marks = None if mask is None else mask.astype(np.uint8)
            if marks is not None:
                marks[~mask] = 255
            yield image, label, marks

    found = evaluate(detector, labelled(), EvaluationOptions(ignore_label=255))
    assert found.metrics["pixel_AUROC"] is not None
    assert found.metrics["pixel_AUROC"] != evaluate(detector, samples(dataset)).metrics["pixel_AUROC"]


def test_without_masks_there_are_image_metrics(detector: sf.Detector, dataset: Path) -> None:
    found = evaluate(detector, ((image, label, None) for image, label, _ in samples(dataset)))
    whole = evaluate(detector, samples(dataset))
    assert found.metrics["image_AUROC"] == whole.metrics["image_AUROC"]
    assert found.metrics["pixel_AUROC"] is None
    assert found.reasons["pixel_AUROC"] == "the set has no masks"


def test_images_of_the_gallery_are_named(detector: sf.Detector, dataset: Path) -> None:
    normal = sorted((dataset / "train/good").iterdir())
    with pytest.warns(
        UserWarning, match=r"images: 1 of 8 test images are in .*; the figures|images: 1 of 8 test images"
    ):
        found = evaluate(detector, [*samples(dataset), (normal[0], False, None)])
    assert found.in_gallery == [str(normal[0])]


GREY = np.full((40, 48, 3), 90, np.uint8)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((GREY, True), r"expected \(image, label, mask\).*found tuple of 2 as item 7"),
        ({"image": 1, "label": 2, "mask": 3}, "found dict of 3 as item 7"),
        (7, "found int as item 7"),
        ((GREY, "defect", None), "found 'defect' in item 7"),
        ((GREY, 2, None), "found 2 in item 7"),
    ],
)
def test_items_that_are_no_samples_are_named(item: Any, message: str, detector: sf.Detector, dataset: Path) -> None:
    with pytest.raises(sf.ImageError, match=message):
        evaluate(detector, [*samples(dataset), item])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            (GREY, True, np.ones((40, 40), bool)),
            "image 7: its mask: expected 48 x 40 pixels, .* found 40 x 40",
        ),
        ((GREY, True, np.ones((40, 48, 3), bool)), r"image 7: its mask: expected a path, .* found \(40, 48, 3\) bool"),
        ((GREY, True, "gone.png"), r"gone\.png: cannot be read"),
        ((GREY, True, None), "image 7: expected a mask, as the image is anomalous"),
        ((GREY, False, np.ones((40, 48), bool)), "image 7: expected an empty mask, as the image is labelled as normal"),
    ],
)
def test_masks_that_do_not_fit_are_raised_or_left_out(
    item: Any, message: str, detector: sf.Detector, dataset: Path
) -> None:
    with pytest.raises(sf.ImageError, match=message):
        evaluate(detector, [*samples(dataset), item])
    found = evaluate(detector, [*samples(dataset), item], EvaluationOptions(skip_bad_masks=True))
    assert [one.path.name for one in found.skipped_masks] == ["image 7"]
    assert found.normal + found.anomalous == 8  # still in the image metrics
    assert found.metrics["pixel_AUROC"] == evaluate(detector, samples(dataset)).metrics["pixel_AUROC"]


def test_images_that_cannot_be_read_are_raised_or_left_out(detector: sf.Detector, dataset: Path) -> None:
    bad = [(b"", False, None), ("gone.png", True, None)]
    with pytest.raises(sf.ImageError, match="image 0: "):
        evaluate(detector, [*bad, *samples(dataset)])
    found = evaluate(detector, [*bad, *samples(dataset)], EvaluationOptions(skip_bad_images=True))
    assert [str(one.path) for one in found.skipped_images] == ["image 0", "gone.png"]
    assert found.metrics == evaluate(detector, samples(dataset)).metrics


def test_what_needs_names_is_refused(detector: sf.Detector, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(sf.OptionError, match="expected a Category, whose images have names"):
        evaluate(detector, samples(dataset), EvaluationOptions(maps=tmp_path))
    with pytest.raises(sf.ImageError, match=r"expected \(image, label, mask\).*, found NoneType"):
        evaluate(detector, None)  # type: ignore[arg-type]


def test_samples_are_taken_as_they_are_needed(detector: sf.Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = done = ahead = 0
    extract = detector.extractor.extract

    def many() -> Iterator[tuple[Any, bool, Any]]:
        nonlocal taken, ahead
        for number in range(150):
            taken += 1
            ahead = max(ahead, taken - done)
            yield GREY, bool(number % 2), np.eye(40, 48, dtype=bool) if number % 2 else None

    def counted(views: Any) -> Any:
        nonlocal done
        done += len(views)
        return extract(views)

    monkeypatch.setattr(detector.extractor, "extract", counted)
    evaluate(detector, many())
    assert taken == done == 150
    assert ahead <= 4 * detector.extractor.batch_size
