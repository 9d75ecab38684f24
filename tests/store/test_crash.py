"""Killed, or out of disk, at any moment: the gallery is as it was at a commit, and the same command goes on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.store.manifest import Manifest
from spade_faiss.store.shard_writer import ShardWriter
from tests.helpers.crash import COMMANDS, KEYS, N_IMAGES, STEPS, Content, content, create, failing_flush, reopen, toy
from tests.helpers.galleries import OWN, random_features_of
from tests.helpers.images import write_images
from tests.helpers.processes import Program, run, run_fresh

pytestmark = pytest.mark.slow

CHILD = """
import os, signal, sys
from pathlib import Path
from tests.helpers.crash import COMMANDS, reopen
name, path, images, flushes = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
real = os.fsync

def fsync(descriptor):
    global flushes
    flushes -= 1
    if flushes == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)

os.fsync = fsync
gallery = reopen(path)
print("ready", flush=True)
COMMANDS[name](gallery, images)
print("done", flush=True)
"""


def start(name: str, path: Path, images: Path, flushes: int = 0) -> Program:
    """Start a command in a process of its own, which kills itself at the given flush to disk; 0: at none."""
    process = Program(CHILD, name, path, images, flushes)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("crash") / "images", N_IMAGES, size=(32, 32))


@pytest.fixture(scope="module")
def beginnings(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, Path]:
    """The gallery that each command starts from, with images in it already."""
    folder = tmp_path_factory.mktemp("beginnings")
    with create(folder / "add_images", toy().spec) as gallery:
        gallery.add_images([images / f"{number:03d}.png" for number in range(0, 6, 2)], toy())
    with create(folder / "add_images_recompute", toy().spec, patches="recompute") as gallery:
        gallery.add_images([images / f"{number:03d}.png" for number in range(0, 6, 2)], toy())
    with create(folder / "append", shard_bytes=3 * OWN.bytes_per_image) as gallery:
        gallery.append(["before", KEYS[3]], pick(random_features_of(2, seed=77), random_features_of(2, seed=3)))
    with create(folder / "remove", shard_bytes=5 * OWN.bytes_per_image) as gallery, gallery.writer() as writer:
        writer.append([*KEYS, "after"], random_features_of(len(KEYS) + 1))
    shutil.copytree(folder / "remove", folder / "compact")
    with reopen(folder / "compact") as gallery:
        gallery.remove(KEYS[::4])  # so that two shards are left to write
    return {name: folder / name for name in COMMANDS}


def pick(first: sf.Features, second: sf.Features) -> sf.Features:
    """The first image of each."""
    pairs = zip(first.levels, second.levels, strict=True)
    image = np.concatenate([first.image[:1], second.image[:1]])
    return sf.Features(image, [np.concatenate([one[:1], other[:1]]) for one, other in pairs])


@pytest.fixture(scope="module")
def ends(
    tmp_path_factory: pytest.TempPathFactory, beginnings: dict[str, Path], images: Path
) -> dict[str, tuple[Content, float, int]]:
    """What each command makes of its gallery when nobody disturbs it, its seconds and how often it flushes."""
    folder, found = tmp_path_factory.mktemp("ends"), {}
    real, flushes = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal flushes
        flushes += 1
        real(descriptor)

    for name, command in COMMANDS.items():
        path = shutil.copytree(beginnings[name], folder / name)
        flushes, began = 0, time.perf_counter()
        with pytest.MonkeyPatch.context() as patch, reopen(path) as gallery:
            patch.setattr(os, "fsync", fsync)
            command(gallery, images)
            seconds = time.perf_counter() - began
            found[name] = content(gallery), seconds, flushes
    return found


def check_interrupted(path: Path, before: Content, after: Content) -> Content:
    """It opens, it is clean, and holds a part of what was to be done, each image whole."""
    with reopen(path) as gallery:
        assert gallery.verify() == []
        found = content(gallery)
        for key, levels in found.items():
            assert levels == (after if key in after else before)[key]
        assert before.keys() & after.keys() <= found.keys() <= before.keys() | after.keys()
        if found:
            ids, _ = gallery.search(np.zeros((1, gallery.spec.image_dim), np.float32), len(found))
            assert set(gallery.keys(ids[0])) == found.keys()
    return found


@pytest.mark.parametrize("how", ["at a random time", "at a random flush"])
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_it_is_as_it_was_at_a_commit_and_goes_on(
    tmp_path: Path,
    beginnings: dict[str, Path],
    ends: dict[str, tuple[Content, float, int]],
    images: Path,
    name: str,
    how: str,
) -> None:
    after, seconds, flushes = ends[name]
    rng = np.random.default_rng(list(f"{name} {how}".encode()))
    with reopen(beginnings[name]) as gallery:
        before = content(gallery)
    path = shutil.copytree(beginnings[name], tmp_path / "g")
    for share in (rng.uniform(0, 0.5), rng.uniform(0.3, 0.9)):  # killed twice in one life
        if how == "at a random flush":
            process = start(name, path, images, flushes=max(1, int(share * flushes)))
        else:
            process = start(name, path, images)
            time.sleep(share * seconds)
            process.kill()
        committed = Manifest.read(path).rows if how == "at a random time" and name.startswith("add_images") else 0
        said = process.communicate()[0].splitlines()
        if how == "at a random flush":
            assert process.returncode == -signal.SIGKILL or "done" in said
        found = check_interrupted(path, before, after)
        assert len(found) >= committed
        assert all((line.split()[1] in found) == line.startswith("has") for line in said if line != "done")
        if name.startswith("add_images"):
            done = sorted(found.keys() - before.keys())
            assert done == sorted(after.keys() - before.keys())[: len(done)]  # in their order, none left out
    with reopen(path) as gallery:
        COMMANDS[name](gallery, images)
        assert content(gallery) == after
        assert gallery.verify() == []
        assert {file.relative_to(path).as_posix() for file in path.glob("shards/*")} == {
            shard.file for shard in Manifest.read(path).shards
        }  # what the dead left behind is swept away


FULL, CTRL_C = OSError(errno.ENOSPC, ""), KeyboardInterrupt()


@pytest.mark.parametrize(  # Ctrl-C keeps what is whole of appends alone: elsewhere the two take turns
    ("name", "errors"),
    [
        *[(name, (error,)) for name in ("append", "replace") for error in (FULL, CTRL_C)],
        *[(name, (FULL, CTRL_C)) for name in ("remove", "compact", "rebuild_index")],
    ],
)
def test_stopped_at_any_flush_it_is_old_or_new(
    tmp_path: Path,
    beginnings: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    errors: tuple[BaseException, ...],
) -> None:
    step, template = STEPS[name], beginnings["compact"]
    fail_at = failing_flush(monkeypatch, *errors)
    with reopen(shutil.copytree(template, tmp_path / "undisturbed")) as gallery:
        old = content(gallery)
        step(gallery)
        new = content(gallery)
    flushes = fail_at(0)
    assert flushes >= 2
    for nth in range(1, flushes + 1):
        path = shutil.copytree(template, tmp_path / str(nth))
        with reopen(path) as gallery:
            fail_at(nth)
            with pytest.raises((sf.GalleryError, KeyboardInterrupt)) as caught:
                step(gallery)
            fail_at(0)
            if not isinstance(caught.value, KeyboardInterrupt):
                assert "No space left on device; free some space" in str(caught.value)
                assert "\n" not in str(caught.value)
            with reopen(path) as other:
                for found in (gallery, other):
                    state = content(found)
                    assert state in (old, new), f"{len(state)} images after flush {nth} of {flushes} failed"
                    assert len(found) == len(state)  # no key has two images
            assert gallery.verify() == []
            if name != "remove" or state == old:  # else it is done: the flush that failed came after
                step(gallery)
            assert content(gallery) == new
            assert gallery.verify() == []
        shutil.rmtree(path)


# The limit on file size stands for a full disk: writing fails within a file, for Python, HDF5 and FAISS alike.
FULL_DISK = """
import resource, shutil, sys
from pathlib import Path
from tests.helpers.crash import *
template, images = Path(sys.argv[1]), Path(sys.argv[2])

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

