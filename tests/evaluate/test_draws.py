"""Draws from labelled sets: few shots, contamination, repeats; what is drawn, what is said, what is left alone."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.datasets import Category, Draws, Sample, draw, open_dataset
from spade_faiss.evaluate import METRICS, EvaluationOptions, check_categories, evaluate
from spade_faiss.images.sources import ImageFile
from spade_faiss.repeats import drawn_from, each_draw
from tests.helpers.command_line import TOY, Spade
from tests.helpers.datasets import BUILDS, detector_over, make_set
from tests.helpers.galleries import make_gallery

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


def named(normal: int, anomalous: int, good: int = 2, name: str = "tiles") -> Category:
    """A category of names alone."""
    images = [ImageFile(Path(f"train/{i:03}.png"), f"train/{i:03}.png") for i in range(normal)]
    test = [Sample(Path(f"good/{i}.png"), f"good/{i}.png", "good", False) for i in range(good)]
    test += [Sample(Path(f"cut/{i}.png"), f"cut/{i}.png", "cut", True, Path(f"m/{i}.png")) for i in range(anomalous)]
    return Category(name, images, test, "mvtec", masks=True)


@pytest.fixture(scope="module")
def toy_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a set and of its gallery; only read."""
    folder = tmp_path_factory.mktemp("draws")
    dataset = make_set(folder / "tiles")
    detector_over(folder / "tiles.gallery", dataset)
    return folder / "tiles.gallery", dataset


def files_of(folder: Path) -> dict[str, bytes]:
    """All that lies in a gallery, but for its lock files."""
    found = {path.name: path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name}
    return {name: path.read_bytes() for name, path in found.items()}


def test_the_same_seed_draws_the_same_in_all_versions() -> None:
    category = named(30, 9)
    found = draw(category, 3, 0.5, seed=7)
    assert [image.key for image in found.normal[:3]] == ["train/012.png", "train/017.png", "train/029.png"]
    assert [image.key for image in found.normal[3:]] == ["cut/2.png", "cut/4.png"]
    assert draw(category, 3, 0.5, seed=7) == found
    assert len({tuple(image.key for image in draw(category, 3, seed=seed).normal) for seed in range(20)}) > 15


def test_fewer_shots_are_among_more_and_contamination_does_not_depend_on_them() -> None:
    category = named(40, 12)
    draws = [draw(category, shots, seed=3) for shots in (1, 5, 20, 40)]
    for less, more in pairwise(draws):
        assert {image.key for image in less.normal} < {image.key for image in more.normal}
    assert draws[-1] == category
    one, two = (draw(category, shots, share, seed=3) for shots, share in ((10, 0.1), (None, 0.025)))
    assert one.normal[-1] == two.normal[-1]  # an anomalous image each


def test_every_image_is_drawn_as_often_as_the_others() -> None:
    category, counts = named(10, 4), np.zeros(10)
    for seed in range(1000):
        counts[[int(image.key[-5]) for image in draw(category, 3, seed=seed).normal]] += 1
    assert counts.sum() == 3000
    assert np.abs(counts - 300).max() < 5 * np.sqrt(1000 * 0.3 * 0.7)


def test_categories_are_drawn_from_independently() -> None:
    draws = {tuple(image.key for image in draw(named(30, 4, name=name), 3).normal) for name in "abcdef"}
    assert len(draws) == 6


@pytest.mark.parametrize(("shots", "share", "count"), [(30, 0.05, 2), (100, 0.05, 5), (None, 0.05, 10), (10, 0.24, 2)])
def test_contamination_is_a_share_of_the_normal_images_that_train(shots: int | None, share: float, count: int) -> None:
    category = named(200, 20)
    found = draw(category, shots, share, seed=1)
    trained = {image.key for image in found.normal}
    assert len(trained) == (shots or 200) + count
    assert sum(key.startswith("cut/") for key in trained) == count
    assert trained.isdisjoint(sample.key for sample in found.test)
    assert [sample for sample in category.test if sample.key not in trained] == found.test
    assert len(category.normal) == 200  # it was not changed


