"""A run of images made into a shard, by whichever process: what it is told, what it does, and what becomes of it."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from PIL import Image

from ..errors import ImageError, OptionError, SpadeError, first_line
from ..extractors.registry import Extractor
from ..images.decode import read_file, size_in_header
from ..images.facts import FactCounts
from ..images.reading import decoding_gate
from ..images.sources import ImageFile
from ..store.shard_format import ShardSchema
from ..store.shard_writer import ShardWriter
from ..store.writer import GalleryWriter
from ..system.atomic_files import flush_to_disk, storage_errors
from ..system.prefetch import batched, read_ahead
from .blocks import extracted
from .image_reader import ReadImage, read_image, reading_threads, reads_ahead

AHEAD = 2  # runs for each worker, from the first uncommitted one on: bounds what waits for a slow worker


@dataclass(frozen=True)
class Job:
    """What a worker is told when it starts."""

    extractor: bytes  # pickled
    folder: Path  # shards/
    schema: ShardSchema
    strict: bool
    processes: int  # workers that share this machine's cores
    max_pixels: int | None  # Pillow's limit for an image, which the caller may have raised


@dataclass
class Outcome:
    """What became of a run."""

    number: int  # the run's
    keys: list[str] = field(default_factory=list)  # of the shard's rows
    digests: list[str] = field(default_factory=list)
    shard: tuple[Path, int] | None = None  # its temporary file and that file's bytes; None: no image was taken
    errors: dict[str, SpadeError] = field(default_factory=dict)  # by key: why an image was not taken
    facts: FactCounts = field(default_factory=FactCounts)


def job_of(writer: GalleryWriter, extractor: Extractor, strict: bool, processes: int) -> Job:
    """Return what those who make shards for a gallery are told.

    Raises:
        OptionError: the extractor cannot be pickled.
    """
    try:
        pickled = pickle.dumps(extractor)
    except Exception as error:  # pickling runs the extractor's own code
        raise OptionError(
            "workers: expected an extractor that another process can load, by pickle, "
            f"found {type(extractor).__name__}: {first_line(error)}; use workers=1"
        ) from error
    folder, schema = writer.folder / "shards", writer.snapshot.manifest.schema
    return Job(pickled, folder, schema, strict, processes, Image.MAX_IMAGE_PIXELS)


class ShardMakers(Protocol):
    """Makes runs into shards, several at the same time; a context manager, whose end deletes what nobody adopted."""

    def __enter__(self) -> ShardMakers:
        """Begin."""
        ...

    def __exit__(self, *_: object) -> None:
        """End."""
        ...

    def outcomes(self, progress: Callable[[int], object]) -> Iterator[Outcome]:
        """Yield what became of each run, in order.

        Args:
            progress: called with the number of images read since the last call.
        """
        ...


class Machines(Protocol):
    """Processes elsewhere that make shards."""

    @property
    def workers(self) -> int:
        """How many work at the same time."""
        ...

    def makers(self, job: Job, runs: Sequence[list[ImageFile]]) -> ShardMakers:
        """Return what makes the runs of a job.

        Raises:
            WorkerError: a machine cannot see the gallery, or the first image.
        """
        ...


def runs_of(
    files: Sequence[ImageFile], writer: GalleryWriter, extractor: Extractor, workers: int
) -> list[list[ImageFile]]:
    """Cut images into runs that fill a shard, as one process does, and the rest into one run for each worker."""
    manifest, tiles = writer.snapshot.manifest, _tiles_of_first(files, extractor)
    batch = math.ceil(extractor.batch_size / tiles)
    full = math.ceil(math.ceil(manifest.shard_bytes / manifest.schema.bytes_per_image / tiles) / batch) * batch
    whole = len(files) // (full * workers) * (full * workers)
    share = max(1, math.ceil((len(files) - whole) / workers / batch)) * batch
    return [*batched(files[:whole], full), *batched(files[whole:], share)]


def _tiles_of_first(files: Sequence[ImageFile], extractor: Extractor) -> int:
    """Return how many tiles an image is cut into, as the first that can be read says."""
    for file in files if extractor.spec.tile is not None else ():
        with contextlib.suppress(ImageError):
            return len(extractor.spec.tiling.boxes(size_in_header(read_file(file.path))))
    return 1


def load(job: Job) -> Extractor:
    """Load the extractor of a job, with this process's share of the cores."""
    extractor: Extractor = pickle.loads(job.extractor)
    job.schema.spec.require(extractor.spec, f"worker process {os.getpid()}")
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // job.processes))
    return extractor


def make_shard(
    job: Job, extractor: Extractor, run: tuple[int, Sequence[ImageFile]], name: str, goes_on: Callable[[int], bool]
) -> Outcome:
    """Extract a run of images into a shard under a temporary name, and flush it to disk.

    Nothing else is changed, so a run may be made any number of times, by any process that sees the files.

    Args:
        job: what to make.
        extractor: of the job.
        run: its number and its files.
        name: of the shard until it is adopted; no other attempt at it has the same.
        goes_on: called after each batch with the number of images read since; False: stop, with what is complete.
    """
    (number, files), seen = run, 0
    outcome, shard = Outcome(number), None

    def taken(images: Iterable[ReadImage]) -> Iterator[ReadImage]:
        nonlocal seen
        for image in images:
            seen += 1
            if image.error is None:
                outcome.facts.add(image.facts)
                yield image
                continue
            outcome.errors[image.file.key] = image.error
            if job.strict:
                return

    def failed(image: ReadImage) -> bool:
        assert image.error is not None
        outcome.errors[image.file.key] = image.error
        return not job.strict

    read = partial(read_image, spec=job.schema.spec, gate=decoding_gate(job.processes))
    images = read_ahead(files, read, reading_threads(job.processes), reads_ahead(extractor))
    for block in extracted(taken(images), extractor, failed):
        if shard is None:
            shard = ShardWriter(job.folder / name, job.schema)
        shard.append(block.keys, block.digests, job.schema.stored(block.features), block.paths)
        outcome.keys += block.keys
        outcome.digests += block.digests
        read_since, seen = seen, 0
        if not goes_on(read_since):
            break
    goes_on(seen)
    if shard is not None:
        outcome.shard = shard.temporary, shard.complete()
        with storage_errors(f"cannot write {shard.path}"):
            flush_to_disk(shard.temporary)
    return outcome
