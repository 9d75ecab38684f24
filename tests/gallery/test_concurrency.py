"""Several at a time: writers, readers and threads, alive and killed. Nothing lost, never a mix, no hang."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import spade_faiss as sf
from spade_faiss.cli.main import cli
from spade_faiss.detect import audit, calibration, normal_scores
from spade_faiss.detect.audit import find_suspects
from spade_faiss.options import Patches
from spade_faiss.store import create
from spade_faiss.store.locks import HOLDER, READERS, WRITER
from tests.helpers.galleries import OWN, random_features_of
from tests.helpers.images import write_images
from tests.helpers.processes import ready, said
from tests.helpers.readers import WORLD, features_of, look, look_on

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


@pytest.fixture
def gallery(tmp_path: Path) -> sf.Gallery:
    """Of six images in three shards."""
    gallery = sf.Gallery.create(tmp_path / "g", OWN, sf.IndexOptions(device="cpu"), 2 * OWN.bytes_per_image)
    gallery.append(list("abcdef"), random_features_of(6))
    return gallery


WRITES = """
import sys
import spade_faiss as sf
from tests.helpers.galleries import random_features_of
with sf.Gallery.open(sys.argv[1], device="cpu").writer() as writer:
    writer.append(["lost"], random_features_of(1, seed=5))
    print("ready", flush=True)
    sys.stdin.read()
"""
READS = """
import sys
import spade_faiss as sf
gallery = sf.Gallery.open(sys.argv[1], device="cpu")
print("ready", flush=True)
sys.stdin.read()
"""


# Two writers


@pytest.mark.slow
def test_every_command_that_writes_may_wait(gallery: sf.Gallery, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 2)
    extractor = sf.load_extractor("toy")
    made = sf.Gallery.create(tmp_path / "toy.gallery", extractor.spec, sf.IndexOptions(device="cpu"))
    made.add_images(images, extractor)
    path = str(made.path)
    commands = (
        ["build", path, str(images), "--extractor", "toy", "--recipe", "paper"],
        ["add", path, str(images)],
        ["remove", path, "000.png"],
        ["compact", path],
        ["reindex", path],
    )
    with ready(READS.replace("\nprint", "\nhold = gallery.writer()\nhold.__enter__()\nprint"), path) as holder:
        for command in commands[1:]:
            found = CliRunner().invoke(cli, [*command, "--wait", "0.05"])
            assert isinstance(found.exception, sf.GalleryLockedError), found.output
            assert f"process {holder.pid}" in str(found.exception)
            assert "timeout=SECONDS" in str(found.exception)
        ends = threading.Timer(0.3, holder.kill)
        ends.start()
        assert CliRunner().invoke(cli, [*commands[2], "--wait", "30"]).exit_code == 0
        ends.join()
    made.refresh()
    assert made.keys() == ["001.png"]
    assert all("--wait" in CliRunner().invoke(cli, [command, "--help"]).output for command, *_ in commands)


def test_one_waits_while_another_is_killed(gallery: sf.Gallery) -> None:
    with ready(WRITES, gallery.path) as writer:
        killed = threading.Timer(0.3, writer.kill)
        killed.start()
        gallery.append(["mine"], random_features_of(1, seed=6), timeout=30)
        killed.join()
    assert gallery.keys() == [*"abcdef", "mine"]
    assert gallery.verify() == []
    assert not list(gallery.path.rglob("*.tmp"))


def test_what_a_dead_writer_left_keeps_nobody_out(gallery: sf.Gallery) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert (gallery.path / WRITER).exists()
    (gallery.path / HOLDER).write_text(str(dead.pid))
    gallery.remove(["a"])
    (gallery.path / HOLDER).write_text("")  # killed before it had written it
    gallery.remove(["b"])
    assert gallery.keys() == list("cdef")


def test_of_two_that_make_a_gallery_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen that nothing is there: it was deleted by the one that failed."""
    check, path, others = create._check_free, tmp_path / "g", []

    def and_then_another(folder: Path) -> None:
        check(folder)
        monkeypatch.setattr(create, "_check_free", check)
        others.append(sf.Gallery.create(path, OWN))
        others[0].append(["theirs"], random_features_of(1))

    monkeypatch.setattr(create, "_check_free", and_then_another)
    with pytest.raises(sf.GalleryError, match="expected nothing, or an empty folder"):
        sf.Gallery.create(path, OWN)
    assert sf.Gallery.open(path).keys() == ["theirs"]


def test_a_build_goes_on_with_what_another_has_just_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, check = write_images(tmp_path / "images", 3), create._check_free
    command = ["build", str(tmp_path / "g"), str(images), "--extractor", "toy", "--quiet"]

    def and_then_another(folder: Path) -> None:
        monkeypatch.setattr(create, "_check_free", check)
        assert CliRunner().invoke(cli, command).exit_code == 0
        check(folder)

    monkeypatch.setattr(create, "_check_free", and_then_another)
    found = CliRunner().invoke(cli, command)
    assert (found.exit_code, found.output.split(",")[:2]) == (0, ["0 added (0 replaced)", " 3 unchanged"])