@pytest.mark.parametrize(
    ("normal", "anomalous", "settings", "said"),
    [
        (12, 4, {"shots": 13}, "at most the 12 normal training images of tiles, found 13"),
        (12, 4, {"shots": 0}, "shots: expected a number of normal images >= 1, found 0"),
        (12, 4, {"shots": -2}, "found -2"),
        (12, 4, {"shots": 2.5}, "found 2.5"),
        (12, 4, {"contaminate": 0}, r"in \(0, 1\), as 0.05, found 0"),
        (12, 4, {"contaminate": 1}, "found 1"),
        (12, 4, {"contaminate": float("nan")}, "found nan"),
        (12, 4, {"contaminate": "0.05"}, "found '0.05'"),
        (12, 4, {"contaminate": 0.3}, "found 0.3 of 12 normal images, which is 4 of the 4 anomalous ones; give a sm"),
        (12, 4, {"contaminate": 0.9}, "which is 11 of the 4 anomalous ones"),
        (12, 4, {"contaminate": 0.04}, "at least 1 image, found 0.04 of the 12 normal images of tiles; give 0.083 or"),
        (12, 4, {"shots": 1, "contaminate": 0.4}, "found 0.4 of the 1 normal images of tiles; give 0.5 or more"),
        (12, 1, {"contaminate": 0.1}, "at least 2 anomalous test images in tiles, .* found 1"),
        (12, 0, {"contaminate": 0.1}, "found 0"),
        (12, 4, {"shots": 1, "seed": -1}, "seed: expected a whole number >= 0, found -1"),
    ],
)
def test_what_cannot_be_drawn(normal: int, anomalous: int, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(sf.OptionError, match=said) as caught:
        draw(named(normal, anomalous), **settings)
    assert "\n" not in str(caught.value)


def test_repeats_without_a_draw() -> None:
    with pytest.raises(sf.OptionError, match="repeat=3: expected shots=N or contaminate=SHARE"):
        Draws(repeat=3)
    with pytest.raises(sf.OptionError, match="repeat: expected a number of draws >= 1, found 0"):
        Draws(2, repeat=0)
    assert list(Draws(2, repeat=3, seed=5).seeds) == [5, 6, 7]


@pytest.mark.parametrize("layout", BUILDS)
def test_in_every_layout_a_drawn_image_has_a_key_of_its_own(tmp_path: Path, layout: str) -> None:
    BUILDS[layout](tmp_path / "set")
    for category in open_dataset(tmp_path / "set"):
        keys = [one.key for one in (*category.normal, *category.test)]
        assert len(set(keys)) == len(keys)
        anomalous = [sample for sample in category.test if sample.anomalous]
        if len(anomalous) < 2:
            with pytest.raises(sf.OptionError, match="at least 2 anomalous"):
                draw(category, contaminate=0.9)
            continue
        found = draw(category, 1, contaminate=0.9)
        assert len(found.normal) == 2
        assert [found.normal[1].path] == [one.path for one in anomalous if one not in found.test]


def test_a_draw_is_a_gallery_of_what_was_drawn(toy_set: tuple[Path, Path]) -> None:
    path, dataset = toy_set
    before = files_of(path)
    (category,) = open_dataset(dataset)
    [checked] = check_categories([category])
    with sf.Gallery.open(path) as gallery:
        extractor = gallery.load_extractor()
        seeds = []
        for one, own in each_draw(gallery, category, Draws(4, 0.25, repeat=2, seed=5), extractor, checked):
            seeds.append(one.seed)
            assert one.shots is not None
            assert list(own.keys()) == [*one.shots, *one.contamination] == [one.key for one in one.category.normal]
            assert (len(one.shots), len(one.contamination), own.recipe) == (4, 1, gallery.recipe)
            detector = sf.Detector(own, extractor, sf.SearchOptions(k=3), sf.ScoreOptions(image_score="map_max"))
            found = evaluate(detector, one.category, checked=one.checked)
            assert (found.normal, found.anomalous, found.in_gallery) == (3, 3, [])
            drawn = own.path
        assert seeds == [5, 6]
    assert not drawn.exists()
    assert files_of(path) == before


def test_copies_of_a_drawn_defect_are_not_judged(toy_set: tuple[Path, Path], tmp_path: Path) -> None:
    dataset = shutil.copytree(toy_set[1], tmp_path / "tiles")
    for number in range(4):
        for folder, name in (("test", "{}.png"), ("ground_truth", "{}_mask.png")):
            kind = dataset / folder / "square"
            shutil.copy(kind / name.format(f"00{number}"), kind / name.format(f"copy{number}"))
    (category,) = open_dataset(dataset)
    [checked] = check_categories([category])
    found = drawn_from(category, Draws(contaminate=0.1), 0, checked)
    [drawn], [copy] = found.contamination, found.copies
    assert {drawn[-5], copy[-5]} == {drawn[-5]}  # the same number
    assert {drawn, copy}.isdisjoint(sample.key for sample in found.category.test)
    assert len(found.category.test) == 9
    assert set(found.checked.digests) == {sample.key for sample in found.category.test}


def test_broken_images_are_not_drawn_and_are_still_named(toy_set: tuple[Path, Path], tmp_path: Path) -> None:
    dataset = shutil.copytree(toy_set[1], tmp_path / "tiles")
    for number in (0, 1):
        (dataset / f"test/square/00{number}.png").write_bytes(b"no image")
    (category,) = open_dataset(dataset)
    [checked] = check_categories([category], EvaluationOptions(skip_bad_images=True))
    for seed in range(8):
        found = drawn_from(category, Draws(contaminate=0.1), seed, checked)
        assert found.contamination[0] in ("test/square/002.png", "test/square/003.png")
        assert {"test/square/000.png", "test/square/001.png"} < {sample.key for sample in found.category.test}
    (dataset / "train/good/003.png").write_bytes(b"no image")
    gallery, extractor = make_gallery(tmp_path / "g", toy_set[1] / "train")
    with pytest.raises(sf.ImageError, match=r"train/good/003\.png"):
        list(each_draw(gallery, category, Draws(12), extractor, checked))


def test_the_command_line(
    toy_set: tuple[Path, Path], tmp_path: Path, spade: Spade, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path, dataset), out, temporary = toy_set, tmp_path / "out", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))  # not the one that other tests share meanwhile
    before = files_of(path)
    words = ("evaluate", path, dataset, "--shots", 4, "--contaminate", 0.25, "--repeat", 2, "--seed", 5, "--quiet")
    run = spade(*words, "--output", out, "--maps", "tiff")
    assert (run.status, run.err) == (0, "")
    results = json.loads((out / "metrics.json").read_text())
    [tiles] = results["categories"]
    settings = {name: results["settings"][name] for name in ("shots", "contaminate", "repeat", "seed")}
    assert settings == {"shots": 4, "contaminate": 0.25, "repeat": 2, "seed": 5}
    (category,) = open_dataset(dataset)
    assert [one["seed"] for one in tiles["draws"]] == [5, 6]
    for one in tiles["draws"]:
        again = draw(category, 4, 0.25, one["seed"])
        assert one["shots"] + one["contamination"] == [image.key for image in again.normal]
        seed = f"seed-{one['seed']}"
        assert (out / seed / "report.html").is_file()
        assert len(list((out / "anomaly_maps" / seed).rglob("*.tiff"))) == len(again.test) == 6
    for name in METRICS:
        values = [one["metrics"][name] for one in tiles["draws"]]
        assert tiles["metrics"][name] == results["mean"][name] == pytest.approx(np.mean(values))
        assert tiles["std"][name] == results["std"][name] == pytest.approx(np.std(values, ddof=1))
    row, mean = run.out.splitlines()[1:]
    assert row.split()[:2] == ["tiles", f"{tiles['metrics'][METRICS[0]]:.4f}±{tiles['std'][METRICS[0]]:.4f}"]
    assert mean.split()[1:] == row.split()[1:]
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["pixel_AUPRO_std"]) == pytest.approx(tiles["std"]["pixel_AUPRO"], abs=1e-6)
    assert set(json.loads((out / "curves.json").read_text())) == {"tiles, seed 5", "tiles, seed 6"}
    assert files_of(path) == before
    assert not list(temporary.iterdir())
    printed = json.loads(spade(*words, "--json").out)
    assert printed[0]["metrics"] == pytest.approx(tiles["metrics"])


