"""Images whose features the gallery cannot hold, as a float16 that overflows: skipped by name, the others kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.images.sources import find_images
from spade_faiss.ingest.estimate import estimate
from tests.helpers.workers import Moody, create, moody_of, write_images_with_white

WHITE = "000.png"  # whose features do not fit


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images_with_white(tmp_path / "images", 5, WHITE)


@pytest.fixture
def refusing(tmp_path: Path) -> Moody:
    return moody_of(tmp_path, "refusing")


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_image_is_skipped_and_named(tmp_path: Path, images: Path, refusing: Moody, count: int) -> None:
    gallery = create(tmp_path / "g")
    report = gallery.add_images(images, refusing, workers=count)
    assert [skipped.reason for skipped in report.skipped] == [f"{images / WHITE}: not white"]
    assert (report.added, gallery.keys()) == (4, [f"{number:03d}.png" for number in range(1, 5)])
    assert gallery.verify() == []


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_strict_names_it(tmp_path: Path, images: Path, refusing: Moody, count: int) -> None:
    (images / WHITE).rename(images / "002.png")
    gallery = create(tmp_path / "g")
    with pytest.raises(sf.FeatureError, match=r"002\.png: not white$"):
        gallery.add_images(images, refusing, strict=True, workers=count)
    assert gallery.keys()[:1] == ["001.png"]


def test_a_network_that_fits_no_image_stops_the_run(tmp_path: Path, images: Path, refusing: Moody) -> None:
    for path in images.iterdir():
        Image.new("RGB", (40, 40), "white").save(path)
    with pytest.raises(sf.FeatureError, match=r"000\.png: not white$"):
        create(tmp_path / "g").add_images(images, refusing)


def test_it_is_not_what_an_estimate_measures(tmp_path: Path, images: Path, refusing: Moody) -> None:
    assert estimate(find_images([images]), refusing, tmp_path).images == 5
