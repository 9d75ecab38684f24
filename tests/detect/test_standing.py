"""A calibration says how much each normal image is doubted by the others; queries leave out none that is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect import measure_doubts
from spade_faiss.detect.baseline import Baseline
from spade_faiss.detect.standing import doubts_of
from spade_faiss.images.sources import ImageFile
from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images

WARY = sf.RECIPES["wary"]
SEARCH = sf.SearchOptions(matching="by_level", kappa=1, distinct=True, leave_out=0.1)
DEFECT = (slice(10, 22), slice(12, 26))
COLOUR = (250, 10, 240)


@pytest.fixture(autouse=True)
def _of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_doubts, "FEWEST", 12)
    monkeypatch.setattr(measure_doubts, "SAMPLE", 11)  # so that only calibrations know of doubts


def with_defect(file: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(file)).copy()
    pixels[DEFECT] = COLOUR
    return pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make 24 images that are alike, the first two with a defect."""
    [first] = make_images(tmp_path / "first", 1).iterdir()
    pixels, rng = np.asarray(Image.open(first)).astype(int), np.random.default_rng(0)
    (tmp_path / "normal").mkdir()
    for number in range(24):
        file = tmp_path / "normal" / f"{number:03}.png"
        noise = rng.integers(-30, 31, pixels.shape)
        Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(file)
        if number < 2:
            Image.fromarray(with_defect(file)).save(file)
    return tmp_path / "normal"


@pytest.fixture
def gallery(tmp_path: Path, folder: Path) -> sf.Gallery:
    return make_gallery(tmp_path / "gallery", folder)[0]


def detector_of(gallery: sf.Gallery, **options: Any) -> sf.Detector:
    return sf.Detector(gallery, gallery.load_extractor(), replace(SEARCH, **options), WARY.score, calibrated=False)


def doubts(calibration: sf.Calibration) -> dict[str, float]:
    assert calibration.baseline is not None
    return dict(calibration.baseline.doubts)


def vouched(calibration: sf.Calibration) -> set[str]:
    return {digest for digest, doubt in doubts(calibration).items() if doubt == 0}


def digests(gallery: sf.Gallery, *keys: str) -> list[str]:
    snapshot = gallery.snapshot()
    return snapshot.digests([row for row in snapshot.find_all(list(keys)) if row is not None])


def parted(gallery: sf.Gallery, calibration: sf.Calibration) -> tuple[list[str], list[str]]:
    """Return the keys of the images that others vouch for, and of those that may be left out."""
    keys, known = gallery.keys(), vouched(calibration)
    good = [key for key, digest in zip(keys, digests(gallery, *keys), strict=True) if digest in known]
    return good, [key for key in keys if key not in good]


def scores_of(detector: sf.Detector, ids: Any) -> np.ndarray:
    return np.array([one.image_score for one in detector.leave_one_out(ids)])


def test_three_quarters_of_the_images_are_vouched_for(gallery: sf.Gallery) -> None:
    """By the scores that they have where any of them may be left out, and the calibration's are those of afterwards."""
    detector = detector_of(gallery)
    before = scores_of(detector, range(24))
    calibration = sf.calibrate(detector, false_alarms=0.2)
    keys = np.array(gallery.keys())
    order = np.argsort(before)
    assert vouched(calibration) == set(digests(gallery, *keys[order[:18]]))
    expected = dict(zip(digests(gallery, *keys[order[18:]]), np.arange(1, 7) / 6, strict=True))
    assert {digest: doubt for digest, doubt in doubts(calibration).items() if doubt} == pytest.approx(expected)
    assert not vouched(calibration) & set(digests(gallery, *sorted(keys)[:2]))  # the defects
    calibration.write(gallery.path)
    after = scores_of(sf.Detector(gallery, detector.extractor), range(24))
    np.testing.assert_allclose(calibration.image_scores, after, rtol=1e-6)
    assert abs(after - before).max() > 0.01


def test_queries_leave_out_only_what_others_do_not_vouch_for(gallery: sf.Gallery, folder: Path) -> None:
    detector = detector_of(gallery)
    calibration = sf.calibrate(detector, false_alarms=0.2)
    calibration.write(gallery.path)
    calibrated = sf.Detector(gallery, detector.extractor)
    files = sorted(folder.iterdir())
    found = calibrated.query(with_defect(files[5]))
    assert {found.neighbours.keys[at] for at in found.left_out} == {file.name for file in files[:2]}
    some = 0
    for file in files[2:]:
        pixels = 255 - np.asarray(Image.open(file))
        left = calibrated.query(pixels)
        names = [left.neighbours.keys[at] for at in left.left_out]
        assert not vouched(calibration) & set(digests(gallery, *names))
        every = detector.query(pixels)
        some += bool(
            vouched(calibration) & set(digests(gallery, *(every.neighbours.keys[at] for at in every.left_out)))
        )
    assert some  # or it would be no test


