"""Labelled sets on the command line: the same words build and evaluate, for every layout and any folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.datasets.category import Category
from spade_faiss.datasets.folders import from_folders
from spade_faiss.datasets.layouts import open_dataset
from spade_faiss.evaluate import evaluate
from spade_faiss.recipes import DEFAULT_RECIPE
from tests.helpers.command_line import TOY, Spade
from tests.helpers.datasets import BUILDS, make_set
from tests.helpers.images import make_images

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


QUIET_TOY = (*TOY, "--quiet")


def make_different(categories: list[Category]) -> None:
    """Give each image content of its own."""
    rng = np.random.default_rng(0)
    for category in categories:
        for image in (*category.normal, *category.test):
            Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(image.path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", BUILDS)
def test_from_a_data_set_to_its_metrics(tmp_path: Path, spade: Spade, layout: str) -> None:
    root, out, gallery = tmp_path / "set", tmp_path / "out", tmp_path / "{category}.gallery"
    BUILDS[layout](root)
    setting = {"shanghaitech": {"every": 5}, "magnetic_tile": {"seed": 3}}.get(layout, {})
    words = ("--layout", layout, *(word for name, value in setting.items() for word in (f"--{name}", value)))
    make_different(open_dataset(root))
    categories = open_dataset(root, **setting)
    # Some have one normal image, which gives the default recipe no scale.
    assert spade("build", gallery, "--dataset", root, *words, *QUIET_TOY, "--recipe", "robust").status == 0
    for category in categories:
        with sf.Gallery.open(tmp_path / f"{category.name}.gallery") as opened:
            assert sorted(opened.keys()) == sorted(image.key for image in category.normal)
    run = spade("evaluate", gallery, root, *words, "-k", 1, "--output", out, "--maps", "tiff", "--quiet")
    assert run.status == 0
    results = json.loads((out / "metrics.json").read_text())
    for category, found in zip(categories, results["categories"], strict=True):
        assert (found["category"], found["in_gallery"]) == (category.name, [])
        assert found["normal"] + found["anomalous"] == len(category.test)
        maps = {path.relative_to(out / "anomaly_maps").as_posix() for path in out.glob(f"*/{category.name}/**/*.tiff")}
        assert maps == {f"{category.name}/{sample.key.rpartition('.')[0]}.tiff" for sample in category.test}
    assert (results["settings"]["k"], results["settings"]["every"]) == (1, setting.get("every"))


@pytest.mark.slow
def test_one_category_needs_no_name_in_the_path(tmp_path: Path, spade: Spade) -> None:
    make_set(tmp_path / "set" / "one")
    make_set(tmp_path / "set" / "two")
    assert spade("build", tmp_path / "g", "--dataset", tmp_path / "set", "--category", "two", *QUIET_TOY).status == 0
    assert spade("evaluate", tmp_path / "g", tmp_path / "set", "--category", "two", "--quiet").status == 0
    several = spade("build", tmp_path / "h", "--dataset", tmp_path / "set", *QUIET_TOY)
    assert (several.status, (tmp_path / "h").exists()) == (1, False)
    assert "expected {category} in the path, for one gallery each of one, two" in several.error


def test_skipped_images_do_not_stop_the_next_category(tmp_path: Path, spade: Spade) -> None:
    for name in ("one", "two"):
        make_set(tmp_path / "set" / name)
    (tmp_path / "set/one/train/good/000.png").write_text("not an image")
    run = spade("build", tmp_path / "{category}.gallery", "--dataset", tmp_path / "set", *QUIET_TOY)
    assert run.status == 3
    assert "one/train/good/000.png" in run.err
    lines = run.out.splitlines()
    assert [line.split(" added")[0] for line in lines] == ["11", "12"]


def test_a_gallery_that_is_missing_is_missed_at_once(tmp_path: Path, spade: Spade) -> None:
    for name in ("one", "two"):
        make_set(tmp_path / "set" / name)
    spade("build", tmp_path / "one.gallery", "--dataset", tmp_path / "set", "--category", "one", *QUIET_TOY)
    run = spade("evaluate", tmp_path / "{category}.gallery", tmp_path / "set", "--output", tmp_path / "out", "--quiet")
    assert "two.gallery: expected a gallery" in run.error
    assert not (tmp_path / "out").exists()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Images without and with defects, and masks."""
    made = make_set(tmp_path / "tiles")
    return [made / "train" / "good", made / "test" / "square", made / "ground_truth" / "square"]


@pytest.mark.slow
@pytest.mark.filterwarnings("always:.*test images are in")
def test_any_folders(tmp_path: Path, spade: Spade, folders: list[Path]) -> None:
    normal, abnormal, masks = folders
    words = ("--normal", normal, "--abnormal", abnormal, "--seed", 3)
    gallery = tmp_path / "g"
    built = spade("build", gallery, *words, *QUIET_TOY)
    assert "9 added" in built.out
    run = spade("evaluate", gallery, *words, "--masks", masks, "-k", 2, "--json", "--quiet")
    assert (run.status, run.err) == (0, "")
    category = from_folders(normal, abnormal, masks, seed=3)
    small = dataclasses.replace(sf.RECIPES[DEFAULT_RECIPE].features, image_size=64)
    with sf.Gallery.open(gallery) as opened:
        expected = evaluate(
            sf.Detector(opened, sf.load_extractor("toy", options=small), sf.SearchOptions(k=2)),
            category,
        )
    assert json.loads(run.out)[0]["metrics"] == expected.metrics
    assert expected.metrics["pixel_AUPRO"] is not None

    other = spade("evaluate", gallery, *words[:4], "--seed", 4, "--quiet")
    assert "test images are in" in other.err  # another draw: some were trained with
    test_normal = make_images(tmp_path / "checked", 2, seed=9)
    run = spade("evaluate", gallery, *words[:4], "--test-normal", test_normal, "--quiet")
    assert run.status == 0
    assert "no pixel_AUPRO: the set has no masks" in run.err
    assert "test images are in" not in run.err


