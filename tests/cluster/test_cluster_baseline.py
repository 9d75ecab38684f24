"""The scale of a cluster's normal images: one process measures it, the next takes it from the user's cache folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.detect.baseline import Baseline
from spade_faiss.images.sources import ImageFile
from tests.helpers.baselines import SCORE, SEARCH, cache_of_doubts, count_measured
from tests.helpers.command_line import Spade
from tests.helpers.galleries import make_gallery
from tests.helpers.images import write_images

SIZES = {"north": 14, "south": 10}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return cache_of_doubts(tmp_path, monkeypatch)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    return count_measured(monkeypatch)


@pytest.fixture
def members(tmp_path: Path) -> dict[str, Path]:
    return {name: member(tmp_path, name, seed) for seed, name in enumerate(SIZES)}


def images(tmp_path: Path, name: str, seed: int) -> Path:
    """A folder of new images; the same keys, whatever the seed."""
    folder = write_images(tmp_path / "images" / f"{name}-{seed}", SIZES[name], seed=seed)
    for file in sorted(folder.iterdir()):
        file.rename(file.with_name(f"{name}-{file.name}"))
    return folder


def member(tmp_path: Path, name: str, seed: int) -> Path:
    path = tmp_path / f"{name}.gallery"
    make_gallery(path, images(tmp_path, name, seed))[0].close()
    return path


@pytest.fixture
def path(tmp_path: Path, members: dict[str, Path]) -> Path:
    return sf.Cluster.create(tmp_path / "plant.cluster", members).path


def federation(path: Path, **options: str) -> sf.Federation:
    """Return one that keeps its scale, as a command does."""
    cluster = sf.Cluster.open(path, options=sf.MemberOptions(**options))  # type: ignore[arg-type]
    found = sf.Federation(cluster, cluster.load_extractor(), SEARCH, SCORE)
    found.keep_baseline()
    return found


def kept(path: Path, **options: str) -> Baseline:
    baseline = federation(path, **options).baseline()
    assert baseline is not None
    return baseline


def test_it_is_measured_once(tmp_path: Path, path: Path, cache: Path, measured: Callable[[], int]) -> None:
    first, second = kept(path), kept(path)
    assert measured() == 1
    assert len(list(cache.iterdir())) == 1
    assert first.to_json() == second.to_json()
    assert len(first.doubts) == 24
    detector = federation(path)
    assert detector.keep_baseline()
    with sf.Gallery.create(tmp_path / "one", detector.gallery.spec) as one:
        for name in SIZES:
            one.add_images(next((tmp_path / "images").glob(f"{name}-*")), detector.extractor)
        alone = sf.Detector(one, detector.extractor, SEARCH, SCORE)
        image = next((tmp_path / "images").glob("south-*/*"))
        found, expected = detector.query(image), alone.query(image)
    assert measured() == 1  # that of the gallery
    assert (found.image_score, found.left_out) == (expected.image_score, expected.left_out)
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)


def test_it_is_for_the_commits_of_its_members(
    tmp_path: Path, path: Path, members: dict[str, Path], measured: Callable[[], int]
) -> None:
    first = kept(path)
    assert measured() == 1
    with sf.Gallery.open(members["south"]) as south:
        south.remove(south.keys()[:1])
    sf.Cluster.update(path)
    assert len(kept(path).doubts) == 23
    assert measured() == 1
    with sf.Gallery.open(members["south"]) as south:
        south.trust(south.keys()[:1])
    kept(path)
    assert measured() == 1
    shutil.rmtree(path)
    for seed, (name, gallery) in enumerate(members.items(), 7):
        shutil.rmtree(gallery)
        assert member(tmp_path, name, seed) == gallery
    sf.Cluster.create(path, members)
    assert kept(path).to_json() != first.to_json()  # of the same generation, keys and numbers of images
    assert measured() == 1


def test_images_that_indexes_do_not_cover_count(
    tmp_path: Path, path: Path, members: dict[str, Path], measured: Callable[[], int]
) -> None:
    """A member that was restored from a backup and grew otherwise: they are told apart by content."""
    toy = sf.load_extractor("toy")
    with sf.Gallery.open(members["south"]) as south:
        south.add_images(write_images(tmp_path / "more" / "m", 100, seed=5).parent, toy)
    shutil.copytree(members["south"], tmp_path / "backup")
    for seed in (5, 6):
        shutil.rmtree(members["south"])
        shutil.copytree(tmp_path / "backup", members["south"])
        [image] = write_images(tmp_path / f"late {seed}", 1, seed=seed).iterdir()
        with sf.Gallery.open(members["south"]) as south:
            south.add_images([ImageFile(image, "late")], toy)
            index = south.snapshot().manifest.index
            assert index is not None
            assert index.images == len(south) - 1
        shutil.rmtree(path)
        sf.Cluster.create(path, members)
        kept(path)
    assert measured() == 2


def test_nothing_is_kept_where_members_may_be_missing(
    path: Path, members: dict[str, Path], cache: Path, measured: Callable[[], int]
) -> None:
    shutil.move(members["south"], members["south"].with_suffix(".away"))
    assert len(kept(path, partial="allow").doubts) == 14
    assert not cache.exists()
    shutil.move(members["south"].with_suffix(".away"), members["south"])
    assert len(kept(path).doubts) == 24
    assert len(kept(path, partial="allow").doubts) == 24
    assert measured() == 3


def test_the_command_line_measures_once(tmp_path: Path, spade: Spade, measured: Callable[[], int]) -> None:
    paths = [tmp_path / f"{name}.gallery" for name in SIZES]
    for seed, path in enumerate(paths):
        words = ("--extractor", "toy", "--image-size", 32, "--recipe", "wary", "--quiet")
        assert spade("build", path, images(tmp_path, path.stem, seed), *words).status == 0
    plant, image = tmp_path / "plant.cluster", next((tmp_path / "images").glob("*/*"))
    assert spade("cluster", "create", plant, *(f"{path.stem}={path}" for path in paths)).status == 0
    runs = [spade("cluster", "query", plant, image) for _ in range(2)]
    assert [run.status for run in runs] == [0, 0]
    assert runs[0].out == runs[1].out
    assert "normal images are compared with the others first" in runs[0].err
    assert "compared with the others" not in runs[1].err
    assert measured() == 1