def test_a_build_that_took_nothing_leaves_what_others_have_put_there(tmp_path: Path) -> None:
    path = tmp_path / "g"
    sf.Gallery.create(path, OWN)
    with sf.Gallery.open(path).writer() as writer:
        create.discard_folder(path)
        writer.append(["theirs"], random_features_of(1))
    create.discard_folder(path)
    assert sf.Gallery.open(path).keys() == ["theirs"]
    sf.Gallery.create(tmp_path / "empty", OWN)
    create.discard_folder(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_a_writer_leaves_a_calibration_alone_that_is_being_written(gallery: sf.Gallery) -> None:
    """It deleted it as what a killed process had left, and calibrate failed after all its work."""
    being_written = gallery.path / f"{calibration.FILE}.tmp"
    being_written.touch()
    with sf.Gallery.open(gallery.path):  # as whoever calibrates has it
        gallery.remove(["a"])
    assert being_written.exists()


# Readers that die


def test_a_killed_reader_keeps_no_files(gallery: sf.Gallery) -> None:
    old = set(gallery.path.glob("shards/*"))
    with ready(READS, gallery.path) as reader:
        gallery.remove(list("ace"))
        gallery.compact()
        assert old <= set(gallery.path.glob("shards/*"))
        reader.kill()
        reader.wait()
        gallery.append(["new"], random_features_of(1, seed=9))
        assert not old & set(gallery.path.glob("shards/*"))
    assert gallery.keys() == [*"bdf", "new"]


# Readers while one writes


def write_on(gallery: sf.Gallery, version: int) -> None:
    """Every commit is of one version, which readers see whole."""
    keys = [str(key) for key in WORLD]
    parts = [features_of(key, version) for key in WORLD]
    levels = [np.concatenate(level) for level in zip(*(part.levels for part in parts), strict=True)]
    gallery.append(keys, sf.Features(np.concatenate([part.image for part in parts]), levels), replace=True)
    gallery.remove(keys[version % 3 :: 3])
    gallery.compact()
    gallery.reindex("ivf" if version % 2 else "flat", nlist=2)


LOOKS = """
import sys
from pathlib import Path
from tests.helpers.readers import look_on
print("ready", flush=True)
print(look_on(Path(sys.argv[1]), (Path(sys.argv[1]) / "stop").exists))
"""


@pytest.mark.slow
def test_readers_see_one_generation_whole_whatever_is_written(tmp_path: Path) -> None:
    """Threads that share a gallery, a thread with its own, and a process."""
    gallery, stop = sf.Gallery.create(tmp_path / "g", OWN, shard_bytes=4 * OWN.bytes_per_image), threading.Event()
    write_on(gallery, 0)

    def look_at_shared() -> None:
        while not stop.is_set():
            look(gallery.snapshot())

    with ready(LOOKS, gallery.path) as other, ThreadPoolExecutor(3) as pool:
        looking = [pool.submit(look_at_shared) for _ in range(2)]
        looking.append(pool.submit(look_on, gallery.path, stop.is_set))
        try:
            for version in range(1, 6):
                write_on(gallery, version)
        finally:
            stop.set()
            (gallery.path / "stop").touch()
        assert all((done.result() or 2) > 1 for done in looking)
        assert int(other.communicate(timeout=30)[0]) > 1
    gallery.append(["last"], features_of(12, 5))
    manifest = gallery.snapshot().manifest
    assert {file.name for file in gallery.path.glob("shards/*")} == {Path(one.file).name for one in manifest.shards}
    assert len(list(gallery.path.glob("index/*"))) == 2
    assert gallery.verify() == []


MANY_SHARDS = """
import resource, sys
import spade_faiss as sf
from tests.helpers.galleries import OWN
from tests.helpers.galleries import random_features_of
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
gallery, n = sf.Gallery.create(sys.argv[1], OWN, "SQ8", shard_bytes=1), 100
gallery.append([str(row) for row in range(n)], random_features_of(n))
views = []
try:
    for number in range(3):
        views.append(gallery.snapshot())
        for view in views:
            view.levels(view.ids()), view.rows.read(view.ids())
        gallery.remove([str(number)])
    print("done")
except sf.CorruptGalleryError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "expected"), [(320, "done"), (100, "cannot be opened: ")])
def test_three_generations_of_many_shards_have_files_enough(tmp_path: Path, limit: int, expected: str) -> None:
    """320 are too few if the file of every shard that is read stays open."""
    found = said(MANY_SHARDS, tmp_path / "g", limit)
    assert expected in found
    assert "damaged" not in found  # for want of files


# Threads that share a detector


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(  # each with each of another kind
    ("cached", "engine", "patches"),
    [
        *[(0, "pyramid", "stored"), (3, "flat", "stored"), (100, "pyramid", "stored")],
        *[(0, "flat", "recompute"), (3, "pyramid", "recompute"), (100, "flat", "recompute")],
    ],
)
def test_sixteen_threads_find_what_one_finds(
    tmp_path: Path, toy: sf.Extractor, patches: Patches, engine: str, cached: int
) -> None:
    images = sorted(write_images(tmp_path / "images", 16).iterdir())
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec, sf.IndexOptions(device="cpu"), patches=patches)
    gallery.add_images(images, toy)
    size = sum(int(np.prod(shape)) for shape in toy.spec.level_shapes) * 2
    options = sf.SearchOptions(k=4, kappa=2, engine=engine, cache_bytes=cached * size)
    alone = [sf.Detector(gallery, toy, options).query(image) for image in images]
    detector, start = sf.Detector(sf.Gallery.open(gallery.path, device="cpu"), toy, options), threading.Barrier(16)

    def ask(number: int) -> list[sf.Detection]:
        start.wait()  # the first opens files, loads the index and fills the cache
        some = images[number:] + images[:number]
        return [detector.query(some[0]), *detector.stream(some[1:2]), *detector.query_batch(some[2:3])]

    with ThreadPoolExecutor(16) as pool:
        for number, found in enumerate(pool.map(ask, range(16))):
            for one, expected in zip(found, alone[number:] + alone[:number], strict=False):
                assert (one.path, one.image_score) == (expected.path, expected.image_score)
                assert one.neighbours.keys == expected.neighbours.keys
                np.testing.assert_array_equal(one.neighbours.sq_distances, expected.neighbours.sq_distances)
                np.testing.assert_array_equal(one.anomaly_map, expected.anomaly_map)
                np.testing.assert_array_equal(one.matches, expected.matches)
    assert detector._caches.host.bytes <= cached * size
    assert not detector._caches.host._reading


def test_what_is_written_meanwhile_is_in_no_calibration_and_no_audit(
    tmp_path: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibration said that it was of the generation at its end, which it had not seen: nobody was warned."""
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec, sf.IndexOptions(device="cpu"))
    gallery.add_images(write_images(tmp_path / "images", 12), toy)
    detector, generation = sf.Detector(gallery, toy, sf.SearchOptions(k=3)), gallery.generation
    scores, expected = normal_scores.normal_scores, sf.calibrate(detector, 0.2).image_scores

    def and_then_another_writes(*arguments: Any) -> Any:
        gallery.remove(["003.png", "005.png"])
        gallery.compact()
        return scores(*arguments)

    monkeypatch.setattr(normal_scores, "normal_scores", and_then_another_writes)
    found = sf.calibrate(detector, 0.2)
    assert found.generation == generation < gallery.generation
    np.testing.assert_array_equal(found.image_scores, expected)
    left = gallery.keys()
    monkeypatch.setattr(audit, "normal_scores", lambda *arguments: (gallery.remove(left[:2]), scores(*arguments))[1])
    assert {suspect.key for suspect in find_suspects(detector)} == set(left)


