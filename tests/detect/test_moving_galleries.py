"""Detectors whose gallery moves on to another commit, or is another one; and image files that have moved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.arrays import Pixels
from spade_faiss.extractors.toy import ToyExtractor
from spade_faiss.options import Patches
from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images
from tests.helpers.recomputed import create


@pytest.fixture
def normal(tmp_path: Path) -> Path:
    return make_images(tmp_path / "normal", 12)


@pytest.mark.parametrize("engine", ["flat", "pyramid", "bounds"])
def test_a_gallery_that_is_built_where_another_one_was(tmp_path: Path, engine: sf.options.Engine) -> None:
    """Whatever a Detector keeps in memory is of the files that were there before, whose names the new ones have."""
    [file] = make_images(tmp_path / "one", 1, seed=99).iterdir()
    gallery, toy = make_gallery(tmp_path / "g", make_images(tmp_path / "first", 6))
    search = sf.SearchOptions(k=3, engine=engine, matching="by_level")
    detector = sf.Detector(gallery, toy, search)
    before = detector.query(file)
    other, _ = make_gallery(tmp_path / "other", make_images(tmp_path / "second", 6, seed=8))
    expected = sf.Detector(other, toy, search).query(file)
    (tmp_path / "g").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "g")
    gallery.refresh()
    found = detector.query(file)
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
    assert not np.array_equal(found.anomaly_map, before.anomaly_map)


def test_a_gallery_of_another_spec_where_the_old_one_was(tmp_path: Path, normal: Path) -> None:
    gallery, toy = make_gallery(tmp_path / "g", normal)
    detector = sf.Detector(gallery, toy)
    make_gallery(tmp_path / "other", normal, sf.FeatureOptions(neighbourhood=3))
    (tmp_path / "g").rename(tmp_path / "old")
    (tmp_path / "other").rename(tmp_path / "g")
    gallery.refresh()
    with pytest.raises(sf.SpecMismatchError, match="neighbourhood: expected 3, found 1"):
        detector.query(normal / "000.png")


def test_a_gallery_that_shrinks_below_what_was_asked_for(tmp_path: Path, normal: Path) -> None:
    gallery, toy = make_gallery(tmp_path / "g", normal)
    detector, of_all = sf.Detector(gallery, toy, sf.SearchOptions(k=5)), sf.Detector(gallery, toy)
    gallery.remove(gallery.keys()[4:])
    with pytest.raises(sf.NotEnoughImagesError, match=r"k: expected at most the number .*, 4, found 5"):
        detector.query(normal / "000.png")
    assert len(of_all.query(normal / "000.png").neighbours.keys) == 4
    gallery.remove(gallery.keys())
    with pytest.raises(sf.NotEnoughImagesError, match="expected normal images"):
        of_all.query(normal / "000.png")


@pytest.mark.parametrize(("ids", "message"), [([5], "removed"), ([500], "0 to"), ([-1], "0 to"), ([0.5], "whole")])
def test_leave_one_out_is_of_images_that_are_there(tmp_path: Path, normal: Path, ids: Any, message: str) -> None:
    gallery, toy = make_gallery(tmp_path / "g", normal)
    gallery.remove([gallery.keys([5])[0]])
    with pytest.raises(sf.OptionError, match=f"ids: expected .*{message}"):
        list(sf.Detector(gallery, toy).leave_one_out(ids))


@pytest.mark.parametrize("as_given", [str, Path, lambda folder: [folder], lambda folder: (str(folder),)])
def test_one_folder_may_be_given_by_itself(tmp_path: Path, normal: Path, as_given: Any) -> None:
    toy = make_gallery(tmp_path / "toy", normal)[1]
    with create(tmp_path / "g", toy) as gallery:
        gallery.add_images(normal, toy)
        moved = normal.rename(tmp_path / "moved")
        given = as_given(moved)
        expected = sf.Detector(gallery, toy, normal=[moved]).query(moved / "000.png").anomaly_map
        np.testing.assert_array_equal(
            sf.Detector(gallery, toy, normal=given).query(moved / "000.png").anomaly_map, expected
        )
        assert gallery.verify(normal=given) == []
        assert len(gallery.read([0], toy, normal=given)) == 3


class Padded(ToyExtractor):
    """Gives rows for images that nobody has asked for, or too few."""

    rows = 1

    def extract(self, pixels: Sequence[Pixels]) -> sf.Features:
        found = super().extract(pixels)
        if self.rows < 0:
            return found[: self.rows]
        levels = [np.concatenate([level[: self.rows], level]) for level in found.levels]
        return sf.Features(np.concatenate([found.image[: self.rows], found.image]), levels)


@pytest.mark.parametrize("rows", [1, 2, -1])
@pytest.mark.parametrize("patches", ["stored", "recompute"])
def test_rows_of_other_images_are_not_taken(tmp_path: Path, normal: Path, patches: Patches, rows: int) -> None:
    toy = make_gallery(tmp_path / "toy", normal)[1]
    with create(tmp_path / "g", toy, patches) as gallery:
        gallery.add_images(normal, toy)
        padded = Padded(sf.FeatureOptions())
        padded.rows = rows
        with pytest.raises(sf.FeatureError, match=r"extractor toy: expected features of \d+, found \d+"):
            sf.Detector(gallery, padded).query_batch([normal / "000.png", normal / "001.png"])
        if patches == "recompute":
            with pytest.raises(sf.FeatureError, match=r"extractor toy: expected features of 3, found \d"):
                gallery.read([0, 1, 2], padded)
