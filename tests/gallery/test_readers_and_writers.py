"""Readers keep their generation; one writes at a time."""

from __future__ import annotations

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
from tests.helpers.galleries import OWN, random_features_of
from tests.helpers.own_galleries import KEYS, N, assert_holds, create, join, named, reopen
from tests.helpers.processes import ready, run

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
