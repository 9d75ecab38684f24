"""Levels searched apart and put on the scale of normal images: the recipe `relative`, against the oracle."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect.baseline import Baseline
from spade_faiss.detect.level_matches import (
    FLOOR,
    HIGH,
    LOW,
    POWERS,
    LevelMatches,
    LevelStats,
    averaged,
    relative,
    telling,
)
from spade_faiss.detect.scoring import top_score
from spade_faiss.patch_search.bounds import workers as bounds_workers
from spade_faiss.patch_search.bounds.gallery import BoundsGallery
from spade_faiss.patch_search.spacing import NEAREST
from tests import reference
from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images

RELATIVE = sf.RECIPES["relative"]
RELATIVE_FUSION, APART = {"fusion": "relative"}, {"matching": "by_level"}
SHARP = sf.RECIPES["sharp"]
GRIDS = [(6, 8), (3, 4), (2, 2)]


def normal_gallery(folder: Path, n: int) -> sf.Gallery:
    return make_gallery(folder / "gallery", make_images(folder / "normal", n))[0]


def an_image(folder: Path) -> np.ndarray:
    [file] = make_images(folder / "one", 1, seed=99).iterdir()
    return np.asarray(Image.open(file))


def levels(seed: int, with_spacing: bool = True) -> list[LevelMatches]:
    rng = np.random.default_rng(seed)
    return [
        LevelMatches(
            np.sort(rng.uniform(0, 3, (*grid, 2)), axis=2).astype(np.float32),
            np.zeros((*grid, 2, 3), np.int32),
            rng.uniform(0, 2, grid).astype(np.float32) if with_spacing else None,
        )
        for grid in GRIDS
    ]


@pytest.mark.parametrize("power", [0, -1, -2])
@pytest.mark.parametrize("with_spacing", [True, False])
def test_one_map_of_levels_equals_the_oracle(with_spacing: bool, power: int) -> None:
    found = levels(0, with_spacing)
    stats = [LevelStats.of([level, other]) for level, other in zip(found, levels(1), strict=True)]
    figures = [(one.low, one.high, one.typical) for one in stats]
    expected = reference.relative_map([(one.distances, one.spacing) for one in found], figures, power)
    np.testing.assert_allclose(relative(found, stats, power)[0], expected, rtol=1e-6)
    mean = np.mean([reference.resize_map(one.distances, GRIDS[0]) for one in found], axis=0)
    np.testing.assert_allclose(averaged(found, ())[0], mean, rtol=1e-6)


def test_figures_of_normal_images_by_hand() -> None:
    some = [LevelMatches(np.full((2, 2, 1), value, np.float32), np.zeros((2, 2, 1, 3), np.int32)) for value in (1, 9)]
    stats = LevelStats.of(some)
    distances = [1] * 4 + [9] * 4
    assert (stats.low, stats.high) == pytest.approx((np.quantile(distances, LOW), np.quantile(distances, HIGH)))
    assert stats.scores(some[0]).mean() + stats.scores(some[1]).mean() == pytest.approx(2)  # a typical one scores 1


def test_copies_are_as_normal_as_can_be() -> None:
    same = LevelMatches(np.zeros((2, 2, 1), np.float32), np.zeros((2, 2, 1, 3), np.int32), np.zeros((2, 2), np.float32))
    stats = LevelStats.of([same, same])
    for power in POWERS.values():
        assert relative([same], [stats], power)[0] == pytest.approx(FLOOR)


def test_matches_are_those_of_the_level_that_scores_highest() -> None:
    """On the finest grid; the centre of a coarser cell."""
    fine, coarse = (np.zeros((*grid, 1, 3), np.int32) for grid in ((4, 6), (2, 3)))
    fine[..., 0, 0], coarse[..., 0, :] = 1, (2, 1, 2)
    found = [LevelMatches(np.ones((*one.shape[:2], 1), np.float32), one) for one in (fine, coarse)]
    scores = [np.full((4, 6), 1.0), np.full((4, 6), 0.5)]
    scores[1][3, 5] = 2
    matches = telling(found, scores)
    assert (matches[:3, :, 0] == (1, 0, 0)).all()
    assert matches[3, 5, 0].tolist() == [2, 3, 5]  # row 1 of 2 is rows 2 and 3 of 4, column 2 of 3 is 4 and 5 of 6


def test_the_mean_of_the_highest_hundredth() -> None:
    values = np.random.default_rng(0).normal(size=(30, 41)).astype(np.float32)
    assert top_score(values) == pytest.approx(reference.top_score(values))
    assert top_score(values[:3, :4]) == pytest.approx(values[:3, :4].max())


@pytest.mark.parametrize("recipe", [RELATIVE, SHARP], ids=lambda recipe: recipe.name)
def test_a_query_equals_the_oracle(tmp_path: Path, toy: sf.Extractor, recipe: sf.Recipe) -> None:
    gallery = normal_gallery(tmp_path, 9)
    search = sf.SearchOptions(k=5, matching="by_level", kappa=3, distinct=True)
    detector = sf.Detector(gallery, toy, search, recipe.score)
    baseline, sigma = detector.baseline(), recipe.score.sigma
    assert baseline is not None
    assert sigma is not None
    image = an_image(tmp_path)
    detection = detector.query(image)
    features = toy.extract([toy.spec.view.apply(image)])
    stored = np.stack([gallery.snapshot().image_feature(row) for row in range(9)])
    ids, _ = reference.retrieve(features.image[0], stored, 5)
    found = []
    for own, others in zip(features.levels, gallery.read(ids), strict=True):
        patches, grid = own[0].reshape(own.shape[1], -1), own.shape[2:]
        sq_distances, places = reference.search_distinct(patches, others, 3)
        matches = np.stack(np.unravel_index(places[:, 0], (5, *grid)), axis=-1).reshape(*grid, 3)
        found.append((sq_distances.mean(axis=1).reshape(grid), reference.spacing(others, matches, NEAREST)))
    figures = [(level.low, level.high, level.typical) for level in baseline.levels]
    expected = reference.relative_map(found, figures, POWERS[recipe.score.fusion])
    np.testing.assert_allclose(detection.sq_distances[..., 0], expected, rtol=1e-4)
    view = toy.spec.view
    whole = reference.anomaly_map(expected[..., None], image.shape[:2], view.resized, view.crop, sigma)
    np.testing.assert_allclose(detection.anomaly_map, whole, rtol=1e-4)
    at_view = reference.anomaly_map(expected[..., None], view.resized, view.resized, view.crop, sigma)
    assert detection.image_score == pytest.approx(reference.top_score(at_view), rel=1e-4)


@pytest.mark.parametrize("recipe", [RELATIVE, SHARP], ids=["relative", "sharp"])
def test_what_queries_prepare_for_each_other_changes_no_answer(
    tmp_path: Path, toy: sf.Extractor, recipe: sf.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it when the normal set has changed; and neighbours are prepared once."""
    prepared: list[int] = []
    prepare = BoundsGallery._prepare

    def noted(self: Any, some: range, *args: Any) -> Any:
        prepared.append(len(some))
        return prepare(self, some, *args)

    gallery = normal_gallery(tmp_path, 9)
    images = [np.asarray(Image.open(file)) for file in sorted(make_images(tmp_path / "some", 4, seed=99).iterdir())]
    options = {"k": 5, "matching": "by_level", "kappa": 3, "distinct": True}
    kept = sf.Detector(gallery, toy, sf.SearchOptions(**options), recipe.score)
    for change in ([], [gallery.keys()[0]]):
        if change:
            gallery.remove(change)
            before, kept = kept, sf.Detector(gallery, toy, sf.SearchOptions(**options), recipe.score)
            kept.share_caches(before)
        alone = sf.Detector(gallery, toy, sf.SearchOptions(**options, cache_bytes=0), recipe.score)
        for image in images * 2:
            found, expected = kept.query(image), alone.query(image)
            np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
            np.testing.assert_array_equal(found.matches, expected.matches)
    monkeypatch.setattr(BoundsGallery, "_prepare", noted)
    monkeypatch.setattr(bounds_workers, "CROWD", 1e6)  # what is left always takes long on so small a grid
    kept.query(images[0])
    prepared.clear()
    kept.query(images[0])
    assert prepared == []


