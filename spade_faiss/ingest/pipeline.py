"""From folders of images into a gallery: reading, the network and writing at the same time, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from ..errors import SpadeError
from ..extractors.registry import Extractor
from ..images.sources import ImageFile, find_images
from ..store.writer import Appended, GalleryWriter
from ..system.prefetch import batched, read_ahead
from .image_reader import Read, absolute, is_wanted, read_image, reading_threads, reads_ahead


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


def ingest(
    writer: GalleryWriter,
    paths: Sequence[str | Path | ImageFile],
    extractor: Extractor,
    *,
    replace: bool = False,
    strict: bool = False,
    progress: bool = False,
) -> IngestReport:
    """Extract and append the images of files and folders; see Gallery.add_images."""
    start, report = time.perf_counter(), IngestReport()
    sources = find_images(paths)

    def read(source: ImageFile) -> Read:
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


def _count(report: IngestReport, writing: Future[Appended] | None) -> None:
    if writing is not None:
        done = writing.result()
        report.added += done.added
        report.replaced += done.replaced
        report.unchanged += done.unchanged
