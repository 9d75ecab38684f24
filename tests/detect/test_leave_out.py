"""Neighbours that a verdict must not rest on are left out: the recipe `wary`, against the oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect.baseline import Baseline
from spade_faiss.detect.known_baseline import KnownBaseline
from spade_faiss.detect.leave_out import LeaveOut, most_left_out
from spade_faiss.detect.level_matches import POWERS, LevelMatches, LevelStats
from spade_faiss.detect.standing import Standing
from spade_faiss.patch_search.spacing import NEAREST
from tests import reference
from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images

WARY = sf.RECIPES["wary"]
GRIDS = [(10, 12), (5, 6), (3, 3)]


def distances_of(seed: int, k: int, grids: list[tuple[int, int]] = GRIDS) -> list[np.ndarray]:
    """Return the distances of a query to each neighbour, of which the last two have something rare of it."""
    rng = np.random.default_rng(seed)
    found = [rng.uniform(1, 3, (k, *grid)).astype(np.float32) for grid in grids]
    for level in found:
        height, width = level.shape[1:]
        level[:-2, : -(-height // 4), : -(-width // 4)] += 20
    return found


def nearest(distances: list[np.ndarray], number: int) -> list[LevelMatches]:
    """Return the nearest of each cell as they are found."""
    found = []
    for level in distances:
        order = np.argsort(level, axis=0, kind="stable")[:number]
        sq_distances = np.moveaxis(np.take_along_axis(level, order, 0), 0, 2)
        matches = np.zeros((*sq_distances.shape, 3), np.int32)
        matches[..., 0] = np.moveaxis(order, 0, 2)
        found.append(LevelMatches(sq_distances, matches))
    return found


@pytest.mark.parametrize(
    ("k", "kappa", "most", "fusion", "trusted"),
    [
        (12, 3, 2, "harmonic_squares", ()),
        (12, 3, 2, "relative", (5,)),
        (13, 2, 4, "harmonic", (0, 10, 11)),
        (12, 1, 3, "harmonic_squares", (0, 11)),
        (5, 3, 2, "harmonic_squares", (0, 1, 2, 4)),
        (12, 8, 4, "harmonic_squares", ()),
    ],
)
def test_what_is_left_out_equals_the_oracle(
    k: int, kappa: int, most: int, fusion: str, trusted: tuple[int, ...]
) -> None:
    distances = distances_of(k, k)
    stats = tuple(LevelStats(1.0 + number, 2.0, 0.5 + number) for number in range(3))
    figures = [(one.low, one.high, one.typical) for one in stats]
    marks = replace(Standing.nothing(k), trusted=np.isin(np.arange(k), trusted))
    left = LeaveOut(stats, POWERS[fusion], kappa, most, marks)(nearest(distances, kappa + most))
    known = [one for one in trusted if one < k]
    chosen, scale, rise = reference.left_out(distances, figures, POWERS[fusion], kappa, most, known)
    assert list(left.neighbours) == chosen
    assert left.scale == pytest.approx(scale, rel=1e-5)
    assert left.rise == pytest.approx(rise, rel=1e-5)
    assert left.rarity == bool(chosen)  # nothing is known of normal images
    for level, every in zip(left.levels, distances, strict=True):
        stay = np.delete(np.arange(k), chosen)
        expected = np.moveaxis(np.sort(every[stay], axis=0)[:kappa], 0, 2)
        np.testing.assert_array_equal(level.sq_distances[..., :kappa], expected)
        assert not np.isin(level.matches[..., :kappa, 0], chosen).any()


@pytest.mark.parametrize("grids", [[(10, 4), (3, 9), (12, 2)], [(2, 2), (9, 40)], [(6, 7)], [(1, 1), (1, 1)]])
def test_levels_of_any_grids_equal_the_oracle(grids: list[tuple[int, int]]) -> None:
    """Whoever brings features may have a level that is wider, or higher, than the first."""
    distances = distances_of(0, 12, grids)
    stats = tuple(LevelStats(1.0 + number, 2.0, 0.5 + number) for number in range(len(grids)))
    left = LeaveOut(stats, -2, 3, 2, Standing.nothing(12))(nearest(distances, 5))
    figures = [(one.low, one.high, one.typical) for one in stats]
    chosen, scale, rise = reference.left_out(distances, figures, -2, 3, 2)
    assert list(left.neighbours) == chosen
    assert (left.scale, left.rise) == (pytest.approx(scale, rel=1e-5), pytest.approx(rise, rel=1e-5))


def test_what_only_two_neighbours_have_is_no_excuse() -> None:
    stats = tuple(LevelStats(1.0, 2.0) for _ in range(3))
    found = nearest(distances_of(0, 20), 5)
    left = LeaveOut(stats, -2, 3, 2, Standing.nothing(20))(found)
    assert set(left.neighbours) == {18, 19}
    assert 0.4 < left.scale < 1  # a little of the rise is everywhere


def test_where_nothing_rises_it_makes_no_difference() -> None:
    """To an image that is equally far from all."""
    level = np.ones((12, 20, 20), np.float32)
    level[:, :5] = 4
    one = LevelStats(1.0, 2.0)
    left = LeaveOut((one,), 0, 3, 2, Standing.nothing(12))(nearest([level], 5))
    assert (left.neighbours, left.scale) == ((), 1)
    np.testing.assert_array_equal(left.levels[0].sq_distances[..., 0], level[0])


@pytest.mark.parametrize(
    ("share", "kappa", "k", "expected"),
    [(None, 3, 50, 0), (0, 3, 50, 0), (0.1, 3, 50, 5), (0.1, 3, 30, 3), (0.1, 3, 39, 3), (0.1, 3, 9, 0), (0.5, 3, 4, 1),
     (0.3, 1, 1, 0), (0.29, 1, 100, 29)],
)  # fmt: skip
def test_how_many_are_left_out(share: float | None, kappa: int, k: int, expected: int) -> None:
    assert most_left_out(share, kappa, k) == expected


def a_detector(folder: Path, n: int, **search: Any) -> tuple[sf.Detector, np.ndarray]:
    """Return a detector of n normal images, a third of the neighbours left out, and an image."""
    gallery, toy = make_gallery(folder / "gallery", make_images(folder / "normal", n))
    given = {"k": 9, "matching": "by_level", "kappa": 3, "distinct": True, "leave_out": 0.34, **search}
    [file] = make_images(folder / "one", 1, seed=99).iterdir()
    return sf.Detector(gallery, toy, sf.SearchOptions(**given), WARY.score), np.asarray(Image.open(file))


def to_neighbours(detector: sf.Detector, levels: list[np.ndarray], ids: Any) -> tuple[list[Any], list[Any]]:
    """Return for each level (1, c, h, w) distances to the nearest patches of neighbours, (K, h, w), and their cells."""
    distances, places = [], []
    for own, others in zip(levels, detector.gallery.read(ids), strict=True):
        patches, grid = own[0].reshape(own.shape[1], -1), own.shape[2:]
        each = [reference.search_distinct(patches, other[None], 1) for other in others]
        distances.append(np.stack([found[:, 0].reshape(grid) for found, _ in each]))
        places.append(np.stack([at[:, 0].reshape(grid) for _, at in each]))
    return distances, places


@pytest.mark.parametrize(
    ("trusted", "doubts"),
    [((), {}), ((0, 1, 2), {}), ((0,), {1: 0, 2: 0, 5: 0, 6: 0.4, 7: 0.9, 8: 0.2}), ((), {3: 0.7, 4: 0.0, 8: 1.0})],
)
@pytest.mark.parametrize("rises", [None, (), (1.01, 1.02, 9.0)])
def test_a_query_equals_the_oracle(
    tmp_path: Path, trusted: tuple[int, ...], doubts: dict[int, float], rises: tuple[float, ...] | None
) -> None:
    detector, image = a_detector(tmp_path, 14)
    gallery, toy = detector.gallery, detector.extractor
    ids, _ = reference.retrieve(
        toy.extract([toy.spec.view.apply(image)]).image[0],
        np.stack([gallery.snapshot().image_feature(row) for row in range(14)]),
        9,
    )
    if trusted:
        gallery.trust([gallery.keys()[ids[at]] for at in trusted])
        detector = sf.Detector(gallery, toy, detector.search, WARY.score)
    baseline = detector.baseline()
    assert baseline is not None
    if rises is not None:
        baseline = replace(baseline, rises=rises)
    digests = gallery.snapshot().digests([ids[at] for at in doubts])
    detector._known = KnownBaseline(replace(baseline, doubts=dict(zip(digests, doubts.values(), strict=True))))
    detection = detector.query(image)
    distances, places = to_neighbours(detector, toy.extract([toy.spec.view.apply(image)]).levels, ids)
    figures = [(level.low, level.high, level.typical) for level in baseline.levels]
    known = [*trusted, *(at for at, doubt in doubts.items() if doubt == 0)]
    chosen, scale, rise = reference.left_out(distances, figures, -2, 3, 3, trusted, known)
    weight = np.mean([doubts.get(at, reference.rarity(rise, baseline.rises)) for at in chosen])
    assert list(detection.left_out) == chosen
    assert chosen
    found = []
    for far, at, others in zip(distances, places, gallery.read(ids), strict=True):
        spacings = []
        for some in ([], chosen):
            far[some] = np.inf
            order = np.argsort(far, axis=0, kind="stable")
            first = np.take_along_axis(at, order[:1], 0)[0]
            matches = np.stack([order[0], *np.divmod(first, far.shape[2])], axis=-1)
            spacings.append(reference.spacing(others, matches, NEAREST))
        near = np.take_along_axis(far, order[:3], 0).reshape(3, -1).T
        mean = reference.mean_or_trusted(near, order[:3].reshape(3, -1).T, trusted).reshape(far.shape[1:])
        found.append((mean, spacings[0] + weight * (spacings[1] - spacings[0])))
    expected = reference.relative_map(found, figures, -2) * scale
    np.testing.assert_allclose(detection.sq_distances[..., 0], expected, rtol=1e-4)


@pytest.mark.parametrize("trusted", [(), (3, 5)])
def test_rises_of_normal_images_equal_the_oracle(tmp_path: Path, trusted: tuple[int, ...]) -> None:
    """Each is compared with the others, as a query is where a person has confirmed some; a calibration keeps them."""
    detector, _ = a_detector(tmp_path, 9, k=6)
    gallery = detector.gallery
    if trusted:
        gallery.trust([gallery.keys()[row] for row in trusted])
        detector = sf.Detector(gallery, detector.extractor, detector.search, WARY.score)
    baseline = detector.baseline()
    assert baseline is not None
    figures = [(level.low, level.high, level.typical) for level in baseline.levels]
    features = np.stack([gallery.snapshot().image_feature(row) for row in range(9)])
    rises = []
    for row in range(9):
        others = np.delete(np.arange(9), row)
        ids, _ = reference.retrieve(features[row], features[others], 6)
        distances, _ = to_neighbours(detector, gallery.read([row]), others[ids])
        confirmed = np.flatnonzero(np.isin(others[ids], trusted))
        rises.append(reference.left_out(distances, figures, -2, 3, 2, confirmed)[2])
    np.testing.assert_allclose(baseline.rises, sorted(rises), rtol=1e-5)
    assert baseline.rises[-1] > 1
    sf.calibrate(detector, false_alarms=0.2).write(gallery.path)
    kept = sf.Detector(gallery, detector.extractor).baseline()
    assert kept is not None
    assert kept.rises == baseline.rises


def test_a_calibration_without_rises_takes_all_of_them_for_rare(tmp_path: Path) -> None:
    """As earlier ones are, which were made before rises were measured."""
    detector, image = a_detector(tmp_path, 14)
    calibration = sf.calibrate(detector, false_alarms=0.2)
    assert calibration.baseline is not None
    before = replace(calibration.baseline, rises=(), doubts={})
    replace(calibration, baseline=before).write(detector.gallery.path)
    written = next(detector.gallery.path.glob("calibration*.json")).read_text("utf-8")
    assert "rises" not in written
    assert "doubts" not in written
    earlier, now = sf.Detector(detector.gallery, detector.extractor), detector.query(image)
    found = earlier.query(image)
    assert found.left_out == now.left_out
    assert found.image_score >= now.image_score


def test_without_a_share_the_answer_is_that_of_sharp(tmp_path: Path) -> None:
    detector, image = a_detector(tmp_path, 12, leave_out=0)
    sharp = sf.RECIPES["sharp"]
    plain = sf.SearchOptions(k=9, matching="by_level", kappa=3, distinct=True)
    expected = sf.Detector(detector.gallery, detector.extractor, plain, sharp.score).query(image)
    found = detector.query(image)
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
    assert found.left_out == expected.left_out == ()
    assert detector.settings() == sf.Detector(detector.gallery, detector.extractor, plain, sharp.score).settings()


def test_a_defect_that_hides_in_two_normal_images(tmp_path: Path) -> None:
    """It is found all the same, and what hides it is named; a person's word for it is worth more."""
    folder = make_images(tmp_path / "normal", 24)
    files = sorted(folder.iterdir())
    for file in files[:2]:
        pixels = np.asarray(Image.open(file)).copy()
        pixels[10:22, 12:26] = (250, 10, 240)
        Image.fromarray(pixels).save(file)
    gallery, toy = make_gallery(tmp_path / "gallery", folder)
    query = np.asarray(Image.open(files[5])).copy()
    query[10:22, 12:26] = (250, 10, 240)
    detectors = {
        share: sf.Detector(gallery, toy, sf.SearchOptions(matching="by_level", kappa=1, distinct=True, leave_out=share),
                           WARY.score)
        for share in (0, 0.1)
    }  # fmt: skip
    hidden, found = (detectors[share].query(query) for share in (0, 0.1))
    bad = {file.name for file in files[:2]}
    assert {found.neighbours.keys[at] for at in found.left_out} == bad
    assert found.image_score > 1.3 * hidden.image_score
    gallery.trust(sorted(bad))
    confirmed = sf.Detector(gallery, toy, detectors[0.1].search, WARY.score).query(query)
    assert not {confirmed.neighbours.keys[at] for at in confirmed.left_out} & bad
    assert confirmed.image_score < found.image_score / 1.3