# Where nothing can be written

READ_ONLY = """
import sys
import numpy as np
import spade_faiss as sf
from spade_faiss.cli import cli
from click.testing import CliRunner
path, image = sys.argv[1:]
gallery = sf.Gallery.open(path, device="cpu")
extractor = sf.load_extractor("toy")
ids, _ = gallery.search(np.zeros((1, gallery.spec.image_dim), np.float32), 2)
print(gallery.info()["images"], gallery.keys()[:2], gallery.read(ids[0])[0].shape[0], gallery.verify())
print(sf.Detector(gallery, extractor).query(image).neighbours.keys[0])
for command in ("info", "verify"):
    print(CliRunner().invoke(cli, [command, path]).exit_code)
for write in (gallery.compact, lambda: gallery.remove(["000.png"]), lambda: gallery.add_images(image, extractor)):
    try:
        write()
    except sf.GalleryError as error:
        print(error)
"""


@pytest.mark.parametrize("locks", [True, False])
def test_on_a_read_only_file_system_everything_that_reads_works(tmp_path: Path, toy: sf.Extractor, locks: bool) -> None:
    images, path = write_images(tmp_path / "images", 4), tmp_path / "g"
    with sf.Gallery.create(path, toy.spec, sf.IndexOptions(device="cpu")) as gallery:
        gallery.add_images(images, toy)
    if not locks:  # as in a copy that left empty files out
        for name in (WRITER, HOLDER, READERS):
            (path / name).unlink()
    mount = ["mount", "--bind", "-o", "ro", str(path), str(path)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting takes root")
    try:
        with pytest.raises(OSError, match="Read-only"):
            (path / "new").touch()
        read, nearest, *commands, first, second, third = said(READ_ONLY, path, images / "002.png").splitlines()
    finally:
        subprocess.run(["umount", str(path)], check=True)
    assert read == "4 ['000.png', '001.png'] 2 []"
    assert (nearest, commands) == ("002.png", ["0", "0"])
    for error in (first, second, third):
        assert error == f"cannot write to {path}: Read-only file system; it is on a read-only file system"
