"""Evaluation over images that an iterable gives: the figures of the same images in a folder; wrong items."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

import spade_faiss as sf
from spade_faiss.datasets import open_dataset
from spade_faiss.datasets.masks import given_marks, read_marks
from spade_faiss.evaluate import EvaluationOptions, evaluate
from tests.helpers.datasets import detector_over, make_set

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out

IMAGES = {
    "path": str,
    "PIL": Image.open,
    "array": lambda path: np.asarray(Image.open(path).convert("RGB")),
}
MASKS = {"path": str, "PIL": Image.open, "array": lambda path: np.asarray(Image.open(path)) > 0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_set(tmp_path_factory.mktemp("given") / "tiles")


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> sf.Detector:
    return detector_over(tmp_path_factory.mktemp("given") / "tiles.gallery", dataset)


@pytest.fixture(scope="module")
def whole(detector: sf.Detector, dataset: Path) -> dict[str, float | None]:
    """The metrics of the set."""
    return evaluate(detector, samples(dataset)).metrics


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


def test_at_a_fixed_size_and_with_an_ignored_label(
    detector: sf.Detector, dataset: Path, whole: dict[str, float | None]
) -> None:
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
    assert found.metrics["pixel_AUROC"] != whole["pixel_AUROC"]
    with pytest.warns(UserWarning, match="ignore_label=9: expected masks with pixels of this value, found none in"):
        evaluate(detector, labelled(), EvaluationOptions(ignore_label=9))


def test_without_masks_there_are_image_metrics(
    detector: sf.Detector, dataset: Path, whole: dict[str, float | None]
) -> None:
    found = evaluate(detector, ((image, label, None) for image, label, _ in samples(dataset)))
    assert found.metrics["image_AUROC"] == whole["image_AUROC"]
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
        ((GREY, True), r"expected \(image, label, mask\).*found tuple of 2 as item 0"),
        ({"image": 1, "label": 2, "mask": 3}, "found dict of 3 as item 0"),
        (7, "found int as item 0"),
        ((GREY, "defect", None), "found 'defect' in item 0"),
        ((GREY, 2, None), "found 2 in item 0"),
    ],
)
def test_items_that_are_no_samples_are_named(item: Any, message: str, detector: sf.Detector) -> None:
    with pytest.raises(sf.ImageError, match=message):
        evaluate(detector, [item])


MASK = np.eye(40, 48, dtype=bool)


def closed() -> Image.Image:
    image = Image.fromarray(MASK)
    image.close()
    return image


UNFIT = [
    ((GREY, True, np.ones((40, 40), bool)), "image 1: its mask: expected 48 x 40 pixels, .* found 40 x 40"),
    ((GREY, True, np.ones((40, 48, 3), bool)), r"image 1: its mask: expected a path, .* found \(40, 48, 3\) bool"),
    ((GREY, True, "gone.png"), r"gone\.png: cannot be read"),
    ((GREY, True, np.where(MASK, np.nan, 0)), "image 1: its mask: expected numbers, found NaN"),
    ((GREY, True, closed()), "image 1: its mask: cannot be read: "),
    ((GREY, True, None), "image 1: expected a mask, as the image is anomalous"),
    ((GREY, False, MASK), "image 1: expected an empty mask, as the image is labelled as normal"),
]


@pytest.mark.parametrize(("item", "message"), UNFIT)
def test_masks_that_do_not_fit_are_raised(item: Any, message: str, detector: sf.Detector) -> None:
    with pytest.raises(sf.ImageError, match=message):
        evaluate(detector, [(GREY, True, MASK), item])


def test_masks_that_do_not_fit_are_left_out(
    detector: sf.Detector, dataset: Path, whole: dict[str, float | None]
) -> None:
    items = [*samples(dataset), *(item for item, _ in UNFIT)]
    found = evaluate(detector, items, EvaluationOptions(skip_bad_masks=True))
    assert [one.path.name for one in found.skipped_masks] == [f"image {number}" for number in range(7, 14)]
    assert found.normal + found.anomalous == 14  # still in the image metrics
    assert found.metrics["pixel_AUROC"] == whole["pixel_AUROC"]


def test_a_picture_as_a_mask_is_read_as_its_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # upside down
    marks = MASK.astype(np.uint8) * 200
    Image.fromarray(marks).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(marks).save(tmp_path / "lossy.jpg")
    found = given_marks(Image.open(tmp_path / "turned.png"), "a", MASK.shape)
    np.testing.assert_array_equal(found.anomalous, MASK[::-1, ::-1])
    np.testing.assert_array_equal(found.anomalous, read_marks(tmp_path / "turned.png").anomalous)
    for mask in (tmp_path / "lossy.jpg", Image.open(tmp_path / "lossy.jpg")):
        with pytest.raises(sf.ImageError, match="expected a lossless format, as ignore_label=9 needs exact labels"):
            given_marks(mask, "a", MASK.shape, ignore_label=9)


def test_images_that_cannot_be_read_are_raised_or_left_out(
    detector: sf.Detector, dataset: Path, whole: dict[str, float | None]
) -> None:
    bad = [(b"", False, None), ("gone.png", True, None)]
    with pytest.raises(sf.ImageError, match="image 0: "):
        evaluate(detector, [*bad, *samples(dataset)])
    found = evaluate(detector, [*bad, *samples(dataset)], EvaluationOptions(skip_bad_images=True))
    assert [str(one.path) for one in found.skipped_images] == ["image 0", "gone.png"]
    assert found.metrics == whole


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


def test_masks_after_anomalous_images_without_one(
    detector: sf.Detector, dataset: Path, whole: dict[str, float | None]
) -> None:
    """All other masks count, as do the normal images before the first of them."""
    items = [(GREY, True, None), *samples(dataset)]
    with pytest.raises(sf.ImageError, match="expected no mask, as anomalous images before it have none, found one"):
        evaluate(detector, items)
    found = evaluate(detector, items, EvaluationOptions(skip_bad_masks=True))
    assert [one.path.name for one in found.skipped_masks] == ["image 0"]
    assert "expected a mask, as later images have one" in found.skipped_masks[0].reason
    assert found.metrics["pixel_AUROC"] == whole["pixel_AUROC"]
    bare = [(image, label, None) for image, label, _ in samples(dataset)]
    found = evaluate(detector, bare, EvaluationOptions(skip_bad_masks=True))
    assert (found.skipped_masks, found.reasons["pixel_AUROC"]) == ([], "the set has no masks")