steps = {**STEPS, "add_images": lambda gallery: add_images(gallery, images)}
step = steps[sys.argv[3]]
undisturbed = shutil.copytree(template, template.parent / "undisturbed")
with reopen(undisturbed) as gallery:
    old = content(gallery)
    step(gallery)
    new = content(gallery)
largest = max(file.stat().st_size for file in undisturbed.rglob("*") if file.is_file())
refused = 0
for size in [0, 1, *range(100, largest + 500, max(500, largest // 8))]:
    path = shutil.copytree(template, template.parent / str(size))
    gallery = reopen(path)
    limit(size)
    try:
        step(gallery)
    except sf.GalleryError as error:
        refused += 1
        assert "cannot" in str(error) and "\\n" not in str(error) and len(str(error)) < 500, str(error)
    finally:
        limit(resource.RLIM_INFINITY)
    for found in (content(gallery), content(reopen(path))):
        between = old.keys() <= found.keys() <= new.keys() and sys.argv[3] == "add_images"
        assert found in (old, new) or between, f"{sorted(found)} at {size}"
    if sys.argv[3] != "remove" or content(gallery) == old:
        step(gallery)
    assert content(gallery) == new, size
    assert gallery.verify() == []
print(refused, "refused")
"""


@pytest.mark.parametrize("name", ["append", "remove", "compact", "rebuild_index", "add_images"])
def test_a_full_disk_is_one_line_and_the_work_goes_on(
    tmp_path: Path, beginnings: dict[str, Path], images: Path, name: str
) -> None:
    template = shutil.copytree(beginnings["add_images" if name == "add_images" else "compact"], tmp_path / "template")
    few = tmp_path / "few"
    few.mkdir()
    for number in range(6):
        shutil.copy(images / f"{number:03d}.png", few)
    by = run_fresh if name == "add_images" else run
    done = by(FULL_DISK, template, few, name)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr  # and the interpreter ends in peace
    assert int(done.stdout.split()[0]) >= 3


def test_ctrl_c_within_an_append_takes_none_of_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The append fills several shards, and is stopped at the second; what a whole append took before may stay."""
    gallery = sf.Gallery.create(tmp_path / "g", OWN, shard_bytes=3 * OWN.bytes_per_image)
    names, real, calls = [str(number) for number in range(8)], ShardWriter.append, 0

    def append(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        real(*args)

    def write() -> None:
        with gallery.writer() as writer:
            writer.append(["first"], random_features_of(1))
            writer.append(names, random_features_of(8))

    monkeypatch.setattr(ShardWriter, "append", append)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert set(sf.Gallery.open(tmp_path / "g").keys()) <= {"first"}
    assert gallery.append(names, random_features_of(8)).added == 8


def test_a_new_gallery_on_a_full_disk(tmp_path: Path) -> None:
    """In a process of its own, as a limit is of the whole process."""
    code = """
import resource, sys
import spade_faiss as sf
spec = sf.ExtractorSpec(name="own", level_shapes=((3, 5, 7),), image_dim=6)
resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    sf.Gallery.create(sys.argv[1], spec)
except sf.GalleryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
print(len(sf.Gallery.create(sys.argv[1], spec)))
"""
    done = run(code, tmp_path / "g")
    assert (done.returncode, done.stderr) == (0, "")
    error, length = done.stdout.splitlines()
    assert f"cannot make the gallery {tmp_path / 'g'}: File too large" in error
    assert length == "0"


def test_limits_on_file_size_can_be_set_here() -> None:
    """Where they cannot, the tests above show nothing."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