def test_it_is_kept_with_the_calibration(gallery: sf.Gallery) -> None:
    calibration = sf.calibrate(detector_of(gallery), false_alarms=0.2)
    calibration.write(gallery.path)
    kept = sf.Calibration.read(gallery.path)
    assert kept is not None
    assert doubts(kept) == doubts(calibration)
    assert doubts(kept.promising(0.1)) == doubts(calibration)
    assert len(doubts(kept)) == 24


def test_to_calibrate_again_begins_anew(gallery: sf.Gallery) -> None:
    calibration = sf.calibrate(detector_of(gallery), false_alarms=0.2)
    calibration.write(gallery.path)
    again = sf.calibrate(sf.Detector(gallery, gallery.load_extractor()), false_alarms=0.2)
    assert doubts(again) == doubts(calibration)
    np.testing.assert_array_equal(again.image_scores, calibration.image_scores)


@pytest.mark.parametrize(("options", "sample"), [({"leave_out": 0}, None), ({"k": 9}, None), ({}, 11)])
def test_nothing_is_doubted_where_nothing_is_left_out_or_few_are_compared(
    gallery: sf.Gallery, options: dict[str, Any], sample: int | None
) -> None:
    """It takes one round then, and the calibration is as earlier releases write it."""
    sf.calibrate(detector_of(gallery), false_alarms=0.2).write(gallery.path)
    detector = sf.Detector(gallery, gallery.load_extractor()) if sample else detector_of(gallery, **options)
    calibration = sf.calibrate(detector, false_alarms=0.2, sample=sample)
    assert not doubts(calibration)
    assert calibration.baseline is not None
    assert "doubts" not in calibration.baseline.to_json()


def standing_of(gallery: sf.Gallery, key: str) -> str | float:
    """Return what is known of an image in queries of a calibrated gallery, or how much it is doubted."""
    pipeline = sf.Detector(gallery, gallery.load_extractor()).pipeline()
    found = pipeline.standing(np.array(gallery.snapshot().find_all([key]), np.int64))
    assert found is not None
    if found.known[0]:
        return "trusted" if found.trusted[0] else "known"
    return "not compared" if np.isnan(found.doubts[0]) else float(found.doubts[0])


@pytest.mark.filterwarnings("ignore:.*has changed since it was calibrated:UserWarning")
def test_the_word_is_for_a_content(gallery: sf.Gallery, folder: Path, tmp_path: Path) -> None:
    """Not for what later takes its key, nor for what comes later; for another copy of it, it is."""
    toy = gallery.load_extractor()
    calibration = sf.calibrate(detector_of(gallery), false_alarms=0.2)
    calibration.write(gallery.path)
    [good, *_], [bad, *_] = parted(gallery, calibration)
    doubted = doubts(calibration)[digests(gallery, bad)[0]]
    assert (standing_of(gallery, good), standing_of(gallery, bad)) == ("known", doubted)
    gallery.add_images([ImageFile(folder / good, "copy.png"), ImageFile(folder / bad, "again.png")], toy)
    assert (standing_of(gallery, "copy.png"), standing_of(gallery, "again.png")) == ("known", doubted)
    gallery.trust([bad, good])
    assert (standing_of(gallery, good), standing_of(gallery, bad)) == ("trusted", "trusted")
    gallery.distrust([bad, good])
    Image.fromarray(with_defect(folder / good)).save(tmp_path / "other.png")
    gallery.add_images([ImageFile(tmp_path / "other.png", good)], toy, replace=True)
    assert standing_of(gallery, good) == "not compared"


def test_copies_are_vouched_for_together(gallery: sf.Gallery, folder: Path, tmp_path: Path) -> None:
    """A copy that another file format made has another digest."""
    for file in sorted(folder.iterdir()):
        Image.open(file).save(tmp_path / f"{file.stem}.bmp")
    gallery.add_images(
        [ImageFile(file, file.name) for file in sorted(tmp_path.glob("*.bmp"))], gallery.load_extractor()
    )
    calibration = sf.calibrate(detector_of(gallery), false_alarms=0.2)
    good, _ = parted(gallery, calibration)
    assert len(good) == 36
    assert {key.split(".")[0] for key in good if key.endswith("png")} == {
        key.split(".")[0] for key in good if key.endswith("bmp")
    }


