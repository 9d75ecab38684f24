"""Images whose features the gallery cannot hold, as a float16 that overflows: skipped by name, the others kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.arrays import Pixels
from spade_faiss.extractors.toy import ToyExtractor
from spade_faiss.images.sources import find_images
from spade_faiss.ingest.estimate import estimate
from tests.helpers.workers import BATCH, Moody, create, moody_of, toy, write_images_with_white

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


# What is wrong with the features of the white image: what is said of them, after its name
BAD = {
    "nan image": "image feature of image 0 of 1: expected finite values, found NaN or infinity",
    "inf image": "image feature of image 0 of 1: expected finite values, found NaN or infinity",
    "nan level": "level 1 of image 0 of 1: expected finite values, found NaN or infinity",
    "inf level": "level 1 of image 0 of 1: expected finite values, found NaN or infinity",
    "large level": "level 1: ",  # of float16
    "too many": "extractor toy: expected features of 1, found 2",
    "none": "extractor toy: expected features of 1, found 0",
}


class Wrong(ToyExtractor):
    """The toy, with features for a white view that no gallery holds."""

    def __init__(self, what: str) -> None:
        super().__init__(sf.FeatureOptions(batch_size=BATCH))
        self.what = what

    def extract(self, views: Sequence[Pixels]) -> sf.Features:
        found = super().extract(views)
        white = [row for row, view in enumerate(views) if view.min() == 255]
        image, levels = found.image.copy(), [level.astype(np.float32) for level in found.levels]
        if self.what == "too many" and white:
            return sf.Features(np.repeat(image, 2, axis=0), [np.repeat(level, 2, axis=0) for level in levels])
        if self.what == "none" and white:
            return found[:0]
        value, _, place = self.what.partition(" ")
        (image if place == "image" else levels[1])[white, 0] = {"nan": np.nan, "inf": np.inf, "large": 1e6}.get(
            value, 1
        )
        return sf.Features(image, levels)


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", BAD)
def test_features_that_no_gallery_holds_are_named_by_their_image(
    tmp_path: Path, images: Path, what: str, count: int
) -> None:
    (images / WHITE).rename(images / "002.png")
    gallery = create(tmp_path / "g")
    report = gallery.add_images(images, Wrong(what), workers=count)
    [skipped] = report.skipped
    assert skipped.path == images / "002.png"
    assert skipped.reason.startswith(f"{images / '002.png'}: {BAD[what]}")
    assert (report.added, gallery.keys(), gallery.verify()) == (3, ["001.png", "003.png", "004.png"], [])
    assert gallery.add_images(images, toy(), workers=count).added == 1  # it goes on from there


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["nan image", "inf level"])
def test_what_was_built_before_them_stays(tmp_path: Path, images: Path, what: str, count: int) -> None:
    """All of a batch have such features: the extractor is at fault, and the run ends with the first image's name."""
    (images / WHITE).replace(images / "003.png")
    (images / "004.png").write_bytes((images / "003.png").read_bytes())
    gallery = create(tmp_path / "g", images_a_shard=2)
    with pytest.raises(sf.FeatureError, match=r"003\.png: .* found NaN or infinity$"):
        gallery.add_images(images, Wrong(what), workers=count)
    assert set(gallery.keys()) <= {"001.png", "002.png"}
    assert gallery.verify() == []
    gallery.add_images(images, toy(), workers=count)
    assert gallery.keys() == ["001.png", "002.png", "003.png", "004.png"]
    assert gallery.verify() == []


def test_they_are_named_among_images_of_an_iterable(tmp_path: Path) -> None:
    pictures = [
        (f"row {number}", np.full((40, 40, 3), number * 85, np.uint8)) for number in range(4)
    ]  # the last: white
    gallery = create(tmp_path / "g")
    report = gallery.add(pictures, Wrong("nan level"))
    assert [skipped.reason for skipped in report.skipped] == [f"row 3: {BAD['nan level']}"]
    assert gallery.keys() == ["row 0", "row 1", "row 2"]