@pytest.mark.parametrize("images", [1, 2, 3, 9, 12])
def test_few_normal_images(tmp_path: Path, images: int) -> None:
    gallery, toy = make_gallery(tmp_path / "gallery", make_images(tmp_path / "normal", images))
    detector = sf.Detector(gallery, toy, WARY.search, WARY.score)
    [file] = make_images(tmp_path / "one", 1, seed=99).iterdir()
    if images == 1:
        with pytest.warns(UserWarning, match="found 1"):
            detection = detector.query(file)
    else:
        detection = detector.query(file)
    assert np.isfinite(detection.anomaly_map).all()
    assert len(detection.left_out) <= images // 10


def test_a_calibration_holds_for_its_share_only(tmp_path: Path) -> None:
    detector, image = a_detector(tmp_path, 14)
    sf.calibrate(detector, false_alarms=0.2).write(detector.gallery.path)
    again = sf.Detector(detector.gallery, detector.extractor)
    assert again.settings()["leave_out"] == 0.34
    assert again.query(image).verdict is not None
    with pytest.warns(UserWarning, match=r"calibrated for leave_out 0\.34, not leave_out 0\.1; calibrate again"):
        sf.Detector(detector.gallery, detector.extractor, sf.SearchOptions(leave_out=0.1))
    with pytest.warns(UserWarning, match=r"calibrated for leave_out 0\.34, not leave_out 0; calibrate again"):
        sf.Detector(detector.gallery, detector.extractor, sf.SearchOptions(leave_out=0))


