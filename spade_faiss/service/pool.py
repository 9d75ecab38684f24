"""The one pool that searches: a bounded queue, and a thread that streams what waits through one generation."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..detect.detection import Detection
from ..detect.pipeline import Pipeline
from ..detect.query import Decoded
from .errors import ServiceError
from .generations import Generation

logger = logging.getLogger("spade_faiss.service")
FIRST_GUESS = 0.5  # seconds an image, until some were measured
MEMORY = 0.9  # share of the mean of seconds that stays when another is measured


@dataclass(frozen=True)
class Found:
    """What a search found, and the generation that it was made in."""

    detection: Detection
    generation: Generation
    waited: float  # seconds in the queue


@dataclass
class Job:
    """An image that waits to be searched. Whoever cancels its future before then saves the search.

    Its request keeps the generation open, so that all its images are searched in the one that they were made for.
    """

    generation: Generation
    image: Decoded
    deadline: float  # of time.monotonic()
    k: int | None = None
    future: Future[Found] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class InferencePool:
    """Searches images one after the other, those of one generation together."""

    def __init__(self, size: int) -> None:
        """Start with an empty queue that takes so many images."""
        self.size = size
        self._waiting: deque[Job] = deque()
        self._reserved = 0
        self._seconds = FIRST_GUESS
        self._changed = threading.Condition()
        self._ending = False
        self.thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self) -> None:
        """Begin to search."""
        self.thread.start()

    @property
    def depth(self) -> int:
        """Number of images that wait, or are decoded on their way here."""
        return len(self._waiting) + self._reserved

    def reserve(self, count: int) -> None:
        """Take room for so many images, before work is put into them.

        Raises:
            ServiceError: there is no such room now, or never will be, or the service ends.
        """
        if count > self.size:
            raise ServiceError(
                413, "too_many_images", f"Expected at most {self.size} images in a request, found {count}."
            )
        with self._changed:
            self.require_room(count)
            self._reserved += count

    def require_room(self, count: int) -> None:
        """Check that there is room now; raises as reserve."""
        if self._ending:
            raise ServiceError(503, "ending", "The service is about to end.", {"Retry-After": "5"})
        if self.depth + count > self.size:
            wait = max(1, math.ceil(self.depth * self._seconds))
            raise ServiceError(
                429,
                "queue_full",
                f"{self.depth} of {self.size} images wait; try again in {wait} s.",
                {"Retry-After": str(wait)},
            )

    def release(self, count: int) -> None:
        """Give back room that was taken and not used."""
        with self._changed:
            self._reserved -= count

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue images that room was reserved for."""
        with self._changed:
            self._reserved -= len(jobs)
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Search what waits, take nothing more, and end."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self.thread.is_alive():
            self.thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ending)
                head = self._next()
                if head is None:
                    if self._ending and not self._waiting:
                        return
                    continue
            self._stream(head)

    def _next(self, like: Job | None = None) -> Job | None:
        """Take the next image whose client still waits; with `like`, only if it goes into the same stream."""
        with self._changed:
            while self._waiting:
                job = self._waiting[0]
                if like is not None and (job.generation is not like.generation or job.k != like.k):
                    return None
                self._waiting.popleft()
                if not job.future.set_running_or_notify_cancel():
                    continue
                if time.monotonic() > job.deadline:
                    job.future.set_exception(too_late(job))
                    continue
                return job
            return None

    def _stream(self, head: Job) -> None:
        """Search an image, and what waits behind it for the same generation."""
        taken, generation = deque[Job](), head.generation
        if not generation.enter():  # its request was given up
            self._fail([head], ServiceError(503, "ending", "The request was given up.", {"Retry-After": "1"}))
            return

        def images() -> Iterator[Decoded]:
            job: Job | None = head
            while job is not None:
                taken.append(job)
                yield job.image
                job = self._next(head)

        try:
            self._search(generation, generation.run(head.k), images(), taken)
        except Exception as error:
            self._fail(taken or [head], error)
        finally:
            generation.leave()

    def _search(self, generation: Generation, run: Pipeline, images: Iterator[Decoded], taken: deque[Job]) -> None:
        """Stream images; if one fails, those after it that were taken already are searched one by one."""
        start = time.monotonic()
        try:
            for detection in run.stream(images):
                now = time.monotonic()
                self._seconds = MEMORY * self._seconds + (1 - MEMORY) * (now - start)
                start = now
                self._hand_out(taken.popleft(), detection, generation)
        except Exception as error:
            if not taken:
                raise
            taken.popleft().future.set_exception(error)
            while taken:
                job = taken.popleft()
                try:
                    [detection] = run.stream([job.image])
                    self._hand_out(job, detection, generation)
                except Exception as other:
                    job.future.set_exception(other)

    def _hand_out(self, job: Job, detection: Detection, generation: Generation) -> None:
        working = sum(detection.seconds.values())
        job.future.set_result(Found(detection, generation, max(0.0, time.monotonic() - job.since - working)))

    def _fail(self, jobs: Iterable[Job], error: Exception) -> None:
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(error)


def too_late(job: Job) -> ServiceError:
    """Return the answer to an image that has waited too long."""
    waited = time.monotonic() - job.since
    return ServiceError(
        503, "deadline", f"The image waited {waited:.1f} s, longer than it may; try again.", {"Retry-After": "1"}
    )
