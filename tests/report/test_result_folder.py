"""The folder that a query writes, file by file; test_cli.py has the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.arrays import Pixels
from spade_faiss.detect.query_files import query_files
from spade_faiss.images.sources import find_images
from spade_faiss.ingest.pipeline import Skipped
from spade_faiss.report.colour_scale import colour_scale
from spade_faiss.report.drawing import OUTLINE
from spade_faiss.report.report import Report
from spade_faiss.report.result_folder import ResultFolder
from spade_faiss.report.run_facts import RunFacts
from spade_faiss.store.source_images import SourceImages
from tests.helpers.images import make_images


@pytest.fixture
def detector(tmp_path: Path, toy: sf.Extractor) -> sf.Detector:
    gallery = sf.Gallery.create(tmp_path / "toy.gallery", toy.spec)
    gallery.add_images(make_images(tmp_path / "normal", 12), toy)
    return sf.Detector(gallery, toy, sf.SearchOptions(k=4, kappa=3))


@pytest.fixture
def calibrated(detector: sf.Detector) -> sf.Detector:
    sf.calibrate(detector, 0.1).write(detector.gallery.path)
    return sf.Detector(detector.gallery, detector.extractor, detector.search)


@pytest.fixture
def white(tmp_path: Path) -> Path:
    folder = tmp_path / "test" / "blot"
    folder.mkdir(parents=True)
    Image.new("RGB", (60, 50), "white").save(folder / "white.png")
    return folder.parent


def write(detector: sf.Detector, folder: Path, images: Path, report: Report | None = None) -> list[sf.Detection]:
    found = []
    skipped: list[Skipped] = []
    with ResultFolder(folder, colour_scale(detector), report) as results:
        for source, pixels, detection in query_files(detector, find_images([images]), skipped):
            results.write(source, pixels, detection)
            found.append(detection)
        results.close([*skipped, Skipped(Path("bad.png"), "bad")])
    return found


def test_matches_are_read_back_without_pickle(tmp_path: Path, detector: sf.Detector, white: Path) -> None:
    (detection,) = write(detector, tmp_path / "out", white)
    with np.load(tmp_path / "out" / "matches" / "blot" / "white.png.npz", allow_pickle=False) as found:
        arrays = dict(found)
    assert set(arrays) == {"keys", "neighbour", "row", "column", "sq_distance", "grid", "region"}
    h, w = arrays["grid"]
    assert arrays["neighbour"].shape == arrays["row"].shape == arrays["sq_distance"].shape == (h, w, 3)
    assert arrays["keys"].tolist() == detection.neighbours.keys
    assert arrays["region"].tolist() == [0, 0, 60, 50]
    # From the file alone: the normal patch that a pixel was matched with, and how far it is.
    key = arrays["keys"][arrays["neighbour"][2, 1, 0]]
    neighbour, row, column = detection.matches[2, 1, 0]
    assert key == detection.neighbours.keys[neighbour]
    assert (arrays["row"][2, 1, 0], arrays["column"][2, 1, 0]) == (row, column)
    np.testing.assert_array_equal(arrays["sq_distance"], detection.sq_distances)


def test_overlays_outline_the_regions(tmp_path: Path, calibrated: sf.Detector, white: Path) -> None:
    (detection,) = write(calibrated, tmp_path / "out", white)
    mask = detection.region_mask
    assert mask.any()
    shown = np.asarray(Image.open(tmp_path / "out" / "overlays" / "blot" / "white.png.png"))
    outlined = (shown == OUTLINE).all(axis=2)
    assert outlined.any() == (not mask.all())
    assert not (outlined & mask).any()


def test_the_scale_is_from_the_calibration_where_there_is_one(
    tmp_path: Path, detector: sf.Detector, calibrated: sf.Detector, white: Path
) -> None:
    write(calibrated, tmp_path / "out", white)
    scale = json.loads((tmp_path / "out" / "scale.json").read_text())
    assert calibrated.calibration is not None
    assert scale["pixel_threshold"] == calibrated.calibration.pixel_threshold
    assert scale["high"] == 2 * scale["pixel_threshold"]
    write(detector, tmp_path / "out", white)  # which knows of no calibration
    scale = json.loads((tmp_path / "out" / "scale.json").read_text())
    assert scale["pixel_threshold"] is None
    assert "8 normal maps" in scale["basis"]


def test_the_report_takes_every_image_and_says_what_was_skipped(
    tmp_path: Path, detector: sf.Detector, white: Path
) -> None:
    make_images(white / "more", 2)
    page = tmp_path / "out" / "report.html"
    source_images = SourceImages(detector.gallery.snapshot())
    with Report(page, RunFacts.of(detector), colour_scale(detector), "run", source_images) as report:
        write(detector, tmp_path / "out", white, report)
    text = page.read_text()
    assert all(source.key in text for source in find_images([white]))
    assert text.count("<article") == 3
    assert "1 image was skipped; skipped.jsonl says which" in text


def test_a_run_that_stops_closes_its_files(tmp_path: Path, detector: sf.Detector, white: Path) -> None:
    def stop(image: Pixels) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ResultFolder(tmp_path / "out", colour_scale(detector)) as results:
        stop(np.zeros((8, 8, 3), np.uint8))
    assert results._results.closed


def test_the_page_of_an_earlier_run_goes_before_the_first_image(
    tmp_path: Path, detector: sf.Detector, white: Path
) -> None:
    page, source_images = tmp_path / "out" / "report.html", SourceImages(detector.gallery.snapshot())
    write(detector, tmp_path / "out", white)
    page.write_text("of an earlier run")
    with Report(page, RunFacts.of(detector), colour_scale(detector), "run", source_images) as report:
        ResultFolder(tmp_path / "out", colour_scale(detector), report).__exit__()
    assert not page.exists()
