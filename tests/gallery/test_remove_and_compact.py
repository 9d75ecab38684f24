"""What goes out of a gallery, and when its files get smaller."""

from __future__ import annotations

from pathlib import Path

import pytest

import spade_faiss as sf
from spade_faiss.system import failpoints
from tests.helpers.galleries import random_features_of
from tests.helpers.own_galleries import BIG, KEYS, N, assert_holds, create, named, pick, reopen


def test_removed_images_are_gone_before_and_after_compact(gallery: sf.Gallery, features: sf.Features) -> None:
    gone = [1, 6, 11]
    gallery.remove([KEYS[row] for row in gone])
    left = [row for row in range(N) if row not in gone]
    keys, rest = [KEYS[row] for row in left], pick(features, left)
    for step in (lambda: None, gallery.compact, gallery.rebuild_index):
        step()
        for at in (gallery, reopen(gallery.path)):
            assert_holds(at, keys, rest)
            assert all(KEYS[row] not in at for row in gone)
            assert at.verify() == []
            found, sq_distances = at.search(features.image[gone], len(keys))
            assert {key for row in found for key in at.keys(row)} == set(keys)
            assert sq_distances.min() > 0
    gallery.append([KEYS[row] for row in gone], pick(features, gone))  # and may come back
    assert_holds(gallery, KEYS, features)


def test_an_unknown_key_removes_nothing(gallery: sf.Gallery, features: sf.Features) -> None:
    gallery.remove(KEYS[:1])
    before = named(gallery.path)
    for unknown in ("no such", KEYS[0]):
        with pytest.raises(sf.OptionError, match=unknown):
            gallery.remove([KEYS[1], unknown, KEYS[2]])
        assert named(gallery.path) == before
    assert_holds(gallery, KEYS[1:], features[1:])


def test_removing_rewrites_no_shard(gallery: sf.Gallery) -> None:
    before = named(gallery.path)
    gallery.remove(KEYS[4:8])
    after = named(gallery.path)
    assert {name for name in before if after.get(name) != before[name]} == {"gallery.json"}
    assert after.keys() == before.keys()


def test_all_images_may_be_removed(gallery: sf.Gallery, features: sf.Features) -> None:
    gallery.remove(KEYS)
    for _ in range(2):
        assert (len(gallery), gallery.keys()) == (0, [])
        with pytest.raises(sf.NotEnoughImagesError, match="found 0"):
            gallery.search(features.image, 1)
        gallery.compact()
    assert list(gallery.path.glob("shards/*")) == []
    gallery.append(KEYS, features)
    assert_holds(gallery, KEYS, features)


def size_on_disk(path: Path) -> int:
    return sum(len(content) for content in named(path).values())


def test_compact_saves_space_and_keeps_the_answers(tmp_path: Path) -> None:
    gallery, features = create(tmp_path / "g", BIG, shard_bytes=10 * BIG.bytes_per_image), random_features_of(30, BIG)
    keys = [f"{row:02d}" for row in range(30)]
    for start in range(0, 30, 10):
        gallery.append(keys[start : start + 10], features[start : start + 10])
    gallery.remove(keys[5:25])
    left = [*range(5), *range(25, 30)]
    query = random_features_of(4, BIG, seed=5).image
    answers = [[gallery.keys(row) for row in gallery.search(query, 6)[0]], gallery.search(query, 6)[1].tolist()]
    before = size_on_disk(tmp_path / "g")
    saved = gallery.compact()
    assert 20 * BIG.bytes_per_image < saved <= before - size_on_disk(tmp_path / "g")
    assert [[gallery.keys(row) for row in gallery.search(query, 6)[0]], gallery.search(query, 6)[1].tolist()] == answers
    assert_holds(gallery, [keys[row] for row in left], pick(features, left))
    assert len(list((tmp_path / "g").glob("shards/*"))) == 1
    assert gallery.compact() == 0


def test_compact_joins_small_shards_and_leaves_full_ones(tmp_path: Path) -> None:
    gallery, features = create(tmp_path / "g", BIG, shard_bytes=10 * BIG.bytes_per_image), random_features_of(13, BIG)
    keys = [f"{row:02d}" for row in range(13)]
    for rows in (slice(0, 1), slice(1, 11), slice(11, 12), slice(12, 13)):  # small, full, small, small
        gallery.append(keys[rows], features[rows])
    full = named(tmp_path / "g")["shards/000001.h5"]
    gallery.compact()
    assert_holds(gallery, keys, features)
    shards = [content for name, content in named(tmp_path / "g").items() if name.startswith("shards/")]
    assert len(shards) == 2
    assert full in shards


@pytest.mark.parametrize(
    "step",
    [
        "read a shard to compact",
        "completed N.h5",
        "renamed N.h5",
        "finished a shard",
        "flushed gallery.json",
        "renamed gallery.json",  # the generation is there, though nobody is told
        "committed",
    ],
)
def test_a_writer_goes_on_after_a_compact_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """What it had written by then is in no commit: its images would be there twice."""
    gallery, features = create(tmp_path / "g", BIG, shard_bytes=10 * BIG.bytes_per_image), random_features_of(8, BIG)
    keys = [f"{row:02d}" for row in range(7)]
    for row, key in enumerate(keys):
        gallery.append([key], features[row : row + 1])

    def fails(passed: str) -> None:
        if passed == step:
            raise sf.GalleryError("the disk is full")

    with gallery.writer() as writer:
        with monkeypatch.context() as patch, pytest.raises(sf.GalleryError, match="the disk is full"):  # noqa: PT012
            patch.setattr(failpoints, "action", fails)
            writer.compact()
        writer.append(["new"], features[7:])
    for at in (gallery, reopen(gallery.path)):
        assert_holds(at, [*keys, "new"], features)
        assert at.verify() == []
    files = {file for file in named(gallery.path) if file.startswith("shards/")}
    assert files == {entry.file for entry in gallery.snapshot().manifest.shards}
    gallery.compact()
    assert_holds(gallery, [*keys, "new"], features)


def test_what_is_damaged_fails_a_compact_and_loses_nothing(gallery: sf.Gallery, features: sf.Features) -> None:
    path = gallery.path / "shards/000001.h5"
    content = bytearray(path.read_bytes())
    content[content.find(features.levels[0][N - 1].tobytes())] ^= 1  # of the last image: the others are copied by then
    path.write_bytes(content)
    gallery.refresh()
    with gallery.writer() as writer, pytest.raises(sf.CorruptGalleryError, match="not what was written"):
        writer.compact()
    assert gallery.keys() == KEYS
    assert [problem.key for problem in gallery.verify()] == KEYS[-1:]


def test_a_writer_goes_on_after_compact(tmp_path: Path) -> None:
    """Joining small shards around a full one moves images to other ids."""
    gallery, features = create(tmp_path / "g", BIG, shard_bytes=10 * BIG.bytes_per_image), random_features_of(12, BIG)
    keys = [f"{row:02d}" for row in range(12)]
    for rows in (slice(0, 1), slice(1, 11), slice(11, 12)):
        gallery.append(keys[rows], features[rows])
    with gallery.writer() as writer:
        writer.compact()
        assert writer.status("00", "other content") == "differs"
        writer.remove(["00"])
    assert_holds(gallery, keys[1:], features[1:])
