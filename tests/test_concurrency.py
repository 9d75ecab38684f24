"""Several at a time: writers, readers, threads and processes, alive and killed. Nothing lost, never a mix, no hang."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import OWN, random_features_of, write_images

import spade_faiss as sf
from spade_faiss import calibration, writing
from spade_faiss.cli import cli
from spade_faiss.locks import HOLDER, WRITER

TESTS = str(Path(__file__).parent)


@pytest.fixture
def gallery(tmp_path: Path) -> sf.Gallery:
    """Of six images in three shards."""
    gallery = sf.Gallery.create(tmp_path / "g", OWN, sf.IndexOptions(device="cpu"), 2 * OWN.bytes_per_image)
    gallery.append(list("abcdef"), random_features_of(6))
    return gallery


@contextlib.contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process that says "ready" when it is, and is killed at the end."""
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {TESTS!r})\n{code}", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == "ready\n"
            yield started
        finally:
            started.kill()


WRITES = """
import spade_faiss as sf
from conftest import random_features_of
with sf.Gallery.open(sys.argv[1], device="cpu").writer() as writer:
    writer.append(["lost"], random_features_of(1, seed=5))
    print("ready", flush=True)
    sys.stdin.read()
"""

READS = """
import spade_faiss as sf
gallery = sf.Gallery.open(sys.argv[1], device="cpu")
print("ready", flush=True)
sys.stdin.read()
"""


# Two writers


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
    with process(READS.replace("\nprint", "\nhold = gallery.writer()\nhold.__enter__()\nprint"), path) as holder:
        for command in commands[1:]:
            found = CliRunner().invoke(cli, [*command, "--wait", "0.05"])
            assert isinstance(found.exception, sf.GalleryLockedError), found.output
            assert f"process {holder.pid}" in str(found.exception)
            assert "--wait SECONDS" in str(found.exception)
        ends = threading.Timer(0.3, holder.kill)
        ends.start()
        assert CliRunner().invoke(cli, [*commands[2], "--wait", "30"]).exit_code == 0
        ends.join()
    made.refresh()
    assert made.keys() == ["001.png"]
    assert all("--wait" in CliRunner().invoke(cli, [command, "--help"]).output for command, *_ in commands)


def test_one_waits_while_another_is_killed(gallery: sf.Gallery) -> None:
    with process(WRITES, gallery.path) as writer:
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


def test_the_lock_goes_back_when_the_disk_is_full(gallery: sf.Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(sf.GalleryError, match="No space left") as caught:
            gallery.remove(["a"])
    gallery.remove(["a"])
    assert caught.value is not None  # and with it the frames of the writer that failed


# Two that make a gallery at the same place


def test_of_two_that_make_a_gallery_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen that nothing is there: it was deleted by the one that failed."""
    check, path, others = writing._check_free, tmp_path / "g", []

    def and_then_another(folder: Path) -> None:
        check(folder)
        monkeypatch.setattr(writing, "_check_free", check)
        others.append(sf.Gallery.create(path, OWN))
        others[0].append(["theirs"], random_features_of(1))

    monkeypatch.setattr(writing, "_check_free", and_then_another)
    with pytest.raises(sf.GalleryError, match="expected nothing, or an empty folder"):
        sf.Gallery.create(path, OWN)
    assert sf.Gallery.open(path).keys() == ["theirs"]


def test_a_build_goes_on_with_what_another_has_just_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, check = write_images(tmp_path / "images", 3), writing._check_free
    command = ["build", str(tmp_path / "g"), str(images), "--extractor", "toy", "--quiet"]

    def and_then_another(folder: Path) -> None:
        monkeypatch.setattr(writing, "_check_free", check)
        assert CliRunner().invoke(cli, command).exit_code == 0
        check(folder)

    monkeypatch.setattr(writing, "_check_free", and_then_another)
    found = CliRunner().invoke(cli, command)
    assert (found.exit_code, found.output.split(",")[:2]) == (0, ["0 added (0 replaced)", " 3 unchanged"])


def test_a_build_that_took_nothing_leaves_what_others_have_put_there(tmp_path: Path) -> None:
    path = tmp_path / "g"
    sf.Gallery.create(path, OWN)
    with sf.Gallery.open(path).writer() as writer:
        writing.discard_empty(path)
        writer.append(["theirs"], random_features_of(1))
    writing.discard_empty(path)
    assert sf.Gallery.open(path).keys() == ["theirs"]
    sf.Gallery.create(tmp_path / "empty", OWN)
    writing.discard_empty(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_a_gallery_that_was_half_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between its first folder and its manifest."""
    path = tmp_path / "g"
    real, calls = os.fsync, []
    for step in ("temporary", "named"):
        with monkeypatch.context() as patch:

            def killed(descriptor: int, last: str = step) -> None:
                calls.append(descriptor)
                if len(calls) == ("temporary", "named").index(last) + 1:
                    raise KeyboardInterrupt
                real(descriptor)

            patch.setattr(os, "fsync", killed)
            calls.clear()
            with pytest.raises(KeyboardInterrupt):
                sf.Gallery.create(path, OWN)
        if step == "temporary":
            (path / "gallery.json.tmp").write_text("{")  # as a kill leaves it
            assert len(sf.Gallery.create(path, OWN)) == 0
            (path / "gallery.json").unlink()
    assert len(sf.Gallery.open(path)) == 0
    (path / "gallery.json").unlink()
    (path / "shards" / "mine.h5").touch()  # but this is somebody's
    with pytest.raises(sf.GalleryError, match="found something"):
        sf.Gallery.create(path, OWN)


def test_a_writer_leaves_a_calibration_alone_that_is_being_written(gallery: sf.Gallery) -> None:
    """It deleted it as what a killed process had left, and calibrate failed after all its work."""
    being_written = gallery.path / f"{calibration.FILE}.tmp"
    being_written.touch()
    gallery.remove(["a"])
    assert being_written.exists()


# Readers that die


def test_a_killed_reader_keeps_no_files(gallery: sf.Gallery) -> None:
    old = set(gallery.path.glob("shards/*"))
    with process(READS, gallery.path) as reader:
        gallery.remove(list("ace"))
        gallery.compact()
        assert old <= set(gallery.path.glob("shards/*"))
        reader.send_signal(signal.SIGKILL)
        reader.wait()
        gallery.append(["new"], random_features_of(1, seed=9))
        assert not old & set(gallery.path.glob("shards/*"))
    assert gallery.keys() == [*"bdf", "new"]
