"""Which images of a snapshot are copies: by search and by a pass over all images, which agree."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.extractors.spec import ExtractorSpec
from spade_faiss.ingest import workers as ingest_workers
from spade_faiss.store import copies
from spade_faiss.store.copies import Copies
from tests.helpers.galleries import OWN, random_features_of
from tests.helpers.processes import FORKSERVER

FIXTURES = Path(__file__).parents[1] / "fixtures"


def gallery_of(folder: Path, features: sf.Features, spec: ExtractorSpec = OWN, index: str = "auto") -> sf.Gallery:
    gallery = sf.Gallery.create(folder, spec, index=index, shard_bytes=7 * spec.bytes_per_image)
    for start in range(0, len(features), 20):
        some = features[start : start + 20]
        gallery.append([f"{start + row:03}" for row in range(len(some))], some)
    return gallery


def rows_of(features: sf.Features, rows: list[int]) -> sf.Features:
    return sf.Features(features.image[rows].copy(), [level[rows].copy() for level in features.levels])


@pytest.mark.slow
@pytest.mark.parametrize("index", ["flat", "ivf", "HNSW8"])
@pytest.mark.parametrize("seed", range(3))
def test_search_and_pass_agree(tmp_path: Path, index: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    contents = rng.integers(0, 20, 60).tolist()
    features = rows_of(random_features_of(20), contents)
    features.image[:] *= 1 + 1e-7 * rng.standard_normal(features.image.shape).astype(np.float32)  # another batch
    gallery = gallery_of(tmp_path / "g", features, index=index)
    gallery.remove(["003", "017", "044"])
    ids = [row for row in range(60) if row not in (3, 17, 44)]
    found = Copies(gallery.snapshot())
    for row, same in zip(ids, found.of(ids), strict=True):
        assert same.tolist() == [one for one in ids if contents[one] == contents[row]]
    expected = [row for row in ids if contents[row] in {contents[one] for one in ids if one < row}]
    assert Copies(gallery.snapshot()).repeated().tolist() == expected
    assert found.first_of(ids).tolist() == sorted(set(ids) - set(expected))
    for first in (0, 30, 59, 60):
        assert found.count_among(first) == sum(row >= first for row in expected)
    assert gallery.info()["copies"] == len(expected)


def test_more_copies_than_are_looked_at_at_first(tmp_path: Path) -> None:
    features = rows_of(random_features_of(3), [0] * 23 + [1, 2, 1])
    found = Copies(gallery_of(tmp_path / "g", features).snapshot())
    assert [len(same) for same in found.of(range(26))] == [23] * 23 + [2, 1, 2]
    assert len(found.repeated()) == 23


def test_equal_image_features_with_other_levels_are_no_copies(tmp_path: Path) -> None:
    features = rows_of(random_features_of(3), [0, 0, 0, 1])
    features.levels[1][1] = random_features_of(1, seed=5).levels[1][0]
    found = Copies(gallery_of(tmp_path / "g", features).snapshot())
    assert [same.tolist() for same in found.of(range(4))] == [[0, 2], [1], [0, 2], [3]]
    assert found.repeated().tolist() == [2]


def test_levels_may_round_differently(tmp_path: Path) -> None:
    features = rows_of(random_features_of(3), [0, 0, 1])
    level = features.levels[0]
    level[1] = np.nextafter(level[1], np.float16(np.inf))  # all of them, which no batch does
    found = Copies(gallery_of(tmp_path / "g", features).snapshot())
    assert found.repeated().tolist() == [1]


def test_a_pass_looks_ahead_no_further_than_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image features that hardly differ must not make it quadratic; equal bits are found all the same."""
    monkeypatch.setattr(copies, "LOOK_AHEAD", 1)
    features = rows_of(random_features_of(1), [0] * 30)
    found = Copies(gallery_of(tmp_path / "g", features).snapshot())
    assert len(found.repeated()) == 29


def test_black_images_are_copies(tmp_path: Path, toy: sf.Extractor) -> None:
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec)
    black = np.zeros((32, 32, 3), np.uint8)
    gallery.append(["a", "b", "c"], toy.extract([black, black, black + 1]))
    assert gallery.info()["copies"] == 1


@pytest.mark.parametrize("name", ["stored-1", "recompute-1"])
def test_galleries_of_the_first_release_hold_no_copies(name: str) -> None:
    assert sf.Gallery.open(FIXTURES / name).info()["copies"] == 0


def test_a_gallery_that_recomputes_patches(tmp_path: Path, image_folder: Path, toy: sf.Extractor) -> None:
    (image_folder / "again.png").write_bytes((image_folder / "004.png").read_bytes())
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec, patches="recompute")
    assert gallery.add_images(image_folder, toy).copies == 1
    assert gallery.info()["copies"] == 1
    found = sf.calibrate(sf.Detector(gallery, toy), 0.1)
    assert len(found.image_scores) == 12


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_add_counts_copies_among_the_new_ones_and_of_old_ones(
    tmp_path: Path,
    toy_gallery: sf.Gallery,
    image_folder: Path,
    toy: sf.Extractor,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    monkeypatch.setattr(ingest_workers, "SPAWN", FORKSERVER)
    other = tmp_path / "other"
    other.mkdir()
    for number, name in enumerate(("004.png", "004.png", "007.png")):
        (other / f"new-{number}.png").write_bytes((image_folder / name).read_bytes())
    assert toy_gallery.add_images(image_folder, toy).copies == 0  # unchanged
    report = toy_gallery.add_images(other, toy, workers=workers)
    assert (report.added, report.copies) == (3, 3)
    assert toy_gallery.info()["copies"] == 3


def test_a_few_are_searched_rather_than_all_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: sf.Extractor
) -> None:
    rng = np.random.default_rng(0)
    pixels = list(rng.integers(0, 256, (80, 32, 32, 3), np.uint8))
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec)
    gallery.append([str(number) for number in range(80)], toy.extract(pixels))
    gallery.append(["again"], toy.extract(pixels[7:8]))
    calls = Counter[str]()
    monkeypatch.setattr(Copies, "repeated", lambda self: calls.update(["all"]))
    assert Copies(gallery.snapshot()).count_among(80) == 1
    assert not calls


def test_info_and_add_go_on_where_a_shard_is_damaged(
    tmp_path: Path, toy_gallery: sf.Gallery, image_folder: Path, toy: sf.Extractor
) -> None:
    shard = next((toy_gallery.path / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    at = content.find(toy_gallery.snapshot().image_feature(3).tobytes())
    content[at] ^= 1
    shard.write_bytes(content)
    gallery = sf.Gallery.open(toy_gallery.path)
    assert gallery.info()["copies"] is None
    (image_folder / "again.png").write_bytes((image_folder / "004.png").read_bytes())
    report = gallery.add_images(image_folder, toy)
    assert (report.added, report.copies) == (1, None)


def test_large_galleries_are_not_counted(toy_gallery: sf.Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spade_faiss.store.copies.COUNTED_BYTES", 100)
    assert toy_gallery.info()["copies"] is None
