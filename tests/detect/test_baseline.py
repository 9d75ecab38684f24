"""The scale that normal images give: levels alike, borders damped, maximum and mean comparable, from normals alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect.baseline import BULK, Baseline, LogStats
from spade_faiss.detect.measure_baseline import measure
from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images

ROBUST = sf.RECIPES["robust"]


def make_baseline(total: np.ndarray, keys: int = 4) -> Baseline:
    return Baseline(frozenset(map(str, range(keys))), (), total, LogStats(1, 1), LogStats(1, 1))


def test_typical_by_hand() -> None:
    found = LogStats.of([1.0, np.e, np.e**2, np.e**3, np.e**9])
    assert found.median == pytest.approx(np.e**2)
    assert found.spread == pytest.approx(1.4826)  # deviations of the logarithms: 2, 1, 0, 1, 7
    assert found.ratio(np.e**3) == pytest.approx(np.e)
    assert found.distance(np.array([np.e**2, np.e**2 * np.e**1.4826])) == pytest.approx([0, 1])


def test_only_positions_beyond_the_bulk_are_damped_and_none_is_amplified() -> None:
    total = np.ones((32, 32))
    total[:4] = 100  # a hot border, an eighth of the positions
    total[20:24, 20:24] = 0.01  # and a place where normal images hardly differ
    baseline = make_baseline(4 * total)
    damped = baseline.damped(np.ones((32, 32)))
    assert damped[0].max() < 0.05 * damped.max()
    np.testing.assert_allclose(damped[8:], 1, rtol=0.01)  # the quiet place included
    assert np.quantile(1 / damped, BULK) == pytest.approx(1, rel=0.01)
    zero = baseline.damped(np.zeros((32, 32)))
    assert (zero == 0).all()


@pytest.mark.parametrize("left_out", [(3, 4), (3, 0, 7, 9), (3,)])
def test_an_image_that_is_queried_without_others_takes_out_what_it_had_added(
    tmp_path: Path, left_out: tuple[int, ...]
) -> None:
    """It was measured without itself alone, and is farther from the rest than it was from its like."""
    folder = make_images(tmp_path / "normal", 10)
    alike = np.asarray(Image.open(folder / "003.png")).copy()
    alike[:4, :4] ^= 8
    Image.fromarray(alike).save(folder / "004.png")
    gallery, toy = make_gallery(tmp_path / "gallery", folder)
    run = sf.Detector(gallery, toy, sf.SearchOptions(k=4), ROBUST.score).pipeline()
    without = [np.array(left_out)]
    [alone], [found] = run.leave_one_out([3]), run.leave_one_out([3], without)
    assert run.baseline is not None
    others = replace(
        run.baseline,
        keys=run.baseline.keys - {"003.png"},
        total=run.baseline.total - alone.sq_distances.mean(axis=2, dtype=np.float64),
    )
    [expected] = run.scored_by(others).leave_one_out([3], without)
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, rtol=1e-5)
    assert found.image_score == pytest.approx(expected.image_score, rel=1e-5)


def test_an_image_of_the_sample_is_left_out_of_its_own_scale() -> None:
    rng = np.random.default_rng(0)
    grids = rng.uniform(1, 2, (4, 8, 8))
    grids[2] *= 50
    everyone, others = make_baseline(grids.sum(axis=0)), make_baseline(np.delete(grids, 2, 0).sum(axis=0), keys=3)
    np.testing.assert_allclose(everyone.damped(grids[2], grids[2]), others.damped(grids[2]))
    assert everyone.damped(grids[2], grids[2]).mean() > 3 * everyone.damped(grids[2]).mean()


@pytest.mark.parametrize("total", [np.zeros((4, 4)), np.eye(4)])
def test_positions_without_distance_divide_by_something(total: np.ndarray) -> None:
    assert np.isfinite(make_baseline(total).damped(np.ones((4, 4)))).all()


def test_the_image_score_is_the_rarer_of_maximum_and_mean() -> None:
    baseline = Baseline(frozenset("a"), (), np.ones((2, 2)), peak=LogStats(4.0, 0.4), mean=LogStats(2.0, 0.1))
    typical = np.array([[4, 4, 0, 0]], np.float32)
    assert baseline.image_score(typical) == pytest.approx(1, rel=0.01)
    assert baseline.image_score(np.array([[8, 0, 0, 0]], np.float32)) == pytest.approx(2)  # the maximum doubled
    assert baseline.image_score(np.array([[4, 4, 4, 0]], np.float32)) == pytest.approx(1.5**4)  # spreads 0.4 and 0.1
    assert baseline.image_score(np.zeros((1, 4), np.float32)) == 0
    assert np.isfinite(baseline.image_score(np.full((1, 4), 1e38, np.float32)))


def test_level_scales_make_levels_spread_alike(tmp_path: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", make_images(tmp_path / "normal", 12))
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(level_weights="spread"))
    baseline = measure(detector._pipeline(gallery.snapshot()))
    for level, scale in zip(gallery.read(range(12)), baseline.level_scales, strict=True):
        vectors = np.moveaxis(level.astype(np.float64), 1, 3).reshape(-1, level.shape[1]) * scale
        assert ((vectors - vectors.mean(axis=0)) ** 2).sum(axis=1).mean() == pytest.approx(1, rel=0.01)


def test_the_search_is_that_of_scaled_levels(tmp_path: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", make_images(tmp_path / "normal", 8))
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=8, level_weights="spread"))
    image = np.asarray(Image.open(make_images(tmp_path / "query", 1, seed=9) / "000.png"))
    found, baseline = detector.query(image), detector.baseline()
    assert baseline is not None
    levels = [level[0] for level in extractor.extract([gallery.spec.view.apply(image)]).levels]
    ids = gallery.ids(found.neighbours.keys)
    scaled = [
        [level * np.float32(scale) for level, scale in zip(some, baseline.level_scales, strict=True)]
        for some in (levels, gallery.read(ids))
    ]
    np.testing.assert_allclose(found.sq_distances, sf.search_patches(*scaled)[0], rtol=1e-5)


def test_queries_never_change_the_scale(tmp_path: Path) -> None:
    """Scores are those of the gallery alone: the same whatever else is queried, in whatever order."""
    normal, test = make_images(tmp_path / "normal", 12), make_images(tmp_path / "test", 4, seed=3)
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    paths = sorted(test.iterdir())
    scores = [
        [sf.Detector(gallery, extractor, score=ROBUST.score).query(path).image_score for path in paths],
        [one.image_score for one in sf.Detector(gallery, extractor, score=ROBUST.score).query_batch(paths[::-1])][::-1],
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("recipe", ["robust", "wary"])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("change", ["add", "remove", "replace"])
def test_the_scale_is_that_of_the_commit(tmp_path: Path, recipe: str, kept: bool, change: str) -> None:
    """A detector whose gallery moves on finds what a new one does, and an earlier commit has its own scale still."""
    options = sf.RECIPES[recipe].search, sf.RECIPES[recipe].score
    normal, more = make_images(tmp_path / "normal", 12), make_images(tmp_path / "more", 4, seed=3)
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    old = sf.Detector(gallery, extractor, *options)
    if kept:
        old.keep_baseline()
    earlier, [first] = gallery.snapshot(), old.query_batch([more / "002.png"])
    if change == "remove":
        gallery.remove(["001.png", "005.png", "006.png"])
    else:
        for number, path in enumerate(sorted(more.iterdir())):
            path.rename(path.with_name(f"more-{number}.png" if change == "add" else f"0{number + 4:02}.png"))
        gallery.add_images(more, extractor, replace=True)
    test = make_images(tmp_path / "test", 1, seed=8) / "000.png"
    if kept:
        assert not old.keep_baseline()  # of another commit
    found, expected = old.query(test), sf.Detector(gallery, extractor, *options).query(test)
    assert found.image_score == expected.image_score
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
    again = next(old.pipeline(earlier).stream([make_images(tmp_path / "again", 4, seed=3) / "002.png"]))
    assert again.image_score == pytest.approx(first.image_score, rel=1e-6)


def test_a_calibration_keeps_the_baseline(tmp_path: Path) -> None:
    normal = make_images(tmp_path / "normal", 12)
    gallery, extractor = make_gallery(tmp_path / "g", normal)
    search, path = sf.SearchOptions(k=3, level_weights="spread"), tmp_path / "normal" / "000.png"
    fresh = sf.Detector(gallery, extractor, search, ROBUST.score)
    sf.calibrate(fresh, 0.1).write(gallery.path)
    kept = sf.Detector(gallery, extractor)  # settings and baseline of the calibration
    assert kept.settings() == fresh.settings()
    assert kept.baseline() is not None
    np.testing.assert_array_equal(kept.baseline().total, fresh.baseline().total)  # type: ignore[union-attr]
    assert kept.query(path).image_score == fresh.query(path).image_score
    assert json.loads((gallery.path / "calibration.json").read_text())["baseline"]["keys"] == sorted(
        path.name for path in normal.iterdir()
    )


def test_leave_one_out_scores_under_robust_are_exchangeable_with_queries(tmp_path: Path) -> None:
    """A new normal image's score lies among the leave-one-out scores, neither above nor below all of them."""
    gallery, extractor = make_gallery(tmp_path / "g", make_images(tmp_path / "normal", 60))
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=10, level_weights="spread"), ROBUST.score)
    known = sf.calibrate(detector, 0.1).image_scores
    new = [
        one.image_score for one in detector.query_batch(sorted(make_images(tmp_path / "new", 40, seed=777).iterdir()))
    ]
    ranks = [(known < score).mean() for score in new]
    assert 0.35 < np.mean(ranks) < 0.65


