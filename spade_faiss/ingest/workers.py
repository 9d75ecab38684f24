"""From folders of images into a gallery by several processes: each writes whole shards, the parent commits them.

The parent holds the writer's lock, decides which images are wanted, hands them out in runs that fill a shard, and
commits the shards in the order of the sources. A worker decodes a run, extracts it and writes it under a temporary
name. A worker that is killed leaves at most a temporary file, which the next writer deletes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ..errors import ImageError, KeyConflictError, OptionError, SpadeError, WorkerError, first_line
from ..extractors.registry import Extractor
from ..images.decode import read_file
from ..images.facts import FactCounts
from ..images.sources import ImageFile
from ..store.source_images import content_digest
from ..store.writer import GalleryWriter
from ..system.atomic_files import TEMPORARY
from ..system.prefetch import read_ahead
from ..system.progress import progress_bar
from .image_reader import is_wanted, reading_threads
from .pipeline import IngestOptions, IngestReport, Skipped, count, listed
from .runs import AHEAD, Job, Machines, Outcome, ShardMakers, job_of, load, make_shard, runs_of

SPAWN = multiprocessing.get_context("spawn")  # torch, FAISS and HDF5 do not survive a fork


def ingest_in_processes(
    writer: GalleryWriter,
    sources: Sequence[str | Path | ImageFile],
    extractor: Extractor,
    machines: Machines,
    options: IngestOptions,
) -> IngestReport:
    """Extract and append the images of files and folders by several processes; see Gallery.add_images."""
    start, facts = time.perf_counter(), FactCounts()
    files, report = listed(writer, sources, options)
    errors: dict[str, SpadeError] = {}  # by key: why an image was not taken
    with progress_bar(len(files), "images", options.progress) as bar:
        wanted: list[ImageFile] = []
        for file, state in zip(files, _states(writer, files, options.replace), strict=True):
            if state is True:
                wanted.append(file)  # counted when a worker has read it
                continue
            bar.update()
            if state is False:
                report.unchanged += 1
                continue
            errors[file.key] = state
            if options.strict:
                break
        runs = runs_of(wanted, writer, extractor, machines.workers)
        job = job_of(writer, extractor, options.strict, min(machines.workers, len(runs)))
        with machines.makers(job, runs) as makers:
            for outcome in makers.outcomes(bar.update):
                if outcome.shard is not None:
                    count(report, writer.adopt(*outcome.shard, outcome.keys, outcome.digests))
                errors |= outcome.errors
                facts.merge(outcome.facts)
                if options.strict and outcome.errors:
                    break
    failed = [file for file in files if file.key in errors]
    if options.strict and failed:
        raise errors[failed[0].key]
    report.skipped += [Skipped(file.path, str(errors[file.key])) for file in failed]
    report.notes += facts.notes(extractor.spec.bits)
    report.seconds = time.perf_counter() - start
    return report


def _require_importable_program() -> None:
    """Refuse a program that worker processes cannot import, as a spawned process imports the program's file.

    Raises:
        OptionError: the program came from a pipe or from a file that is gone.
    """
    program = sys.modules.get("__main__")
    path = getattr(program, "__file__", None)  # python -c and an interactive Python have none, and need none
    if path is None or getattr(program, "__spec__", None) is not None or Path(path).exists():
        return
    raise OptionError(
        f"workers: expected a program in a file, because each worker process imports it, found {path}; "
        "save the program to a file, or use workers=1"
    )


def _states(writer: GalleryWriter, files: Sequence[ImageFile], replace: bool) -> Iterator[bool | SpadeError]:
    """Yield for each image whether it is wanted, or why it cannot be taken. A file with a new key is not read."""

    def state(file: ImageFile) -> bool | SpadeError:
        try:
            new = writer.status(file.key, "") == "new"
            return new or is_wanted(writer, file, content_digest(read_file(file.path)), replace)
        except (ImageError, KeyConflictError) as error:
            return error

    return read_ahead(files, state, reading_threads())


class _Worker:
    """The parent's end of one process."""

    def __init__(self, job: Job) -> None:
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_work, args=(job, theirs), daemon=True)
        self.state: Literal["loading", "idle", "busy"] = "loading"
        try:
            self.process.start()
        except (OSError, AssertionError) as error:  # AssertionError: a daemonic process may not have children
            raise WorkerError(
                f"cannot start worker processes: {first_line(error)}; use fewer workers, or workers=1"
            ) from error
        finally:
            theirs.close()  # so that the pipe ends when the process does

    def died(self) -> WorkerError:
        """Return the error that says how the process ended."""
        self.process.join()
        code = self.process.exitcode or 0
        how = f"killed by signal {-code}, as when memory runs out" if code < 0 else f"exit status {code}"
        if self.state == "loading" and code >= 0:
            how += " before it was ready; a script has to call add_images under `if __name__ == '__main__':`"
        return WorkerError(
            f"worker process {self.process.pid} ended before its work ({how}); what was committed is kept: "
            "run it again, with fewer workers, or workers=1, if memory is short"
        )


