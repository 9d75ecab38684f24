"""What is done by the killing benchmark and by tests: commands in processes that are killed, or find the disk full.

A trial disturbs a command, checks what is left, runs the command again and compares with an undisturbed run.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from common import SERVER
from PIL import Image
from tqdm import tqdm

import spade_faiss as sf
from spade_faiss.cli.main import cli
from spade_faiss.detect.calibration import Calibration
from spade_faiss.gallery import creation
from spade_faiss.store.manifest import Manifest
from spade_faiss.store.shard_format import ShardSchema
from spade_faiss.store.shard_writer import ShardWriter
from spade_faiss.system import failpoints

K = 2
SIDE = 32  # px
REMOVED = ["001.png", "004.png", "005.png"]
MORE = 8  # images that `add` adds
PAGE = 4096


def spade_faiss(*arguments: object) -> None:
    """Run the command line in this process."""
    cli.main([str(argument) for argument in arguments], standalone_mode=False)


def build(path: Path, images: Path) -> None:
    options = ["--extractor", "toy", "--recipe", "paper", "--image-size", SIDE, "--crop", SIDE, "--batch-size", 2]
    spade_faiss("build", path, images / "some", *options, "--quiet")


def add(path: Path, images: Path, workers: int = 1) -> None:
    spade_faiss("add", path, images / "more", "--replace", "--batch-size", 2, "--workers", workers, "--quiet")


def add_by_workers(path: Path, images: Path) -> None:
    add(path, images, workers=2)


def adopt(path: Path, images: Path) -> None:
    """Do the parent's part of `add --workers`, where nothing is random: shards that others wrote."""
    extractor = sf.load_extractor("toy")
    with sf.Gallery.open(path) as opened, opened.writer() as writer:
        for number, file in enumerate(sorted((images / "more").iterdir())):
            if writer.status(file.name, file.name) == "same":
                continue
            with Image.open(file) as image:
                features = extractor.extract([np.asarray(image)])
            shard = ShardWriter(path / f"shards/{os.getpid()}-{number:06d}.h5", ShardSchema(extractor.spec))
            shard.append([file.name], [file.name], features)
            writer.adopt(shard.temporary, shard.complete(), [file.name], [file.name])


def remove(path: Path, images: Path) -> None:
    spade_faiss("remove", path, *REMOVED)


def compact(path: Path, images: Path) -> None:
    spade_faiss("compact", path)


def reindex(path: Path, images: Path) -> None:
    spade_faiss("reindex", path, "--index", "IVF2,Flat", "--nprobe", 2)  # all lists: the answers stay the exact ones


def calibrate(path: Path, images: Path) -> None:
    spade_faiss("calibrate", path, "--false-alarms", 0.2, "-k", K, "--engine", "flat", "--quiet")


COMMANDS: dict[str, Callable[[Path, Path], None]] = {
    command.__name__: command for command in (build, add, adopt, remove, compact, reindex, calibrate, add_by_workers)
}


def work(
    name: str, path: Path, images: Path, parent: Connection, where: str | None = None, limit: int | None = None
) -> None:
    """Run a command as a child: say when it begins, then its error, the failpoints passed and the seconds it took.

    Args:
        name: of the command.
        path: of the gallery.
        images: folder of the images.
        parent: who is told.
        where: the failpoint to be killed at; see failpoints.killing.
        limit: on the size of files, in bytes.
    """
    passed: Counter[str] = Counter()
    failpoints.action = (lambda step: passed.update([step])) if where is None else failpoints.killing(where)
    error = ""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and who is killed does not give it back
    parent.send("begins")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    start = time.perf_counter()
    try:
        run(name, path, images)
    except sf.SpadeError as found:
        error = str(found)
    except BaseException:
        error = "\n" + traceback.format_exc()  # two lines are one too many
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    parent.send((error, passed, time.perf_counter() - start))


def run(name: str, path: Path, images: Path) -> None:
    """Run a command in this process, its notes unheard."""
    small = 3 * sf.load_extractor("toy").spec.bytes_per_image  # so that there are several shards
    unheard = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(unheard), contextlib.redirect_stderr(unheard):
        warnings.simplefilter("ignore")
        with patch.dict(creation.SHARD_BYTES, stored=small):
            COMMANDS[name](path, images)


Image_ = tuple[bytes, ...]


