"""The parts of the service put together, and its one deed: an image in, a verdict out, a line in the log."""

from __future__ import annotations

import asyncio
import base64
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ..errors import SpadeError
from .calibrations import Calibrations, Order
from .delivery import Delivery, targets_of
from .errors import ServiceError, as_service_error
from .events import Events
from .generations import Generation, Registry, ServedGallery
from .inspecting import (
    Prepared,
    Wish,
    artifacts_of,
    columns_of,
    digest,
    facts_of,
    judged,
    matches_of,
    new_id,
    prepare,
)
from .judging import staleness
from .log.changes import Changes
from .log.database import Database
from .log.inspections import COLUMNS, Inspections, Line, as_result
from .metrics import Metrics
from .normal_set import NormalSet
from .pictures import MEDIA_TYPES, map_as
from .pool import Found, InferencePool, Job, too_late
from .settings import ServiceSettings
from .tokens import VARIABLE, Tokens
from .watch import FolderWatch

logger = logging.getLogger("spade_faiss.service")
T = TypeVar("T")
ERRANDS = 2  # threads for what takes seconds: loading, audits, changes, exports
HELPERS = 3  # threads that decode, encode and write beside the one that searches
PATIENCE = 0.1  # seconds between looks whether a client has gone
Gone = Callable[[], Awaitable[bool]]


@dataclass(frozen=True)
class Post:
    """Images of one request, on their way to their verdicts."""

    gallery: str
    images: Sequence[tuple[str, bytes]]  # name and content
    who: str
    request: str
    wish: Wish = field(default_factory=Wish)
    version: str | None = None  # generation that it asks for; None: the newest