@pytest.mark.slow
@pytest.mark.filterwarnings("always:.*test images are in")
def test_test_images_in_the_gallery_are_pointed_out(tmp_path: Path, spade: Spade) -> None:
    made = make_set(tmp_path / "tiles")
    (made / "test" / "good" / "copy.png").write_bytes((made / "train" / "good" / "003.png").read_bytes())
    spade("build", tmp_path / "g", made / "train", *QUIET_TOY)
    spade("add", tmp_path / "g", made / "test" / "square", "--quiet")
    run = spade("evaluate", tmp_path / "g", made, "--output", tmp_path / "out", "--quiet")
    assert run.status == 0
    note = f"spade-faiss: note: tiles: 5 of 8 test images are in {tmp_path / 'g'} too (test/good/copy.png, "
    assert run.err.startswith(note)
    (found,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["categories"]
    assert found["in_gallery"] == ["test/good/copy.png", *(f"test/square/00{number}.png" for number in range(4))]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("evaluate {g}", "expected a data set, or both --normal and --abnormal"),
        ("evaluate {g} --normal {n}", "expected a data set, or both --normal and --abnormal"),
        ("evaluate {g} --abnormal {a} --masks {n}", "expected a data set, or both --normal and --abnormal"),
        ("evaluate {g} {set} --normal {n}", "--normal: a data set has its own"),
        ("evaluate {g} {set} --test-normal {n}", "--test-normal: a data set has its own"),
        ("evaluate {g} {set} --masks {n}", "--masks: a data set has its own"),
        ("evaluate {g} --normal {n} --abnormal {a} --layout mvtec", "--layout: goes with a data set"),
        ("evaluate {g} --normal {n} --abnormal {a} --category x", "--category: goes with a data set"),
        ("evaluate {g} --normal {n} --abnormal {a} --every 2", "--every: goes with a data set"),
        (
            "evaluate {g} --normal {n} --abnormal {a} --test-normal {set} --seed 0",
            "--seed: there is nothing to draw beside --test-normal",
        ),
        ("evaluate {g} {set} --maps tiff", "--maps: expected --output"),
        ("evaluate {g} {set} --every often", "'often' is not a valid integer"),
        ("build {g}", "expected SOURCE..., or --dataset, or both --normal and --abnormal"),
        ("build {g} {n} --dataset {set}", "train/good: expected SOURCE... or a labelled set, found both"),
        ("build {g} {n} --normal {n} --abnormal {a}", "train/good: expected SOURCE... or a labelled set, found both"),
        ("build {g} --normal {n}", "expected a data set, or both --normal and --abnormal"),
        ("build {g} --dataset {set} --masks {n}", "--masks: a data set has its own"),
        ("build {g} {n} --layout mvtec", "--layout: goes with a labelled set, not with SOURCE..."),
        ("build {g} {n} --seed 0", "--seed: goes with a labelled set, not with SOURCE..."),
        ("build {g} {n} --category tiles", "--category: goes with a labelled set, not with SOURCE..."),
    ],
)
def test_words_that_do_not_go_together(
    tmp_path: Path, spade: Spade, folders: list[Path], words: str, expected: str
) -> None:
    places = {"g": tmp_path / "g", "set": tmp_path / "tiles", "n": folders[0], "a": folders[1]}
    run = spade(*(word.format(**places) for word in words.split(" ")))
    assert run.status == 2
    assert expected in run.err
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--seed", 1), "seed: not a setting of the layout mvtec"),
        (("--every", 2), "every: not a setting of the layout mvtec"),
        (("--layout", "visa"), "visa: split_csv/1cls.csv"),
        (("--layout", "MVTec"), "layout: expected one of mvtec, loco"),
        (("--category", "tile"), "category: expected one of tiles, found 'tile'"),
    ],
)
def test_what_a_data_set_does_not_have(
    tmp_path: Path, spade: Spade, folders: list[Path], words: tuple[str, ...], expected: str
) -> None:
    for command in (("build", tmp_path / "g", "--dataset"), ("evaluate", tmp_path / "g")):
        run = spade(*command, tmp_path / "tiles", *words)
        assert run.status == 1
        assert expected in run.error
        assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--metrics-size", 0), "metrics_size: expected pixels >= 1, found 0"),
        (("--integration-limit", 0), "integration_limit: expected an FPR in (0, 1], found 0"),
        (("--integration-limit", "nan"), "integration_limit: expected an FPR in (0, 1], found nan"),
    ],
)
def test_settings_are_checked_before_anything_is_opened(
    tmp_path: Path, spade: Spade, words: tuple[object, ...], expected: str
) -> None:
    assert expected in spade("evaluate", tmp_path / "none", tmp_path / "none", *words).error