@dataclass
class State:
    """What a gallery holds and answers."""

    images: dict[str, Image_]  # by key: digest, image feature, levels
    neighbours: list[tuple[str, float]]  # of one query, all
    map: bytes  # of another; none where it was not asked
    calibration: tuple[object, ...]

    @classmethod
    def of(cls, path: Path, images: Path, asks: bool = True) -> State:
        """Read it and ask a query, unless told otherwise; raises where anything is wrong."""
        if not (path / "gallery.json").exists():
            return NOTHING
        with sf.Gallery.open(path, "cpu") as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            problems = opened.verify()
            assert problems == [], problems
            snapshot, ids = opened.snapshot(), opened.snapshot().ids()
            keys, found = opened.keys(), Calibration.read(path)
            levels = opened.read(ids)
            held = {
                key: (
                    snapshot.digests([row])[0].encode(),
                    snapshot.image_feature(int(row)).tobytes(),
                    *(level[at].tobytes() for level in levels),
                )
                for at, (key, row) in enumerate(zip(keys, ids, strict=True))
            }
            assert len(held) == len(keys) == len(opened), "a key has two images"
            calibration = (found.image_scores.tolist(), found.map_maxima.tolist(), found.settings) if found else ()
            if len(ids) < K:
                return cls(held, [], b"", calibration)
            nearest, distances = opened.search(np.full((1, 12), 0.4, np.float32), len(ids))
            neighbours = list(zip(opened.keys(nearest[0]), distances[0].tolist(), strict=True))
            if not asks:  # a query takes as long as all before it, and has nothing else to read
                return cls(held, neighbours, b"", calibration)
            search = sf.SearchOptions(k=K, kappa=1, engine="flat")
            detector = sf.Detector(opened, sf.load_extractor("toy"), search, calibrated=False)
            detection = detector.query(images / "query.png")
            return cls(held, neighbours, detection.anomaly_map.tobytes(), calibration)


NOTHING = State({}, [], b"", ())


@dataclass
class Course:
    """A command undisturbed."""

    beginning: Path  # gallery that it starts from; none: there is none
    before: State
    after: State
    steps: Counter[str]  # failpoints that it passes, and how often
    seconds: float
    grows: int  # bytes on disk


