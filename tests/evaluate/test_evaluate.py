"""Evaluation over a labelled set in MVTec AD's layout: figures against plain recomputation, masks, files, mistakes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.datasets.layouts import open_dataset
from spade_faiss.detect import scorer
from spade_faiss.evaluate import METRICS, EvaluationOptions, evaluate
from spade_faiss.metrics.pixel import PIXEL_METRICS
from tests.helpers.command_line import TOY, Spade
from tests.helpers.datasets import make_set
from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


def auroc(normal: np.ndarray, anomalous: np.ndarray) -> float:
    """The chance that an anomalous score is the higher one, ties counted half."""
    difference = anomalous[:, None] - normal[None, :]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def test_figures_equal_plain_ones(detector: sf.Detector, dataset: Path) -> None:
    (category,) = open_dataset(dataset)
    found = evaluate(detector, category)
    assert (found.category, found.normal, found.anomalous) == ("tiles", 3, 4)
    detections = detector.query_batch([sample.path for sample in category.test])
    labels = np.array([sample.anomalous for sample in category.test])
    scores = np.array([detection.image_score for detection in detections])
    assert found.metrics["image_AUROC"] == pytest.approx(auroc(scores[~labels], scores[labels]))
    pixels = np.concatenate([detection.anomaly_map.ravel() for detection in detections])
    masks = np.concatenate([category.mask_of(sample, (40, 48)).ravel() for sample in category.test])
    assert masks.sum() == (12 + 13 + 14 + 15) * 20
    assert found.metrics["pixel_AUROC"] == pytest.approx(auroc(pixels[~masks], pixels[masks]), abs=1e-6)
    assert all(0.5 < value <= 1 for value in found.metrics.values() if value is not None)
    assert set(found.metrics) == set(METRICS)
    assert found.reasons == {}


def test_at_a_fixed_size_the_figures_are_near(detector: sf.Detector, dataset: Path) -> None:
    (category,) = open_dataset(dataset)
    own, fixed = evaluate(detector, category), evaluate(detector, category, EvaluationOptions(metrics_size=32))
    assert own.metrics["image_AUROC"] == fixed.metrics["image_AUROC"]
    assert own.metrics["pixel_AUROC"] != fixed.metrics["pixel_AUROC"]
    assert own.metrics["pixel_AUROC"] == pytest.approx(fixed.metrics["pixel_AUROC"], abs=0.02)


def test_a_mask_of_another_size_is_an_error_or_left_out(detector: sf.Detector, dataset: Path) -> None:
    bad = dataset / "ground_truth" / "square" / "002_mask.png"
    Image.new("L", (48, 41), 255).save(bad)
    (category,) = open_dataset(dataset)
    with pytest.raises(sf.ImageError, match=r"002\.png.*mask.*002_mask\.png"):
        evaluate(detector, category)
    found = evaluate(detector, category, EvaluationOptions(skip_bad_masks=True))
    assert [item.path.name for item in found.skipped_masks] == ["002.png"]
    assert found.anomalous == 4  # still in the image metrics
    assert found.metrics["pixel_AUROC"] is not None


def test_one_class_is_none_with_the_reason(detector: sf.Detector, dataset: Path) -> None:
    for path in (dataset / "test" / "good").iterdir():
        path.unlink()
    (category,) = open_dataset(dataset)
    found = evaluate(detector, category)
    assert found.metrics["image_AUROC"] is None
    assert "image_AUROC" in found.reasons
    assert found.metrics["pixel_AUROC"] is not None


def test_a_set_without_masks_has_image_metrics_only(detector: sf.Detector, dataset: Path) -> None:
    shutil.rmtree(dataset / "ground_truth")
    (category,) = open_dataset(dataset)
    found = evaluate(detector, category)
    assert {name for name, value in found.metrics.items() if value is None} == set(PIXEL_METRICS)
    assert found.reasons == dict.fromkeys(PIXEL_METRICS, "the set has no masks")


def test_masks_that_mark_nothing(detector: sf.Detector, dataset: Path) -> None:
    for path in (dataset / "ground_truth" / "square").iterdir():
        Image.new("L", (48, 40)).save(path)
    (category,) = open_dataset(dataset)
    found = evaluate(detector, category)
    assert found.reasons == dict.fromkeys(PIXEL_METRICS, "no pixel is anomalous: there is nothing to tell apart")
    assert {name for name, value in found.metrics.items() if value is None} == set(PIXEL_METRICS)


def test_images_that_are_all_the_same_score_the_same(tmp_path: Path) -> None:
    for number, folder in enumerate(("train/good", "train/good", "test/good", "test/grey")):
        path = tmp_path / "grey" / folder / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (90, 90, 90)).save(path, compress_level=number)
    (category,) = open_dataset(tmp_path / "grey")
    gallery, extractor = make_gallery(tmp_path / "g", tmp_path / "grey" / "train")
    found = evaluate(sf.Detector(gallery, extractor), category)
    assert found.metrics["image_AUROC"] == 0.5  # both classes are there, and nothing tells them apart
    assert found.metrics["image_AP"] == 0.5


def test_a_map_with_nan_is_an_error_that_names_the_image(
    detector: sf.Detector, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scorer.anomaly_map

    def with_nan(*args: Any) -> np.ndarray:
        scores = whole(*args)
        scores[3, 4] = np.nan
        return scores

    monkeypatch.setattr(scorer, "anomaly_map", with_nan)
    (category,) = open_dataset(dataset)
    with pytest.raises(sf.FeatureError, match=r"test/good/000\.png: expected finite .*, found nan at \(3, 4\)"):
        evaluate(detector, category)


def test_no_map_overwrites_another(tmp_path: Path, detector: sf.Detector, dataset: Path) -> None:
    for folder in ("a", "b"):
        make_images(dataset / "test" / "good" / folder, 1, seed=ord(folder))
    (category,) = open_dataset(dataset)
    evaluate(detector, category, EvaluationOptions(maps=tmp_path / "maps"))
    assert len(list((tmp_path / "maps").rglob("*.tiff"))) == len(category.test) == 9
    assert (tmp_path / "maps" / "tiles" / "test" / "good" / "b" / "000.tiff").exists()
    Image.open(dataset / "test" / "good" / "001.png").save(dataset / "test" / "good" / "001.bmp")
    (category,) = open_dataset(dataset)
    with pytest.raises(sf.ImageError, match=r"001\.png: expected a name of its own for its map, found .*001\.bmp"):
        evaluate(detector, category, EvaluationOptions(maps=tmp_path / "maps"))
    evaluate(detector, category)  # without maps there is no harm in it


def test_test_images_in_the_gallery_are_warned_of(detector: sf.Detector, dataset: Path) -> None:
    train = dataset / "train" / "good" / "005.png"
    (dataset / "test" / "good" / "other name.png").write_bytes(train.read_bytes())
    (category,) = open_dataset(dataset)
    with pytest.warns(UserWarning, match=r"tiles: 1 of 8 test images are in .* too \(test/good/other name\.png\)"):
        found = evaluate(detector, category)
    assert found.in_gallery == ["test/good/other name.png"]
    detector.gallery.remove(["005.png"])
    assert evaluate(detector, category).in_gallery == []  # and no warning


def test_settings_out_of_range() -> None:
    for name, values in (("metrics_size", [0, 2.5, "3"]), ("integration_limit", [0, 1.1, "0.3", None, True])):
        for value in values:
            with pytest.raises(sf.OptionError, match=f"{name}: expected"):
                EvaluationOptions(**{name: value})
    assert EvaluationOptions(integration_limit=np.float64(0.3), metrics_size=np.int32(9)) == EvaluationOptions(0.3, 9)


def test_maps_that_were_not_searched_are_not_evaluated(detector: sf.Detector, dataset: Path) -> None:
    gallery, toy, knn = detector.gallery, detector.extractor, sf.ScoreOptions(image_score="knn")
    sf.calibrate(sf.Detector(gallery, toy, score=knn), 0.2).write(gallery.path)
    cascade = sf.Detector(gallery, toy, sf.SearchOptions(localise="suspicious"))
    [category] = open_dataset(dataset)
    for given in (category, iter([])):
        with pytest.raises(sf.OptionError, match="localise: expected 'all', as metrics take the map of every image"):
            evaluate(cascade, given)


def test_the_command_line(tmp_path: Path, detector: sf.Detector, dataset: Path, spade: Spade) -> None:
    gallery, out = detector.gallery.path, tmp_path / "out"
    options = ("-k", 3, "--image-score", "map_max", "--quiet")
    run = spade("evaluate", gallery, dataset, "--output", out, "--maps", "tiff", *options)
    assert (run.status, run.err) == (0, "")
    (category,) = open_dataset(dataset)
    expected = evaluate(detector, category).metrics
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["category"] for row in rows] == ["tiles", "Mean"]
    assert float(rows[0]["pixel_AUPRO"]) == pytest.approx(expected["pixel_AUPRO"], abs=1e-6)
    assert json.loads((out / "metrics.json").read_text())["mean"] == pytest.approx(expected)
    curves = json.loads((out / "curves.json").read_text())["tiles"]
    assert set(curves) == {"image_ROC", "pixel_ROC", "pixel_PRO"}
    roc = np.array([curves["pixel_ROC"]["fpr"], curves["pixel_ROC"]["value"]])
    area = np.dot(np.diff(roc[0]), roc[1, 1:] + roc[1, :-1]) / 2
    assert area == pytest.approx(expected["pixel_AUROC"], abs=1e-3)
    assert (out / "curves.csv").read_text().startswith("category,curve,fpr,value\ntiles,image_ROC,0.0,")
    report = (out / "report.html").read_text()
    assert report.count("<article") == 7
    assert report.count("ground truth outlined") == 4
    assert "not found" not in report  # the normal images are those of the set
    assert f"pixel PRO</b>, area {expected['pixel_AUPRO']:.4f}" in report
    with Image.open(out / "anomaly_maps" / "tiles" / "test" / "square" / "001.tiff") as image:
        scores = np.asarray(image)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, detector.query(dataset / "test" / "square" / "001.png").anomaly_map)
    printed = json.loads(spade("evaluate", gallery, dataset, "--json", *options).out)
    assert printed[0]["metrics"] == pytest.approx(expected)


def test_a_report_has_verdicts_where_the_gallery_is_calibrated(
    tmp_path: Path, detector: sf.Detector, dataset: Path, spade: Spade
) -> None:
    gallery, out, options = detector.gallery.path, tmp_path / "out", ("-k", 3, "--image-score", "map_max", "--quiet")
    assert spade("calibrate", gallery, *options, "--false-alarms", 0.1).status == 0
    printed = spade("evaluate", gallery, dataset, *options, "--output", out).out
    report = (out / "report.html").read_text()
    assert 'class="verdict anomalous"' in report
    assert "pixel threshold</text>" in report
    (out / "report.html").unlink()
    assert spade("evaluate", gallery, dataset, *options, "--output", out, "--no-report").out == printed
    assert not (out / "report.html").exists()


@pytest.mark.slow
def test_several_categories_have_a_gallery_each(tmp_path: Path, spade: Spade) -> None:
    for name in ("one", "two"):
        make_set(tmp_path / "set" / name)
        images = tmp_path / "set" / name / "train" / "good"
        assert spade("build", tmp_path / f"{name}.gallery", images, *TOY).status == 0
    out = tmp_path / "out"
    run = spade("evaluate", tmp_path / "{category}.gallery", tmp_path / "set", "--quiet", "--output", out)
    assert run.status == 0
    for name in ("one", "two"):
        assert f"Evaluation of {name}" in (out / name / "report.html").read_text()
    assert not (out / "report.html").exists()
    lines = run.out.splitlines()
    assert [line.split()[0] for line in lines] == ["category", "one", "two", "Mean"]
    assert lines[1].split()[1:] == lines[2].split()[1:] == lines[3].split()[1:]
    only = spade("evaluate", tmp_path / "one.gallery", tmp_path / "set", "--category", "one", "--quiet")
    assert only.out.splitlines()[1].split()[1:] == lines[1].split()[1:]
    assert "expected {category} in the path" in spade("evaluate", tmp_path / "one.gallery", tmp_path / "set").error
    assert "expected one of one, two, found 'three'" in spade(
        "evaluate", tmp_path / "one.gallery", tmp_path / "set", "--category", "three"
    ).error  # fmt: skip
