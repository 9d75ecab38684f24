"""Other processes than the one that opened a gallery: forked, spawned, and given what was pickled."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import spade_faiss as sf
from tests.helpers.images import write_images
from tests.helpers.processes import FORKSERVER, run_fresh, said
from tests.helpers.readers import query

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


# In processes of their own with two threads for FAISS and torch, as a child that waits for threads that it has not
# would wait for ever, and as a fork of pytest's own process would be one of much else.
FORKED = """
import os, sys, time, threading
from pathlib import Path
import faiss, numpy as np
from tests.helpers.galleries import OWN
from tests.helpers.galleries import random_features_of
from tests.helpers.images import write_images
import spade_faiss as sf
faiss.omp_set_num_threads(2)
folder = Path(sys.argv[1])

def in_child(work):
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "it hangs"
"""


ASKS = """
import torch
torch.set_num_threads(2)
images = sorted(write_images(folder / "images", 9).iterdir())
extractor = sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=4))
gallery = sf.Gallery.create(folder / "g", extractor.spec, patches=sys.argv[2])
gallery.add_images(folder / "images", extractor)
detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=5, engine=sys.argv[3]))
queries = np.random.default_rng(0).standard_normal((3000, gallery.spec.image_dim), np.float32)
torch.randn(500, 500) @ torch.randn(500, 500)

def answers():
    found = detector.query_batch(images[:4])
    ids, sq_distances = gallery.search(queries, 5)
    levels = gallery.read(ids[0], extractor)
    return [gallery.keys(), ids.tobytes(), sq_distances.tobytes(), [level.tobytes() for level in levels],
            [(one.neighbours.keys, one.anomaly_map.tobytes(), one.matches.tobytes()) for one in found]]

expected = answers()

def asks():
    assert answers() == expected
    gallery.refresh()
    assert answers() == expected
    gallery.remove(["000.png"])
    assert len(gallery) == 8

# Others of its threads hold each lock and read into the cache at the moment of the fork.
view, cache = gallery.snapshot(), detector._caches.host
held = [view._lock, view.rows._lock, view.indexes._lock, view._files._lock, cache._lock, detector._lock]
ready, go_on = threading.Barrier(2), threading.Event()

def hold():
    for lock in held:
        lock.acquire()
    ready.wait()
    go_on.wait()
    for lock in reversed(held):
        lock.release()

holder = threading.Thread(target=hold)
holder.start()
ready.wait()
result = in_child(asks)
go_on.set()
holder.join()
gallery.refresh()
print(result, len(gallery), gallery.verify(), detector.query(images[3]).neighbours.keys[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it does not fork here")
@pytest.mark.parametrize(("patches", "engine"), [("stored", "auto"), ("stored", "pyramid"), ("recompute", "flat")])
def test_a_forked_process_goes_on_with_what_its_parent_opened(tmp_path: Path, patches: str, engine: str) -> None:
    assert said(FORKED + ASKS, tmp_path, patches, engine) == "0 8 [] 003.png\n"


WRITES_TWICE = """
from spade_faiss.system.atomic_files import DeferredErrorFile
gallery = sf.Gallery.create(folder / "g", OWN, shard_bytes=10**6)
features = random_features_of(40)

def ends_at_once():
    sys.exit()  # and HDF5 closes what it has open

def goes_on():
    try:
        writer.append(["child"], features[39:])
    except sf.GalleryError as error:
        print(error)
    try:
        writer.__exit__(None, None, None)
    except sf.GalleryError as error:
        print("again")

def as_python_does(work):
    pid = os.fork()
    if not pid:
        work()
    else:
        os.waitpid(pid, 0)

with gallery.writer() as writer:
    for number in range(0, 30, 3):
        writer.append([str(row) for row in range(number, number + 3)], features[number : number + 3])
        as_python_does(ends_at_once)
    assert in_child(goes_on) == 0
    try:
        sf.Gallery.open(folder / "g").remove([])
    except sf.GalleryLockedError:
        print("held")
disk = DeferredErrorFile(folder / "file")
disk.write(b"parent")

def writes_from_the_start():
    disk.seek(0)
    disk.write(b"child")

assert in_child(writes_from_the_start) == 0
disk.write(b"'s")
disk.flush()
assert (folder / "file").read_bytes() == b"parent's"
ids = gallery.ids([str(row) for row in range(30)])
assert gallery.read(ids)[0].tobytes() == features.levels[0][:30].tobytes()
print(os.getpid(), len(gallery), gallery.verify())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it does not fork here")
def test_a_forked_process_does_not_write_beside_its_parent(tmp_path: Path) -> None:
    refused, *rest, last = said(FORKED + WRITES_TWICE, tmp_path, by=run_fresh).splitlines()
    pid, *found = last.split()
    assert refused.startswith(f"{tmp_path / 'g'}: expected process {pid}, which is writing to it, found ")
    assert (rest, found) == (["again", "held"], ["30", "[]"])


def test_pickled_it_is_opened_anew_at_the_last_commit(tmp_path: Path, toy: sf.Extractor) -> None:
    images = sorted(write_images(tmp_path / "images", 9).iterdir())
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec, sf.IndexOptions(device="cpu"))
    gallery.add_images(tmp_path / "images", toy)
    detector = sf.Detector(gallery, toy, sf.SearchOptions(k=3, kappa=2), sf.ScoreOptions(sigma=2), calibrated=False)
    pickled = pickle.dumps((gallery, detector))
    copy, other = pickle.loads(pickled)
    assert (copy.path, copy.generation, copy.keys()) == (gallery.path, gallery.generation, gallery.keys())
    assert (other.search, other.score, other.calibration) == (detector.search, detector.score, None)
    for image in images[:3]:
        np.testing.assert_array_equal(other.query(image).anomaly_map, detector.query(image).anomaly_map)
    gallery.remove(["000.png"])
    assert len(copy) == 9
    assert len(pickle.loads(pickled)[0]) == 8


@pytest.mark.slow
def test_another_process_queries_a_detector_that_it_is_given(tmp_path: Path, toy: sf.Extractor) -> None:
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec, sf.IndexOptions(device="cpu"))
    gallery.add_images(write_images(tmp_path / "images", 9), toy)
    detector = sf.Detector(gallery, toy, sf.SearchOptions(k=3))
    asked = sorted(write_images(tmp_path / "asked", 3, seed=1).iterdir())
    with ProcessPoolExecutor(1, FORKSERVER) as pool:
        assert list(pool.map(partial(query, detector), asked)) == [query(detector, image) for image in asked]


COMPILES = """
from numba.core.compiler_lock import global_compiler_lock
from spade_faiss.patch_search import compiled
begun = threading.Event()

def compiles():
    with global_compiler_lock:
        begun.set()
        time.sleep(0.5)

thread = threading.Thread(target=compiles)
thread.start()
begun.wait()
print(in_child(lambda: compiled.numba.njit(lambda x: x + 1)(1)))
thread.join()
"""


def test_a_fork_waits_for_what_is_being_compiled(tmp_path: Path) -> None:
    """A child has no thread that would ever end it, and could compile nothing, nor take anything from a folder."""
    assert said(FORKED + COMPILES, tmp_path) == "0\n"