class Service:
    """Everything that lives as long as the service does."""

    def __init__(self, settings: ServiceSettings) -> None:
        """Open the log; nothing runs yet.

        Raises:
            OutputError: the log cannot be opened.
            OptionError: tokens or targets that are none, or an address that needs tokens and has none.
        """
        self.settings = settings
        self.tokens = Tokens(settings.tokens, settings.extra.get(VARIABLE))
        self.database = Database(settings.data)
        self.inspections = Inspections(self.database, settings.kept)
        self.changes = Changes(self.database)
        self.metrics = Metrics()
        self.events = Events()
        self.registry = Registry(settings, self._generation_changed)
        self.pool = InferencePool(settings.queue)
        self.normal_set = NormalSet(settings, self.registry, self.inspections, self.changes)
        self.calibrations = Calibrations(self.registry, self.changes)
        self.targets = targets_of(settings)
        self.delivery = Delivery(self.database, settings, self.metrics)
        self.watch = FolderWatch(settings, self.database)
        self.is_ready = False
        self._ending = False
        self._warming = threading.Thread(target=self._warm, name="warming", daemon=True)
        self.problem: str | None = None  # why the first gallery cannot be served
        self._helpers = ThreadPoolExecutor(HELPERS, thread_name_prefix="helper")
        self._errands = ThreadPoolExecutor(ERRANDS, thread_name_prefix="errand")

    def start(self) -> None:
        """Finish what a kill has interrupted, start all threads, and load the first gallery in one of them."""
        self.normal_set.finish_interrupted()
        self.registry.start()
        self.pool.start()
        self.calibrations.start()
        self.delivery.start()
        self._warming.start()

    def _warm(self) -> None:
        for served in self.registry:
            try:
                with self.registry.loaded(served.name)[0].leased() as generation:
                    _ = generation.warmed, generation.scale
                if self._ending:
                    return
                self.is_ready = True
            except SpadeError as error:
                if self._ending:
                    return
                self.problem = str(error)
                logger.error("%s: cannot be served: %s", served.name, error)
            except Exception as error:
                if self._ending:  # its gallery was closed
                    return
                self.problem = type(error).__name__
                logger.exception("%s: cannot be served", served.name)
            return  # the others are loaded when they are asked for

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """The threads that compute. `close` does not wait for all of them: nobody needs what they are at."""
        return (self._warming, self.registry.thread, self.pool.thread, self.calibrations.thread)

    def close(self) -> None:
        """Answer what waits, then end all threads and close the log. A gallery that is being loaded is let go."""
        self._ending = True
        self.events.end()
        self.watch.close()
        self.pool.close()
        self.calibrations.close()
        self.delivery.close()
        self._errands.shutdown()
        self._helpers.shutdown()
        self.registry.close()
        self.database.close()

    async def helped(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in a thread that may wait for disks."""
        return await asyncio.get_running_loop().run_in_executor(self._helpers, lambda: function(*arguments))

    async def errand(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function that may take seconds in a thread beside those that inspections wait for."""
        return await asyncio.get_running_loop().run_in_executor(self._errands, lambda: function(*arguments))

    def _generation_changed(self, served: ServedGallery) -> None:
        """Tell pages and metrics of what is in memory now, and have thresholds found again that are stale."""
        generation = served.current
        if generation is None:
            return
        name, calibration = served.name, generation.calibration
        self.metrics.generation.labels(name).set(generation.number)
        self.metrics.images.labels(name).set(len(generation.gallery))
        self.metrics.stale.labels(name).set(generation.is_stale)
        values = {"gallery": name, "generation": generation.number, "images": len(generation.gallery)}
        self.events.tell("generation", values | {"stale": generation.is_stale})
        if self.settings.recalibrate and calibration is not None and generation.is_stale:
            self.calibrations.ask(Order(name, calibration.false_alarms))

    async def inspect(self, post: Post, is_gone: Gone) -> list[dict[str, Any]]:
        """Inspect the images of a request; an image that cannot be read gets an error in its place.

        Args:
            post: the images.
            is_gone: whether the client has left; then what was not begun is not searched.

        Raises:
            ServiceError: there is no room, the gallery is not served, or is not at the version that is asked for.
            SpadeError: the gallery cannot be loaded.
        """
        start, count = time.monotonic(), len(post.images)
        self.registry.named(post.gallery)
        self.pool.reserve(count)
        reserved = True
        try:
            async with self._leased(post.gallery) as generation:
                generation.require(post.gallery, post.version)
                reserved = False
                return await self._inspected(post, generation, start, is_gone)
        finally:
            if reserved:
                self.pool.release(count)

    @asynccontextmanager
    async def _leased(self, name: str) -> AsyncIterator[Generation]:
        """Use the newest generation of a gallery for a whole request; raises as Registry.loaded."""
        _, generation = await self.loaded(name)
        while not generation.enter():
            _, generation = await self.loaded(name)
        try:
            yield generation
        finally:
            generation.leave()

    async def _inspected(self, post: Post, generation: Generation, start: float, is_gone: Gone) -> list[dict[str, Any]]:
        """Inspect images, which room is reserved for, in one generation."""
        reserved = count = len(post.images)
        try:
            calls = [self.helped(self._prepared, name, content, generation) for name, content in post.images]
            prepared = await asyncio.gather(*calls)
            whole = [one for one in prepared if isinstance(one, Prepared)]
            deadline = start + self.settings.deadline
            jobs = [Job(generation, one.image, deadline, post.wish.k) for one in whole]
            self.pool.release(count - len(jobs))
            reserved = len(jobs)
            self.pool.submit(jobs)
            reserved = 0
        finally:
            if reserved:
                self.pool.release(reserved)
        found = dict(zip(map(id, whole), await self._waited(jobs, is_gone), strict=True))
        answers = []
        for (name, content), one in zip(post.images, prepared, strict=True):
            outcome = found[id(one)] if isinstance(one, Prepared) else one
            if isinstance(one, Prepared) and isinstance(outcome, Found):
                answers.append(await self.helped(self._record, post, one, outcome, start))
            else:
                assert isinstance(outcome, ServiceError)
                answers.append(await self.helped(self._record_error, post, (name, content), outcome, start))
        return answers

    async def loaded(self, name: str) -> tuple[ServedGallery, Generation]:
        """Return a gallery and its newest generation, loaded if it is not; raises as Registry.loaded."""
        served = self.registry.named(name)
        if served.is_loaded:
            return self.registry.loaded(name)
        return await self.errand(self.registry.loaded, name)

    def _prepared(self, name: str, content: bytes, generation: Generation) -> Prepared | ServiceError:
        try:
            return prepare(name, content, generation, self.settings.pixels)
        except Exception as error:
            known = as_service_error(error)
            if known is None:
                raise
            return known

    async def _waited(self, jobs: Sequence[Job], is_gone: Gone) -> list[Found | ServiceError]:
        """Wait until each image is searched, late, or its client has gone."""
        futures = [asyncio.wrap_future(job.future) for job in jobs]
        waiting: set[asyncio.Future[Found]] = set(futures)
        gone = False
        while waiting:
            _, waiting = await asyncio.wait(waiting, timeout=PATIENCE)
            now = time.monotonic()
            gone = gone or (bool(waiting) and await is_gone())
            for job in jobs:
                if gone or now > job.deadline:
                    job.future.cancel()  # without effect on what is done, or is being searched
        found: list[Found | ServiceError] = []
        for job, future in zip(jobs, futures, strict=True):
            if future.cancelled():
                found.append(ServiceError(499, "client_gone", "The client has gone.") if gone else too_late(job))
                continue
            error = future.exception()
            if error is None:
                found.append(future.result())
                continue
            known = as_service_error(error)
            if known is None:
                raise error
            found.append(known)
        return found

    def _record(self, post: Post, prepared: Prepared, found: Found, start: float) -> dict[str, Any]:
        """Write an inspection into the log; returns its answer, which is given only when it is there."""
        detection, generation, wish = found.detection, found.generation, post.wish
        judgement = judged(found, wish.threshold)
        view = generation.gallery.spec.tiling.view
        facts = facts_of(found, judgement, wish)
        values = self._values(post, prepared.name, prepared.sha256, start) | columns_of(found, judgement)
        values["facts"] = facts | {"media_type": prepared.media_type}
        number = self.inspections.add(values, artifacts_of(prepared, detection, view), self.targets)
        answer = self._announced(Line(number, values | {"label": None}))
        self.metrics.inspected(post.gallery, values, facts["seconds"])
        hits, misses = generation.detector.cache_counts
        self.metrics.hits.labels(post.gallery).set(hits)
        self.metrics.misses.labels(post.gallery).set(misses)
        if wish.map in MEDIA_TYPES:
            content = map_as(wish.map, detection.anomaly_map, generation.scale)
            answer["map"] = {"media_type": MEDIA_TYPES[wish.map], "base64": base64.b64encode(content).decode()}
        if wish.matches:
            answer["matches"] = matches_of(detection, view)
        return answer

    def _record_error(self, post: Post, image: tuple[str, bytes], error: ServiceError, start: float) -> dict[str, Any]:
        """Write into the log that an image could not be inspected, and why; one that was never begun is not there."""
        values = self._values(post, image[0], digest(image[1]), start)
        values |= {"error": error.code, "message": error.message}
        number = self.inspections.add(values, {})
        self.metrics.inspected(post.gallery, values, {})
        answer = self._announced(Line(number, values | {"label": None, "verdict": None, "facts": {}}))
        answer["status"], answer["headers"] = error.status, error.headers
        return answer

    def _values(self, post: Post, name: str, sha256: str, start: float) -> dict[str, Any]:
        return {
            "uid": new_id(),
            "at": time.time(),
            "request": post.request,
            "who": post.who,
            "gallery": post.gallery,
            "name": name[:300],
            "sha256": sha256,
            "ms": round(1000 * (time.monotonic() - start), 3),
        }

    def _announced(self, line: Line) -> dict[str, Any]:
        full: dict[str, Any] = dict.fromkeys(COLUMNS)
        answer = as_result(replace(line, values=full | line.values))
        self.events.tell("inspection", answer, line.id)
        return answer

    def facts(self, served: ServedGallery) -> dict[str, Any]:
        """Return what is known of a gallery without loading it."""
        generation = served.current
        found: dict[str, Any] = {"name": served.name, "loaded": generation is not None, "problem": served.problem}
        if generation is None:
            return found
        gallery, calibration = generation.gallery, staleness(generation)
        return found | {
            "generation": generation.number,
            "images": len(gallery),
            "extractor": gallery.spec.name,
            "recipe": gallery.recipe.name if gallery.recipe else None,
            "patches": gallery.patches,
            "k": generation.detector.k,
            "calibration": calibration and calibration | {"running": self.calibrations.is_at(served.name)},
            "calibrating": self.calibrations.is_at(served.name),
            "notes": generation.detector.told,
            "scale": {"low": generation.scale.low, "high": generation.scale.high},
        }
