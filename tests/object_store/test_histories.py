"""Two histories of a gallery at one address: names of files are the same, and what they hold is not."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.object_store import pull as pulling
from spade_faiss.object_store.address import Address
from spade_faiss.object_store.bucket import Bucket
from spade_faiss.object_store.files import checksum_of
from spade_faiss.object_store.origins import FILE as ORIGINS
from spade_faiss.pyramids.cache import PyramidCache
from spade_faiss.pyramids.reader import StoredPyramids
from tests.helpers.galleries import OWN
from tests.helpers.stores import SHARD, N, append, features_between, same


def others(first: int, end: int, what: str) -> sf.Features:
    """Features of other images; "levels": the image features, and so index and key table, are those of before."""
    found, own = features_between(N + first, N + end), features_between(first, end)
    return sf.Features(own.image, found.levels) if what == "levels" else found


def rebuilt(folder: Path, what: str) -> sf.Gallery:
    """A gallery made from scratch, whose keys and files have the names of the one that the tests begin with."""
    gallery = sf.Gallery.create(folder, OWN, index="flat")
    size = SHARD - 1 if what == "fewer" else SHARD
    for first in range(0, N, SHARD):
        keys = [f"{number:03}" for number in range(first, first + size)]
        gallery.append(keys, others(first, first + size, what))
    return gallery


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


@pytest.mark.parametrize("what", ["images", "levels", "fewer"])
def test_another_history_is_not_pulled_into_a_folder(
    gallery: sf.Gallery, memory: str, tmp_path: Path, what: str
) -> None:
    """Its shards would stay under the new index, or be replaced while the old gallery.json names them."""
    sf.push(gallery.path, memory)
    sf.pull(memory, tmp_path / "pulled")
    other = rebuilt(tmp_path / "rebuilt", what)
    sf.push(other.path, memory, replace=True)
    before = content(tmp_path / "pulled")
    with pytest.raises(sf.GalleryError, match=r"another history of the gallery, .*; pull into another folder") as error:
        sf.pull(memory, tmp_path / "pulled")
    assert "\n" not in str(error.value)
    assert content(tmp_path / "pulled") == before
    assert same(sf.Gallery.open(tmp_path / "pulled"), gallery)
    sf.pull(memory, tmp_path / "new")
    assert same(sf.Gallery.open(tmp_path / "new"), other)


def test_a_history_that_parted_later_is_not_pulled_either(gallery: sf.Gallery, memory: str, tmp_path: Path) -> None:
    """Two machines have each added a shard to the same generation."""
    sf.push(gallery.path, memory)
    for name in ("pulled", "other"):
        sf.pull(memory, tmp_path / name)
    append(gallery, N, N + 1)
    sf.push(gallery.path, memory)
    sf.pull(memory, tmp_path / "pulled")
    with sf.Gallery.open(tmp_path / "other") as other:
        other.append([f"{N:03}"], features_between(N + 1, N + 2))
    sf.push(tmp_path / "other", memory, replace=True)
    with pytest.raises(sf.GalleryError, match="another history"):
        sf.pull(memory, tmp_path / "pulled")
    assert same(sf.Gallery.open(tmp_path / "pulled"), gallery)


def test_shards_that_are_known_are_not_read_again(
    gallery: sf.Gallery, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder remembers what it has pulled or pushed; one that an earlier release pulled is read once."""
    read: list[str] = []
    monkeypatch.setattr(pulling, "checksum_of", lambda path: (read.append(path.name), checksum_of(path))[1])
    sf.push(gallery.path, memory)
    sf.pull(memory, tmp_path / "pulled")
    append(gallery, N, N + 1)
    sf.push(gallery.path, memory)
    assert sf.pull(memory, tmp_path / "pulled").kept == N // SHARD
    with sf.Gallery.open(tmp_path / "pulled") as pulled:
        append(pulled, N + 1, N + 2)
    sf.push(tmp_path / "pulled", memory)
    sf.pull(memory, gallery.path)
    assert [name for name in read if name.endswith(".h5")] == []
    origins = tmp_path / "pulled" / ORIGINS
    origins.write_text(json.dumps({k: v for k, v in json.loads(origins.read_text()).items() if "shards" not in k}))
    gallery.refresh()
    gallery.remove(["000"])
    sf.push(gallery.path, memory)
    for _ in range(2):
        sf.pull(memory, tmp_path / "pulled")
        shards = [name for name in read if name.endswith(".h5")]
        assert shards == [f"{number:06}.h5" for number in range(N // SHARD + 2)]
    gallery.refresh()
    assert same(sf.Gallery.open(tmp_path / "pulled"), gallery)


@pytest.mark.parametrize("what", ["gone", "cut short"])
def test_a_shard_that_is_damaged_is_no_other_history(
    gallery: sf.Gallery, memory: str, tmp_path: Path, what: str
) -> None:
    """It is fetched again, even where nobody remembers what was pulled."""
    sf.push(gallery.path, memory)
    sf.pull(memory, tmp_path / "pulled")
    (tmp_path / "pulled" / ORIGINS).unlink()
    shard = tmp_path / "pulled/shards/000001.h5"
    cut = shard.read_bytes()[:100]
    shard.unlink()
    if what == "cut short":
        shard.write_bytes(cut)
    assert sf.pull(memory, tmp_path / "pulled").fetched == 1
    assert sf.Gallery.open(tmp_path / "pulled").verify() == []


@pytest.mark.parametrize("what", ["images", "levels"])
def test_cached_levels_are_those_of_the_last_push(gallery: sf.Gallery, memory: str, tmp_path: Path, what: str) -> None:
    sf.push(gallery.path, memory)
    cache = PyramidCache(10**6)
    with sf.Gallery.open(memory, cache=tmp_path / "cache") as opened:
        cache.read(StoredPyramids(opened.snapshot()), np.arange(N))
        append(gallery, N, N + 1)
        sf.push(gallery.path, memory)
        opened.refresh()
        cache.read(StoredPyramids(opened.snapshot()), np.arange(N))
        assert (cache.hits, cache.misses) == (N, N)  # the same objects, whatever else was pushed
        other = rebuilt(tmp_path / "rebuilt", what)
        sf.push(other.path, memory, replace=True)
        opened.refresh()
        found = cache.read(StoredPyramids(opened.snapshot()), np.arange(N))
        assert all(np.array_equal(a, b) for a, b in zip(found, other.read(np.arange(N)), strict=True))


@pytest.mark.parametrize("engine", ["pyramid", "bounds"])
def test_a_detector_answers_from_the_last_push(memory: str, tmp_path: Path, engine: sf.options.Engine) -> None:
    """Whatever its searches have prepared of the images that had these names before."""
    toy, search = sf.load_extractor("toy"), sf.SearchOptions(k=3, engine=engine)
    rng = np.random.default_rng(0)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        for number in range(6):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / name / f"{number}.png")
        with sf.Gallery.create(tmp_path / f"{name}.gallery", toy.spec) as made:
            made.add_images(tmp_path / name, toy)
    sf.push(tmp_path / "first.gallery", memory)
    query = rng.integers(0, 256, (32, 32, 3), np.uint8)
    with sf.Gallery.open(memory, cache=tmp_path / "cache") as opened:
        detector = sf.Detector(opened, toy, search)
        before = detector.query(query)
        sf.push(tmp_path / "second.gallery", memory, replace=True)
        opened.refresh()
        found = detector.query(query)
    with sf.Gallery.open(tmp_path / "second.gallery") as made:
        expected = sf.Detector(made, toy, search).query(query)
    assert np.array_equal(found.anomaly_map, expected.anomaly_map)
    assert not np.array_equal(found.anomaly_map, before.anomaly_map)


def test_what_a_sweep_has_deleted_is_not_relied_on_however_often_others_push(
    gallery: sf.Gallery, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push finds its own objects; then others sweep these away and leave the same gallery as when it began."""
    with sf.Gallery.create(tmp_path / "other", gallery.spec) as other:
        append(other, 0, 2)
    for _ in range(2):
        sf.push(other.path, memory)
    replace = Bucket.replace

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    def late(self: Bucket, *args: Any) -> None:
        monkeypatch.setattr(Bucket, "replace", replace)
        assert sf.push(other.path, memory, sweep=True).swept > 0
        sf.push(other.path, memory)
        replace(self, *args)

    monkeypatch.setattr(Bucket, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sf.push(gallery.path, memory, replace=True)
    monkeypatch.setattr(Bucket, "replace", late)
    with pytest.raises(sf.GalleryLockedError, match="another push has replaced it"):
        sf.push(gallery.path, memory, replace=True)
    assert same(sf.Gallery.open(memory, cache=tmp_path / "cache"), other)
    sf.push(gallery.path, memory, replace=True)
    assert same(sf.Gallery.open(memory, cache=tmp_path / "cache"), gallery)


def test_a_push_of_what_is_there_changes_nothing_for_others(gallery: sf.Gallery, memory: str, tmp_path: Path) -> None:
    sf.push(gallery.path, memory)
    sf.pull(memory, tmp_path / "pulled")
    before = Bucket(Address(memory)).read("gallery.json")
    assert sf.push(gallery.path, memory).uploaded == 0
    assert Bucket(Address(memory)).read("gallery.json") == before
    with sf.Gallery.open(tmp_path / "pulled") as pulled:
        append(pulled, N, N + 1)
    assert sf.push(tmp_path / "pulled", memory).uploaded > 0


def test_what_an_earlier_release_has_pushed_is_ours(
    gallery: sf.Gallery, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        token = secrets.token_hex
        patch.setattr(secrets, "token_hex", lambda size: "" if size == 8 else token(size))  # it wrote no such number
        sf.push(gallery.path, memory)
    assert b'"push"' not in (Bucket(Address(memory)).read("gallery.json") or b"")
    append(gallery, N, N + 1)
    assert sf.push(gallery.path, memory).uploaded > 0