@pytest.mark.parametrize("rises", [None, 1, [0], [-1.0], [float("nan")], [float("inf")], ["x"], [[1.0]], [None]])
def test_rises_that_are_none(tmp_path: Path, rises: Any) -> None:
    baseline = a_detector(tmp_path, 12)[0].baseline()
    assert baseline is not None
    values = baseline.to_json()
    assert Baseline.from_json(values).rises == baseline.rises
    with pytest.raises((TypeError, ValueError)):
        Baseline.from_json(values | {"rises": rises})


@pytest.mark.parametrize("share", [-0.1, 0.51, 1, 2, True, False, "0.1", float("nan"), float("inf")])
def test_shares_that_are_none(share: Any) -> None:
    with pytest.raises(sf.OptionError, match=r"leave_out: expected a share from 0 to 0\.5, found"):
        sf.SearchOptions(leave_out=share)


@pytest.mark.parametrize(
    ("search", "score", "expected"),
    [
        ({"distinct": False}, {}, "leave_out goes with distinct=True, found False: give leave_out=0"),
        (
            {"matching": "concatenated"},
            {},
            "give fusion='mean'; distinct=True .*: give distinct=False; leave_out goes with matching='by_level', .*=0",
        ),
        ({}, {"fusion": "mean"}, "leave_out goes with fusion='harmonic_squares' .*, found 'mean': give leave_out=0"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, search: dict[str, Any], score: dict[str, Any], expected: str
) -> None:
    detector, _ = a_detector(tmp_path, 9)
    options = {"matching": "by_level", "kappa": 1, "distinct": True, "leave_out": 0.2, **search}
    with pytest.raises(sf.OptionError, match=expected):
        sf.Detector(
            detector.gallery, detector.extractor, sf.SearchOptions(**options),
            sf.ScoreOptions(**{"fusion": "relative", **score}),
        )  # fmt: skip


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_sizes_of_distances_do_not_matter(factor: float) -> None:
    distances = distances_of(3, 12)
    lefts = []
    for scale in (1.0, factor):
        stats = tuple(LevelStats(scale, 2 * scale) for _ in range(3))
        found = nearest([(level * scale).astype(np.float32) for level in distances], 5)
        lefts.append(LeaveOut(stats, -2, 3, 2, Standing.nothing(12))(found))
    assert lefts[0].neighbours == lefts[1].neighbours
    assert lefts[0].scale == pytest.approx(lefts[1].scale, rel=1e-4)


def test_a_query_that_is_out_of_all_proportion() -> None:
    distances = [level * np.float32(1e37) for level in distances_of(3, 12)]
    stats = tuple(LevelStats(1e-6, 1e-5) for _ in range(3))
    left = LeaveOut(stats, -2, 3, 2, Standing.nothing(12))(nearest(distances, 5))
    assert (left.neighbours, left.scale) == ((), 1)
