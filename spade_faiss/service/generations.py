"""Galleries that are served: a new commit becomes a new Detector beside the old one, which is drained."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

from ..detect.calibration import FILE as CALIBRATION
from ..detect.calibration import Calibration
from ..detect.detector import Detector
from ..detect.pipeline import Pipeline
from ..errors import GalleryNotFoundError, SpadeError
from ..extractors.registry import Extractor
from ..gallery.gallery import Gallery
from ..report.colour_scale import Scale, colour_scale
from ..store.manifest import FILE as MANIFEST
from ..store.source_images import SourceImages
from ..store.trusted import FILE as TRUSTED
from .errors import ServiceError
from .settings import ServiceSettings

logger = logging.getLogger("spade_faiss.service")
Stamp = tuple[tuple[int, int, int] | None, ...]  # of the files that say what a gallery is
GREY = 128  # of the picture that a first search is for
PATIENCE = 5.0  # seconds that the thread which looks for commits gets to end: it may be loading one
AGAIN = 5.0  # seconds until a commit that could not be taken up is tried again


class ServedDetector(Detector):
    """A Detector that keeps what it has to say of its calibration, for every answer to name."""

    def _tell(self, text: str) -> None:
        self.__dict__.setdefault("notes", []).append(text)

    @property
    def told(self) -> list[str]:
        """What a user should know of the calibration."""
        return list(self.__dict__.get("notes", []))


class Generation:
    """One commit of a gallery with its calibration, and the Detector over it. It never changes."""

    def __init__(self, path: Path, settings: ServiceSettings, old: Generation | None = None) -> None:
        """Open the last commit.

        Args:
            path: of the gallery.
            settings: of the service.
            old: the generation before it, whose network and cache it goes on with.

        Raises:
            SpadeError: the gallery is gone, damaged, or is not one of the extractor.
        """
        self.gallery = Gallery.open(path, settings.device)
        try:
            how = settings.weights, settings.batch_size, settings.device
            loaded = self.gallery.load_extractor(*how) if old is None else old.extractor
            self.detector: ServedDetector = ServedDetector(self.gallery, loaded, normal=settings.normal)
            if old is not None:
                self.detector.share_caches(old.detector)
            self.detector.keep_baseline()
            self.detector.baseline()  # measured here, where only the first request waits for it
        except BaseException:
            self.gallery.close()
            raise
        self.number = self.gallery.generation
        self.trusted = self.gallery.trusted()
        self.calibration: Calibration | None = self.detector.calibration
        self._users = 0
        self._retired = False
        self._lock = threading.Lock()

    @property
    def extractor(self) -> Extractor:
        """The network."""
        return self.detector.extractor

    @property
    def is_stale(self) -> bool:
        """Whether the gallery or its trust has changed since its calibration, so that no rate is promised."""
        found = self.calibration
        return found is not None and found.outdated(self.number, self.detector.trusted.values()) is not None

    @cached_property
    def scale(self) -> Scale:
        """The colours of its maps."""
        return colour_scale(self.detector)

    @cached_property
    def warmed(self) -> bool:
        """Search once, which compiles."""
        height, width = self.gallery.spec.tiling.view.resized
        self.detector.query(np.full((max(8, height), max(8, width), 3), GREY, np.uint8))
        return True

    def require(self, name: str, version: str | None) -> None:
        """Check that it is the version of a gallery that a request asks for, if it asks for one.

        Raises:
            ServiceError: it is another one.
        """
        if version not in (None, str(self.number)):
            raise ServiceError(
                404, "unknown_version", f"Gallery {name} is at generation {self.number}, found version {version!r}."
            )

    def source_images(self, folders: tuple[Path, ...]) -> SourceImages:
        """Return where the pictures of its images may be."""
        return SourceImages(self.gallery.snapshot(), folders)

    @cached_property
    def _run(self) -> Pipeline:
        return self.detector.pipeline()

    def run(self, k: int | None = None) -> Pipeline:
        """Return the run that queries share; with k, one that searches so many neighbours and does not judge."""
        return self._run if k is None else self.detector.pipeline(k=k)

    def enter(self) -> bool:
        """Keep it open until `leave`; returns whether it still was."""
        with self._lock:
            if self._retired and not self._users:
                return False
            self._users += 1
            return True

    def leave(self) -> None:
        """Let it be closed, if it was retired meanwhile."""
        with self._lock:
            self._users -= 1
            last = self._retired and not self._users
        if last:
            self.gallery.close()

    def retire(self) -> None:
        """Close it when its last user has done."""
        with self._lock:
            self._retired = True
            idle = not self._users
        if idle:
            self.gallery.close()


class ServedGallery:
    """A gallery by its name, at its last commit."""

    def __init__(self, name: str, path: Path, settings: ServiceSettings) -> None:
        self.name = name
        self.path = path
        self.problem: str | None = None  # why the last commit could not be taken up
        self._settings = settings
        self._current: Generation | None = None
        self._stamp: Stamp = ()
        self._failed: Stamp = ()  # of what could not be taken up
        self._again = 0.0  # of time.monotonic(), when that is tried again
        self.calibration_lock = threading.Lock()  # of a look at calibration.json and the write that follows from it
        self._lock = threading.Lock()  # of loading and swapping

    @property
    def is_loaded(self) -> bool:
        """Whether it is in memory."""
        return self._current is not None

    @property
    def current(self) -> Generation | None:
        """The newest generation that is open; None: not loaded."""
        return self._current

    def load(self) -> Generation:
        """Return the newest generation, loaded if it is not.

        Raises:
            SpadeError: it cannot be opened.
        """
        current = self._current
        if current is not None:
            if self.problem and self.is_gone:
                raise GalleryNotFoundError(f"{self.path}: expected the gallery {self.name!r}, found no {MANIFEST}")
            return current
        self.take_up()
        assert self._current is not None
        return self._current

    @contextmanager
    def leased(self) -> Iterator[Generation]:
        """Use the newest generation, which stays open for the block even if another one takes its place.

        Raises:
            SpadeError: as load.
        """
        generation = self.load()
        while not generation.enter():
            generation = self.load()
        try:
            yield generation
        finally:
            generation.leave()

    @property
    def is_gone(self) -> bool:
        """Whether its folder no longer holds a gallery."""
        return not (self.path / MANIFEST).exists()

    def take_up(self) -> bool:
        """Open the last commit and the calibration if they have changed; returns whether they had.

        Raises:
            SpadeError: what is there now cannot be opened. The generation before it goes on.
        """
        with self._lock:
            stamp, old = _stamp(self.path), self._current
            if old is not None and stamp == self._stamp:
                self.problem = None  # what could not be taken up is gone
                return False
            if old is not None and stamp == self._failed and time.monotonic() < self._again:
                return False
            try:
                # Trust in an image that is not there yet: its commit follows.
                is_same = old is not None and stamp[:-1] == self._stamp[:-1] and old.gallery.trusted() == old.trusted
                new = old if is_same else Generation(self.path, self._settings, old)
            except Exception as error:  # which may pass, as of too many open files
                self.problem = str(error) or type(error).__name__
                self._failed, self._again = stamp, time.monotonic() + AGAIN
                raise
            self.problem, self._stamp = None, stamp
            if new is old:
                return False
            self._current = new
        if old is not None:
            old.retire()
        return True

    def unload(self, wait: bool = True) -> None:
        """Let go of it; it is loaded again when it is asked for.

        Args:
            wait: until it is loaded, where a thread is at that, which may take minutes; False: leave it to the thread.
        """
        if not self._lock.acquire(blocking=wait):
            return
        try:
            old, self._current, self._stamp = self._current, None, ()
        finally:
            self._lock.release()
        if old is not None:
            old.retire()


class Registry:
    """All galleries that are served; a thread looks for new commits."""

    def __init__(self, settings: ServiceSettings, changed: Callable[[ServedGallery], None]) -> None:
        """Serve galleries, none of them loaded yet.

        Args:
            settings: which ones.
            changed: called when a gallery is at another commit or calibration, in the thread that looks; and when one
                was loaded, in the thread that has asked for it.
        """
        self._settings = settings
        self._changed = changed
        self._served = {name: ServedGallery(name, path, settings) for name, path in settings.galleries.items()}
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="generations", daemon=True)

    def start(self) -> None:
        """Begin to look for commits."""
        self.thread.start()

    def __iter__(self) -> Iterator[ServedGallery]:
        return iter(self._served.values())

    def named(self, name: str) -> ServedGallery:
        """Return a gallery by its name.

        Raises:
            ServiceError: none has it.
        """
        if name not in self._served:
            known = ", ".join(self._served)
            raise ServiceError(404, "unknown_gallery", f"Expected one of the galleries {known}, found {name!r}.")
        return self._served[name]

    def loaded(self, name: str) -> tuple[ServedGallery, Generation]:
        """Return a gallery and its newest generation; loading it may unload the one that was not used the longest."""
        served = self.named(name)
        with self._lock:
            self._recent[name] = None
            self._recent.move_to_end(name)
            beyond = [other for other in list(self._recent)[: -self._settings.loaded] if self._served[other].is_loaded]
        for other in beyond:
            self._served[other].unload()
            with self._lock:
                self._recent.pop(other, None)
        is_new = not served.is_loaded and served.take_up()  # by this thread, and no other one
        generation = served.load()
        if is_new:
            try:
                self._changed(served)
            except Exception:  # whoever asks for the gallery gets it
                if not self._stop.is_set():
                    logger.exception("%s: nobody is told that it is loaded", name)
        return served, generation

    def look(self) -> None:
        """Take up the new commits of all galleries that are loaded."""
        for served in self._served.values():
            if not served.is_loaded:
                continue
            before = served.problem
            try:
                if served.take_up():
                    self._changed(served)
            except Exception as error:  # the thread goes on: it is tried again, and the next commit may be whole
                if before is not None and served.problem == before:
                    continue  # told already
                tell = logger.warning if isinstance(error, SpadeError) else logger.exception
                tell("%s: the last commit cannot be taken up: %s", served.name, error)

    def _watch(self) -> None:
        while not self._stop.wait(self._settings.poll_seconds):
            self.look()

    def close(self) -> None:
        """Stop looking, and let go of all galleries, but for one that is being loaded: that ends with the process."""
        self._stop.set()
        if self.thread.is_alive():
            self.thread.join(timeout=PATIENCE)
        for served in self._served.values():
            served.unload(wait=False)


def _stamp(folder: Path) -> Stamp:
    found: list[tuple[int, int, int] | None] = []
    for name in (MANIFEST, CALIBRATION, TRUSTED):
        try:
            status = (folder / name).stat()
            found.append((status.st_mtime_ns, status.st_ino, status.st_size))
        except OSError:
            found.append(None)
    return tuple(found)
