"""From folders of images into a gallery: reading, the network and writing at the same time, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ImageError, SpadeError
from ..extractors.registry import Extractor
from ..images.annotations import notes as annotation_notes
from ..images.annotations import with_photos
from ..images.facts import FactCounts
from ..images.reading import decoding_gate
from ..images.sources import ImageFile, Listing, list_sources, without_twin_names
from ..store.writer import Appended, GalleryWriter
from ..system.prefetch import read_ahead
from ..system.progress import progress_bar
from .blocks import extracted
from .image_reader import ReadImage, is_wanted, read_image, reading_threads, reads_ahead
from .kept_keys import renamed, require_kept_keys


@dataclass(frozen=True)
class IngestOptions:
    """How images are taken."""

    replace: bool = False  # take changed content under a key that is there; False: skip and report that image
    strict: bool = False  # stop at the first image that cannot be taken
    progress: bool = False  # show a bar where standard error is a terminal


@dataclass(frozen=True)
class Skipped:
    """An image that was not taken, and why.

    >>> open("normal/bad.png", "wb").close()
    >>> [skipped] = gallery.add_images("normal/bad.png", toy).skipped
    >>> skipped.path.name, skipped.reason
    ('bad.png', '...bad.png: expected an image, found an empty file (0 bytes)')
    """

    path: Path
    reason: str


@dataclass
class IngestReport:
    """What became of the images of a run.

    >>> report = gallery.add_images("normal", toy)  # run again, it finds nothing new
    >>> report.added, report.unchanged, report.skipped
    (0, 12, [])
    """

    added: int = 0
    replaced: int = 0  # among those added: changed content under a key that was there
    unchanged: int = 0  # there already, with the same content
    skipped: list[Skipped] = field(default_factory=list)
    seconds: float = 0.0
    copies: int | None = 0  # among those added: another image has the same content; None: damage kept them uncounted
    passed_over: dict[str, int] = field(default_factory=dict)  # what is no image, by reason
    notes: list[str] = field(default_factory=list)  # what a user has to know of sources and images, a sentence each


def count(report: IngestReport, done: Appended) -> None:
    """Add to a report what became of a batch or a shard."""
    report.added += done.added
    report.replaced += done.replaced
    report.unchanged += done.unchanged


def listed(
    writer: GalleryWriter, sources: Sequence[str | Path | ImageFile], options: IngestOptions
) -> tuple[Listing, IngestReport]:
    """List the images of sources, and begin the report with what cannot be listed.

    Raises:
        ImageError: as list_sources; with options.strict, what cannot be listed; or keys other than those that the
            gallery has of the same images.
    """
    files = with_photos(without_twin_names(list_sources(sources)))
    for one in files.unlisted if options.strict else ():
        raise ImageError(one.reason)
    require_kept_keys(writer.snapshot, files)
    report = IngestReport(passed_over=dict(files.passed_over.counts), notes=list(files.notes))
    report.skipped = [Skipped(one.path, one.reason) for one in files.unlisted]
    if files.passed_over:
        report.notes.append(str(files.passed_over))
    report.notes += annotation_notes(files, skipped=True) + renamed(writer.snapshot, files)
    return files, report


def ingest(
    writer: GalleryWriter,
    sources: Sequence[str | Path | ImageFile],
    extractor: Extractor,
    options: IngestOptions,
) -> IngestReport:
    """Extract and append the images of files and folders; see Gallery.add_images."""
    start, facts, gate = time.perf_counter(), FactCounts(), decoding_gate()
    files, report = listed(writer, sources, options)

    def wanted(file: ImageFile, digest: str) -> bool:
        return is_wanted(writer, file, digest, options.replace)

    def read(file: ImageFile) -> ReadImage:
        return read_image(file, extractor.spec, gate, wanted)

    images = read_ahead(files, read, reading_threads(), reads_ahead(extractor))
    with progress_bar(images, "images", options.progress, total=len(files)) as bar:
        taken = _Taken(bar, report, facts, options.strict)
        _append_all(writer, taken, extractor, options.replace, report)
    if taken.stopped_by is not None:
        writer.commit()
        raise taken.stopped_by
    report.notes += facts.notes(extractor.spec.bits)
    report.seconds = time.perf_counter() - start
    return report


class _Taken:
    """The images to extract; the others are counted or reported as they go by."""

    def __init__(self, images: Iterable[ReadImage], report: IngestReport, facts: FactCounts, strict: bool) -> None:
        self._images, self._report, self._facts, self._strict = images, report, facts, strict
        self.stopped_by: SpadeError | None = None  # the first error, if strict

    def __iter__(self) -> Iterator[ReadImage]:
        for image in self._images:
            if image.views is not None:
                self._facts.add(image.facts)
                yield image
            elif image.error is None:
                self._report.unchanged += 1
            elif self._strict:
                self.stopped_by = image.error
                return
            else:
                self._report.skipped.append(Skipped(image.file.path, str(image.error)))


def _append_all(
    writer: GalleryWriter, images: Iterable[ReadImage], extractor: Extractor, replace: bool, report: IngestReport
) -> None:
    """Extract images batch by batch; while one goes through the network, a thread writes the one before."""
    writing: Future[Appended] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="writing") as pool:
        for block in extracted(images, extractor):
            if writing is not None:
                count(report, writing.result())
            writing = pool.submit(writer.append, block.keys, block.features, block.digests, replace, block.paths)
        if writing is not None:
            count(report, writing.result())
