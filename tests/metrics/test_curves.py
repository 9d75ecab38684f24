"""Curves agree with the metrics that are their areas, and are written whole."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from spade_faiss.metrics.curves import Curve, all_curves, image_roc, write_curves
from spade_faiss.metrics.image import image_metrics
from spade_faiss.metrics.pixel import PixelMetrics


def test_image_roc_by_hand() -> None:
    curve = image_roc([0.9, 0.8, 0.8, 0.1], [True, False, True, False])
    assert curve is not None
    assert curve.fpr.tolist() == [0, 0, 0.5, 1]
    assert curve.value.tolist() == [0, 0.5, 1, 1]


@pytest.mark.parametrize("digits", [1, 9])  # with many ties, and none
def test_the_area_is_the_metric(rng: np.random.Generator, digits: int) -> None:
    scores, labels = rng.normal(size=200).round(digits), rng.random(200) < 0.3
    curve = image_roc(scores, labels)
    assert curve is not None
    area = np.dot(np.diff(curve.fpr), curve.value[1:] + curve.value[:-1]) / 2
    assert area == pytest.approx(image_metrics(scores, labels).values[curve.metric], abs=1e-12)


def test_one_class_has_no_curve(rng: np.random.Generator) -> None:
    assert image_roc([1.0, 2.0], [True, True]) is None
    assert image_roc([], []) is None
    pixel = PixelMetrics()
    pixel.add(rng.random((4, 4), np.float32), np.zeros((4, 4), bool))
    assert all_curves([1.0, 2.0], [False, False], pixel, 0.3) == []


def test_all_curves_name_their_metrics(rng: np.random.Generator) -> None:
    pixel = PixelMetrics()
    pixel.add(rng.random((8, 8), np.float32), np.arange(64).reshape(8, 8) < 9)
    found = all_curves([1.0, 2.0], [False, True], pixel, 0.2)
    assert [curve.metric for curve in found] == ["image_AUROC", "pixel_AUROC", "pixel_AUPRO"]
    assert [curve.limit for curve in found] == [None, None, 0.2]


def test_path_goes_from_the_lower_left_to_the_upper_right() -> None:
    curve = Curve("image_ROC", np.array([0, 0, 0.0001, 0.5, 1]), np.array([0, 0.5, 0.5001, 0.5001, 1]))
    assert curve.path(100, 50) == "M0 50L0 25L50 25L100 0"  # points nearer than a tenth are one


def test_files_hold_every_point(tmp_path: Path) -> None:
    curve = Curve("pixel_PRO", np.array([0, 1 / 3, 1]), np.array([0, 0.75, 1]), 0.3)
    write_curves(tmp_path, {"a,b": [curve], "none": []})
    values = json.loads((tmp_path / "curves.json").read_text())
    assert values == {"a,b": {"pixel_PRO": {"fpr": [0, 0.333333, 1], "value": [0, 0.75, 1]}}, "none": {}}
    with (tmp_path / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["category"], row["curve"], float(row["fpr"]), float(row["value"])) for row in rows] == [
        ("a,b", "pixel_PRO", 0, 0), ("a,b", "pixel_PRO", 0.333333, 0.75), ("a,b", "pixel_PRO", 1, 1),
    ]  # fmt: skip