@dataclass(frozen=True)
class Processes:
    """Processes of this machine; see Machines."""

    workers: int

    def __post_init__(self) -> None:
        _require_importable_program()

    def makers(self, job: Job, runs: Sequence[list[ImageFile]]) -> ShardMakers:
        """See Machines."""
        return _Workers(job, runs)


class _Workers:
    """Processes that turn runs of images into shards. A context manager; leaving it ends them."""

    def __init__(self, job: Job, runs: Sequence[list[ImageFile]]) -> None:
        self._todo = deque(enumerate(runs))
        self._workers: list[_Worker] = []
        self._failure: BaseException | None = None
        self._job = job

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()  # its work is done, or no longer wanted
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
            for path in self._job.folder.glob(f"{worker.process.pid}-*{TEMPORARY}"):
                path.unlink(missing_ok=True)

    def outcomes(self, progress: Callable[[int], object]) -> Iterator[Outcome]:
        """Yield what became of each run, in order.

        When a worker fails, and at Ctrl-C, the others finish the batch they are at and close their shards. Those
        shards are yielded before the error is raised.

        Args:
            progress: called with the number of images read since the last call.

        Raises:
            WorkerError: a worker ended, or failed with an error other than a SpadeError.
            SpadeError: raised in a worker.
        """
        with _children_ignore_interrupts():
            for _ in range(self._job.processes):
                self._workers.append(_Worker(self._job))
        done: dict[int, Outcome] = {}
        head, end = 0, len(self._todo)  # the first run that is not yielded, and the one after the last
        working = list(self._workers)
        while working and head < end:
            try:
                with _interrupts_after():
                    self._hand_out(head)
                ready = set(wait([worker.connection for worker in working]))
                with _interrupts_after():
                    for worker in [worker for worker in working if worker.connection in ready]:
                        if not self._receive(worker, done, progress):
                            working.remove(worker)
            except KeyboardInterrupt as error:
                if self._failure is not None:
                    raise
                self._fail(error)
                continue
            while head in done:
                yield done.pop(head)
                head += 1
        yield from (done[number] for number in sorted(done))  # after a failure, which leaves gaps
        if self._failure is not None:
            raise self._failure

    def _receive(self, worker: _Worker, done: dict[int, Outcome], progress: Callable[[int], object]) -> bool:
        """Take a message of a worker; returns whether it goes on."""
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._fail(worker.died())
            return False
        if isinstance(message, int):
            progress(message)
        elif isinstance(message, SpadeError):
            self._fail(message)
        elif isinstance(message, Outcome):
            done[message.number], worker.state = message, "idle"
        else:
            worker.state = "idle"
        return True

    def _hand_out(self, head: int) -> None:
        """Give a run to each idle worker, unless the first uncommitted run is too far behind."""
        for worker in self._workers:
            if worker.state == "idle" and self._todo and self._todo[0][0] < head + AHEAD * len(self._workers):
                worker.state = "busy"
                with contextlib.suppress(OSError):  # the worker has died: reading from it reports that
                    worker.connection.send(self._todo.popleft())

    def _fail(self, error: BaseException) -> None:
        """Keep the first error, and tell the workers to end: a busy one when it has closed its shard."""
        if self._failure is not None:
            return
        self._failure = error
        self._todo.clear()
        for worker in self._workers:
            if worker.state != "busy":
                worker.process.kill()
            with contextlib.suppress(OSError):
                worker.connection.send(None)


@contextlib.contextmanager
def _interrupts_after() -> Iterator[None]:
    """Let a Ctrl-C wait until a block is done, so that messages are sent and received whole."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pressed = list[Any]()
    signal.signal(signal.SIGINT, lambda *given: pressed.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        handler(*pressed[0])


@contextlib.contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    """Let new processes ignore Ctrl-C from their start; only the main thread can set that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _work(job: Job, parent: Connection) -> None:
    """Run a worker process: send None when ready, then turn runs into outcomes until None arrives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent decides what to do
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    warnings.filterwarnings("ignore", module="PIL")  # an image that cannot be read is reported as an error
    Image.MAX_IMAGE_PIXELS = job.max_pixels
    try:
        extractor = load(job)
        parent.send(None)

        def goes_on(read: int) -> bool:
            parent.send(read)
            return not parent.poll()

        while (run := parent.recv()) is not None:
            parent.send(make_shard(job, extractor, run, f"{os.getpid()}-{run[0]:06d}.h5", goes_on))
    except Exception as error:
        found = f"worker process {os.getpid()}: {type(error).__name__}: {first_line(error)}"
        with contextlib.suppress(OSError):  # the parent has gone
            parent.send(error if isinstance(error, SpadeError) else WorkerError(found))


def _end_with_the_parent() -> None:
    """End this process, whatever it is doing, when the parent process has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
