"""Galleries of few images: normal ones are compared as new ones are, though each has fewer others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect.leave_out import LeaveOut, Left
from spade_faiss.detect.level_matches import LevelMatches
from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images

WARY = sf.RECIPES["wary"]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many neighbours each search from now on may leave out."""
    seen: list[int] = []
    call = LeaveOut.__call__

    def counting(self: LeaveOut, found: Sequence[LevelMatches]) -> Left:
        seen.append(self.most)
        return call(self, found)

    monkeypatch.setattr(LeaveOut, "__call__", counting)
    return seen


@pytest.mark.parametrize(
    ("images", "group", "k", "expected"),
    [(10, None, None, 1), (20, None, None, 2), (24, r"^\d\d", 20, 2), (30, r"^\d\d", None, 3)],
)
@pytest.mark.parametrize("copies", [0, 9])
def test_normal_images_leave_out_as_many_as_a_query(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    images: int,
    group: str | None,
    k: int | None,
    expected: int,
    copies: int,
) -> None:
    """Else thresholds, and what is rare of normal images, would be of another search than that of a query.

    In a gallery of K images or fewer, one that is compared with the others has fewer neighbours, and so it has
    without its group. Copies are no neighbours.
    """
    folder = make_images(tmp_path / "normal", images)
    for file in sorted(folder.iterdir())[:copies]:
        Image.open(file).save(folder / f"{file.stem} again.bmp")
    gallery, toy = make_gallery(tmp_path / "gallery", folder)
    detector = sf.Detector(gallery, toy, replace(WARY.search, k=k), WARY.score)
    seen = counted(monkeypatch)
    [file] = make_images(tmp_path / "one", 1, seed=99).iterdir()
    detector.query(file)
    baseline = detector.baseline()
    assert baseline is not None
    assert len(baseline.rises) == images
    sf.calibrate(detector, false_alarms=0.2, group=group)
    assert set(seen) == {expected}
    assert len(seen) >= 2 * images + 1  # the query, the baseline's images, and the calibration's


@pytest.mark.parametrize(("places", "expected"), [("same", {2}), ("any", {5})])
def test_normal_tiles_leave_out_as_many_as_a_query(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: str, expected: set[int]
) -> None:
    folder = make_images(tmp_path / "normal", 20, size=(64, 64))
    gallery, toy = make_gallery(tmp_path / "gallery", folder, sf.FeatureOptions(tile=32))
    detector = sf.Detector(gallery, toy, replace(WARY.search, tile_places=places), WARY.score)
    seen = counted(monkeypatch)
    detector.baseline()
    [file] = make_images(tmp_path / "one", 1, 99, (64, 64)).iterdir()
    detector.query(file)
    assert set(seen) == expected


@pytest.mark.parametrize("recipe", ["robust", "wary"])
def test_an_image_that_is_the_only_one_of_its_size(tmp_path: Path, recipe: str) -> None:
    """Where tiles are compared at their places, it says nothing of others, and has no threshold of its own."""
    normal = make_images(tmp_path / "normal", 60, size=(32, 64))
    make_images(tmp_path / "normal" / "odd", 1, seed=1, size=(32, 160))
    [query] = make_images(tmp_path / "one", 1, seed=99, size=(32, 64)).iterdir()
    gallery, toy = make_gallery(tmp_path / "g", normal, sf.FeatureOptions(tile=32, overlap=0))
    given = replace(sf.RECIPES[recipe].search, k=6, tile_places="same"), sf.RECIPES[recipe].score
    detector = sf.Detector(gallery, toy, *given)
    assert np.isfinite(detector.query(query).image_score)
    with pytest.raises(sf.NotEnoughImagesError, match=r"images of the size of 'odd/000\.png', found none"):
        sf.calibrate(detector, 0.1)
    gallery.remove(["odd/000.png"])
    assert len(sf.calibrate(sf.Detector(gallery, toy, *given), 0.1).image_scores) == 60
