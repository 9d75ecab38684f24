"""`export` after a query, and what it says of folders that are no results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spade_faiss.report.results import Results
from tests.helpers.command_line import Spade


@pytest.fixture
def results(tmp_path: Path, gallery: Path, spade: Spade) -> Path:
    assert spade("calibrate", gallery, "--false-alarms", "0.2", "--quiet").status == 0
    Image.new("RGB", (48, 40), "white").save(tmp_path / "white.png")
    query = ("query", gallery, tmp_path / "white.png", "--output", tmp_path / "results", "--no-report", "--quiet")
    assert spade(*query).status == 0
    return tmp_path / "results"


def test_a_query_is_exported(tmp_path: Path, results: Path, gallery: Path, spade: Spade) -> None:
    run = spade("export", results, "--format", "coco", "-o", tmp_path / "regions.json", "--label", "blot")
    assert (run.status, run.out) == (0, f"1 image -> {tmp_path / 'regions.json'}\n")
    found = json.loads((tmp_path / "regions.json").read_text())
    [result] = Results.open(results)
    assert [one["area"] for one in found["annotations"]] == [region.area for region in result.regions] != []
    assert found["categories"][0]["name"] == "blot"
    info = json.loads(spade("info", gallery, "--json").out)
    assert found["images"][0]["generation"] == info["generation"]
    assert spade("export", results, "--format", "masks", "-o", tmp_path / "masks").status == 0
    mask = np.asarray(Image.open(tmp_path / "masks" / "white.png.png"))
    np.testing.assert_array_equal(mask > 0, result.labels() > 0)


@pytest.mark.parametrize("several", [False, True])
def test_results_without_thresholds_are_refused(tmp_path: Path, gallery: Path, spade: Spade, several: bool) -> None:
    """They have no regions, as if every image were normal; a calibration afterwards does not change them."""
    for number in range(1 + several):
        (tmp_path / "queried").mkdir(exist_ok=True)
        Image.new("RGB", (48, 40), "white").save(tmp_path / "queried" / f"{number}.png")
    query = ("query", gallery, tmp_path / "queried", "--output", tmp_path / "results", "--no-report", "--quiet")
    assert spade(*query).status == 0
    for calibrated in (False, True):
        if calibrated:
            assert spade("calibrate", gallery, "--false-alarms", "0.2", "--quiet").status == 0
        for kind in ("coco", "labelstudio", "cvat", "masks"):
            run = spade("export", tmp_path / "results", "--format", kind, "-o", tmp_path / "labels")
            assert run.status == 1
            assert run.error.endswith("so that there are no regions; run `calibrate`, then `query` again")
            assert not (tmp_path / "labels").exists()
    assert (
        spade(*query).status == spade("export", tmp_path / "results", "--format", "coco", "-o", tmp_path / "l").status
    )
    assert (tmp_path / "l").exists()


def test_what_cannot_be_exported(tmp_path: Path, gallery: Path, spade: Spade) -> None:
    run = spade("export", gallery, "--format", "coco", "-o", tmp_path / "regions.json")
    assert run.status == 1
    assert run.error.endswith("with a results.jsonl, found none; give the folder of --output")
    assert spade("export", gallery, "--format", "yolo", "-o", tmp_path / "x").status == 2