def test_one_draw_has_no_deviation(toy_set: tuple[Path, Path], spade: Spade) -> None:
    path, dataset = toy_set
    run = spade("evaluate", path, dataset, "--shots", 1)
    assert "tiles, seed 0: a gallery of 1 normal and 0 anomalous images" in run.err
    assert "±" not in run.out
    assert run.status == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shots", 13), "shots: expected at most the 12 normal training images of tiles, found 13; ask for fewer"),
        (("--shots", 0), "shots: expected a number of normal images >= 1, found 0"),
        (("--contaminate", 1.5), "contaminate: expected a share of the normal images in (0, 1), as 0.05, found 1.5"),
        (("--contaminate", 0.5), "which is 6 of the 4 anomalous ones; give a smaller share"),
        (
            ("--shots", 4, "--false-alarms", 0.1),
            "tiles: false_alarms 0.1: expected at least 9 normal images",
        ),
        (("--shots", 4, "--false-alarms", 1), "tiles: false_alarms: expected a rate between 0 and 1, found 1.0"),
        (("--repeat", 3), "--repeat 3: expected --shots N or --contaminate SHARE, or there is nothing to draw"),
        (("--seed", 3), "seed: not a setting of the layout mvtec"),
    ],
)
def test_one_line_of_what_is_wrong(
    toy_set: tuple[Path, Path], spade: Spade, words: tuple[object, ...], said: str
) -> None:
    run = spade("evaluate", *toy_set, *words)
    assert (run.status, run.out) == (1, "")
    assert said in run.error
    assert run.err.count("\n") == 1