def test_one_normal_image_is_not_compared(tmp_path: Path) -> None:
    gallery, extractor = make_gallery(tmp_path / "g", make_images(tmp_path / "normal", 1))
    detector = sf.Detector(gallery, extractor, score=ROBUST.score)
    found = detector.query(make_images(tmp_path / "query", 1, seed=9) / "000.png")
    assert found.image_score == pytest.approx(found.map_max, rel=1e-3)


def test_images_that_are_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "normal"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (40, 40), "gray").save(folder / f"{number}.png")
    gallery, extractor = make_gallery(tmp_path / "g", folder)
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(level_weights="spread"), ROBUST.score)
    assert detector.query(folder / "0.png").image_score == 0
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    assert 0 < detector.query(tmp_path / "red.png").image_score < np.inf


def test_recipes_fill_in_what_is_not_given(tmp_path: Path) -> None:
    normal = make_images(tmp_path / "normal", 4)
    extractor = sf.load_extractor("toy", options=ROBUST.features)
    gallery = sf.Gallery.create(tmp_path / "g", extractor.spec, recipe="robust")
    gallery.add_images(normal, extractor)
    detector = sf.Detector(sf.Gallery.open(tmp_path / "g"), extractor, sf.SearchOptions(k=2), sf.ScoreOptions(sigma=0))
    assert (detector.search.k, detector.search.level_weights) == (2, "spread")
    assert (detector.score.sigma, detector.score.image_score, detector.score.positions) == (0, "map", "damped")
    given = sf.Detector(gallery, extractor, score=sf.ScoreOptions(image_score="knn"))
    assert (given.score.image_score, given.score.positions) == ("knn", "damped")
    assert gallery.info()["recipe"]["score"] == {"image_score": "map", "positions": "damped", "sigma": 4.0}


def test_an_unknown_recipe_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        sf.OptionError, match="expected paper or robust or relative or sharp or wary or rad, found 'secret'"
    ):
        sf.Gallery.create(tmp_path / "g", sf.load_extractor("toy").spec, recipe="secret")
    assert not (tmp_path / "g").exists()


def test_the_paper_recipe_is_the_publication() -> None:
    """256 px, centre crop 224, strides 4, 8 and 16, K = 50, kappa = 1, nothing weighed, pooled or damped, sigma 4."""
    paper = sf.RECIPES["paper"]
    assert (paper.features.image_size, paper.features.crop, paper.features.strides) == (
        (256,) * 2,
        (224,) * 2,
        (4, 8, 16),
    )
    assert paper.features.neighbourhood == 1
    assert (paper.search.k, sf.options.DEFAULT_K, paper.search.kappa, paper.search.k_score) == (None, 50, 1, None)
    assert (paper.search.level_weights, paper.score.positions, paper.score.image_score) == ("equal", "equal", "knn")
    assert (paper.score.sigma, paper.score.min_region) == (4.0, 1)
