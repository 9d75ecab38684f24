"""Audit: the image that does not belong comes first, with a picture of why."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect.audit import GREY, suspect_images
from spade_faiss.store.source_images import SourceImages
from tests.helpers.command_line import TOY, Spade
from tests.helpers.galleries import make_gallery

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


@pytest.fixture
def contaminated(tmp_path: Path) -> Path:
    """Sixteen nearly equal images, one of them with a defect."""
    folder, rng = tmp_path / "normal", np.random.default_rng(0)
    folder.mkdir()
    for number in range(16):
        pixels = rng.integers(100, 120, (40, 48, 3), dtype=np.uint8)
        if number == 11:
            pixels[10:20, 30:40] = (250, 20, 20)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return folder


@pytest.mark.parametrize("image_score", ["knn", "map_max", "map"])
def test_the_contamination_comes_first(tmp_path: Path, contaminated: Path, image_score: sf.options.ImageScore) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", contaminated)
    found = sf.find_suspects(sf.Detector(gallery, extractor, score=sf.ScoreOptions(image_score=image_score)))
    assert [suspect.outlier_score for suspect in found] == sorted((one.outlier_score for one in found), reverse=True)
    assert {suspect.key for suspect in found} == {f"{number:03}.png" for number in range(16)}
    assert found[0].key == "011.png"
    assert found[0].outlier_score > 3 * found[1].outlier_score


def test_a_copy_vouches_for_a_contamination_unless_they_are_grouped(tmp_path: Path, contaminated: Path) -> None:
    copy = np.asarray(Image.open(contaminated / "011.png")).copy()
    copy[0, 0] = 0
    Image.fromarray(copy).save(contaminated / "111.png")
    gallery, extractor = make_gallery(tmp_path / "g", contaminated)
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=3))
    alone = {suspect.key: suspect for suspect in sf.find_suspects(detector)}
    grouped = sf.find_suspects(detector, group=r"\d(11)\.png")
    assert {grouped[0].key, grouped[1].key} == {"011.png", "111.png"}
    assert grouped[0].map_max > 10 * alone["011.png"].map_max


def test_pictures_are_of_the_view_and_grey_where_the_file_is_missing(tmp_path: Path, contaminated: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", contaminated)
    detector = sf.Detector(gallery, extractor)
    worst = sf.find_suspects(detector, sample=16)[:1]
    [(_, missing, detection)] = suspect_images(detector, worst, SourceImages(gallery.snapshot()))
    [(_, there, _)] = suspect_images(detector, worst, SourceImages(gallery.snapshot(), [contaminated]))
    assert missing.shape == there.shape == (*detection.anomaly_map.shape, 3)
    assert (missing == GREY).all()
    row, column = np.unravel_index(detection.anomaly_map.argmax(), detection.anomaly_map.shape)
    assert there[row, column, 0] > 200


@pytest.mark.slow
def test_the_command(tmp_path: Path, contaminated: Path, spade: Spade) -> None:
    path, out = tmp_path / "g", tmp_path / "out"
    spade("build", path, contaminated, *TOY, "--quiet")
    run = spade("audit", path, "--top", 3, "--output", out, "--normal", contaminated, "--quiet")
    assert (run.status, run.err) == (0, "")
    lines = run.out.splitlines()
    assert len(lines) == 4
    assert lines[1].endswith("011.png")
    page = (out / "report.html").read_text()
    assert "Audit of g" in page
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["key"] for line in results] == [line.split()[-1] for line in lines[1:]]
    assert (out / "overlays" / "011.png.png").is_file()
    assert spade("audit", path, "--top", 0).status == 2
    line = json.loads(spade("audit", path, "--top", 1, "--json", "--quiet").out)
    assert set(line) == {"key", "image_score", "map_max", "oddity"}


@pytest.mark.parametrize(
    ("args", "expected"),
    [(("--group", "("), "expected a regular expression"), (("--sample", 0), "expected whole numbers >= 1")],
)
def test_mistakes(
    tmp_path: Path,
    contaminated: Path,
    spade: Spade,
    args: tuple[object, ...],
    expected: str,
) -> None:
    spade("build", tmp_path / "g", contaminated, *TOY, "--quiet")
    assert expected in spade("audit", tmp_path / "g", *args).error


def test_a_gallery_of_one_image(tmp_path: Path, contaminated: Path) -> None:
    for path in sorted(contaminated.iterdir())[1:]:
        path.unlink()
    gallery, extractor = make_gallery(tmp_path / "g", contaminated)
    with pytest.raises(sf.NotEnoughImagesError):
        sf.find_suspects(sf.Detector(gallery, extractor))
