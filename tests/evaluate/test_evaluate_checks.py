"""What is looked at before the first query: broken images, masks that do not fit, masks that look wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.datasets.layouts import open_dataset
from spade_faiss.detect.detector import Detector
from spade_faiss.evaluate import EvaluationOptions, check_categories, evaluate
from tests.helpers.command_line import TOY, Spade
from tests.helpers.datasets import make_set

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


BAD = {"test/good/001.png": b"", "test/square/002.png": b"not an image", "test/square/003.png": b"\x89PNG\r\n\x1a\n"}


def break_images(folder: Path) -> None:
    for key, content in BAD.items():
        (folder / key).write_bytes(content)


def no_query(*_: object) -> None:
    raise AssertionError("an image was queried")


def test_all_broken_images_are_named_before_the_first_query(
    detector: sf.Detector, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LeiaLi/ReLoBlur issue 4: an image that no decoder knows, met in the middle of a run."""
    break_images(dataset)
    (category,) = open_dataset(dataset)
    monkeypatch.setattr(Detector, "stream", no_query)
    with pytest.raises(sf.ImageError) as caught:
        evaluate(detector, category)
    said = str(caught.value)
    assert said.startswith("3 of 7 test images cannot be read (skip_bad_images=True leaves them out): ")
    assert all(str(dataset / key) in said for key in BAD)
    assert "\n" not in said


def test_broken_images_are_left_out(detector: sf.Detector, dataset: Path) -> None:
    break_images(dataset)
    (category,) = open_dataset(dataset)
    found = evaluate(detector, category, EvaluationOptions(skip_bad_images=True))
    assert {item.path for item in found.skipped_images} == {dataset / key for key in BAD}
    assert (found.normal, found.anomalous, found.skipped_masks) == (2, 2, [])
    for key in BAD:
        (dataset / key).unlink()
    (category,) = open_dataset(dataset)
    assert evaluate(detector, category).metrics == found.metrics


def test_an_image_that_goes_after_the_check_is_left_out(detector: sf.Detector, dataset: Path) -> None:
    (category,) = open_dataset(dataset)
    options = EvaluationOptions(skip_bad_images=True)
    [checked] = check_categories([category], options)
    (dataset / "test/good/001.png").unlink()
    found = evaluate(detector, category, options, checked=checked)
    assert [item.path.name for item in found.skipped_images] == ["001.png"]
    assert (found.normal, found.anomalous) == (2, 4)


def test_no_image_can_be_read(detector: sf.Detector, dataset: Path) -> None:
    for path in (dataset / "test").rglob("*.png"):
        path.write_bytes(b"x")
    (category,) = open_dataset(dataset)
    found = evaluate(detector, category, EvaluationOptions(skip_bad_images=True))
    assert len(found.skipped_images) == 7
    assert set(found.metrics.values()) == {None}


