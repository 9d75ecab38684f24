"""The gallery through its public surface: what it promises to callers, readers, writers and whoever damages it."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.store.manifest import Manifest
from spade_faiss.store.shard_writer import ShardWriter
from spade_faiss.store.snapshot import Snapshot
from tests.helpers.galleries import OWN, RandomFeatures, random_features_of
from tests.helpers.processes import ready, run

N = 12
KEYS = [f"part {number % 3}/{number:02d}.png" for number in range(N)]
BIG = sf.ExtractorSpec(name="big", level_shapes=((16, 16, 16),), image_dim=4)  # 8 KiB an image: outweighs a file's own


def create(path: Path, spec: sf.ExtractorSpec = OWN, index: str = "auto", **options: Any) -> sf.Gallery:
    return sf.Gallery.create(path, spec, sf.IndexOptions(index, device="cpu"), **options)


def reopen(path: Path) -> sf.Gallery:
    return sf.Gallery.open(path, device="cpu")


def named(path: Path) -> dict[str, bytes]:
    """Every byte of a gallery but the locks'."""
    files = [path / "gallery.json", *path.glob("shards/*"), *path.glob("index/*")]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def pick(features: sf.Features, rows: list[int]) -> sf.Features:
    return features[rows]


def assert_holds(gallery: sf.Gallery, keys: list[str], features: sf.Features) -> None:
    """It holds exactly these images: by key, bit for bit, and found by search."""
    assert len(gallery) == len(keys)
    assert sorted(gallery.keys()) == sorted(keys)
    assert all(key in gallery for key in keys)
    ids = gallery.ids(keys)
    assert gallery.keys(ids) == keys
    for found, level in zip(gallery.read(ids), features.levels, strict=True):
        assert found.dtype == level.dtype
        assert found.tobytes() == level.tobytes()
    nearest, sq_distances = gallery.search(features.image, 1)
    assert nearest[:, 0].tolist() == ids
    assert sq_distances.max() == 0
    everything, _ = gallery.search(features.image[:1], len(keys))
    assert sorted(everything[0].tolist()) == sorted(ids)


@pytest.fixture
def features(random_features: RandomFeatures) -> sf.Features:
    return random_features(N)


@pytest.fixture
def gallery(tmp_path: Path, features: sf.Features) -> sf.Gallery:
    """N images in two shards."""
    gallery = create(tmp_path / "own.gallery")
    gallery.append(KEYS[:5], features[:5])
    gallery.append(KEYS[5:], features[5:])
    return gallery


# The way through


def test_from_nothing_to_neighbours(tmp_path: Path, features: sf.Features) -> None:
    path = tmp_path / "deep" / "new folder"
    gallery = create(path)
    assert (len(gallery), gallery.generation, gallery.keys(), gallery.verify()) == (0, 0, [], [])
    with pytest.raises(sf.NotEnoughImagesError, match=r"K = 1 .* found 0"):
        gallery.search(features.image, 1)

    appended = gallery.append(KEYS, features)
    assert (appended.added, appended.replaced, appended.unchanged) == (N, 0, 0)
    assert gallery.keys() == KEYS  # in the order of appending
    assert gallery.generation > 0
    assert_holds(gallery, KEYS, features)
    assert_holds(reopen(path), KEYS, features)
    assert gallery.verify() == []

    queries = random_features_of(3, seed=9).image
    ids, sq_distances = gallery.search(queries, 5)
    brute = ((queries[:, None].astype(np.float64) - features.image[None]) ** 2).sum(axis=2)
    assert ids.tolist() == np.argsort(brute, axis=1)[:, :5].tolist()
    np.testing.assert_allclose(sq_distances, np.sort(brute, axis=1)[:, :5], rtol=1e-5)
    assert gallery.search(queries, 5, without=ids[0, :2])[0][0].tolist() == np.argsort(brute[0])[2:7].tolist()


def test_rows_come_back_in_the_order_asked_for(gallery: sf.Gallery, features: sf.Features) -> None:
    order = [11, 0, 7, 7, 4, 5]
    ids = gallery.ids([KEYS[row] for row in order])
    assert gallery.keys(np.array(ids)) == [KEYS[row] for row in order]
    for found, level in zip(gallery.read(np.array(ids)), features.levels, strict=True):
        assert found.tobytes() == level[order].tobytes()
    assert [level.shape for level in gallery.read([])] == [(0, 3, 5, 7), (0, 2, 3, 3)]