def test_a_draw_may_be_calibrated(toy_set: tuple[Path, Path], tmp_path: Path, spade: Spade) -> None:
    words = ("evaluate", *toy_set, "--shots", 9, "--quiet", "--output", tmp_path / "out")
    assert spade(*words).status == 0
    assert "false alarms" not in (tmp_path / "out/seed-0/report.html").read_text("utf-8")
    assert spade(*words, "--false-alarms", 0.2).status == 0
    assert "false alarms" in (tmp_path / "out/seed-0/report.html").read_text("utf-8")
    assert json.loads((tmp_path / "out/metrics.json").read_text())["settings"]["false_alarms"] == 0.2
    run = spade("evaluate", *toy_set, "--false-alarms", 0.2)
    assert (run.status, run.out) == (2, "")
    assert "--false-alarms: goes with --shots or --contaminate; to evaluate GALLERY with a calibration" in run.err


def test_a_gallery_of_other_images_is_refused(toy_set: tuple[Path, Path], tmp_path: Path, spade: Spade) -> None:
    gallery, _ = make_gallery(tmp_path / "other.gallery", toy_set[1] / "test")
    gallery.close()
    run = spade("evaluate", tmp_path / "other.gallery", toy_set[1], "--shots", 2, "--quiet")
    assert run.status == 1
    assert "other.gallery: expected a gallery of the normal training images of tiles, found 2 that" in run.error


@pytest.mark.parametrize("words", [("--tile", 32), ("--patches", "recompute")])
def test_a_draw_is_made_as_the_gallery_is(
    toy_set: tuple[Path, Path], tmp_path: Path, spade: Spade, words: tuple[object, ...]
) -> None:
    dataset, path = toy_set[1], tmp_path / "{category}.gallery"
    assert spade("build", path, "--dataset", dataset, *TOY, *words, "--quiet").status == 0
    run = spade("evaluate", path, dataset, "--shots", 3, "--contaminate", 0.4, "-k", 3)
    assert run.status == 0
    assert "tiles, seed 0: a gallery of 3 normal and 1 anomalous images" in run.err


def test_each_category_is_drawn_from(toy_set: tuple[Path, Path], tmp_path: Path, spade: Spade) -> None:
    for name in ("one", "two"):
        shutil.copytree(toy_set[1], tmp_path / "set" / name)
        shutil.copytree(toy_set[0], tmp_path / f"{name}.gallery")
    words = ("--shots", 2, "--repeat", 2, "-k", 1, "--image-score", "map_max", "--quiet", "--output", tmp_path / "out")
    run = spade("evaluate", tmp_path / "{category}.gallery", tmp_path / "set", *words)
    assert [line.split()[0] for line in run.out.splitlines()] == ["category", "one", "two", "Mean"]
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    one, two = results["categories"]
    assert [draw["shots"] for draw in one["draws"]] != [draw["shots"] for draw in two["draws"]]
    for name in METRICS:  # the deviation of the mean over the categories
        means = np.mean([[draw["metrics"][name] for draw in each["draws"]] for each in (one, two)], axis=0)
        assert (results["mean"][name], results["std"][name]) == pytest.approx((means.mean(), means.std(ddof=1)))
    assert (tmp_path / "out" / "two" / "seed-1" / "report.html").is_file()


def test_a_set_that_draws_its_split_keeps_it(tmp_path: Path, spade: Spade) -> None:
    dataset = make_set(tmp_path / "set")
    folders = ("--normal", dataset / "train/good", "--abnormal", dataset / "test/square", "--seed", 3, "--quiet")
    assert spade("build", tmp_path / "g", *folders, *TOY).status == 0
    with sf.Gallery.open(tmp_path / "g") as gallery:
        keys = set(gallery.keys())
    run = spade("evaluate", tmp_path / "g", *folders, "--shots", 3, "--repeat", 2, "--json")
    assert run.status == 0
    for one in json.loads(run.out)[0]["draws"]:
        assert set(one["shots"]) < keys
    tested = ("--test-normal", dataset / "test/good")  # the set draws nothing then, and the seed is that of the shots
    run = spade("evaluate", tmp_path / "g", *folders, *tested, "--shots", 12)
    assert "expected a gallery of the normal training images of " in run.error
