"""Thresholds from normal images: the quantile by hand, the promise by simulation, the cascade, and what goes stale."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect.calibration import FILE, Calibration, conformal_threshold, images_needed
from spade_faiss.detect.normal_scores import leave_out_groups
from spade_faiss.detect.regions import find_regions
from spade_faiss.system.sealed_json import sealed
from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images


@pytest.mark.parametrize(
    ("n", "alpha", "rank"),
    [(9, 0.1, 9), (19, 0.1, 18), (99, 0.01, 99), (100, 0.05, 96), (4, 0.5, 3), (1, 0.5, 1), (10, 1 - 1e-15, 1)],
)
def test_the_rank_worked_out_by_hand(n: int, alpha: float, rank: int) -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert conformal_threshold(scores, alpha) == rank


@pytest.mark.parametrize(("alpha", "needed"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.5, 1), (0.3, 3)])
def test_too_few_images_say_how_many_it_takes(alpha: float, needed: int) -> None:
    assert images_needed(alpha) == needed
    conformal_threshold(np.zeros(needed), alpha)
    with pytest.raises(sf.OptionError, match=rf"expected at least {needed} normal images .* found {needed - 1}"):
        conformal_threshold(np.zeros(needed - 1), alpha)


@pytest.mark.parametrize("n", [1, 2, 6, 9, 13, 19, 36, 99, 761, 10**4 + 3, 123_456])
def test_the_rate_that_too_few_images_are_told_is_one_that_they_can_promise(n: int) -> None:
    scores = np.arange(float(n))
    with pytest.raises(sf.OptionError, match="ask for a rate of at least") as refused:
        conformal_threshold(scores, 0.5 / (n + 1))
    rate = float(str(refused.value).rpartition(" ")[2])
    assert conformal_threshold(scores, rate) == n - 1
    assert 1 <= rate * (n + 1) < 1.01


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, float("nan"), 1e-320])
def test_a_rate_that_is_none(alpha: float) -> None:
    with pytest.raises(sf.OptionError, match="expected a rate between 0 and 1"):
        conformal_threshold(np.zeros(100), alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_the_promise_holds_on_average(alpha: float) -> None:
    """Over many draws, the share of new scores above the threshold is alpha at most, and not far below it."""
    rng = np.random.default_rng(1)
    rates = [np.mean(rng.gamma(2, size=200) > conformal_threshold(rng.gamma(2, size=99), alpha)) for _ in range(500)]
    assert alpha - 0.01 < np.mean(rates) < alpha + 0.005


def make_calibration(image_scores: list[float], map_maxima: list[float], alpha: float = 0.5) -> sf.Calibration:
    return sf.Calibration(1, {}, alpha, None, np.array(image_scores), np.array(map_maxima))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(0, 1e6), st.floats(0, 1e6))
def test_scaled_scores_are_monotone_with_the_threshold_at_one_half(scores: list[float], a: float, b: float) -> None:
    found = make_calibration(scores, scores)
    low, high = sorted((found.scaled(a), found.scaled(b)))
    assert 0 <= low <= high <= 1
    assert (found.scaled(min(a, b)), found.scaled(max(a, b))) == (low, high)
    assert found.scaled(found.image_threshold) == 0.5
    assert found.p_value(min(a, b)) >= found.p_value(max(a, b)) > 0


def test_p_values_count_the_new_image_in() -> None:
    found = make_calibration([1, 2, 3, 4], [1, 2, 3, 4])
    assert [found.p_value(score) for score in (0, 1, 2.5, 4, 5)] == [1, 1, 0.6, 0.4, 0.2]


def test_the_cascade() -> None:
    found = make_calibration([1, 2, 3], [10, 20, 30])  # thresholds 2 and 20
    scores = np.zeros((8, 9), np.float32)
    scores[1:3, 2:5] = 25
    scores[6, 7] = 40
    assert found.judge(2, 40, scores).verdict == "normal"  # not suspicious, whatever the map
    assert found.judge(3, 20, scores).verdict == "normal"  # suspicious, but not at the size of calibration
    assert found.judge(3, 25, np.minimum(scores, 20)).verdict == "normal"  # no pixel above
    judged = found.judge(3, 40, scores)
    assert judged.verdict == "anomalous"
    assert judged.regions == [sf.Region((7, 6, 8, 7), 1, 40.0), sf.Region((2, 1, 5, 3), 6, 25.0)]
    assert [region.area for region in found.judge(3, 40, scores, min_region=2).regions] == [6]
    assert found.judge(3, 40, scores, min_region=7).verdict == "normal"


def test_regions_touch_at_corners() -> None:
    assert [region.area for region in find_regions(np.eye(5, dtype=np.float32), 0.5)[0]] == [5]
    assert find_regions(np.zeros((4, 4), np.float32), 0.5)[0] == []


@pytest.fixture
def normal(tmp_path: Path) -> Path:
    return make_images(tmp_path / "normal", 20)


def test_a_calibrated_gallery_judges(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    options = sf.SearchOptions(k=3)
    detector = sf.Detector(gallery, extractor, options)
    image = normal / "003.png"
    assert detector.query(image).verdict is None
    found = sf.calibrate(detector, 0.1)
    assert len(found.image_scores) == 20
    assert found.image_threshold == np.sort(found.image_scores)[18]
    found.write(gallery.path)

    judging = sf.Detector(sf.Gallery.open(gallery.path), extractor, options)
    assert judging.query(image).verdict == "normal"
    noise = np.random.default_rng(0).integers(0, 2, (64, 64, 1), dtype=np.uint8).repeat(3, axis=2) * 255
    noise[:32] = 255
    detection = judging.query(noise)
    assert detection.verdict == "anomalous"
    assert detection.judgement is not None
    assert detection.judgement.p_value == 1 / 21
    assert detection.judgement.score > 0.5
    left, top, right, bottom = detection.regions[0].box
    assert detection.anomaly_map[top:bottom, left:right].max() == np.float32(detection.regions[0].peak)


def test_leave_one_out_scores_are_those_of_a_gallery_without_the_image(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal, sf.FeatureOptions(image_size=(48, 32)))
    found = sf.calibrate(sf.Detector(gallery, extractor, sf.SearchOptions(k=3)), 0.1)
    image = np.asarray(Image.open(normal / "007.png").resize((32, 48), Image.Resampling.BILINEAR))
    gallery.remove(["007.png"])
    alone = sf.Detector(gallery, extractor, sf.SearchOptions(k=3)).query(image)
    assert found.image_scores[7] == pytest.approx(alone.image_score, rel=1e-5)
    assert found.map_maxima[7] == pytest.approx(alone.map_max, rel=1e-5)


def test_groups_are_left_out_together(tmp_path: Path, normal: Path) -> None:
    for path in sorted(normal.iterdir()):  # two pictures of every part
        path.rename(normal / f"part{path.stem}-a.png")
        pixels = np.array(Image.open(normal / f"part{path.stem}-a.png"))
        pixels[:8, :8] ^= 8  # else it is a copy, which is left out whatever the group
        Image.fromarray(pixels).save(normal / f"part{path.stem}-b.png")
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=1))
    alone = sf.calibrate(detector, 0.1).image_scores  # the twin is there: too kind
    for group in (r"part\d+", r"part(\d+)-"):
        assert sf.calibrate(detector, 0.1, group=group).image_scores.min() > alone.max()
    with pytest.raises(sf.OptionError, match="regular expression"):
        sf.calibrate(detector, 0.1, group="(")
    with pytest.raises(sf.NotEnoughImagesError):
        sf.calibrate(detector, 0.1, group="part")  # all of one group: nothing to compare with


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (r"cam1_(\d+)|cam2_(\d+)", [[0, 1], [0, 1], [2], [3, 4], [3, 4], [5]]),
        (r"cam1_(\d)(\d)|cam(2)", [[0, 1, 2], [0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5], [3, 4, 5]]),
        (r"cam\d_\d+", [[0, 1], [0, 1], [2], [3, 4], [3, 4], [5]]),
        (r"x|cam1_(\d+)", [[0, 1], [0, 1], [2], [3], [4], [5]]),
    ],
)
def test_groups_of_several_alternatives(tmp_path: Path, group: str, expected: list[list[int]]) -> None:
    """The group that takes part names them; what matches nothing is alone."""
    folder = make_images(tmp_path / "normal", 6)
    names = ["cam1_10_a", "cam1_10_b", "cam1_11_a", "cam2_20_a", "cam2_20_b", "cam2_21_a"]
    for path, name in zip(sorted(folder.iterdir()), names, strict=True):
        path.rename(folder / f"{name}.png")
    gallery, _ = make_gallery(tmp_path / "g", folder)
    found = leave_out_groups(gallery.snapshot(), range(6), group)
    assert [one.tolist() for one in found] == expected


def test_a_sample_is_seeded(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=1))
    one, again, other = (sf.calibrate(detector, 0.2, sample=10, seed=seed).image_scores for seed in (0, 0, 1))
    assert len(one) == 10
    assert (one == again).all()
    assert (one != other).any()
    for wrong in ({"sample": 0}, {"sample": -3}, {"seed": -1}):
        with pytest.raises(sf.OptionError, match="sample, seed: expected whole numbers"):
            sf.calibrate(detector, 0.2, **wrong)


def test_it_goes_stale_and_says_so(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    sf.calibrate(sf.Detector(gallery, extractor), 0.1).write(gallery.path)
    sf.Detector(gallery, extractor)  # no warning
    gallery.remove(["003.png"])
    with pytest.warns(UserWarning, match="has changed since it was calibrated"):
        stale = sf.Detector(gallery, extractor)
    assert stale.query(normal / "003.png").verdict is not None
    with pytest.warns(UserWarning, match="no verdicts: .* was calibrated for k 19, not k 2; calibrate again"):
        other = sf.Detector(gallery, extractor, sf.SearchOptions(k=2))
    assert other.query(normal / "003.png").verdict is None


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.filterwarnings("ignore:.*(found 1|has changed since it was calibrated)")
def test_what_an_old_detector_finds_is_what_a_new_one_does(tmp_path: Path, normal: Path, calibrated: bool) -> None:
    """Its scale of normal images may be of an earlier commit, and so may what it knows of trusted images."""
    wary = sf.RECIPES["wary"]
    first = make_images(tmp_path / "first", 12 if calibrated else 1, seed=5)
    gallery, extractor = make_gallery(tmp_path / "g", first)
    old = sf.Detector(gallery, extractor, wary.search, wary.score)
    old.query(normal / "000.png")
    if calibrated:
        sf.calibrate(old, 0.2).write(gallery.path)
        old = sf.Detector(gallery, extractor, wary.search, wary.score)
    for file in normal.iterdir():
        file.rename(file.with_name(f"more-{file.name}"))
    gallery.add_images(normal, extractor)
    gallery.trust(["more-003.png"])
    if calibrated:
        old = sf.Detector(gallery, extractor, wary.search, wary.score)
    gallery.trust(["more-004.png"])
    found = sf.calibrate(old, 0.2)
    (gallery.path / "calibration.json").unlink(missing_ok=True)
    assert found.to_json() == sf.calibrate(sf.Detector(gallery, extractor, wary.search, wary.score), 0.2).to_json()


def test_an_edited_file_is_refused(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    sf.calibrate(sf.Detector(gallery, extractor), 0.1).write(gallery.path)
    path = gallery.path / FILE
    values = json.loads(path.read_text())
    for edit in ({"false_alarms": 0.2}, {"image_scores": []}, {"format_version": 3}, {"xxh3": None}):
        path.write_text(json.dumps(values | edit))
        with pytest.raises(sf.CorruptGalleryError, match="calibrate again"):
            sf.Detector(gallery, extractor)
    path.write_text("{")
    with pytest.raises(sf.CorruptGalleryError, match="calibrate again"):
        sf.Detector(gallery, extractor)
    sf.Detector(gallery, extractor, calibrated=False)


def test_a_gallery_of_one_image(tmp_path: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", make_images(tmp_path / "one", 1))
    with pytest.raises(sf.OptionError, match="expected at least 9 normal images"):
        sf.calibrate(sf.Detector(gallery, extractor), 0.1)
    with pytest.raises(sf.NotEnoughImagesError):
        sf.calibrate(sf.Detector(gallery, extractor), 0.5)


def test_only_suspicious_images_are_localised(tmp_path: Path, normal: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    options = sf.SearchOptions(k=3, localise="suspicious")
    with pytest.raises(sf.OptionError, match="needs the thresholds"):
        sf.Detector(gallery, extractor, options)
    with pytest.raises(sf.OptionError, match="found 'map_max'"):
        sf.Detector(gallery, extractor, options, sf.ScoreOptions(image_score="map_max"))
    sf.calibrate(sf.Detector(gallery, extractor, sf.SearchOptions(k=3)), 0.1).write(gallery.path)
    everything = sf.Detector(gallery, extractor, sf.SearchOptions(k=3))
    suspicious = sf.Detector(gallery, extractor, options)
    queries = [*sorted(normal.iterdir())[:5], np.zeros((40, 40, 3), np.uint8)]
    for query in queries:
        one, other = everything.query(query), suspicious.query(query)
        assert (one.verdict, one.image_score) == (other.verdict, other.image_score)
        if "match" in other.seconds:
            np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
        else:
            assert other.verdict == "normal"
            assert (other.anomaly_map == 0).all()
            assert other.matches.shape == (8, 8, 0, 3)
    assert "match" not in suspicious.query(queries[0]).seconds
    assert "match" in suspicious.query(queries[-1]).seconds


@pytest.mark.parametrize("content", ["[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "9" * 5000])
def test_json_that_no_reader_takes_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(sf.CorruptGalleryError, match="calibrate again"):
        Calibration.read(tmp_path)


@pytest.mark.parametrize("scores", [[10**400], ["x"], [[1, 2], [3]], {"a": 1}, None])
def test_scores_that_are_none_are_refused_whatever_the_checksum_says(tmp_path: Path, scores: object) -> None:
    Calibration(1, {}, 0.5, None, np.ones(3), np.ones(3)).write(tmp_path)
    values = json.loads((tmp_path / "calibration.json").read_bytes())
    del values["xxh3"]
    values["image_scores"] = scores
    (tmp_path / "calibration.json").write_bytes(sealed(values))
    with pytest.raises(sf.CorruptGalleryError, match="calibrate again"):
        Calibration.read(tmp_path)


def test_an_image_that_is_nothing_like_the_others_is_named(tmp_path: Path) -> None:
    """Its score is the threshold, so that every defect would pass; without it, or below the threshold, no word."""
    rng = np.random.default_rng(0)
    normal = tmp_path / "normal"
    normal.mkdir()
    for number in range(12):
        pixels = rng.normal(120, 12, (32, 32, 3)) if number != 5 else rng.normal(150, 12, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(normal / f"{number:03d}.png")
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=3), sf.RECIPES["robust"].score)
    with pytest.warns(
        UserWarning, match=r"the image threshold is the score of '005\.png', \d+ spreads above the median"
    ):
        sf.calibrate(detector, 0.1)
    sf.calibrate(detector, 0.2)
    gallery.remove(["005.png"])
    sf.calibrate(sf.Detector(gallery, extractor, sf.SearchOptions(k=3), sf.RECIPES["robust"].score), 0.1)