def test_names_that_are_not_there(gallery: sf.Gallery) -> None:
    assert "no such" not in gallery
    with pytest.raises(KeyError, match="no such"):
        gallery.ids([KEYS[0], "no such"])
    for wrong in (-1, N):
        with pytest.raises(sf.OptionError, match=f"expected 0 to {N - 1}, found {wrong}"):
            gallery.read([0, wrong])
        with pytest.raises(sf.OptionError, match=f"found {wrong}"):
            gallery.keys([wrong])


def test_more_neighbours_than_images_names_both(gallery: sf.Gallery, features: sf.Features) -> None:
    with pytest.raises(sf.NotEnoughImagesError, match=rf"K = {N + 1} .* found {N}"):
        gallery.search(features.image, N + 1)
    gallery.remove(KEYS[:2])
    with pytest.raises(sf.NotEnoughImagesError, match=rf"K = {N} .* found {N - 2}"):
        gallery.search(features.image, N)


@pytest.mark.parametrize(
    "queries",
    [np.zeros(6, np.float32), np.zeros((2, 7), np.float32), np.zeros((2, 6), int), np.full((2, 6), np.nan)],
    ids=["one-dimensional", "other-d", "integers", "nan"],
)
def test_queries_of_another_shape_or_not_finite_are_refused(gallery: sf.Gallery, queries: np.ndarray) -> None:
    with pytest.raises(sf.FeatureError, match="expected"):
        gallery.search(queries, 1)


def test_info_is_json_and_agrees_with_the_files(gallery: sf.Gallery) -> None:
    gallery.remove(KEYS[3:4])
    info = json.loads(json.dumps(gallery.info()))
    assert (info["images"], info["removed"], info["shards"]) == (N - 1, 1, 2)
    assert info["bytes"] == sum(len(data) for name, data in named(gallery.path).items() if name != "gallery.json")
    assert info["extractor"]["name"] == "own"
    assert info["bytes_per_image"] == 2 * (3 * 5 * 7 + 2 * 3 * 3) + 4 * 6
    assert info["generation"] == gallery.generation


@pytest.mark.parametrize("index", ["ivf", "IVF3,Flat", "HNSW8"])
def test_every_kind_of_index_survives_a_life(tmp_path: Path, features: sf.Features, index: str) -> None:
    gallery = create(tmp_path / "g", index=index)
    for start in range(0, N, 4):
        gallery.append(KEYS[start : start + 4], features[start : start + 4])
    gallery.remove(KEYS[2:4])
    rows = [0, 1, *range(4, N)]
    for at in (gallery, reopen(gallery.path)):
        assert_holds(at, [KEYS[row] for row in rows], pick(features, rows))
    gallery.compact()
    assert_holds(gallery, [KEYS[row] for row in rows], pick(features, rows))


def test_an_index_that_needs_more_images_does_not_half_refuse_an_append(tmp_path: Path, features: sf.Features) -> None:
    gallery = create(tmp_path / "g", index="IVF8,Flat")
    with pytest.warns(UserWarning, match=r"flat until there are more images.*points \(4\).*clusters \(8\)"):
        gallery.append(KEYS[:4], features[:4])
    assert_holds(gallery, KEYS[:4], features[:4])
    gallery.append(KEYS[4:], features[4:])  # now there are enough
    assert_holds(reopen(tmp_path / "g"), KEYS, features)


def test_a_writer_takes_several_steps_as_one_commit(gallery: sf.Gallery, features: sf.Features) -> None:
    before, reader = gallery.generation, reopen(gallery.path)
    new = random_features_of(2, seed=3)
    with gallery.writer() as writer:
        writer.append(["a"], new[:1])
        writer.append(["b"], new[1:])
        reader.refresh()
        assert len(reader) == N  # not before it is committed
    assert_holds(gallery, [*KEYS, "a", "b"], join(features, new))
    assert gallery.generation > before


def test_a_writer_stopped_by_an_error_commits_nothing(gallery: sf.Gallery, features: sf.Features) -> None:
    before = named(gallery.path)
    with pytest.raises(RuntimeError, match="mine"), gallery.writer() as writer:  # noqa: PT012
        writer.remove(KEYS[:1])
        writer.append(["a"], random_features_of(1, seed=3))
        raise RuntimeError("mine")
    assert named(gallery.path) == before
    assert_holds(gallery, KEYS, features)


