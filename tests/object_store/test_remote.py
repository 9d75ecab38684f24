"""A gallery read from an object store: the same answers as from disk, bytes counted, a bounded cache."""

from __future__ import annotations

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.object_store import local_cache
from spade_faiss.object_store.files import RemoteFiles
from spade_faiss.object_store.local_cache import LocalCache
from spade_faiss.object_store.rows import RowsFile
from spade_faiss.store.file_pool import PooledFile
from spade_faiss.system.forks import FORKS
from tests.helpers.galleries import OWN
from tests.helpers.stores import SHARD, N, append, features_between, same

LEVELS = OWN.bytes_per_image - 4 * OWN.image_dim  # bytes of an image's levels


def files_of(gallery: sf.Gallery) -> RemoteFiles:
    files = gallery.snapshot().files
    assert isinstance(files, RemoteFiles)
    return files


@pytest.fixture
def pushed(gallery: sf.Gallery, memory: str) -> str:
    sf.push(gallery.path, memory)
    return memory


def test_only_what_is_needed_is_fetched(gallery: sf.Gallery, pushed: str, tmp_path: Path) -> None:
    with sf.Gallery.open(pushed, cache=tmp_path / "cache") as opened:
        files = files_of(opened)
        opened.search(features_between(0, 1).image, 2)
        opened.keys([0, 1])
        before, requests = files.bucket.fetched, files.bucket.requests
        opened.read([1, 0])
        assert files.bucket.fetched - before == 2 * LEVELS
        assert files.bucket.requests - requests == 2 * len(OWN.level_shapes)
        opened.read([0, 1])
        assert files.bucket.fetched - before == 2 * LEVELS
        opened.read([SHARD])  # the other shard's rows come first
        rows = files.commit.objects["shards/000001.rows"]
        assert files.bucket.fetched - before == 3 * LEVELS + rows.bytes
    again = sf.Gallery.open(pushed, cache=tmp_path / "cache")
    assert again.read([0, SHARD])[0].shape == (2, 3, 5, 7)
    assert files_of(again).bucket.fetched == len(files.commit.content)  # gallery.json, and nothing else


