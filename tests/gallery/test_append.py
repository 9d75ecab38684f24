"""What comes into a gallery: several steps as one commit, what is refused, and the same key again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.store.shard_writer import ShardWriter
from spade_faiss.store.snapshot import Snapshot
from spade_faiss.store.writer import GalleryWriter
from spade_faiss.system import failpoints
from tests.helpers.galleries import OWN, random_features_of
from tests.helpers.own_galleries import KEYS, N, assert_holds, create, join, named, pick, reopen


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


@pytest.mark.parametrize("keys", [["a", "b"], [*KEYS[:3], "a"]])  # new ones; some in the place of others
def test_ctrl_c_right_after_a_commit_commits_once(
    gallery: sf.Gallery, features: sf.Features, monkeypatch: pytest.MonkeyPatch, keys: list[str]
) -> None:
    """A shard that is named twice would be a damaged gallery."""
    new, stops = random_features_of(len(keys), seed=3), iter(range(10))

    def stopped(self: GalleryWriter, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name == "snapshot" and getattr(self, "_finished", []) and next(stops) == 0:  # of the commit
            raise KeyboardInterrupt

    monkeypatch.setattr(GalleryWriter, "__setattr__", stopped, raising=False)
    with pytest.raises(KeyboardInterrupt):
        gallery.append(keys, new, replace=True)
    left = [row for row, key in enumerate(KEYS) if key not in keys]
    for at in (gallery, reopen(gallery.path)):
        assert_holds(at, [*(KEYS[row] for row in left), *keys], join(pick(features, left), new))
        assert at.verify() == []


@pytest.mark.parametrize("step", ["opened N.h5", "appended to N.h5"])
@pytest.mark.parametrize("replace", [False, True])
def test_an_append_that_failed_halfway_is_not_committed(
    tmp_path: Path, features: sf.Features, monkeypatch: pytest.MonkeyPatch, replace: bool, step: str
) -> None:
    """Not even by a caller that passes over its error: its first shard would stand beside what it was to replace."""
    gallery = create(tmp_path / "g", shard_bytes=4 * OWN.bytes_per_image)
    gallery.append(KEYS, features)
    keys = KEYS if replace else [f"new {key}" for key in KEYS]
    calls = iter(range(10))

    def full(passed: str) -> None:
        if passed == step and next(calls) == 1:
            raise sf.GalleryError("the disk is full")

    monkeypatch.setattr(failpoints, "action", full)
    with (
        pytest.raises(sf.GalleryError, match="expected whole appends to commit"),
        gallery.writer() as writer,
        pytest.raises(sf.GalleryError, match="the disk is full"),
    ):
        writer.append(keys, random_features_of(N, seed=3), replace=replace)
    for at in (gallery, reopen(gallery.path)):
        assert_holds(at, KEYS, features)
    assert gallery.append(keys, random_features_of(N, seed=3), replace=replace).added == N


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
