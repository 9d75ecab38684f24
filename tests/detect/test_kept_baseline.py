"""The scale of normal images that one process measures and the next takes from the user's cache folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.detect import kept_baseline, measure_doubts
from spade_faiss.detect.baseline import Baseline
from spade_faiss.detect.pipeline import Pipeline
from spade_faiss.images.sources import ImageFile
from spade_faiss.system.sealed_json import sealed
from tests.helpers.baselines import SCORE, SEARCH, cache_of_doubts, count_measured
from tests.helpers.command_line import TOY, Spade
from tests.helpers.galleries import make_gallery
from tests.helpers.images import write_images


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return cache_of_doubts(tmp_path, monkeypatch)


@pytest.fixture
def gallery(tmp_path: Path) -> sf.Gallery:
    return make_gallery(tmp_path / "gallery", write_images(tmp_path / "normal", 24))[0]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    return count_measured(monkeypatch)


def detector_of(gallery: sf.Gallery, search: sf.SearchOptions = SEARCH, **more: bool) -> sf.Detector:
    return sf.Detector(gallery, gallery.load_extractor(), search, SCORE, **more)


def kept(gallery: sf.Gallery, search: sf.SearchOptions = SEARCH, **more: bool) -> Baseline:
    """Return what a command would take, or measure and keep."""
    detector = detector_of(gallery, search, **more)
    detector.keep_baseline()
    baseline = detector.baseline()
    assert baseline is not None
    return baseline


def test_it_is_measured_once(gallery: sf.Gallery, cache: Path, measured: Callable[[], int]) -> None:
    first, second = kept(gallery), kept(gallery)
    assert measured() == 1
    assert len(list(cache.iterdir())) == 1
    assert first.to_json() == second.to_json()
    assert len(first.doubts) == 24
    image = next(Path(gallery.path).parent.glob("normal/*"))
    detectors = [detector_of(gallery), detector_of(gallery)]
    assert detectors[1].keep_baseline()
    one, other = (detector.query(image) for detector in detectors)
    assert measured() == 1  # who does not ask for it measures
    assert one.image_score == other.image_score
    np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)


def test_it_is_for_one_commit_and_one_set_of_settings(
    gallery: sf.Gallery, tmp_path: Path, measured: Callable[[], int]
) -> None:
    kept(gallery)
    assert measured() == 1
    kept(gallery, replace(SEARCH, k=9))
    kept(gallery, replace(SEARCH, leave_out=0.2))
    assert measured() == 2
    gallery.trust(gallery.keys()[:1])
    kept(gallery)
    kept(gallery, trusting=False)
    assert measured() == 1
    gallery.distrust(gallery.keys()[:1])
    kept(gallery)
    assert measured() == 0
    gallery.remove(gallery.keys()[:1])
    kept(gallery)
    assert measured() == 1
    shutil.copytree(gallery.path, tmp_path / "other")
    with sf.Gallery.open(tmp_path / "other") as other:
        kept(other)
    assert measured() == 1
    (tmp_path / "link").symlink_to(gallery.path)
    with sf.Gallery.open(tmp_path / "link") as linked:
        kept(linked)
    assert measured() == 0


def test_another_gallery_at_the_same_place(gallery: sf.Gallery, tmp_path: Path, measured: Callable[[], int]) -> None:
    """Of the same generation and number of images."""
    first, path = kept(gallery), gallery.path
    gallery.close()
    shutil.rmtree(path)
    other, _ = make_gallery(path, write_images(tmp_path / "others", 24, seed=7))
    assert kept(other).to_json() != first.to_json()
    assert measured() == 2


@pytest.mark.parametrize(
    "damage",
    ["cut", "empty", "changed", "no JSON", "foreign", "nonsense", "a level less", "large", "folder", "pipe"],
)
def test_a_file_that_is_damaged_or_foreign_is_measured_again(
    gallery: sf.Gallery, cache: Path, measured: Callable[[], int], damage: str
) -> None:
    expected = kept(gallery).to_json()
    [file] = cache.iterdir()
    content = file.read_bytes()
    values = json.loads(content)
    del values["xxh3"]
    baseline = values["baseline"]
    if damage in ("folder", "pipe"):
        file.unlink()
        file.mkdir() if damage == "folder" else os.mkfifo(file)
    else:
        file.write_bytes({
            "cut": content[:-40],
            "empty": b"",
            "changed": content.replace(b'"median": ', b'"median": 1', 1),
            "no JSON": b"\x80" + content,
            "foreign": sealed({**values, "identity": {**values["identity"], "generation": 99}}),
            "a level less": sealed({**values, "baseline": {**baseline, "levels": baseline["levels"][1:]}}),
            "large": content + b" " * kept_baseline.LARGEST,
            "nonsense": sealed({**values, "baseline": {**baseline, "total": [["a"]]}}),
        }[damage])  # fmt: skip
    assert measured() == 1
    assert kept(gallery).to_json() == expected
    assert measured() == 1
    assert kept(gallery).to_json() == expected
    assert measured() == (damage in ("folder", "pipe"))  # which nothing is put in place of


def no_home() -> Path:
    raise RuntimeError("no home")


@pytest.mark.parametrize("is_file", [False, True])
def test_a_cache_folder_that_cannot_be_written(
    gallery: sf.Gallery, tmp_path: Path, measured: Callable[[], int], is_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody needs it, so nobody is told."""
    if is_file:
        (tmp_path / "cache").write_bytes(b"")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    assert kept(gallery).to_json() == kept(gallery).to_json()
    assert measured() == 2


