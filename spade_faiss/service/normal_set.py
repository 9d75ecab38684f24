"""Changes of a gallery by the service: images added, taken out, and changes taken back, each one commit."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..detect.calibration import Calibration
from ..errors import ImageError, SpadeError
from ..gallery.gallery import Gallery
from ..images.sources import ImageFile
from ..store.source_images import content_digest
from ..store.trusted import change_trusted, read_trusted
from ..system.atomic_files import storage_errors, write_whole
from ..system.failpoints import failpoint
from .errors import ServiceError, as_service_error
from .generations import Generation, Registry, ServedGallery
from .inspecting import checked_format, digest
from .log.changes import Changes
from .log.inspections import Inspections
from .pictures import KINDS
from .settings import ServiceSettings

logger = logging.getLogger("spade_faiss.service")
ADDED = "added"  # first part of the keys of images that the service adds
FALSE_ALARM = "false_alarm"
NEW = "new"  # of the facts of an add: whether the gallery did not have the image, so that a commit was made
Made = tuple[int, dict[str, Any]]  # the generation that a change has led to, and facts of it


@dataclass(frozen=True)
class Author:
    """Who asks for a change, in which request."""

    who: str
    request: str


class NormalSet:
    """Adds images to galleries and takes them out. One change at a time in this process; other processes wait."""

    def __init__(
        self, settings: ServiceSettings, registry: Registry, inspections: Inspections, changes: Changes
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._inspections = inspections
        self._changes = changes
        self._lock = threading.Lock()

    def folders(self, name: str) -> tuple[Path, ...]:
        """Return where the pictures of a gallery's images may be: its own folders, and what was added here."""
        return (*self._settings.normal, self._folder(name))

    def _folder(self, name: str) -> Path:
        return self._settings.data / "normal" / name

    def added_file(self, name: str, key: str) -> Path | None:
        """Return the file of an image that was added here, though it be taken out since; the key makes no path."""
        return {f"{ADDED}/{file.name}": file for file in (self._folder(name) / ADDED).glob("*")}.get(key)

    def add(self, name: str, content: bytes, author: Author, inspection: str | None = None) -> dict[str, Any]:
        """Add an image to a gallery, by a commit, as one that a person has confirmed: see Gallery.trust.

        Its key is made of its content, so that twice is once.

        Args:
            name: of the gallery.
            content: the image file.
            author: who asks.
            inspection: id of the inspection that it comes from; it gets the label of a false alarm.

        Raises:
            ServiceError: it is no image that is taken.
            SpadeError: another process is writing, or the disk is full.
        """
        served, _ = self._registry.loaded(name)
        kind = checked_format(content, self._settings.pixels)
        key = f"{ADDED}/{digest(content)[:16]}{KINDS[kind].suffix}"
        label = None if inspection is None else (inspection, FALSE_ALARM)
        with self._lock:
            facts = {NEW: key not in served.load().gallery}
            number = self._begin(served, "add", author, key=key, inspection=inspection, facts=facts)
            failpoint("begun a change")
            return self._made(number, served, lambda: self._add(served, key, content), label)

    def _add(self, served: ServedGallery, key: str, content: bytes) -> Made:
        path = self._folder(served.name) / key
        with storage_errors(f"cannot write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        # Before the commit: no generation has the image without the trust.
        change_trusted(served.path, {key: content_digest(content)})
        failpoint("trusted an image")
        made = self._commit(served, path, key)
        failpoint("committed a change")
        return made

    def _commit(self, served: ServedGallery, path: Path, key: str) -> Made:
        """Add an image file by a commit, with the network that is in memory; one that is there already makes none."""
        with served.leased() as generation, Gallery.open(served.path, self._settings.device) as gallery:
            files, network = [ImageFile(path, key)], generation.detector.extractor
            report = gallery.add_images(files, network, strict=True, timeout=self._settings.lock_seconds)
            if report.added == report.unchanged == 0:
                raise ImageError(report.skipped[0].reason if report.skipped else f"{key}: was not taken")
            return gallery.generation, {NEW: report.added > 0}

    def remove(self, name: str, key: str, author: Author) -> dict[str, Any]:
        """Take an image out of a gallery, by a commit.

        Raises:
            ServiceError: the gallery has no such key, or it is its last image.
            SpadeError: another process is writing, or the disk is full.
        """
        served, generation = self._registry.loaded(name)
        with self._lock:
            generation = served.load()
            _require_removable(generation.gallery, name, key)
            facts = {"picture": self._kept(generation, name, key), "trusted": read_trusted(served.path).get(key)}
            number = self._begin(served, "remove", author, key=key, facts=facts)
            return self._made(number, served, lambda: self._remove(served, key))

    def _kept(self, generation: Generation, name: str, key: str) -> str | None:
        """Keep the picture of an image that is taken out, for undo; returns its digest, None: it is not at hand."""
        [row_id] = generation.gallery.ids([key])
        try:
            content, _ = generation.source_images(self.folders(name)).find(row_id)
        except ImageError:
            return None
        path = self._removed(name, digest(content))
        with storage_errors(f"cannot write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        return path.name

    def _removed(self, name: str, picture: str) -> Path:
        return self._settings.data / "removed" / name / picture

    def _remove(self, served: ServedGallery, key: str) -> Made:
        with Gallery.open(served.path, self._settings.device) as gallery:
            _require_removable(gallery, served.name, key)  # another process may have changed it
            gallery.remove([key], self._settings.lock_seconds)
            return gallery.generation, {}

    def undo(self, number: int, author: Author) -> dict[str, Any]:
        """Take a change back, by another commit.

        Raises:
            ServiceError: it was taken back already, was never made, has added nothing, or is of a kind that cannot be;
                or the image that it has added is gone.
        """
        with self._lock:
            change = self._changes.numbered(number)
            if change["state"] != "done" or self._changes.undone_by(number) is not None:
                raise ServiceError(409, "not_to_be_undone", f"Change {number} was not made, or is taken back already.")
            if not _has_committed(change):
                raise ServiceError(
                    409, "not_to_be_undone", f"Change {number} has added nothing: the image was in the gallery already."
                )
            served, generation = self._registry.loaded(change["gallery"])
            key, what = change["key"], change["what"]
            if what == "add":
                _require_removable(generation.gallery, served.name, key)
                undone = self._begin(served, "remove", author, key=key, inspection=change["inspection"], undoes=number)
                label = None if change["inspection"] is None else (change["inspection"], "")
                return self._made(undone, served, lambda: self._remove(served, key), label)
            if what == "remove":
                undone = self._begin(served, "add", author, key=key, undoes=number)
                return self._made(undone, served, lambda: self._put_back(served, key, change))
            if what == "threshold":
                rate = change["facts"]["before"]
                undone = self._begin(served, "threshold", author, undoes=number, facts=_rates(change["facts"]))
                return self._made(undone, served, lambda: self._set_rate(served, rate))
        raise ServiceError(409, "not_to_be_undone", f"A change of kind {what!r} cannot be taken back.")

    def _put_back(self, served: ServedGallery, key: str, change: dict[str, Any]) -> Made:
        """Add an image again that was taken out, from the picture that was kept of it."""
        picture = change["facts"].get("picture")
        if picture is None:
            raise ServiceError(
                409,
                "picture_missing",
                f"The picture of {key!r} was not at hand: serve with its folder (normal=FOLDER).",
            )
        if trusted := change["facts"].get("trusted"):
            change_trusted(served.path, {key: trusted})
        return self._commit(served, self._removed(served.name, picture), key)

    def set_false_alarms(self, name: str, false_alarms: float, author: Author) -> dict[str, Any]:
        """Judge by the thresholds of another false-alarm rate from now on, in every process.

        Raises:
            ServiceError: the gallery is not calibrated.
            OptionError: too few images for the rate.
        """
        served, generation = self._registry.loaded(name)
        if generation.calibration is None:
            raise ServiceError(409, "not_calibrated", f"Gallery {name} is not calibrated; calibrate it first.")
        generation.calibration.promising(false_alarms)
        with self._lock:
            facts = {"before": generation.calibration.false_alarms, "after": false_alarms}
            number = self._begin(served, "threshold", author, facts=facts)
            return self._made(number, served, lambda: self._set_rate(served, false_alarms))

    def _set_rate(self, served: ServedGallery, false_alarms: float) -> Made:
        with served.calibration_lock:
            calibration = Calibration.read(served.path)
            if calibration is None:
                raise ServiceError(409, "not_calibrated", f"Gallery {served.name} is not calibrated.")
            calibration.promising(false_alarms).write(served.path)
        return calibration.generation, {}

    def _begin(self, served: ServedGallery, what: str, author: Author, **more: Any) -> int:
        current = served.current
        before = current.number if current else None
        return self._changes.begin(served.name, what, author.who, author.request, generation_before=before, **more)

    def _made(
        self, number: int, served: ServedGallery, make: Callable[[], Made], label: tuple[str, str] | None = None
    ) -> dict[str, Any]:
        """Make a change that is in the log as begun, take it up, and write that it is done."""
        try:
            generation, facts = make()
        except Exception as error:
            known = as_service_error(error)
            self._changes.fail(number, known.message if known else type(error).__name__)
            raise
        self._changes.end(number, generation, label, facts)
        failpoint("ended a change")
        self._registry.look()
        return self._changes.numbered(number)

    def finish_interrupted(self) -> None:
        """Say of each change that a kill has interrupted whether it was made: the gallery knows."""
        for change in self._changes.unfinished():
            try:
                was_made, generation = self._outcome(self._registry.named(change["gallery"]), change)
            except (ServiceError, SpadeError) as error:
                logger.warning("change %d of gallery %s stays unfinished: %s", change["id"], change["gallery"], error)
                continue
            if was_made:
                meant = FALSE_ALARM if change["what"] == "add" else ""
                label = (change["inspection"], meant) if change["inspection"] else None
                self._changes.end(change["id"], generation, label)
            else:
                self._changes.fail(change["id"], "The service was stopped before it was made.")

    def _outcome(self, served: ServedGallery, change: dict[str, Any]) -> tuple[bool, int]:
        """Return whether a change was made, by what is in force now, and the generation of that."""
        what, key = change["what"], change["key"]
        with Gallery.open(served.path, self._settings.device) as gallery:
            if what in ("add", "remove"):
                return (key in gallery) == (what == "add"), gallery.generation
            calibration = Calibration.read(served.path)
            if calibration is None or calibration.false_alarms != change["facts"].get("after"):
                return False, gallery.generation
            return what == "threshold" or calibration.generation == gallery.generation, calibration.generation


def _require_removable(gallery: Gallery, name: str, key: str) -> None:
    if key not in gallery:
        raise ServiceError(404, "unknown_key", f"Expected the key of an image of gallery {name}, found {key!r}.")
    if len(gallery) == 1:
        raise ServiceError(409, "last_image", "This is the gallery's only image; add another one first.")


def _has_committed(change: dict[str, Any]) -> bool:
    if change["what"] != "add":
        return True
    return bool(change["facts"].get(NEW, change["generation_after"] != change["generation_before"]))


def _rates(facts: dict[str, Any]) -> dict[str, Any]:
    return {"before": facts["after"], "after": facts["before"]}