def test_masks_that_do_not_fit_are_named_before_the_first_query(
    detector: sf.Detector, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("001", "002"):
        Image.new("L", (48, 41), 255).save(dataset / f"ground_truth/square/{name}_mask.png")
    (category,) = open_dataset(dataset)
    monkeypatch.setattr(Detector, "stream", no_query)
    with pytest.raises(sf.ImageError, match=r"2 of 7 test images have no mask that fits \(skip_bad_masks=True leaves"):
        evaluate(detector, category)


def test_the_command_line_checks_all_categories_first(tmp_path: Path, spade: Spade) -> None:
    for name in ("one", "two"):
        made = make_set(tmp_path / "set" / name)
        assert spade("build", tmp_path / f"{name}.gallery", made / "train", *TOY).status == 0
    break_images(tmp_path / "set/two")
    words = (tmp_path / "{category}.gallery", tmp_path / "set", "--quiet", "--output", tmp_path / "out")
    run = spade("evaluate", *words)
    assert run.status == 1
    assert "error: 3 of 14 test images cannot be read (--skip-bad-images leaves them out): " in run.err
    assert not (tmp_path / "out").exists()
    run = spade("evaluate", *words, "--skip-bad-images")
    assert run.status == 3
    assert run.err.count("spade-faiss: skipped: ") == 3
    one, two = json.loads((tmp_path / "out/metrics.json").read_text())["categories"]
    assert one["skipped_images"] == []
    assert {item["path"] for item in two["skipped_images"]} == {str(tmp_path / "set/two" / key) for key in BAD}
    assert one["metrics"]["image_AUROC"] is not None


def test_masks_that_mark_nearly_all_are_named(detector: sf.Detector, dataset: Path) -> None:
    for path in (dataset / "ground_truth/square").iterdir():
        mask = np.zeros((40, 48), np.uint8)
        mask[3:5, 3:5] = 255
        Image.fromarray(255 - mask).save(path)
    (category,) = open_dataset(dataset)
    said = r"tiles: 4 of 4 masks mark nearly all of their image; .*\(test/square/000\.png, .* and 1 more\)"
    with pytest.warns(UserWarning, match=said):
        evaluate(detector, category)


def test_two_valued_pictures_among_test_images_are_named(detector: sf.Detector, dataset: Path) -> None:
    """Masks under names of their own: nothing but their values tells."""
    mask = dataset / "ground_truth/square/000_mask.png"
    (dataset / "test/good/1000.png").write_bytes(mask.read_bytes())
    (category,) = open_dataset(dataset)
    with pytest.warns(UserWarning, match=r"1 of 8 test images have two values only, .*\(test/good/1000\.png\)"):
        evaluate(detector, category)


def test_sets_of_two_valued_photos_are_photos(detector: sf.Detector, dataset: Path) -> None:
    rng = np.random.default_rng(0)
    for path in (dataset / "test").rglob("*.png"):
        Image.fromarray(((rng.random((40, 48)) < 0.3) * 255).astype(np.uint8)).save(path)
    (category,) = open_dataset(dataset)
    evaluate(detector, category)  # a warning would be an error here


def test_pixels_of_a_label_are_left_out(detector: sf.Detector, dataset: Path, tmp_path: Path, spade: Spade) -> None:
    (category,) = open_dataset(dataset)
    plain = evaluate(detector, category).metrics
    for path in (dataset / "ground_truth/square").iterdir():
        mask = (np.array(Image.open(path)) > 0).astype(np.uint8)
        Image.fromarray(mask).save(path)
    with pytest.warns(
        UserWarning, match="ignore_label=254: expected masks .* found none in 4 masks: nothing is ignored"
    ):
        assert evaluate(detector, category, EvaluationOptions(ignore_label=254)).metrics == plain
    for path in (dataset / "ground_truth/square").iterdir():
        mask = np.array(Image.open(path))
        mask[30:] = 255  # void, where nothing is to be found
        Image.fromarray(mask).save(path)
    void = evaluate(detector, category).metrics
    ignored = evaluate(detector, category, EvaluationOptions(ignore_label=255))
    assert abs(ignored.metrics["pixel_AUROC"] - plain["pixel_AUROC"]) < 0.02
    assert plain["pixel_AUROC"] - void["pixel_AUROC"] > 0.1
    resized = evaluate(detector, category, EvaluationOptions(ignore_label=255, metrics_size=32)).metrics
    assert abs(resized["pixel_AUROC"] - plain["pixel_AUROC"]) < 0.05
    words = ("-k", 3, "--image-score", "map_max", "--quiet", "--json", "--ignore-label", 255)
    run = spade("evaluate", detector.gallery.path, dataset, *words)
    assert json.loads(run.out)[0]["metrics"] == pytest.approx(ignored.metrics)


def test_a_label_that_is_all_there_is(detector: sf.Detector, dataset: Path) -> None:
    (category,) = open_dataset(dataset)
    with pytest.warns(UserWarning, match="4 of 4 masks mark nothing but ignore_label=255"):
        found = evaluate(detector, category, EvaluationOptions(ignore_label=255))
    assert found.metrics["pixel_AUROC"] is None


@pytest.mark.parametrize("wrong", [-1, 2.5, "255", True])
def test_labels_out_of_range(wrong: object) -> None:
    with pytest.raises(sf.OptionError, match="ignore_label: expected"):
        EvaluationOptions(ignore_label=wrong)  # type: ignore[arg-type]


# --- a gallery's choice of bits -------------------------------------------------------------------------------------


def make_deep(folder: Path, bits: int, count: int = 6) -> Path:
    """Write a set of grey images of so many bits in 16, which do not say so; those of the kind cut have a mark."""
    rng = np.random.default_rng(bits)
    for part in ("train/good", "test/good", "test/cut"):
        (folder / part).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 2 ** (bits - 1), (40, 48), dtype=np.uint16)
            if part == "test/cut":
                pixels[10:20, 10:20] = 2**bits - 1
            Image.fromarray(pixels).save(folder / part / f"{number:03}.png")
    return folder