def test_figures_survive_being_written(tmp_path: Path, toy: sf.Extractor) -> None:
    detector = sf.Detector(normal_gallery(tmp_path, 6), toy, RELATIVE.search, RELATIVE.score)
    baseline = detector.baseline()
    assert baseline is not None
    assert len(baseline.levels) == 3
    again = Baseline.from_json(json.loads(json.dumps(baseline.to_json())))
    assert again.levels == baseline.levels
    assert not again.fits(toy.spec.level_shapes[:2])


def test_a_calibration_of_other_matching_gives_no_verdicts(tmp_path: Path, toy: sf.Extractor) -> None:
    gallery = normal_gallery(tmp_path, 12)
    sf.calibrate(sf.Detector(gallery, toy, RELATIVE.search, RELATIVE.score), false_alarms=0.2).write(gallery.path)
    assert sf.Detector(gallery, toy).search.matching == "by_level"  # as it was calibrated
    assert sf.Detector(gallery, toy).calibration is not None
    search = sf.SearchOptions(matching="concatenated", distinct=False, kappa=1)
    with pytest.warns(UserWarning, match="no verdicts"):
        sf.Detector(gallery, toy, search, sf.ScoreOptions(fusion="mean"))


@pytest.mark.parametrize(
    ("search", "score", "expected"),
    [
        ({"matching": "concatenated"}, RELATIVE_FUSION, "fusion='relative' goes with matching='by_level', .*'mean'"),
        ({"matching": "concatenated"}, {"fusion": "harmonic"}, "fusion='harmonic' goes with matching='by_level', .*"),
        ({**APART, "metric": "cosine"}, RELATIVE_FUSION, "fusion='relative' goes with metric='l2'"),
        ({**APART, "level_weights": "spread"}, RELATIVE_FUSION, "give level_weights='equal'"),
        ({**APART, "metric": "cosine", "level_weights": "spread"}, {}, "give level_weights='equal'"),
        ({"metric": "cosine"}, {}, "levels of one grid, found .*: give matching='by_level'"),
        ({**APART, "window": 8}, {}, "window: expected fewer than 8 cells, found 8: give window='all'"),
        ({**APART, "distinct": True, "window": 2}, {}, "window='all', found 2: give distinct=False"),
        ({**APART, "distinct": True, "engine": "flat"}, {}, "engine='auto', found 'flat': give distinct=False"),
        ({"matching": "concatenated", "distinct": True}, {}, "distinct=True goes with matching='by_level'"),
        ({"distinct": True}, RELATIVE_FUSION, "give fusion='mean'; distinct=True .*: give distinct=False"),
        ({**APART, "distinct": True, "kappa": 3, "k": 2}, {}, "kappa: expected at most 2, .* found 3"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, toy: sf.Extractor, search: dict[str, Any], score: dict[str, Any], expected: str
) -> None:
    gallery = normal_gallery(tmp_path, 4)
    with pytest.raises(sf.OptionError, match=expected):
        sf.Detector(gallery, toy, sf.SearchOptions(**search), sf.ScoreOptions(**score))


@pytest.mark.parametrize("images", [1, 2, 3, 9])
def test_few_normal_images(tmp_path: Path, toy: sf.Extractor, images: int) -> None:
    """As many matches are averaged as there are images; one image has no scale of normal images."""
    gallery = normal_gallery(tmp_path, images)
    detector = sf.Detector(gallery, toy, RELATIVE.search, RELATIVE.score)
    if images == 1:
        with pytest.warns(UserWarning, match="found 1: scores have no scale of normal images"):
            detection = detector.query(an_image(tmp_path))
    else:
        detection = detector.query(an_image(tmp_path))
    assert np.isfinite(detection.anomaly_map).all()
    assert detection.levels[0].sq_distances.shape[2] == min(8, images)


def test_pickled_it_keeps_what_was_given(tmp_path: Path) -> None:
    """Not what was filled in: with 3 neighbours kappa is 3, of the recipe's 8."""
    gallery, extractor = make_gallery(tmp_path / "g", make_images(tmp_path / "normal", 5))
    sf.calibrate(sf.Detector(gallery, extractor, RELATIVE.search, RELATIVE.score), 0.3).write(gallery.path)
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=3), calibrated=False)
    again = pickle.loads(pickle.dumps(detector))
    assert again.settings() == detector.settings()
    found = sf.Detector(gallery, extractor)
    assert pickle.loads(pickle.dumps(found)).settings() == found.settings()


def test_kappa_is_at_most_k(tmp_path: Path, toy: sf.Extractor) -> None:
    search = dataclasses.replace(RELATIVE.search, k=3, kappa=None)
    detector = sf.Detector(normal_gallery(tmp_path, 5), toy, search, RELATIVE.score)
    assert detector.settings()["kappa"] == 1
    explicit = dataclasses.replace(search, kappa=3)
    assert sf.Detector(detector.gallery, toy, explicit, RELATIVE.score).settings()["kappa"] == 3


def test_bounds_of_levels_that_are_nearly_all_alike() -> None:
    """Most distances are 0: the lower bound is their mean, and the upper one no less."""
    sq_distances = np.zeros((10, 10, 1), np.float32)
    sq_distances[3, 3] = 1000
    stats = LevelStats.of([LevelMatches(sq_distances, np.zeros((10, 10, 1, 3), np.int32))])
    assert stats.low == 10
    assert stats.high >= stats.low


@pytest.mark.parametrize("window", [1.0, np.float32(1)])
def test_a_window_of_all_is_not_one_cell(window: float) -> None:
    assert sf.SearchOptions(window=window).window == "all"
    assert type(sf.SearchOptions(window=np.int64(1)).window) is int
