"""From folders of images into a gallery: reading, the network and writing at the same time, in bounded memory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from .errors import ImageError, KeyConflictError, SpadeError
from .features import Extractor, ExtractorSpec
from .images import Pixels, Source, batched, decode, find_images, read_ahead, read_file
from .index_kinds import about_bytes
from .options import MIB, Patches
from .originals import content_digest
from .writing import Appended, GalleryWriter


@dataclass(frozen=True)
class Skipped:
    """An image that was not taken, and why."""

    path: Path
    reason: str


@dataclass
class IngestReport:
    """What became of the images of a run."""

    added: int = 0
    replaced: int = 0  # of those added: changed content under a key that was there
    unchanged: int = 0  # there already, with the same content
    skipped: list[Skipped] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What a build will need."""

    images: int
    disk_bytes: int
    free_bytes: int  # on the disk it goes to
    memory_bytes: int  # beyond the network and the libraries
    seconds_per_image: float
    bytes_per_image: dict[Patches, int]  # on disk without the index, for each way to have patches

    def __str__(self) -> str:
        minutes = self.images * self.seconds_per_image / 60
        disk = f"{self.disk_bytes / MIB:.0f} MiB on disk ({self.free_bytes / MIB:.0f} free)"
        space = f"{disk}, about {self.memory_bytes / MIB:.0f} MiB of memory"
        pace = f"{self.seconds_per_image * 1000:.0f} ms an image, about {minutes:.1f} min"
        stored, recomputed = (self.bytes_per_image[patches] / 1000 for patches in ("stored", "recompute"))
        ways = f"patches stored: {stored:.0f} kB an image; recomputed (--patches recompute): {recomputed:.1f} kB"
        return (
            f"{self.images} images: {space} beyond the network, {pace}; {ways}, and about "
            f"{self.seconds_per_image * 1000:.0f} ms for each neighbour of a query"
        )


def estimate(
    sources: Sequence[Source], extractor: Extractor, folder: Path, patches: Patches = "stored", workers: int = 1
) -> Estimate:
    """Estimate what a build of these images into a folder will need; time is measured on the first that can be read.

    The time is that of one process, however many workers there are to be.
    """
    spec, n = extractor.spec, len(sources)
    seconds = 0.0
    for source in sources[:100]:
        try:
            view = spec.view.apply(decode(source.path))
        except ImageError:
            continue
        extractor.extract([view] * extractor.batch_size)  # warms up
        start = time.perf_counter()
        extractor.extract([spec.view.apply(decode(source.path)) for _ in range(extractor.batch_size)])
        seconds = (time.perf_counter() - start) / extractor.batch_size
        break
    index = about_bytes(n, spec.image_dim)
    batches = 3 * extractor.batch_size * spec.bytes_per_image + reads_ahead(extractor) * _view_bytes(spec)
    free = shutil.disk_usage(folder).free
    sizes = {way: spec.bytes_with(way) for way in get_args(Patches)}
    return Estimate(n, n * sizes[patches] + index, free, index + workers * batches, seconds, sizes)


def reads_ahead(extractor: Extractor) -> int:
    """Return how many images are read before they are needed."""
    return 2 * extractor.batch_size


def reading_threads(processes: int = 1) -> int:
    """Return how many threads read and decode in each of so many processes."""
    return max(1, min(8, (os.cpu_count() or 1) // processes))


def _view_bytes(spec: ExtractorSpec) -> int:
    height, width = spec.view.crop
    return 3 * height * width


@dataclass(frozen=True)
class Read:
    """An image as the readers hand it on: a view with its digest, or why there is none."""

    source: Source
    digest: str = ""
    view: Pixels | None = None
    error: SpadeError | None = None  # neither a view nor an error: it is not wanted


def read_image(source: Source, spec: ExtractorSpec, wanted: Callable[[Source, str], bool] | None = None) -> Read:
    """Read an image, and decode it if it is wanted with the digest that it has."""
    try:
        content = read_file(source.path)
        digest = content_digest(content)
        if wanted is not None and not wanted(source, digest):
            return Read(source, digest)
        return Read(source, digest, spec.view.apply(decode(content, str(source.path))))
    except (ImageError, KeyConflictError) as error:
        return Read(source, error=error)


def is_wanted(writer: GalleryWriter, source: Source, digest: str, replace: bool) -> bool:
    """Tell whether a gallery is to take an image, or has it already.

    Raises:
        KeyConflictError: it has other content under that key, which is not to be replaced.
    """
    state = writer.status(source.key, digest, absolute(source))
    if state == "differs" and not replace:
        raise KeyConflictError(
            f"{source.path}: key {source.key!r} is in the gallery with other content; --replace takes the new one"
        )
    return state in ("new", "differs") or (state == "moved" and replace)


def ingest(
    writer: GalleryWriter,
    paths: Sequence[str | Path | Source],
    extractor: Extractor,
    *,
    replace: bool = False,
    strict: bool = False,
    progress: bool = False,
) -> IngestReport:
    """Extract and append the images of files and folders; see Gallery.add_images."""
    start, report = time.perf_counter(), IngestReport()
    sources = find_images(paths)

    def read(source: Source) -> Read:
        return read_image(source, extractor.spec, lambda source, digest: is_wanted(writer, source, digest, replace))

    stopped_by: SpadeError | None = None

    def taken(reads: Iterable[Read]) -> Iterable[Read]:
        nonlocal stopped_by
        for image in reads:
            if image.view is not None:
                yield image
            elif image.error is None:
                report.unchanged += 1
            elif strict:
                stopped_by = image.error
                return
            else:
                report.skipped.append(Skipped(image.source.path, str(image.error)))

    reads = read_ahead(sources, read, reading_threads(), reads_ahead(extractor))
    writing: Future[Appended] | None = None
    with (
        tqdm(reads, total=len(sources), unit="image", disable=None if progress else True, desc="images") as bar,
        ThreadPoolExecutor(1, thread_name_prefix="writing") as pool,
    ):
        for batch in batched(taken(bar), extractor.batch_size):
            features = extractor.extract([image.view for image in batch if image.view is not None])
            _count(report, writing)  # one batch is written while the next goes through the network
            keys, digests = [image.source.key for image in batch], [image.digest for image in batch]
            files = [absolute(image.source) for image in batch]
            writing = pool.submit(writer.append, keys, features, digests, replace, files)
        _count(report, writing)
    if stopped_by is not None:
        writer.commit()
        raise stopped_by
    report.seconds = time.perf_counter() - start
    return report


def absolute(source: Source) -> str:
    """Return the path that a gallery keeps of an image file."""
    return str(source.path.absolute())  # not resolved: a link may be what stays when the files move


def _count(report: IngestReport, writing: Future[Appended] | None) -> None:
    if writing is not None:
        done = writing.result()
        report.added += done.added
        report.replaced += done.replaced
        report.unchanged += done.unchanged