def detector_of_bits(path: Path, dataset: Path, bits: int) -> sf.Detector:
    extractor = sf.load_extractor("toy", options=sf.FeatureOptions(bits=bits))
    gallery = sf.Gallery.create(path, extractor.spec)
    gallery.add_images(dataset / "train/good", extractor, strict=True)
    return sf.Detector(gallery, extractor, sf.SearchOptions(k=3), sf.ScoreOptions(image_score="map_max"))


def make_too_bright(path: Path, bits: int) -> None:
    pixels = np.array(Image.open(path))
    pixels[0, 0] = 2**bits
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
def test_images_are_checked_with_the_bits_of_the_gallery(
    tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as 16 bits, all could be read, and the run broke off at the first that the query refuses."""
    made = make_deep(tmp_path / "set", bits)
    detector = detector_of_bits(tmp_path / "g", made, bits)
    (category,) = open_dataset(made)
    assert evaluate(detector, category).metrics["image_AUROC"] == pytest.approx(1)  # a warning would be an error here
    for name in ("test/cut/003.png", "test/good/005.png"):
        make_too_bright(made / name, bits)
    found = evaluate(detector, category, EvaluationOptions(skip_bad_images=True))
    assert {item.path for item in found.skipped_images} == {made / "test/cut/003.png", made / "test/good/005.png"}
    monkeypatch.setattr(Detector, "stream", no_query)
    with pytest.raises(sf.ImageError, match=rf"^2 of 12 test images cannot be read .* values of {bits} bits") as caught:
        evaluate(detector, category)
    assert str(made / "test/cut/003.png") in str(caught.value)


def test_dark_images_of_many_values_are_no_masks(tmp_path: Path) -> None:
    """9 bits read as 16 have two values: as masks have."""
    made = make_deep(tmp_path / "set", 9)
    for path in (made / "test").rglob("*.png"):
        if path.name > "001.png":  # most images are bright: their own values do not excuse the others
            pixels = np.random.default_rng(0).integers(0, 256, (40, 48), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    (category,) = open_dataset(made)
    [checked] = check_categories([category], bits=[9])
    assert checked.two_valued == []
    with pytest.warns(UserWarning, match="2 of 12 test images have two values only"):
        check_categories([category])


def test_each_category_is_checked_with_the_bits_of_its_own_gallery(tmp_path: Path, spade: Spade) -> None:
    for bits in (10, 12):
        made = make_deep(tmp_path / f"set/of {bits}", bits)
        words = (tmp_path / f"of {bits}.gallery", made / "train", *TOY, "--bits", bits)
        assert spade("build", *words, "--quiet").status == 0
    words = (tmp_path / "{category}.gallery", tmp_path / "set", "--quiet", "--image-score", "map_max")
    run = spade("evaluate", *words)
    assert (run.status, run.err.count("cannot be read")) == (0, 0)
    for bits in (10, 12):
        make_too_bright(tmp_path / f"set/of {bits}/test/good/004.png", bits)
    run = spade("evaluate", *words, "--output", tmp_path / "out")
    assert run.status == 1
    assert "error: 2 of 24 test images cannot be read (--skip-bad-images leaves them out): " in run.err
    assert all(f"expected values of {bits} bits" in run.err for bits in (10, 12))
    assert not (tmp_path / "out").exists()
    run = spade("evaluate", *words, "--shots", 3)
    assert (run.status, "2 of 24 test images cannot be read" in run.err) == (1, True)
    run = spade("evaluate", *words, "--skip-bad-images")
    assert (run.status, run.err.count("spade-faiss: skipped: ")) == (3, 2)
