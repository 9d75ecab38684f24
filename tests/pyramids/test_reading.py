"""Reading levels: straight from the files as HDF5 does; through a cache within its bound, under threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.pyramids.cache import LevelCache, PyramidCache
from spade_faiss.pyramids.device_cache import DeviceCache
from spade_faiss.pyramids.reader import Identity, StoredPyramids
from spade_faiss.store import level_reader, snapshot
from spade_faiss.store.shard_reader import ShardReader
from spade_faiss.system.devices import as_arrays
from tests.helpers.galleries import OWN, random_features_of

SPEC = sf.ExtractorSpec(name="own", level_shapes=((3, 5, 7), (2, 3, 3)), image_dim=6)
SIZE = 2 * (3 * 5 * 7 + 2 * 3 * 3)  # bytes of an image


class Counted:
    """A source in which every value of an image is its number; `asked` has every id that was read."""

    spec = SPEC

    def __init__(self, delay: float = 0.0, broken: Sequence[int] = ()) -> None:
        self.asked: list[int] = []
        self.delay, self.broken = delay, set(broken)

    def identity(self, row_id: int) -> Identity:
        return "shard", row_id

    def read_into(self, ids: Sequence[int], out: Sequence[list[np.ndarray]]) -> None:
        for row_id, levels in zip(ids, out, strict=True):
            self.asked.append(row_id)
            time.sleep(self.delay)
            if row_id in self.broken:
                raise sf.CorruptGalleryError(f"image {row_id}")
            for level in levels:
                level[:] = row_id


Make = Callable[[int], LevelCache[Any]]


@pytest.fixture(params=["memory", "cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def make(request: pytest.FixtureRequest) -> Make:
    """A cache of a bound, in memory, or on a torch device over one in memory that keeps nothing."""
    if request.param == "memory":
        return PyramidCache
    return lambda limit: DeviceCache(limit, request.param, PyramidCache(0))


def assert_read(cache: LevelCache[Any], source: Counted, ids: Sequence[int]) -> None:
    levels = as_arrays(cache.read(source, ids))
    assert [level.shape for level in levels] == [(len(ids), *shape) for shape in SPEC.level_shapes]
    for level in levels:
        assert level.dtype == SPEC.dtype
        for row_id, one in zip(ids, level, strict=True):
            assert (one == row_id).all()
    assert cache.bytes <= cache.limit


def test_what_was_read_is_not_read_again(make: Make) -> None:
    cache, source = make(100 * SIZE), Counted()
    assert_read(cache, source, [4, 1, 4])
    assert_read(cache, source, [1, 2, 4])
    assert source.asked == [4, 1, 2]
    assert (cache.hits, cache.misses, len(cache), cache.bytes) == (3, 3, 3, 3 * SIZE)
    assert_read(cache, source, [])


def test_what_was_needed_least_lately_goes_first(make: Make) -> None:
    cache, source = make(3 * SIZE + SIZE - 1), Counted()
    assert_read(cache, source, [0, 1, 2])
    assert_read(cache, source, [0])  # now 1 is the oldest
    assert_read(cache, source, [3])
    assert cache.holds(source, [0, 1, 2, 3, 7]) == 3
    source.asked.clear()
    assert_read(cache, source, [0, 2, 3])
    assert source.asked == []
    assert_read(cache, source, [1])
    assert source.asked == [1]


def test_a_read_does_not_evict_what_it_needs_itself(make: Make) -> None:
    cache, source = make(3 * SIZE), Counted()
    assert_read(cache, source, [0, 1, 2])
    assert_read(cache, source, [5, 6, 2, 7])
    assert source.asked == [0, 1, 2, 5, 6, 7]
    source.asked.clear()
    assert_read(cache, source, [2, 5, 6])
    assert source.asked == []


@pytest.mark.parametrize("limit", [0, SIZE - 1])
def test_without_room_everything_is_read(make: Make, limit: int) -> None:
    cache, source = make(limit), Counted()
    for _ in range(2):
        assert_read(cache, source, [3, 1])
    assert source.asked == [3, 1, 3, 1]
    assert (len(cache), cache.bytes, cache.hits) == (0, 0, 0)


def test_what_fits(make: Make) -> None:
    cache = make(3 * SIZE)
    assert [cache.fits(Counted(), n) for n in (0, 3, 4)] == [True, True, False]


def test_what_is_returned_is_the_callers_own(make: Make) -> None:
    cache, source = make(10 * SIZE), Counted()
    for _ in range(2):  # as it was read, and from the cache
        for level in cache.read(source, [2]):
            level[:] = 99
    assert_read(cache, source, [2])
    assert source.asked == [2]


def test_a_device_is_filled_from_memory() -> None:
    memory, source = PyramidCache(10 * SIZE), Counted()
    cache = DeviceCache(2 * SIZE, "cpu", memory)
    for ids in ([0, 1], [2, 3], [1, 2, 0]):
        assert_read(cache, source, ids)
        assert {level.device.type for level in cache.read(source, ids)} == {"cpu"}
    assert source.asked == [0, 1, 2, 3]
    assert len(cache) == 2
    assert memory.hits > 0


def test_a_read_that_fails_leaves_nothing_behind(make: Make) -> None:
    cache, source = make(10 * SIZE), Counted(broken=[5])
    for _ in range(2):
        with pytest.raises(sf.CorruptGalleryError, match="image 5"):
            cache.read(source, [4, 5])
        assert (cache.bytes, len(cache)) == (0, 0)
    assert_read(cache, source, [4])


def test_threads_that_need_the_same_read_it_once(make: Make) -> None:
    cache, source = make(100 * SIZE), Counted(delay=0.005)
    start = threading.Barrier(8)

    def read(shift: int) -> None:
        start.wait(timeout=10)
        assert_read(cache, source, [(shift + step) % 8 for step in range(8)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert sorted(source.asked) == list(range(8))


def test_an_error_is_that_of_the_thread_that_reads(make: Make) -> None:
    """One that waited for another tries for itself."""
    cache, source = make(100 * SIZE), Counted(delay=0.05, broken=[5])
    started = threading.Event()

    def first() -> None:
        started.set()
        cache.read(source, [3, 5])

    with ThreadPoolExecutor(2) as pool:
        failing = pool.submit(first)
        started.wait(timeout=10)
        time.sleep(0.01)  # by now it reads 3, which the other then waits for
        pool.submit(assert_read, cache, source, [3]).result()
        with pytest.raises(sf.CorruptGalleryError, match="image 5"):
            failing.result()


@pytest.mark.slow
def test_threads_that_evict_each_others_images_get_what_they_asked_for(make: Make) -> None:
    cache, source = make(7 * SIZE), Counted()

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(150):
            assert_read(cache, source, rng.integers(0, 20, 5).tolist())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert cache.bytes == len(cache) * SIZE
    assert cache._reading == {}


# From a gallery's files

N = 90  # more than are read together


@pytest.fixture
def gallery(tmp_path: Path) -> sf.Gallery:
    """N images in shards of 7."""
    gallery = sf.Gallery.create(tmp_path / "g", OWN, sf.IndexOptions("flat", device="cpu"), 7 * OWN.bytes_per_image)
    gallery.append([f"{row}.png" for row in range(N)], random_features_of(N))
    return gallery


def assert_stored(found: list[np.ndarray], ids: Sequence[int]) -> None:
    for level, expected in zip(found, random_features_of(N).levels, strict=True):
        assert level.tobytes() == expected[list(ids)].tobytes()


IDS = [*range(N - 1, -1, -1), 5, 0, 5]


def test_without_hdf5_is_the_same(gallery: sf.Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    assert level_reader.SUPPORTED
    assert_stored(gallery.read(IDS), IDS)
    monkeypatch.setattr(level_reader, "SUPPORTED", False)  # as on Windows
    monkeypatch.setattr(level_reader.LevelReader, "read", None)
    assert_stored(gallery.read(IDS), IDS)


@pytest.mark.slow
def test_threads_read_while_shards_are_closed_to_open_others(
    gallery: sf.Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "OPEN_SHARDS", 2)
    monkeypatch.setattr(snapshot, "KNOWN_SHARDS", 5)
    monkeypatch.setattr(snapshot, "READ_TOGETHER", 2)

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(10):
            ids = rng.integers(0, N, 9).tolist()
            assert_stored(gallery.read(ids), ids)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))


@pytest.mark.parametrize(("known", "opened"), [(100, 13), (5, 26)])
def test_where_levels_lie_is_found_out_once_for_each_shard(
    gallery: sf.Gallery, monkeypatch: pytest.MonkeyPatch, known: int, opened: int
) -> None:
    """Of as many shards as are known, however few of them are open."""
    monkeypatch.setattr(snapshot, "OPEN_SHARDS", 1)
    monkeypatch.setattr(snapshot, "KNOWN_SHARDS", known)
    view, files = gallery.snapshot(), []
    assert len(view.manifest.shards) == 13
    monkeypatch.setattr(snapshot, "ShardReader", lambda path, *args: (files.append(path), ShardReader(path, *args))[1])
    for _ in range(2):
        assert_stored(view.levels(range(N)), range(N))
    assert len(files) == opened


def test_a_snapshot_reads_on_while_its_images_are_removed_and_compacted(gallery: sf.Gallery) -> None:
    reader = sf.Gallery.open(gallery.path, device="cpu")
    snapshot, cache = reader.snapshot(), PyramidCache(10 * SIZE)
    assert_stored(cache.read(StoredPyramids(snapshot), [3, 4]), [3, 4])
    gallery.remove([f"{row}.png" for row in range(3, 20)])
    gallery.compact()
    assert_stored(cache.read(StoredPyramids(snapshot), IDS), IDS)
    # The same cache serves the new generation, in which other images have these ids.
    moved = gallery.ids(["50.png", "1.png"])
    assert moved != [50, 1]
    assert_stored(cache.read(StoredPyramids(gallery.snapshot()), moved), [50, 1])


def test_files_that_are_deleted_while_they_are_open_are_read_on(gallery: sf.Gallery) -> None:
    gallery.read(range(N))
    for file in gallery.path.glob("shards/*"):
        file.unlink()
    assert_stored(gallery.read(IDS), IDS)


def test_unverified_reads_believe_the_disk(gallery: sf.Gallery) -> None:
    expected = random_features_of(N).levels
    for path in gallery.path.glob("shards/*"):
        content = bytearray(path.read_bytes())
        at = content.find(expected[1][12].tobytes())
        if at >= 0:
            content[at] ^= 1
            path.write_bytes(content)
    with pytest.raises(sf.CorruptGalleryError, match=r"12\.png.*level 1 is not what was written"):
        PyramidCache(0).read(StoredPyramids(gallery.snapshot()), [11, 12])
    found = PyramidCache(0).read(StoredPyramids(gallery.snapshot(), verify=False), [11, 12])
    changed = np.flatnonzero(found[1].view(np.uint16) != expected[1][[11, 12]].view(np.uint16))
    assert changed.tolist() == [expected[1][0].size]  # the first value of the second image
