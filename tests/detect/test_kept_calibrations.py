"""Calibrations that are written, read by later releases, and outlived by their galleries."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.detect.calibration import Calibration
from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images


@pytest.fixture
def normal(tmp_path: Path) -> Path:
    return make_images(tmp_path / "normal", 20)


def test_a_detector_whose_gallery_moves_on_says_so_once_for_each_commit(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    detector = sf.Detector(gallery, extractor)
    sf.calibrate(detector, 0.1).write(gallery.path)
    detector = sf.Detector(gallery, extractor)
    earlier = gallery.snapshot()
    for key in ("003.png", "004.png"):
        gallery.remove([key])
        with pytest.warns(UserWarning, match=r"generation \d, now \d\); calibrate again"):
            detector.query(normal / "005.png")
        detector.query(normal / "005.png")  # a warning would be an error
    next(detector.pipeline(earlier).stream([normal / "005.png"]))


@pytest.mark.parametrize("way", ["distrust", "trusting=False"])
@pytest.mark.parametrize("recipe", ["wary", "paper"])
@pytest.mark.filterwarnings("ignore:.*found 1:UserWarning")
def test_the_promise_is_that_of_the_trusted_images(tmp_path: Path, normal: Path, way: str, recipe: str) -> None:
    """Without them new images score higher than those that were calibrated; with more, lower."""
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    options = sf.RECIPES[recipe].search, sf.RECIPES[recipe].score
    gallery.trust(["003.png", "004.png"])
    sf.calibrate(sf.Detector(gallery, extractor, *options), 0.2).write(gallery.path)
    gallery.trust(["005.png"])
    assert sf.Detector(gallery, extractor, *options).calibration is not None
    if way == "distrust":
        gallery.distrust(["004.png"])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sf.Detector(gallery, extractor, *options, trusting=way == "distrust")
    number = {"distrust": 1, "trusting=False": 2}[way]
    expected = f"{number} of the 2 images that were trusted then are not trusted now; calibrate again"
    assert [expected in str(one.message) for one in told] == [True] * (recipe == "wary")


def test_a_calibration_of_an_earlier_release_names_no_trusted_images(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    found = sf.calibrate(sf.Detector(gallery, extractor), 0.1)
    values = {name: value for name, value in found.to_json().items() if name not in ("trusted", "method")}
    assert replace(sf.Calibration.from_json(values), method=found.method).to_json() == found.to_json()
    for wrong in ("abc", [1], None, {"a": "b"}):
        with pytest.raises(ValueError, match="expected a list of digests"):
            sf.Calibration.from_json(values | {"trusted": wrong})


@pytest.mark.parametrize(
    ("recipe", "images", "group", "is_wrong"),
    [
        ("robust", 12, r"^00", True),
        ("robust", 12, None, False),
        ("paper", 12, r"^00", False),
        ("wary", 12, None, True),
        ("wary", 60, None, False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found 1:UserWarning")
def test_thresholds_that_an_earlier_release_made_wrong(
    tmp_path: Path, recipe: str, images: int, group: str | None, is_wrong: bool
) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", make_images(tmp_path / "normal", images))
    options = sf.RECIPES[recipe].search, sf.RECIPES[recipe].score
    found = sf.calibrate(sf.Detector(gallery, extractor, *options), 0.2, group=group)
    found.write(gallery.path)
    sf.Detector(gallery, extractor)  # no warning
    replace(found, method=1).write(gallery.path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sf.Detector(gallery, extractor, *options)
    assert ["was wrong here" in str(one.message) for one in told] == [True] * is_wrong


def test_a_detector_of_suspicious_images_can_be_calibrated_again(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    first = sf.calibrate(sf.Detector(gallery, extractor), 0.2)
    first.write(gallery.path)
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(localise="suspicious"))
    assert sf.calibrate(detector, 0.2).to_json() == first.to_json()
    assert detector.uncalibrated().query(normal / "000.png").is_searched


@pytest.mark.parametrize("rate", [np.float32(0.2), np.float64(0.2), "0.2", None, 0, 1, True, float("nan")])
def test_a_rate_is_a_number_that_can_be_written(tmp_path: Path, normal: Path, rate: Any) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    detector = sf.Detector(gallery, extractor)
    if not isinstance(rate, np.generic):
        for wrong in (lambda: sf.calibrate(detector, rate), lambda: sf.calibrate(detector, 0.2).promising(rate)):
            with pytest.raises(sf.OptionError, match="false_alarms: expected a rate between 0 and 1, found"):
                wrong()
        return
    found = sf.calibrate(detector, rate)
    found.promising(rate).write(str(gallery.path))
    again = sf.Calibration.read(str(gallery.path))
    assert again is not None
    assert again.false_alarms == pytest.approx(0.2)


@pytest.mark.parametrize("group", [re.compile("0"), 3, b"0", ["0"]])
def test_a_group_is_a_text(tmp_path: Path, normal: Path, group: Any) -> None:
    detector = sf.Detector(*make_gallery(tmp_path / "g", normal))
    for ask in (partial(sf.calibrate, false_alarms=0.2), sf.find_suspects):
        with pytest.raises(sf.OptionError, match="group: expected a regular expression as text, found"):
            ask(detector, group=group)


def test_no_calibration_is_written_where_no_gallery_is(tmp_path: Path) -> None:
    found = Calibration(1, {}, 0.5, None, np.ones(3), np.ones(3))
    with pytest.raises(sf.GalleryNotFoundError, match=r"typo\.gallery: expected the folder of a gallery, found none"):
        found.write(tmp_path / "typo.gallery")
    assert not list(tmp_path.iterdir())