def test_a_gallery_that_is_not_calibrated_knows_of_a_sample(
    gallery: sf.Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all images of a small gallery: as a calibration does. A calibration begins anew, whatever is known."""
    calibration = sf.calibrate(detector_of(gallery), false_alarms=0.2)
    monkeypatch.setattr(measure_doubts, "SAMPLE", 24)
    detector = detector_of(gallery)
    baseline = detector.baseline()
    assert baseline is not None
    assert baseline.doubts == doubts(calibration)
    np.testing.assert_allclose(scores_of(detector, range(24)), calibration.image_scores, rtol=1e-6)
    again = sf.calibrate(detector, false_alarms=0.2, sample=20)
    np.testing.assert_array_equal(
        again.image_scores, sf.calibrate(detector_of(gallery), false_alarms=0.2, sample=20).image_scores
    )
    assert len(doubts(again)) == 20
    monkeypatch.setattr(measure_doubts, "SAMPLE", 16)
    of_some = detector_of(gallery).baseline()
    assert of_some is not None
    assert sorted(of_some.doubts.values()) == [*[0] * 12, 0.25, 0.5, 0.75, 1]


def test_an_audit_does_not_go_by_doubts(gallery: sf.Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what it looks for: whatever is known, and from whomever."""
    expected = sf.find_suspects(detector_of(gallery))
    sf.calibrate(detector_of(gallery), false_alarms=0.2).write(gallery.path)
    monkeypatch.setattr(measure_doubts, "SAMPLE", 24)
    knowing = detector_of(gallery)
    assert doubts_known(knowing)
    calibrated = sf.Detector(gallery, gallery.load_extractor())
    assert doubts_known(calibrated)
    assert sf.find_suspects(knowing) == expected == sf.find_suspects(calibrated)


def doubts_known(detector: sf.Detector) -> int:
    baseline = detector.baseline()
    assert baseline is not None
    return len(baseline.doubts)


def test_a_calibration_without_doubts_stays_as_it_is(gallery: sf.Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds of an earlier release, or of few images, are of queries that knew of none."""
    sf.calibrate(detector_of(gallery), false_alarms=0.2, sample=11).write(gallery.path)
    monkeypatch.setattr(measure_doubts, "SAMPLE", 24)
    baseline = sf.Detector(gallery, gallery.load_extractor()).baseline()
    assert baseline is not None
    assert not baseline.doubts


def test_of_a_sample_the_others_may_be_left_out(gallery: sf.Gallery) -> None:
    calibration = sf.calibrate(detector_of(gallery), false_alarms=0.2, sample=12)
    assert (len(vouched(calibration)), len(doubts(calibration))) == (9, 12)


@pytest.mark.parametrize(
    "values",
    [None, 1, "abc", [1], ["a"], {"a": None}, {"a": "0"}, {"a": -0.1}, {"a": 1.1}, {"a": float("nan")}, {"a": []}],
)
def test_doubts_that_are_none(gallery: sf.Gallery, values: Any) -> None:
    baseline = sf.calibrate(detector_of(gallery), false_alarms=0.2).baseline
    assert baseline is not None
    written = baseline.to_json()
    assert Baseline.from_json(written).doubts == baseline.doubts
    with pytest.raises((TypeError, ValueError)):
        Baseline.from_json(written | {"doubts": values})


def test_ties_are_doubted_alike() -> None:
    assert doubts_of(np.array([1.0, 1, 1, 1])).tolist() == [1, 1, 1, 1]  # not told apart, and none is vouched for
    assert doubts_of(np.array([1.0, 2, 2, 0])).tolist() == [0, 1, 1, 0]
    assert doubts_of(np.arange(100.0))[[74, 75, 99]] == pytest.approx([0, 0.04, 1])
    assert len(doubts_of(np.empty(0))) == 0


def test_an_image_in_tiles_is_doubted_as_a_whole(folder: Path, tmp_path: Path) -> None:
    """By its highest tile; a copy in another format, whose digest differs, with it."""
    for number, file in enumerate(sorted(folder.iterdir())):
        if number >= 14:
            file.unlink()
        elif number < 3:
            Image.open(file).save(folder / f"{file.stem}.bmp")
    gallery, _ = make_gallery(tmp_path / "tiles", folder, sf.FeatureOptions(tile=32, overlap=8))
    detector = detector_of(gallery)
    calibration = sf.calibrate(detector, false_alarms=0.2)
    assert len(gallery.snapshot().ids()) > 17
    assert len(calibration.image_scores) == 14
    keys = np.array(gallery.keys())
    found = dict(zip(keys, digests(gallery, *keys), strict=True))
    assert set(doubts(calibration)) == set(found.values())
    by_image = {key: doubts(calibration)[digest] for key, digest in found.items()}
    assert {by_image[key] for key in keys if key.split(".")[0] == "001"} == {doubts(calibration)[found["001.png"]]}