def test_a_writer_stopped_by_ctrl_c_keeps_what_is_whole(gallery: sf.Gallery, features: sf.Features) -> None:
    new = random_features_of(1, seed=3)
    with pytest.raises(KeyboardInterrupt), gallery.writer() as writer:  # noqa: PT012
        writer.append(["a"], new)
        raise KeyboardInterrupt
    assert_holds(gallery, [*KEYS, "a"], join(features, new))


def test_ctrl_c_within_an_append_of_several_shards_keeps_none_of_it(
    tmp_path: Path, features: sf.Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part of it would stand beside the rows that it was to replace."""
    gallery = create(tmp_path / "g", shard_bytes=4 * OWN.bytes_per_image)
    gallery.append(KEYS, features)
    append, calls = ShardWriter.append, iter(range(10))

    def stopped(self: ShardWriter, *args: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        append(self, *args)

    monkeypatch.setattr(ShardWriter, "append", stopped)
    with pytest.raises(KeyboardInterrupt):
        gallery.append(KEYS, random_features_of(N, seed=3), replace=True)
    assert_holds(gallery, KEYS, features)
    assert_holds(reopen(gallery.path), KEYS, features)


def join(first: sf.Features, second: sf.Features) -> sf.Features:
    levels = [np.concatenate(pair) for pair in zip(first.levels, second.levels, strict=True)]
    return sf.Features(np.concatenate([first.image, second.image]), levels)


# What is refused


def changed(features: sf.Features, edit: Callable[[sf.Features], Any]) -> sf.Features:
    """The features of two images after an edit in place."""
    copy = sf.Features(features.image[:2].copy(), [level[:2].copy() for level in features.levels])
    return edit(copy) or copy


def put(array: np.ndarray, value: float) -> None:
    array[(1,) * array.ndim] = value


REFUSED = {
    "nan": (lambda f: put(f.levels[0], np.nan), r"level 0 of image 1 of 2"),
    "infinity": (lambda f: put(f.levels[1], -np.inf), r"level 1 of image 1 of 2"),
    "both infinities": (lambda f: (put(f.levels[1], np.inf), put(f.levels[1][::-1], -np.inf), None)[2], r"level 1"),
    "nan in the image feature": (lambda f: put(f.image, np.nan), r"image feature of image 1 of 2"),
    "a level less": (lambda f: sf.Features(f.image, f.levels[:1]), r"expected shapes .*found"),
    "levels the other way": (lambda f: sf.Features(f.image, f.levels[::-1]), r"expected shapes .*found"),
    "another shape": (lambda f: sf.Features(f.image, [f.levels[0][..., :6], f.levels[1]]), r"\(2, 3, 5, 6\)"),
    "an image less": (lambda f: sf.Features(f.image, [f.levels[0], f.levels[1][:1]]), r"\(1, 2, 3, 3\)"),
    "another dimension": (lambda f: sf.Features(f.image[:, :5], f.levels), r"\(2, 6\), found \(2, 5\)"),
    "integers": (lambda f: sf.Features(f.image, [f.levels[0].astype(int), f.levels[1]]), r"float32, found int64"),
    "too large for float16": (
        lambda f: sf.Features(f.image, [np.full((2, 3, 5, 7), 70000, np.float32), f.levels[1]]),
        r"65504.*70000.*float32",
    ),
    "too large for float32": (lambda f: sf.Features(np.full((2, 6), 1e300), f.levels), r"image feature.*1e\+300"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_features_that_do_not_fit_are_refused_whole(gallery: sf.Gallery, features: sf.Features, case: str) -> None:
    edit, expected = REFUSED[case]
    before = named(gallery.path)
    with pytest.raises(sf.FeatureError, match=expected) as caught:
        gallery.append(["good", "bad"], changed(features, edit))
    assert "\n" not in str(caught.value)
    assert named(gallery.path) == before
    assert_holds(gallery, KEYS, features)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["a", "a"], "'a' twice"),
        (["a"], "expected 2, one for each image, found 1"),
        (["a", ""], "expected text"),
        (["a", "b\0c"], "expected text"),
        (["a", "x" * 5000], "expected text of 1 to 4096 bytes"),
        (["a", 7], "found 7"),
        (["a", "name\udcff.png"], "found"),  # a file name that is not UTF-8, as Python spells it
    ],
    ids=["twice", "one-less", "empty", "nul", "long", "number", "surrogate"],
)
def test_keys_that_are_no_names_are_refused_whole(
    gallery: sf.Gallery, features: sf.Features, keys: list[Any], expected: str
) -> None:
    before = named(gallery.path)
    with pytest.raises(sf.FeatureError, match=expected):
        gallery.append(keys, features[:2])
    assert named(gallery.path) == before


def test_one_key_twice_among_very_many_is_refused_at_once(tmp_path: Path) -> None:
    """Comparing each with all before it would take the rest of the day."""
    n, spec = 500_000, sf.ExtractorSpec(name="tiny", level_shapes=((1, 1, 1),), image_dim=1)
    keys = [*map(str, range(n - 1)), str(n - 2)]
    features = sf.Features(np.zeros((n, 1), np.float32), [np.zeros((n, 1, 1, 1), np.float16)])
    with pytest.raises(sf.FeatureError, match=f"'{n - 2}' twice"):
        create(tmp_path / "g", spec).append(keys, features)


@pytest.mark.parametrize(
    "digests",
    [["a"], ["a", 7], ["a", "b\0"], ["a", "\udcff"]],
    ids=["one-less", "number", "nul", "surrogate"],
)
def test_digests_that_are_no_text_are_refused_whole(
    gallery: sf.Gallery, features: sf.Features, digests: list[Any]
) -> None:
    before = named(gallery.path)
    with pytest.raises(sf.FeatureError, match="digests"):
        gallery.append(["a", "b"], random_features_of(2, seed=3), digests=digests)
    assert named(gallery.path) == before


def test_awkward_names_are_kept(tmp_path: Path) -> None:
    keys = ["with space.png", "ünï/日本.png", "../up", "/root", "line\nbreak", "C:\\x", "e\u0301", "\u00e9", "x" * 4096]
    features = random_features_of(len(keys))
    gallery = create(tmp_path / "g")
    gallery.append(keys, features)
    assert_holds(reopen(tmp_path / "g"), keys, features)


def test_finite_values_whose_sum_is_not_are_taken(tmp_path: Path) -> None:
    spec = dataclasses.replace(OWN, dtype="float32")
    features = random_features_of(2, spec)
    features.levels[0][:] = 3e38
    gallery = create(tmp_path / "g", spec)
    gallery.append(["a", "b"], features)
    assert gallery.read([0, 1])[0].min() == np.float32(3e38)


def test_arrays_of_any_layout_are_taken(tmp_path: Path, features: sf.Features) -> None:
    image = np.asfortranarray(features.image.astype(np.float64))
    levels = [
        level[::-1].astype(">f4")[::-1].transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2) for level in features.levels
    ]
    gallery = create(tmp_path / "g")
    gallery.append(KEYS, sf.Features(image, levels))
    assert_holds(gallery, KEYS, features)


def test_nothing_to_append_changes_nothing(gallery: sf.Gallery, features: sf.Features) -> None:
    before = named(gallery.path)
    assert gallery.append([], features[:0]).added == 0
    gallery.remove([])
    assert named(gallery.path) == before


# The same key again


def test_the_same_content_is_passed_over(gallery: sf.Gallery, features: sf.Features) -> None:
    before = named(gallery.path)
    appended = gallery.append(KEYS, features)
    assert (appended.added, appended.replaced, appended.unchanged) == (0, 0, N)
    assert named(gallery.path) == before
    new = random_features_of(1, seed=3)
    appended = gallery.append([*KEYS[:3], "new"], join(features[:3], new))
    assert (appended.added, appended.unchanged) == (1, 3)
    assert_holds(gallery, [*KEYS, "new"], join(features, new))


def test_other_content_under_a_key_is_refused_whole_or_replaces(gallery: sf.Gallery, features: sf.Features) -> None:
    before = named(gallery.path)
    other = random_features_of(3, seed=4)
    keys = ["new", KEYS[0], KEYS[7]]
    with pytest.raises(sf.KeyConflictError, match=KEYS[0]):
        gallery.append(keys, other)
    assert named(gallery.path) == before

    appended = gallery.append(keys, other, replace=True)
    assert (appended.added, appended.replaced, appended.unchanged) == (3, 2, 0)
    rest = [row for row in range(N) if row not in (0, 7)]
    expected = [KEYS[row] for row in rest] + keys, join(pick(features, rest), other)
    assert_holds(gallery, *expected)
    assert_holds(reopen(gallery.path), *expected)
    gallery.compact()
    assert_holds(gallery, *expected)


def test_one_value_makes_other_content(gallery: sf.Gallery, features: sf.Features) -> None:
    for array in (features.image, *features.levels):
        before = array[0].copy()
        array[0].flat[-1] += 1
        with pytest.raises(sf.KeyConflictError):
            gallery.append(KEYS[:1], features[:1])
        array[0] = before
    assert gallery.append(KEYS[:1], features[:1]).unchanged == 1


def test_content_may_be_told_by_digests_of_the_caller(tmp_path: Path, features: sf.Features) -> None:
    gallery = create(tmp_path / "g")
    gallery.append(KEYS[:2], features[:2], digests=["v1", "v1"])
    assert gallery.append(KEYS[:2], features[2:4], digests=["v1", "v1"]).unchanged == 2
    with pytest.raises(sf.KeyConflictError):
        gallery.append(KEYS[:2], features[:2], digests=["v1", "v2"])
    assert_holds(gallery, KEYS[:2], features[:2])


def test_a_key_replaced_twice_in_one_commit(tmp_path: Path) -> None:
    gallery = create(tmp_path / "g")
    versions = [random_features_of(1, seed=seed) for seed in range(3)]
    with gallery.writer() as writer:
        for version in versions:
            writer.append(["a"], version, replace=True)
    assert_holds(gallery, ["a"], versions[-1])
    assert gallery.verify() == []


def test_one_append_replaces_rows_of_this_commit_and_of_older_ones(tmp_path: Path) -> None:
    """And what it replaces has the id that it has now, not that of before the commit in between."""
    gallery, old = create(tmp_path / "g"), random_features_of(3)
    gallery.append(["a", "b", "c"], old)
    gallery.append(["a"], random_features_of(1, seed=1), replace=True)
    pending, new = random_features_of(1, seed=2), random_features_of(4, seed=3)
    with gallery.writer() as writer:
        writer.append(["d"], pending)
        found = writer.append(["e", "d", "a", "b"], new, replace=True)
    assert (found.added, found.replaced, found.unchanged) == (4, 3, 0)
    assert_holds(gallery, ["c", "e", "d", "a", "b"], join(old[2:], new))
    assert gallery.verify() == []


def test_an_append_asks_once_for_each_key(gallery: sf.Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    find_all, asked = Snapshot.find_all, []
    monkeypatch.setattr(Snapshot, "find_all", lambda self, keys: (asked.extend(keys), find_all(self, keys))[1])
    gallery.append(["a", *KEYS[:3]], random_features_of(4, seed=9), replace=True)
    assert asked == ["a", *KEYS[:3]]


# Remove and compact


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


# Readers


def test_a_reader_keeps_its_generation_until_refreshed(gallery: sf.Gallery, features: sf.Features) -> None:
    query = random_features_of(2, seed=8).image
    new = random_features_of(3, seed=3)
    steps: list[tuple[Callable[[], Any], list[str], sf.Features]] = [
        (lambda: gallery.append(["a", "b", "c"], new), [*KEYS, "a", "b", "c"], join(features, new)),
        (lambda: gallery.remove(KEYS[:4]), [*KEYS[4:], "a", "b", "c"], join(features[4:], new)),
        (gallery.compact, [*KEYS[4:], "a", "b", "c"], join(features[4:], new)),
        (gallery.rebuild_index, [*KEYS[4:], "a", "b", "c"], join(features[4:], new)),
    ]
    held, held_features = list(KEYS), features
    for step, keys, expected in steps:
        # One that has read already, and one that opens its files only after they were replaced.
        busy, idle = reopen(gallery.path), reopen(gallery.path)
        ids, sq_distances = busy.search(query, 4)
        levels = busy.read(ids[0])
        generation = busy.generation
        step()
        for reader in (busy, idle):
            assert reader.generation == generation
            assert_holds(reader, held, held_features)
            assert reader.search(query, 4)[0].tolist() == ids.tolist()
            assert reader.search(query, 4)[1].tolist() == sq_distances.tolist()
            assert [level.tobytes() for level in reader.read(ids[0])] == [level.tobytes() for level in levels]
            assert reader.verify() == []
        for reader in (busy, idle):
            reader.refresh()
            assert reader.generation > generation
            assert_holds(reader, keys, expected)
            reader.close()
        held, held_features = keys, expected


def test_old_files_go_with_the_last_reader(gallery: sf.Gallery, features: sf.Features) -> None:
    readers = [reopen(gallery.path), reopen(gallery.path)]
    old = {name for name in named(gallery.path) if name != "gallery.json"}
    gallery.remove(KEYS[:1])
    gallery.compact()
    for reader in readers:
        gallery.append([f"new {id(reader)}"], random_features_of(1, seed=id(reader)))
        assert old <= named(gallery.path).keys()
        assert_holds(reader, KEYS, features)
        reader.close()
    gallery.append(["last"], random_features_of(1, seed=2))
    manifest = json.loads((gallery.path / "gallery.json").read_bytes())
    expected = {shard["file"] for shard in manifest["shards"]} | {"gallery.json"}
    expected |= {manifest[derived]["file"] for derived in ("index", "keys")}
    assert named(gallery.path).keys() == expected
    assert not old & expected


def test_a_reader_that_nobody_closed_does_not_keep_files(gallery: sf.Gallery) -> None:
    reader = reopen(gallery.path)
    reader.search(random_features_of(1).image, 1)
    old = set(gallery.path.glob("shards/*"))
    del reader
    gallery.remove(KEYS[:1])
    gallery.compact()
    assert not old & set(gallery.path.glob("shards/*"))


def test_a_snapshot_outlives_what_the_same_gallery_writes(gallery: sf.Gallery, features: sf.Features) -> None:
    """A query that is under way in one thread while another thread compacts."""
    snapshot = gallery.snapshot()
    ids, _ = snapshot.search(features.image, 1)
    gallery.remove(KEYS[:4])
    gallery.compact()
    assert snapshot.keys(ids[:, 0]) == KEYS
    for found, level in zip(snapshot.levels(ids[:, 0]), features.levels, strict=True):
        assert found.tobytes() == level.tobytes()


@pytest.mark.slow
def test_threads_share_a_gallery(tmp_path: Path) -> None:
    n = 60
    features = random_features_of(n)
    with create(tmp_path / "g", shard_bytes=10 * OWN.bytes_per_image) as gallery:
        gallery.append([str(row) for row in range(n)], features)
    shared = reopen(tmp_path / "g")
    queries = random_features_of(40, seed=6).image

    def ask(gallery: sf.Gallery, query: np.ndarray) -> tuple[Any, ...]:
        ids, sq_distances = gallery.search(query[None], 7)
        levels = gallery.read(ids[0])
        return ids.tolist(), sq_distances.tolist(), gallery.keys(ids[0]), [level.tobytes() for level in levels]

    alone = [ask(reopen(tmp_path / "g"), query) for query in queries]
    start = threading.Barrier(8)

    def all_at_once(number: int) -> list[tuple[Any, ...]]:
        start.wait()  # the first opens files and loads the index
        return [ask(shared, query) for query in np.roll(queries, number, axis=0)]

    with ThreadPoolExecutor(8) as pool:
        for number, answers in enumerate(pool.map(all_at_once, range(8))):
            assert answers == alone[-number:] + alone[:-number]


def test_threads_read_while_another_writes(tmp_path: Path) -> None:
    """Each query sees one generation, whole, whatever is committed meanwhile."""
    gallery, keys, stop = create(tmp_path / "g"), list("01234567"), threading.Event()

    def version(key: str, number: int) -> sf.Features:
        features = random_features_of(1, seed=number)
        features.levels[0][:] = int(key)  # so that levels tell whose they are
        return features

    for key in keys:
        gallery.append([key], version(key, 0))

    def ask() -> int:
        asked = 0
        while not stop.is_set():
            view = gallery.snapshot()
            ids, _ = view.search(np.zeros((1, OWN.image_dim), np.float32), 4)
            found, levels = view.keys(ids[0]), view.levels(ids[0])
            assert len(set(found)) == 4
            assert levels[0][:, 0, 0, 0].tolist() == [int(key) for key in found]
            asked += 1
        return asked

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        try:
            for number in range(1, 6):
                gallery.append([keys[number]], version(keys[number], number), replace=True)
                gallery.compact()
        finally:
            stop.set()
        assert all(done.result() > 0 for done in asking)


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


def test_a_damaged_manifest_or_another_format_version(gallery: sf.Gallery) -> None:
    manifest = gallery.path / "gallery.json"
    content = manifest.read_text()
    manifest.write_text(content.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(sf.CorruptGalleryError, match="expected format version 1, found 2"):
        reopen(gallery.path)
    manifest.write_text(content[:100])
    with pytest.raises(sf.CorruptGalleryError, match=r"gallery\.json: damaged"):
        reopen(gallery.path)
    assert len(gallery) == N  # whoever has it open reads on


# Making and opening


def test_there_is_no_gallery_to_open(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", str(tmp_path / "nothing")):
        with pytest.raises(sf.GalleryNotFoundError, match="expected a gallery"):
            sf.Gallery.open(path)
    assert list(tmp_path.iterdir()) == []


def test_create_leaves_alone_what_is_there(tmp_path: Path, gallery: sf.Gallery, features: sf.Features) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("mine")
    for path in (gallery.path, tmp_path / "file", tmp_path / "folder", tmp_path / "file" / "below"):
        with pytest.raises(sf.GalleryError) as caught:
            create(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert_holds(reopen(gallery.path), KEYS, features)
    assert [file.read_text() for file in (tmp_path / "file", tmp_path / "folder" / "x")] == ["mine", "mine"]
    (tmp_path / "empty").mkdir()
    assert len(create(tmp_path / "empty")) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"level_shapes": ()},
        {"level_shapes": ((3, 5),)},
        {"level_shapes": ((3, 0, 7),)},
        {"image_dim": 0},
        {"dtype": "float64"},
    ],
    ids=["no-levels", "no-shape", "empty-level", "no-dimensions", "dtype"],
)
def test_a_spec_that_is_none_makes_no_gallery(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(sf.OptionError):
        create(tmp_path / "g", dataclasses.replace(OWN, **fields))
    assert not (tmp_path / "g").exists()


def test_an_index_that_faiss_does_not_know_makes_no_gallery(tmp_path: Path) -> None:
    with pytest.raises(sf.OptionError, match="nonsense"):
        create(tmp_path / "g", index="nonsense")
    assert not (tmp_path / "g").exists()


def test_another_spec_names_the_fields_and_both_values(toy_gallery: sf.Gallery, image_folder: Path) -> None:
    before = named(toy_gallery.path)
    options = sf.FeatureOptions(neighbourhood=3, dtype="float32")
    with pytest.raises(sf.SpecMismatchError) as caught:
        toy_gallery.add_images(image_folder, sf.load_extractor("toy", options=options))
    message = str(caught.value)
    assert "neighbourhood: expected 1, found 3" in message
    assert "dtype: expected float16, found float32" in message
    assert "resized" not in message  # the same on both sides
    assert named(toy_gallery.path) == before


def test_where_the_weights_came_from_does_not_matter() -> None:
    one, other = (dataclasses.replace(OWN, weights_sha256="5", weights=name) for name in ("a.pth", "b.pth"))
    one.require(other, "here")
    with pytest.raises(sf.SpecMismatchError, match="weights_sha256: expected 5, found 6"):
        one.require(dataclasses.replace(other, weights_sha256="6"), "here")


# One writer

HOLD = """
import sys
import spade_faiss as sf
gallery = sf.Gallery.open(sys.argv[1], device="cpu")
with gallery.writer() as writer:
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_second_writer_is_told_who_is_writing(gallery: sf.Gallery, features: sf.Features) -> None:
    new = random_features_of(1, seed=3)
    with ready(HOLD, gallery.path) as process:
        before = named(gallery.path)
        for write in (
            lambda: gallery.append(["a"], new),
            lambda: gallery.remove(KEYS[:1]),
            gallery.compact,
            gallery.rebuild_index,
        ):
            with pytest.raises(sf.GalleryLockedError, match=rf"another process \(process {process.pid}\)"):
                write()
        assert_holds(gallery, KEYS, features)  # reading goes on
        assert named(gallery.path) == before
    gallery.append(["a"], new)  # it was killed: its lock went with it
    assert_holds(gallery, [*KEYS, "a"], join(features, new))


@pytest.mark.slow
def test_a_second_writer_may_wait(gallery: sf.Gallery, features: sf.Features) -> None:
    new = random_features_of(1, seed=3)
    with ready(HOLD, gallery.path) as process:
        start = time.monotonic()
        with pytest.raises(sf.GalleryLockedError):
            gallery.append(["a"], new, timeout=0.3)
        assert time.monotonic() - start >= 0.3
        let_go = threading.Timer(0.3, process.stdin.close)
        let_go.start()
        gallery.append(["a"], new, timeout=30)
        let_go.join()
    assert_holds(gallery, [*KEYS, "a"], join(features, new))


def test_two_galleries_of_one_process_do_not_write_at_the_same_time(gallery: sf.Gallery, features: sf.Features) -> None:
    other = reopen(gallery.path)
    with gallery.writer() as writer:
        writer.append(["a"], random_features_of(1, seed=3))
        with pytest.raises(sf.GalleryLockedError, match=str(os.getpid())):
            other.remove(KEYS[:1])
    other.remove(KEYS[:1])  # on top of what the first one wrote, though it has not read that
    assert other.keys() == [*KEYS[1:], "a"]


READ_ONLY = """
import os, sys
import numpy as np
import spade_faiss as sf
if os.geteuid() == 0:
    os.setuid(65534)  # permissions do not stop root
gallery = sf.Gallery.open("own.gallery", device="cpu")
print(len(gallery), gallery.search(np.zeros((1, 6), np.float32), 2)[0].shape, gallery.read([3])[0].shape)
print(gallery.verify())
features = sf.Features(np.zeros((1, 6), np.float32), [np.zeros((1, 3, 5, 7)), np.zeros((1, 2, 3, 3))])
for write in (lambda: gallery.append(["a"], features), lambda: gallery.remove(gallery.keys()[:1]), gallery.compact,
              lambda: sf.Gallery.create("new.gallery", gallery.spec)):
    try:
        write()
        print("written")
    except sf.GalleryError as error:
        print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="permissions are set as on POSIX")
def test_without_permission_to_write_it_can_be_read(gallery: sf.Gallery) -> None:
    before, folder = named(gallery.path), gallery.path.parent
    modes = {path: path.stat().st_mode for path in [folder, gallery.path, *gallery.path.rglob("*")]}
    try:
        for path, mode in modes.items():
            readable = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
            path.chmod(readable | (0o111 if stat.S_ISDIR(mode) else 0))
        done = run(READ_ONLY, cwd=folder)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert done.returncode == 0, done.stderr
    read, verified, *written = done.stdout.splitlines()
    assert (read, verified) == (f"{N} (1, 2) (1, 3, 5, 7)", "[]")
    assert len(written) == 4
    assert all("Permission denied; check who owns it and its permissions" in line for line in written)
    assert named(gallery.path) == before
    assert not (folder / "new.gallery").exists()


# Any order of anything


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("seed", range(2))
def test_a_random_life_equals_a_dict(tmp_path: Path, seed: int) -> None:
    """Appends, replacements, removals, compacts and reopenings against a dict of key -> content."""
    rng = np.random.default_rng(seed)
    path, names = tmp_path / "g", [f"{number}.png" for number in range(15)]
    gallery = create(path, index=["flat", "ivf"][seed], shard_bytes=4 * OWN.bytes_per_image)
    model: dict[str, int] = {}  # key -> the seed of its features

    def contents(versions: list[int]) -> sf.Features:
        rows = [random_features_of(1, seed=version) for version in versions]
        return sf.Features(
            np.concatenate([row.image for row in rows]),
            [np.concatenate(levels) for levels in zip(*(row.levels for row in rows), strict=True)],
        )

    for _ in range(32):
        step = rng.choice(
            ["append", "replace", "remove", "compact", "reopen", "rebuild"], p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.05]
        )
        keys = rng.choice(names, rng.integers(1, 6), replace=False).tolist()
        versions = (100 * np.array([names.index(key) for key in keys]) + rng.integers(0, 3, len(keys))).tolist()
        wanted = dict(zip(keys, versions, strict=True))
        same = sum(model.get(key) == version for key, version in wanted.items())
        differs = sum(key in model for key in keys) - same
        if step == "append" and differs:
            with pytest.raises(sf.KeyConflictError):
                gallery.append(keys, contents(versions))
        elif step in ("append", "replace"):
            appended = gallery.append(keys, contents(versions), replace=step == "replace")
            counts = (appended.added, appended.replaced, appended.unchanged)
            assert counts == (len(keys) - same, differs, same)
            model |= wanted
        elif step == "remove" and not model.keys() >= set(keys):
            with pytest.raises(sf.OptionError):
                gallery.remove(keys)
        elif step == "remove":
            gallery.remove(keys)
            for key in keys:
                del model[key]
        elif step == "compact":
            assert gallery.compact() >= 0
            assert gallery.info()["removed"] == 0
        elif step == "rebuild":
            gallery.rebuild_index()
        else:
            gallery.close()
            gallery = reopen(path)
        if model:
            assert_holds(gallery, list(model), contents(list(model.values())))
        else:
            assert gallery.keys() == []
    assert gallery.verify() == []
    assert_holds(reopen(path), list(model), contents(list(model.values())))
    gallery.compact()
    manifest = json.loads((path / "gallery.json").read_bytes())
    assert {shard["file"] for shard in manifest["shards"]} == {
        name for name in named(path) if name.startswith("shards/")
    }
