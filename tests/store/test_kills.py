"""Commands killed at every step, on a full disk, or when the power goes: by the code of benchmarks/kills_trials.py."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.cli import gallery_commands
from spade_faiss.detect.calibration import Calibration
from spade_faiss.store.locks import HOLDER
from spade_faiss.store.writer import GalleryWriter
from spade_faiss.system import atomic_files, failpoints
from tests.helpers.benchmarks import kills_trials

pytestmark = pytest.mark.slow

NAMES = ["build", "add", "adopt", "remove", "compact", "reindex", "calibrate"]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> kills_trials.Trials:
    return kills_trials.Trials(tmp_path_factory.mktemp("kills"), NAMES, more=4)


@pytest.fixture(scope="module")
def steps(trials: kills_trials.Trials) -> dict[str, list[str]]:
    """For each command failpoints to be killed at: each failpoint at one of the commands that pass it, at any time."""
    rng, plan = np.random.default_rng(0), {name: ["1 committed"] for name in NAMES if name != "calibrate"}
    for step in sorted(set().union(*(course.steps for course in trials.courses.values()))):
        name = rng.choice([name for name, course in trials.courses.items() if step in course.steps])
        plan.setdefault(name, []).append(f"{rng.integers(trials.courses[name].steps[step]) + 1} {step}")
    return plan


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_a_step_nothing_is_lost_and_the_command_finishes(
    trials: kills_trials.Trials, steps: dict[str, list[str]], name: str
) -> None:
    for where in steps[name]:
        assert trials.kill(name, where), where


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_a_random_time(trials: kills_trials.Trials, name: str) -> None:
    rng = np.random.default_rng(list(name.encode()))
    trials.kill(name, after=rng.uniform(0, trials.courses[name].seconds))


def test_every_failpoint_is_passed(trials: kills_trials.Trials) -> None:
    passed = set().union(*(course.steps for course in trials.courses.values()))
    package = Path(sf.__file__).parent
    others = "service", "object_store", "cluster"  # their own tests stop there
    files = [path for path in package.rglob("*.py") if path.parent.name not in others]
    code = "".join(path.read_text() for path in files)
    named = set(re.findall(r'\bfailpoint\("([^"]+)"', code))
    assert len(named) > 10
    assert {name for name in named if not any(step.startswith(name) for step in passed)} == {"discarding", "discarded"}


def test_the_environment_names_a_failpoint(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from spade_faiss.system.atomic_files import write_whole
for number in range(3):
    write_whole(Path(sys.argv[1]) / f"{number}.bin", b"new")
"""
    environment = os.environ | {failpoints.VARIABLE: "2 renamed N.bin"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.bin", "1.bin"]


class Stopped(BaseException):
    """In the place of a kill."""


@pytest.mark.parametrize("where", ["discarding gallery.json", "discarded gallery.json"])
def test_stopped_while_a_build_that_took_nothing_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trials: kills_trials.Trials, where: str
) -> None:
    images = tmp_path / "images"
    shutil.copytree(trials.images / "some", images / "some")
    for file in (images / "some").iterdir():
        file.write_text("no image")

    def stop(step: str) -> None:
        if step == where:
            raise Stopped

    monkeypatch.setattr(failpoints, "action", stop)
    with pytest.raises(Stopped):
        kills_trials.run("build", tmp_path / "g", images)
    monkeypatch.undo()
    kills_trials.run("build", tmp_path / "g", trials.images)
    assert kills_trials.State.of(tmp_path / "g", trials.images) == trials.courses["build"].after


def test_a_build_that_finds_another_writer_leaves_its_gallery_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trials: kills_trials.Trials
) -> None:
    """It has made the gallery, but the other began to write first."""
    writer: GalleryWriter | None = None

    def other_begins(*_: Any) -> str:
        nonlocal writer
        writer = GalleryWriter(tmp_path / "g").__enter__()
        raise sf.GalleryLockedError("another process is writing to it")

    monkeypatch.setattr(gallery_commands, "_add", other_begins)
    with pytest.raises(sf.GalleryLockedError):
        kills_trials.run("build", tmp_path / "g", trials.images)
    assert writer is not None
    writer.__exit__(None, None, None)
    assert len(sf.Gallery.open(tmp_path / "g")) == 0


