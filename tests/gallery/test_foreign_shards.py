"""verify finds shards that are whole, and not those of this gallery."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import spade_faiss as sf
from tests.helpers.galleries import OWN, random_features_of
from tests.helpers.own_galleries import create, reopen

N = 40


def build(path: Path, seed: int, index: str = "flat", keys: str = "a") -> sf.Gallery:
    gallery = create(path, index=index, shard_bytes=8 * OWN.bytes_per_image)
    features = random_features_of(N, seed=seed)
    for start in range(0, N, 8):
        rows = slice(start, start + 8)
        gallery.append(
            [f"{keys}{n:02d}" for n in range(N)][rows], features[np.arange(N)[rows]], list(map(str, range(8)))
        )
    gallery.reindex()
    return gallery


def shards(gallery: sf.Gallery) -> list[str]:
    return [entry.file for entry in gallery.snapshot().manifest.shards]


def test_a_gallery_of_its_own_shards_is_clean(tmp_path: Path) -> None:
    """Also with removed images, and with rows that image index and key table do not have yet."""
    gallery = build(tmp_path / "g", 1)
    gallery.remove(["a03", "a38"])
    with suppress(EOFError), gallery.writer() as writer:
        writer.append(["more"], random_features_of(1, seed=9))
        writer.commit()
        raise EOFError
    manifest = gallery.snapshot().manifest
    assert manifest.keys
    assert manifest.index
    assert manifest.keys.images == manifest.index.images < manifest.rows
    assert gallery.verify() == []
    gallery.compact()
    assert gallery.verify() == []


@pytest.mark.parametrize(("index", "keys"), [("flat", "a"), ("flat", "b"), ("hnsw", "b"), ("ivf", "b")])
def test_shards_of_another_gallery_are_named(tmp_path: Path, index: str, keys: str) -> None:
    """As an interrupted copy leaves them: of the same names and sizes, and whole."""
    gallery, other = build(tmp_path / "g", 1, index), build(tmp_path / "other", 2, index, keys)
    names = shards(gallery)
    for name in (names[1], names[4]):
        assert (other.path / name).stat().st_size == (gallery.path / name).stat().st_size
        (gallery.path / name).rename(tmp_path / Path(name).name)
        shutil.copy(other.path / name, gallery.path / name)
    gallery = reopen(gallery.path)
    problems = gallery.verify()
    assert [(problem.file, problem.key) for problem in problems] == [(names[1], None), (names[4], None)]
    assert all("expected the images that key table and image index have" in problem.message for problem in problems)
    for name in (names[1], names[4]):
        (tmp_path / Path(name).name).replace(gallery.path / name)
    assert reopen(gallery.path).verify() == []


def test_shards_that_changed_places_are_found_and_repaired(tmp_path: Path) -> None:
    gallery = build(tmp_path / "g", 1)
    names, features = shards(gallery), random_features_of(N, seed=1)
    first, second = (gallery.path / names[at] for at in (0, 3))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    gallery = reopen(gallery.path)
    assert [problem.file for problem in gallery.verify()] == [names[0], names[3]]
    assert gallery.repair().derived
    assert gallery.verify() == []
    ids, sq_distances = gallery.search(features.image, 1)
    assert gallery.keys(ids[:, 0]) == [f"a{n:02d}" for n in range(N)]
    assert sq_distances.max() == 0