def test_rows_of_many_shards_are_fetched_at_once(gallery: sf.Gallery, pushed: str, tmp_path: Path) -> None:
    with sf.Gallery.open(pushed, cache=tmp_path / "cache") as opened:
        calls: list[int] = []
        bucket = files_of(opened).bucket
        really = bucket.ranges
        bucket.ranges = lambda wanted: calls.append(len(wanted)) or really(wanted)  # type: ignore[method-assign]
        assert opened.keys() == gallery.keys()
        assert calls == [N // SHARD]
        assert opened.keys() == gallery.keys()
        assert calls == [N // SHARD]
    with sf.Gallery.open(pushed, cache=tmp_path / "small", cache_bytes=6000) as opened:
        assert opened.keys() == gallery.keys()  # one after the other, as they would evict each other


def test_rows_are_the_shard_without_its_levels(gallery: sf.Gallery, pushed: str, tmp_path: Path) -> None:
    opened = sf.Gallery.open(pushed, cache=tmp_path / "cache")
    entry = gallery.snapshot().manifest.shards[0]
    whole = (gallery.path / entry.file).read_bytes()
    rows = files_of(opened).open_shard(opened.path / entry.file, entry.bytes)
    assert isinstance(rows, RowsFile)
    assert isinstance(rows, PooledFile)
    found = bytearray(len(whole))
    rows.read_into(memoryview(found), 0, zeros=True)
    missing = sum(a != b for a, b in zip(whole, found, strict=True))
    assert 0 < missing <= SHARD * LEVELS
    levels = [level[row].tobytes() for level in gallery.read(np.arange(SHARD)) for row in range(SHARD)]
    for level in levels:
        at = whole.find(level)
        assert found[at : at + len(level)] == bytes(len(level))
        with pytest.raises(OSError, match="levels are not among the rows"):
            rows.read_into(memoryview(bytearray(1)), at)
    file = rows.for_hdf5()
    assert (file.seek(0, os.SEEK_END), file.tell()) == (len(whole), len(whole))
    assert (file.seek(-4, os.SEEK_CUR), file.read(10)) == (len(whole) - 4, whole[-4:])


def test_a_detector_answers_as_from_disk(images: Path, memory: str, tmp_path: Path) -> None:
    toy = sf.load_extractor("toy")
    with sf.Gallery.create(tmp_path / "toy.gallery", toy.spec) as local:
        local.add_images(images, toy)
        detector = sf.Detector(local, toy, sf.SearchOptions(k=3))
        sf.calibrate(detector, false_alarms=0.2).write(local.path)
    sf.push(tmp_path / "toy.gallery", memory)
    found = []
    for place in (tmp_path / "toy.gallery", memory):
        with sf.Gallery.open(place, cache=tmp_path / "cache") as opened:
            detection = sf.Detector(opened, toy, sf.SearchOptions(k=3)).query(images / "0.png")
            found.append(detection)
    assert found[0].image_score == found[1].image_score
    assert found[0].verdict == found[1].verdict is not None
    assert np.array_equal(found[0].anomaly_map, found[1].anomaly_map)
    assert np.array_equal(found[0].matches, found[1].matches)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(8):
        pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("what", ["half", "foreign", "empty", "gone"])
def test_a_file_of_the_cache_that_is_not_what_it_says_is_fetched_again(
    gallery: sf.Gallery, pushed: str, tmp_path: Path, what: str
) -> None:
    cache = tmp_path / "cache"
    with sf.Gallery.open(pushed, cache=cache) as first:
        assert "000" in first
        assert same(gallery, first)
    files = list(cache.glob("??/*"))
    assert {path.suffix for path in files} == {".rows", ".faiss", ".npy", ".levels"}
    for path in files:
        content = path.read_bytes()
        path.unlink()
        if what != "gone":
            path.write_bytes({"half": content[: len(content) // 2], "foreign": content[::-1], "empty": b""}[what])
    opened = sf.Gallery.open(pushed, cache=cache)
    assert "000" in opened
    assert same(gallery, opened)
    assert files_of(opened).bucket.fetched > N * LEVELS
    assert sorted(path.name for path in cache.glob("??/*")) == sorted(path.name for path in files)


def test_the_cache_is_bounded(gallery: sf.Gallery, pushed: str, tmp_path: Path) -> None:
    objects = files_of(sf.Gallery.open(pushed, cache=tmp_path / "first")).commit.objects
    largest = max(one.bytes for file, one in objects.items() if not file.endswith(".h5"))
    limit = largest + 2 * LEVELS
    cache = tmp_path / "cache"

    def read(seed: int) -> None:
        opened = sf.Gallery.open(pushed, cache=cache, cache_bytes=limit)
        for row in np.random.default_rng(seed).integers(0, N, 40):
            [[level], _] = opened.read([row])
            assert np.array_equal(level, features_between(row, row + 1).levels[0][0])
            with files_of(opened).cache._lock():  # no file is seen under two names
                assert sum(path.stat().st_size for path in cache.glob("??/*")) <= limit

    read(0)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(read, range(3)))
    assert any(path.suffix == ".levels" for path in cache.glob("??/*"))
    with pytest.raises(sf.OptionError, match=r"expected a cache of at least \d+ bytes"):
        sf.Gallery.open(pushed, cache=tmp_path / "small", cache_bytes=10).keys()


def named(number: int, end: str = "-7.levels") -> str:
    """A name as the cache gives: the checksum of an object, and what is of it."""
    return f"{number:032x}{end}"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("??/*"))


@pytest.mark.parametrize("end", ["-7.levels", "-12345678.levels", ".h5", ".rows", ".faiss", ".npy", ".json"])
def test_the_least_recent_files_go_first(tmp_path: Path, end: str) -> None:
    cache, names = LocalCache(tmp_path, 100), [named(number, end) for number in range(5)]
    for number, name in enumerate(names[:4]):
        cache.put(name, 25, [bytes(25)])
        os.utime(cache.path(name), (number, number))
    assert cache.load(names[0]) == bytes(25)
    cache.put(names[4], 25, [bytes(20), bytes(5)])
    assert names_in(tmp_path) == [names[0], *names[2:]]


@pytest.mark.parametrize(
    "name",
    [
        "fo/foreign.txt",
        "00/photo.json",
        "00/0.levels",
        "00/2024.npy",
        "00/draft.tmp",
        f"01/{named(0, '.h5')}",
        f"00/{named(0, '.png')}",
        f"00/{named(0)[1:]}",
        f"0A/0A{named(0, '.json')[2:]}",
        f"00/{named(0)}.1-2.tmp",
        f"00/copy of {named(0)}",
    ],
)
def test_files_of_others_are_not_counted_and_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The folder may be one that a user keeps other things in."""
    monkeypatch.setattr(local_cache, "ABANDONED", -1)
    cache, foreign = LocalCache(tmp_path, 100), tmp_path / name
    foreign.parent.mkdir()
    foreign.write_bytes(bytes(1000))
    os.utime(foreign, (0, 0))
    for number in range(1, 6):
        cache.put(named(number), 25, [bytes(25)])
        os.utime(cache.path(named(number)), (number, number))
    assert names_in(tmp_path) == sorted([foreign.name, *map(named, range(2, 6))])


def test_a_killed_process_leaves_no_more_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had reserved is counted until files are evicted; its temporary file goes after an hour."""
    cache = LocalCache(tmp_path, 100)
    cache.put(named(0), 40, [bytes(40)])
    left = cache.path(f"{named(1)}.7-8-9.tmp")
    left.write_bytes(bytes(40))
    (tmp_path / local_cache.USED).write_text("80")
    cache.put(named(2), 30, [bytes(30)])
    assert names_in(tmp_path) == [left.name, named(2)]
    monkeypatch.setattr(local_cache, "ABANDONED", -1)
    cache.put(named(3), 60, [bytes(60)])
    assert names_in(tmp_path) == [named(2), named(3)]
    (tmp_path / local_cache.USED).write_text("")  # killed while it wrote the number
    cache.put(named(4), 10, [bytes(10)])
    assert (tmp_path / local_cache.USED).read_text() == "100"


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path, 100)

    def broken() -> Any:
        yield bytes(5)
        raise sf.CorruptGalleryError("the object has changed")

    with pytest.raises(sf.CorruptGalleryError, match="changed"):
        cache.put(named(0), 10, broken())
    assert names_in(tmp_path) == []
    assert cache.load(named(0)) is None


def test_what_is_being_written_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, from the moment that it is begun: another process that evicts counts what is on the disk."""
    cache = LocalCache(tmp_path, 100)
    cache.put(named(0), 40, [bytes(40)])
    monkeypatch.setattr(local_cache, "PATIENCE", 0)

    def slow() -> Any:
        assert sum(path.stat().st_size for path in tmp_path.glob("??/*.tmp")) == 50
        LocalCache(tmp_path, 100).put(named(2), 20, [bytes(20)])
        yield bytes(50)

    cache.put(named(1), 50, slow())
    assert names_in(tmp_path) == [named(1), named(2)]


def test_threads_share_one(gallery: sf.Gallery, pushed: str, tmp_path: Path) -> None:
    opened = sf.Gallery.open(pushed, cache=tmp_path / "cache")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: opened.read(np.arange(N)), range(4)))
    expected = gallery.read(np.arange(N))
    assert all(np.array_equal(a, b) for levels in found for a, b in zip(levels, expected, strict=True))
    names = list(opened.path.parts)
    assert threading.active_count() < 50
    assert names[:2] == ["memory:", "bucket"]


def test_pickled_and_refreshed(gallery: sf.Gallery, pushed: str, tmp_path: Path) -> None:
    opened = sf.Gallery.open(pushed, cache=tmp_path / "cache", cache_bytes=10**6)
    append(gallery, N, N + 1)
    sf.push(gallery.path, pushed)
    other = pickle.loads(pickle.dumps(opened))
    assert (len(opened), len(other)) == (N, N + 1)
    assert (files_of(other).cache.folder, files_of(other).cache.limit) == (tmp_path / "cache", 10**6)
    opened.refresh()
    assert same(opened, other)


@pytest.mark.skipif(not FORKS, reason="needs fork")
def test_a_forked_process_goes_on_reading(gallery: sf.Gallery, client: Any, tmp_path: Path) -> None:
    sf.push(gallery.path, url := "s3://bucket/tiles.gallery")
    opened = sf.Gallery.open(url, cache=tmp_path / "cache")
    opened.read([0])
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(opened.read([N - 1])[0], gallery.read([N - 1])[0]) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert opened.read([1])


def test_patches_that_are_recomputed(images: Path, memory: str, tmp_path: Path) -> None:
    """Image files are not pushed: they are looked for where they were."""
    toy = sf.load_extractor("toy")
    with sf.Gallery.create(tmp_path / "toy.gallery", toy.spec, patches="recompute") as local:
        local.add_images(images, toy)
        sf.push(local.path, memory)
        opened = sf.Gallery.open(memory, cache=tmp_path / "cache")
        assert all(np.array_equal(a, b) for a, b in zip(opened.read([3], toy), local.read([3], toy), strict=True))


def test_nothing_is_written(pushed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    opened = sf.Gallery.open(pushed, cache=tmp_path / "cache")
    toy = sf.load_extractor("toy")
    calls = [
        lambda: append(opened, N, N + 1),
        lambda: opened.remove(["000"]),
        opened.compact,
        opened.reindex,
        opened.repair,
        lambda: sf.Gallery.create(pushed, toy.spec),
        lambda: sf.Gallery.open_or_create(pushed, OWN),
        lambda: sf.Calibration(0, {}, 0.1, None, np.ones(9), np.ones(9)).write(opened.path),
    ]
    for call in calls:
        with pytest.raises(sf.GalleryError, match=r"memory://bucket/tiles.gallery: .* read only; pull the gallery"):
            call()
    assert not (tmp_path / "memory:").exists()
    assert len(fsspec.filesystem("memory").find("/bucket")) == 2 * N // SHARD + 3