class Trials:
    """Galleries, what each command makes of its own undisturbed, and ways to disturb it."""

    def __init__(self, folder: Path, names: list[str], more: int = MORE) -> None:
        """Make images and galleries in an empty folder; `add` adds `more` images, beside one that it replaces."""
        self.folder, self.images = folder, folder / "images"
        rng = np.random.default_rng(0)
        for name, numbers in (("some", range(8)), ("more", range(7, 8 + more))):
            (self.images / name).mkdir(parents=True)
            for number in numbers:
                self._image(rng).save(self.images / name / f"{number:03d}.png")
        self._image(rng).save(self.images / "query.png")
        base, less = folder / "base", folder / "less"
        run("build", base, self.images)
        run("calibrate", base, self.images)
        shutil.copytree(base, less)
        run("remove", less, self.images)
        beginnings = {"build": folder / "nothing", "compact": less, "calibrate": less}
        self._course(names[0], beginnings.get(names[0], base))  # the first takes longer
        self.courses = {name: self._course(name, beginnings.get(name, base)) for name in names}

    def _image(self, rng: np.random.Generator) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))

    def _course(self, name: str, beginning: Path) -> Course:
        with self._copy(beginning, self.folder) as path:
            process, told = self.start(name, path)
            error, steps, seconds = told.recv()
            process.join()
            assert not error, f"{name}: {error}"
            after = State.of(path, self.images)
            grows = _bytes(path) - (_bytes(beginning) if beginning.exists() else 0)
        return Course(beginning, State.of(beginning, self.images), after, steps, seconds, grows)

    @contextlib.contextmanager
    def _copy(self, beginning: Path, folder: Path) -> Iterator[Path]:
        path = folder / "gallery"
        if beginning.exists():
            shutil.copytree(beginning, path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def start(
        self, name: str, path: Path, where: str | None = None, limit: int | None = None
    ) -> tuple[Any, Connection]:
        """Start a command in a child; returns when it begins."""
        told, theirs = SERVER.Pipe(duplex=False)
        process = SERVER.Process(target=work, args=(name, path, self.images, theirs, where, limit))
        process.start()
        theirs.close()
        assert told.recv() == "begins"
        return process, told

    def kill(self, name: str, where: str | None = None, after: float = 0) -> bool:
        """Kill a command at a failpoint, or after some seconds, and check what is left; tell whether it was alive."""
        course = self.courses[name]
        with self._copy(course.beginning, self.folder) as path:
            process, _ = self.start(name, path, where)
            committed = 0
            if where is None:
                time.sleep(after)
                with contextlib.suppress(sf.GalleryNotFoundError):
                    committed = Manifest.read(path).generation
                process.kill()
            process.join(120)
            killed = process.exitcode == -signal.SIGKILL
            assert killed or (where is None and process.exitcode == 0), f"exit status {process.exitcode}"
            self.check(name, path)
            assert committed == 0 or Manifest.read(path).generation >= committed, "a commit is lost"
            self.finish(name, path)
        return bool(killed)

    def fill(self, name: str, share: float, mount: bool) -> bool:
        """Run a command on a disk with a share of the room that it needs, then with enough; tell whether it failed.

        Args:
            name: of the command.
            share: of the bytes that it adds; without `mount` of the size of the largest file.
            mount: a tmpfs; else there is a limit on the size of files.
        """
        course = self.courses[name]
        folder = self.folder / "disk"
        folder.mkdir(exist_ok=True)
        with _tmpfs(folder) if mount else contextlib.nullcontext(), self._copy(course.beginning, folder) as path:
            limit = None
            if mount:
                room = max(0, course.grows) + 2 * PAGE  # compact makes less of it, after more
                _resize(folder, max(PAGE, _bytes(folder) + int(share * room) // PAGE * PAGE))
            else:
                limit = int(share * max([16 * PAGE, *_sizes(course.beginning)]))
            process, told = self.start(name, path, limit=limit)
            error = told.recv()[0]
            process.join()
            assert "\n" not in error, error
            assert process.exitcode == 0, f"exit status {process.exitcode}"
            if mount:
                _resize(folder, 2**26)
            self.check(name, path)
            if error:
                assert "cannot" in error, error
                self.check_tidy(path)
            self.finish(name, path)
        return bool(error)

    def check(self, name: str, path: Path) -> State:
        """Each image is there as it was or as it is to be; none that was to stay is missing, none is half there."""
        course = self.courses[name]
        before, after = course.before.images, course.after.images
        found = State.of(path, self.images, asks=False)
        for key, image in found.images.items():
            assert image in (before.get(key), after.get(key)), f"{key} is neither the old image nor the new"
        missing = before.keys() & after.keys() - found.images.keys()
        assert not missing, f"missing: {missing}"
        assert {key for key, _ in found.neighbours} in (set(), found.images.keys()), "not all are found"
        assert found.calibration in (course.before.calibration, course.after.calibration), "calibration"
        return found

    def finish(self, name: str, path: Path) -> None:
        """Run the same command again: the gallery is as an undisturbed run leaves it."""
        try:
            run(name, path, self.images)
        except sf.OptionError:  # what is removed cannot be removed again
            assert name == "remove"
            with sf.Gallery.open(path) as opened, opened.writer():
                pass  # whoever writes next sweeps
        assert State.of(path, self.images) == self.courses[name].after, "another result than undisturbed"
        self.check_tidy(path)

    def check_tidy(self, path: Path) -> None:
        """No file lies about that the gallery does not name."""
        if not path.exists():
            return
        manifest = Manifest.read(path)
        named = {entry.file for entry in (*manifest.shards, manifest.index, manifest.keys) if entry}
        found = {file.relative_to(path).as_posix() for file in path.glob("*/*")}
        assert found == named, f"left over: {found - named}, missing: {named - found}"
        assert not list(path.glob("*.tmp")), "a temporary file is left over"


def _sizes(path: Path) -> list[int]:
    return [file.stat().st_size for file in path.rglob("*") if file.is_file()]


def _bytes(path: Path) -> int:
    """Return what the files in a folder take, in whole pages."""
    return sum(-(-size // PAGE) * PAGE for size in _sizes(path))


@contextlib.contextmanager
def _tmpfs(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def _resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


def can_mount(folder: Path) -> bool:
    """Tell whether a tmpfs can be mounted here."""
    with contextlib.suppress(subprocess.CalledProcessError, OSError), _tmpfs(folder):
        return True
    return False
