"""Damage: an index is derived and made again; what is wrong is named, and never answered from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spade_faiss as sf
from spade_faiss.store.manifest import Manifest
from tests.helpers.galleries import random_features_of
from tests.helpers.own_galleries import KEYS, N, assert_holds, create, join, reopen

# The index is derived


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [Path.unlink, damage, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_an_index_that_is_missing_or_damaged_is_rebuilt(
    tmp_path: Path, features: sf.Features, kind: str, harm: Callable[[Path], Any]
) -> None:
    gallery = create(tmp_path / "g", index=kind)
    gallery.append(KEYS, features)
    query = random_features_of(3, seed=8).image
    expected = [array.tolist() for array in gallery.search(query, 5)]
    (index,) = gallery.path.glob("index/*.faiss")
    harm(index)
    reader = reopen(gallery.path)
    assert [problem.file for problem in reader.verify()] == [f"index/{index.name}"]
    with pytest.warns(UserWarning, match=rf"rebuilt from the shards: .*{index.name}"):
        assert [array.tolist() for array in reader.search(query, 5)] == expected
    assert [array.tolist() for array in reader.search(query, 5)] == expected  # and warns once
    reader.rebuild_index()
    assert reader.verify() == []
    assert [array.tolist() for array in reopen(gallery.path).search(query, 5)] == expected


def test_an_append_mends_a_damaged_index(gallery: sf.Gallery, features: sf.Features) -> None:
    (index,) = gallery.path.glob("index/*.faiss")
    index.unlink()
    new = random_features_of(3, seed=3)
    with pytest.warns(UserWarning, match="rebuilt from the shards"):
        gallery.append(["a", "b", "c"], new)
    assert gallery.verify() == []
    assert_holds(reopen(gallery.path), [*KEYS, "a", "b", "c"], join(features, new))


def test_an_index_that_lags_behind_is_filled_in(tmp_path: Path) -> None:
    """A single image appended to many does not write the whole index anew, and is found all the same."""
    gallery, features = create(tmp_path / "g"), random_features_of(152)
    keys = [str(row) for row in range(152)]
    gallery.append(keys[:150], features[:150])
    (index,) = gallery.path.glob("index/*.faiss")
    before = index.read_bytes()
    gallery.append(keys[150:151], features[150:151])
    gallery.remove(keys[:1])
    gallery.append(keys[151:], features[151:])
    assert list(gallery.path.glob("index/*.faiss")) == [index]
    assert index.read_bytes() == before
    assert_holds(reopen(tmp_path / "g"), keys[1:], features[1:])


def test_an_index_of_another_gallery_is_not_taken(gallery: sf.Gallery, tmp_path: Path, features: sf.Features) -> None:
    other = create(tmp_path / "other")
    other.append(KEYS[:5], random_features_of(5, seed=1))
    other.append(KEYS[5:], random_features_of(N - 5, seed=2))
    (mine,), (theirs,) = gallery.path.glob("index/*.faiss"), other.path.glob("index/*.faiss")
    assert mine.name == theirs.name
    mine.write_bytes(theirs.read_bytes())
    reader = reopen(gallery.path)
    with pytest.warns(UserWarning, match="rebuilt from the shards"):
        assert_holds(reader, KEYS, features)


# Damage


def test_verify_names_what_is_wrong_and_where(gallery: sf.Gallery, features: sf.Features) -> None:
    shard = gallery.path / "shards/000001.h5"
    content = bytearray(shard.read_bytes())
    content[content.index(features.levels[0][8].tobytes())] ^= 1
    shard.write_bytes(content)
    reader = reopen(gallery.path)
    ((file, key),) = [(problem.file, problem.key) for problem in reader.verify()]
    assert (file, key) == ("shards/000001.h5", KEYS[8])
    good = [row for row in range(N) if row != 8]
    for found, level in zip(reader.read(reader.ids([KEYS[row] for row in good])), features.levels, strict=True):
        assert found.tobytes() == level[good].tobytes()
    with pytest.raises(sf.CorruptGalleryError, match=rf"000001\.h5.*{KEYS[8]}.*level 0"):
        reader.read(reader.ids([KEYS[8]]))


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: os.truncate(path, 3000)], ids=["missing", "cut"])
def test_a_shard_that_is_missing_or_cut_short(
    gallery: sf.Gallery, features: sf.Features, harm: Callable[[Path], Any]
) -> None:
    harm(gallery.path / "shards/000000.h5")
    reader = reopen(gallery.path)
    (problem,) = reader.verify()
    assert problem.file == "shards/000000.h5"
    assert "expected" in problem.message
    with pytest.raises(sf.CorruptGalleryError, match=r"000000\.h5: expected"):
        reader.read([0])
    for found, level in zip(reader.read([5, 11]), features.levels, strict=True):  # the other shard is not the worse
        assert found.tobytes() == level[[5, 11]].tobytes()


def test_compact_needs_no_removed_row_and_launders_no_damage(gallery: sf.Gallery, features: sf.Features) -> None:
    """What it writes gets new checksums: it must not give one to a key that is not what was written."""

    def flip(file: str, part: bytes) -> None:
        content = bytearray((gallery.path / file).read_bytes())
        content[content.index(part)] ^= 1
        (gallery.path / file).write_bytes(content)

    flip("shards/000001.h5", features.image[8].tobytes())
    gallery.remove([KEYS[8]])
    gallery.compact()
    assert (gallery.verify(), KEYS[8] in gallery, len(gallery)) == ([], False, N - 1)
    gallery.remove([KEYS[0]])
    flip(Manifest.read(gallery.path).shards[0].file, KEYS[3].encode())
    with pytest.raises(sf.CorruptGalleryError, match="key, digest or path is not what was written"):
        reopen(gallery.path).compact()


def test_verify_looks_at_the_files_of_now(gallery: sf.Gallery) -> None:
    """Not at what an open file or a cache still holds of them."""
    gallery.read(range(N))
    assert gallery.verify() == []
    (gallery.path / "shards/000000.h5").unlink()
    damage(gallery.path / "shards/000001.h5")
    os.truncate(gallery.path / "shards/000001.h5", 3000)
    assert [problem.file for problem in gallery.verify()] == ["shards/000000.h5", "shards/000001.h5"]