def test_the_oldest_are_dropped(
    gallery: sf.Gallery, cache: Path, measured: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_baseline, "MOST", 2)
    for age, k in zip((300, 200, 100), (5, 6, 7), strict=True):
        before = set(cache.iterdir()) if cache.exists() else set()
        kept(gallery, replace(SEARCH, k=k))
        [new] = set(cache.iterdir()) - before
        os.utime(new, (new.stat().st_mtime - age,) * 2)
    assert len(list(cache.iterdir())) == 2
    assert measured() == 3
    kept(gallery, replace(SEARCH, k=7))
    assert measured() == 0
    kept(gallery, replace(SEARCH, k=5))
    assert measured() == 1


@pytest.mark.filterwarnings("ignore:.*expected at least 2 normal images")
def test_what_a_user_is_warned_of_is_not_kept(tmp_path: Path, cache: Path, measured: Callable[[], int]) -> None:
    gallery, _ = make_gallery(tmp_path / "one", write_images(tmp_path / "normal", 1))
    for _ in range(2):
        kept(gallery)
    assert measured() == 2
    assert not cache.exists()


def test_another_image_that_indexes_do_not_cover_yet(
    gallery: sf.Gallery, tmp_path: Path, measured: Callable[[], int]
) -> None:
    """A backup that was restored and grew otherwise: files of the same names and sizes, of the same generation."""
    toy, path = gallery.load_extractor(), gallery.path
    gallery.add_images(write_images(tmp_path / "more" / "m", 100, seed=5).parent, toy)
    gallery.close()
    shutil.copytree(path, tmp_path / "backup")
    found = []
    for seed in (1, 2):
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "backup", path)
        [image] = write_images(tmp_path / str(seed), 1, seed=seed).iterdir()
        with sf.Gallery.open(path) as opened:
            opened.add_images([ImageFile(image, "x.png")], toy)
            entry = opened.snapshot().manifest.index
            assert entry is not None
            assert entry.images == 124
            kept(opened)
            found.append(opened.generation)
    assert found[0] == found[1]
    assert measured() == 2


def test_a_scale_and_doubts_are_kept_of_one_commit(
    gallery: sf.Gallery, tmp_path: Path, cache: Path, measured: Callable[[], int]
) -> None:
    detector, before = detector_of(gallery), gallery.snapshot()
    assert not detector.keep_baseline()
    sf.find_suspects(detector)
    assert not detector.keep_baseline()  # the doubts are to be found out yet
    gallery.add_images(write_images(tmp_path / "more" / "m", 3, seed=5).parent, gallery.load_extractor())
    assert not cache.exists()
    found = detector.baseline()
    assert found is not None
    assert found.to_json() == kept(gallery).to_json()
    assert len(found.doubts) == 27
    assert measured() == 2
    earlier = detector.pipeline(before).baseline  # kept under that commit's name
    assert earlier is not None
    assert len(earlier.doubts) == 24
    assert kept(gallery).to_json() == found.to_json()
    assert measured() == 1
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("error", [sf.CorruptGalleryError, sf.MemberError])
def test_rows_that_cannot_be_read_share_nothing(
    gallery: sf.Gallery, cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """What no query needs stops none."""

    def damaged(*_: object) -> None:
        raise error("a key is damaged")

    monkeypatch.setattr(sf.Detector, "_images_of", damaged)
    assert len(kept(gallery).doubts) == 24
    assert not cache.exists()


def test_what_is_known_already_is_kept_at_the_next_query(
    gallery: sf.Gallery, cache: Path, measured: Callable[[], int]
) -> None:
    detector = detector_of(gallery)
    detector.baseline()
    assert detector.keep_baseline()
    detector.pipeline()
    assert len(list(cache.iterdir())) == 1
    kept(gallery)
    assert measured() == 1


@pytest.mark.parametrize(("tile", "images", "expected"), [(None, 24, 24 + 24), (32, 24, 64 + 16 * 4), (16, 13, 64)])
def test_how_many_queries_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile: int | None, images: int, expected: int
) -> None:
    """Of images in tiles fewer are compared: each tile is a query."""
    monkeypatch.setattr(measure_doubts, "SAMPLE", 64)
    options = sf.FeatureOptions(tile=tile, overlap=0) if tile else None
    folder = write_images(tmp_path / "normal", images)
    gallery, toy = make_gallery(tmp_path / "gallery", folder, options)
    queries, stored = list[int](), Pipeline.stored

    def and_count(self: Pipeline, ids: Any, *more: Any) -> Any:
        queries.extend(ids := list(ids))
        return stored(self, ids, *more)

    monkeypatch.setattr(Pipeline, "stored", and_count)
    detector = sf.Detector(gallery, toy, SEARCH, SCORE)
    detector.baseline()
    assert len(queries) == detector.to_compare == expected


def test_a_calibration_needs_none(gallery: sf.Gallery, cache: Path, measured: Callable[[], int]) -> None:
    """It takes the figures of the sample, and finds out for itself what is doubted."""
    sf.calibrate(detector_of(gallery), false_alarms=0.2).write(gallery.path)
    assert measured() == 1
    detector = sf.Detector(gallery, gallery.load_extractor())
    assert detector.keep_baseline()
    assert detector.baseline() is not None
    assert measured() == 0
    assert not cache.exists()


def test_commands_share_it(tmp_path: Path, spade: Spade, cache: Path) -> None:
    images = write_images(tmp_path / "normal", 13)
    assert spade("build", tmp_path / "g", images, *TOY).status == 0
    runs = [spade("query", tmp_path / "g", images / "000.png") for _ in range(2)]
    note = "normal images are compared with the others first, for a scale: 26 queries at most"
    assert [note in run.err for run in runs] == [True, False]
    assert runs[0].out == runs[1].out
    assert len(list(cache.iterdir())) == 1
    assert note not in spade("calibrate", tmp_path / "g", "--false-alarms", 0.2).err