def test_two_that_make_a_gallery_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later one is refused, rather than put an empty gallery in the place of the earlier one's."""
    spec = sf.ExtractorSpec(name="own", level_shapes=((3, 5, 7),), image_dim=6)
    earlier: sf.Gallery | None = None

    def first(step: str) -> None:
        nonlocal earlier
        if step == "made index" and earlier is None:
            monkeypatch.setattr(failpoints, "action", None)
            earlier = sf.Gallery.create(tmp_path / "g", spec)
            earlier.append(["a"], sf.Features(np.ones((1, 6), np.float32), [np.ones((1, 3, 5, 7), np.float16)]))

    monkeypatch.setattr(failpoints, "action", first)
    with pytest.raises(sf.GalleryError, match="found something"):
        sf.Gallery.create(tmp_path / "g", spec)
    assert earlier is not None
    assert len(sf.Gallery.open(tmp_path / "g")) == 1
    assert earlier.verify() == []


def test_two_that_calibrate_at_once(
    trials: kills_trials.Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later one wins, and neither writes into the other's file."""
    calibration = Calibration.read(trials.courses["add"].beginning)
    assert calibration is not None
    other = threading.Thread(target=replace(calibration, false_alarms=0.5).write, args=(tmp_path,))

    def other_begins(step: str) -> None:
        if step == "opened calibration.json":
            monkeypatch.setattr(failpoints, "action", None)
            other.start()
            other.join(0.2)

    monkeypatch.setattr(failpoints, "action", other_begins)
    calibration.write(tmp_path)
    other.join()
    found = Calibration.read(tmp_path)
    assert found is not None
    assert found.false_alarms == 0.5


def test_a_full_disk_does_not_keep_the_lock(
    trials: kills_trials.Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose the lock is is only for a message."""
    path = shutil.copytree(trials.courses["add"].beginning, tmp_path / "g")
    real = Path.write_text

    def write_text(path: Path, *args: Any, **kwargs: Any) -> int:
        if path.name == HOLDER:
            raise OSError(28, "")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)
    sf.Gallery.open(path).remove(["000.png"])
    assert "000.png" not in sf.Gallery.open(path)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_may_not_grow(trials: kills_trials.Trials, name: str) -> None:
    """A limit on the size of files stands for a full disk."""
    refused = [trials.fill(name, share, mount=False) for share in (0, 0.2)]
    assert refused[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(trials: kills_trials.Trials, tmp_path: Path, name: str) -> None:
    if not kills_trials.can_mount(tmp_path):
        pytest.skip("mounting a tmpfs takes root")
    refused = [trials.fill(name, share, mount=True) for share in (0, 0.45)]
    assert refused[0]


def test_what_failed_leaves_room(trials: kills_trials.Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that were whole when the disk was full, and that no commit names, would keep it so."""
    course = trials.courses["compact"]
    path = shutil.copytree(course.beginning, tmp_path / "g")
    files = {file: file.read_bytes() for file in path.glob("*/*")}

    def full(step: str) -> None:
        if step == "flushed gallery.json":
            raise OSError(28, "")

    monkeypatch.setattr(failpoints, "action", full)
    with pytest.raises(sf.GalleryError, match="No space left on device; free some space"):
        sf.Gallery.open(path).compact()
    assert {file: file.read_bytes() for file in path.glob("*/*")} == files


class Disk:
    """What a loss of power may leave: bytes as their file was last flushed, names as their folder was, or as they are.

    Flushing is seen through os.fsync; whatever may happen is checked before and after each flush, rename and deletion.
    """

    def __init__(self, root: Path, check: Callable[[Path], object], until_a_problem: bool = False) -> None:
        """Take what is in a folder for flushed; once there is a problem, look for more only where that is wanted."""
        self.root, self.until_a_problem = root, until_a_problem
        self.problems: list[str] = []
        self._check = check
        self._seen: set[tuple[tuple[str, bytes | None], ...]] = set()
        self._bytes: dict[int, bytes] = {}  # by inode
        self._names: dict[int, dict[str, int]] = {}
        self._folders: dict[int, Path] = {}
        self._held: list[int] = []  # open, so that no inode is used again
        for path in (root, *root.rglob("*")):
            self._flush(path)

    def _flush(self, path: Path) -> None:
        self._held.append(os.open(path, os.O_RDONLY))
        number = path.stat().st_ino
        if path.is_dir():
            self._names[number] = self._listing(path)
        else:
            self._bytes[number] = path.read_bytes()

    def _listing(self, folder: Path) -> dict[str, int]:
        numbers = {path.name: path.stat().st_ino for path in folder.iterdir()}
        self._folders |= {numbers[path.name]: path for path in folder.iterdir() if path.is_dir()}
        return numbers

    def left(self, current: set[str], folder: Path | None = None, at: str = "") -> dict[str, bytes | None]:
        """Return what is left, by path: None is a folder.

        Args:
            current: folders of which all names are there, flushed or not, by their own names.
            folder: whose content is wanted; None: the root.
            at: its path.
        """
        folder = folder or self.root
        flushed = self._names.get(folder.stat().st_ino, {})
        found: dict[str, bytes | None] = {}
        for name, number in (self._listing(folder) if folder.name in current else flushed).items():
            if number in self._folders:
                found |= {at + name: None} | self.left(current, self._folders[number], f"{at}{name}/")
            else:
                found[at + name] = self._bytes.get(number, b"")
        return found

    def lose_power(self, target: Path, current: set[str]) -> None:
        """Write what is left into a new folder and check it, unless that was done before."""
        if self.problems and self.until_a_problem:
            return
        files = self.left(current)
        key = tuple(sorted(files.items()))
        if key in self._seen:
            return
        self._seen.add(key)
        target.mkdir()
        for name, content in files.items():
            if content is None:
                (target / name).mkdir()
            else:
                (target / name).write_bytes(content)
        try:
            self._check(target)
        except Exception as error:
            self.problems.append(f"{type(error).__name__}: {error}")
        shutil.rmtree(target)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """See what this process flushes, renames and deletes in the folder."""
        replace, unlink = Path.replace, Path.unlink
        target, checking = self.root.parent / "left", False

        def check() -> None:
            nonlocal checking
            checking = True
            for which in itertools.product([False, True], repeat=3):
                folders = [{self.root.name, "gallery"}, {"shards"}, {"index"}]
                self.lose_power(target, set().union(*itertools.compress(folders, which)))
            checking = False

        def watched(do: Callable[..., Any], path_of: Callable[..., Path]) -> Callable[..., Any]:
            def done(*args: Any, **kwargs: Any) -> Any:
                path = path_of(args[0])
                if checking or not path.is_relative_to(self.root):
                    return do(*args, **kwargs)
                check()
                result = do(*args, **kwargs)
                check()
                return result

            return done

        def path_of(descriptor: int) -> Path:
            return Path(f"/proc/self/fd/{descriptor}").readlink()

        monkeypatch.setattr(os, "fsync", watched(lambda descriptor: self._flush(path_of(descriptor)), path_of))
        monkeypatch.setattr(Path, "replace", watched(replace, Path))
        monkeypatch.setattr(Path, "unlink", watched(unlink, Path))

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)


def without_power(
    trials: kills_trials.Trials, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, until_a_problem: bool = False
) -> tuple[list[str], bool]:
    """Run a command on a disk that may lose power; returns what is wrong, and whether the end would outlast that."""
    course = trials.courses[name]
    (folder / "disk").mkdir()
    if course.beginning.exists():
        shutil.copytree(course.beginning, folder / "disk/gallery")

    def check(left: Path) -> None:
        trials.check(name, left / "gallery")
        if not (left / "gallery/gallery.json").exists():
            trials.finish(name, left / "gallery")

    disk = Disk(folder / "disk", check, until_a_problem)
    with monkeypatch.context() as patch:
        disk.watch(patch)
        kills_trials.run(name, folder / "disk/gallery", trials.images)
    after: list[kills_trials.State] = []
    disk._check = lambda left: after.append(kills_trials.State.of(left / "gallery", trials.images))
    disk._seen.clear()
    problems, disk.problems = disk.problems, []
    disk.lose_power(folder / "end", set())
    disk.close()
    return problems + disk.problems, after == [course.after]


linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to tell what is flushed")


@linux
@pytest.mark.parametrize("name", NAMES)
def test_power_lost_at_any_step(
    trials: kills_trials.Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    problems, lasting = without_power(trials, name, tmp_path, monkeypatch)
    assert problems == []
    assert lasting, "what was done would be lost"


@linux
@pytest.mark.parametrize("forgotten", ["files", "folders", "manifest"])
def test_a_flush_that_is_forgotten_is_noticed(
    trials: kills_trials.Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    flush = atomic_files.flush_to_disk

    def forgetful(path: Path) -> None:
        kind = "folders" if path.is_dir() else "manifest" if path.name.startswith("gallery.json") else "files"
        if kind != forgotten:
            flush(path)

    monkeypatch.setattr(atomic_files, "flush_to_disk", forgetful)
    problems, lasting = without_power(trials, "adopt", tmp_path, monkeypatch, until_a_problem=True)
    assert problems
    assert not lasting
