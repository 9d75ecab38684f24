"""From folders of images into a gallery: reading, the network and writing at the same time, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ImageError, KeyConflictError, SpadeError
from ..extractors.registry import Extractor
from ..images.annotations import notes as annotation_notes
from ..images.annotations import with_photos
from ..images.facts import FactCounts
from ..images.inputs import ImageLike, can_be_iterated, held
from ..images.reading import decoding_gate
from ..images.sources import ImageFile, Listing, list_sources, without_twin_names
from ..store.shard_format import check_keys
from ..store.writer import Appended, GalleryWriter
from ..system.prefetch import read_ahead
from ..system.progress import progress_bar
from .blocks import Block, extracted
from .image_reader import ReadImage, is_wanted, read_given, read_image, reading_threads, reads_ahead
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

    Attributes:
        path: of the image, or the folder.
        reason: one line, which begins with the path.

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

    Attributes:
        added: images.
        replaced: among those added: changed content under a key that was there.
        unchanged: there already, with the same content.
        skipped: what was not taken.
        seconds: that it took.
        copies: among those added: another image has the same content; None: damage kept them uncounted.
        passed_over: what is no image, by reason.
        notes: what a user has to know of sources and images, a sentence each.

    >>> report = gallery.add_images("normal", toy)  # run again, it finds nothing new
    >>> report.added, report.unchanged, report.skipped
    (0, 12, [])
    """

    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    seconds: float = 0.0
    copies: int | None = 0
    passed_over: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def count(report: IngestReport, done: Appended) -> None:
    """Add to a report what became of a batch or a shard."""
    report.added += done.added
    report.replaced += done.replaced
    report.unchanged += done.unchanged


def begun_report(files: Listing) -> IngestReport:
    """Begin a report with what cannot be listed, and what is passed over."""
    report = IngestReport(passed_over=dict(files.passed_over.counts), notes=list(files.notes))
    report.skipped = [Skipped(one.path, one.reason) for one in files.unlisted]
    if files.passed_over:
        report.notes.append(str(files.passed_over))
    return report


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
    report = begun_report(files)
    report.notes += annotation_notes(files, skipped=True) + renamed(writer.snapshot, files)
    return files, report


def ingest(
    writer: GalleryWriter,
    sources: Sequence[str | Path | ImageFile],
    extractor: Extractor,
    options: IngestOptions,
) -> IngestReport:
    """Extract and append the images of files and folders; see Gallery.add_images."""
    start, gate = time.perf_counter(), decoding_gate()
    files, report = listed(writer, sources, options)
    wanted = _wanted(writer, options)

    def read(file: ImageFile) -> ReadImage:
        return read_image(file, extractor.spec, gate, wanted)

    images = read_ahead(files, read, reading_threads(), reads_ahead(extractor))
    with progress_bar(images, "images", options.progress, total=len(files)) as bar:
        _take_all(_Taken(bar, report, options), writer, extractor, options)
    report.seconds = time.perf_counter() - start
    return report


def ingest_given(
    writer: GalleryWriter, images: Iterable[tuple[str, ImageLike]], extractor: Extractor, options: IngestOptions
) -> IngestReport:
    """Extract and append images that an iterable gives, each with its key; see Gallery.add."""
    start, gate, wanted, report = time.perf_counter(), decoding_gate(), _wanted(writer, options), IngestReport()
    from_files = writer.snapshot.manifest.patches == "recompute"

    def read(pair: tuple[str, ImageLike]) -> ReadImage:
        return read_given(*pair, extractor.spec, gate, wanted, from_files)

    failed: list[Exception] = []  # that the iterable ended with

    def pairs() -> Iterator[tuple[str, ImageLike]]:
        try:
            yield from ((key, held(image)) for key, image in _pairs(images))
        except Exception as error:
            failed.append(error)

    read_images = read_ahead(pairs(), read, reading_threads(), reads_ahead(extractor))
    with progress_bar(read_images, "images", options.progress) as bar:
        _take_all(_Taken(bar, report, options, wanted), writer, extractor, options)
    if failed:
        writer.commit()  # what came before it
        raise failed[0]
    report.seconds = time.perf_counter() - start
    return report


def _pairs(images: Iterable[tuple[str, ImageLike]]) -> Iterator[tuple[str, ImageLike]]:
    """Check that each item is a key and an image, when it comes.

    Raises:
        ImageError: it is something else.
        FeatureError: a key that does not fit.
    """
    if not can_be_iterated(images) or isinstance(images, (str, bytes, Mapping)):
        raise ImageError(f"images: expected an iterable of (key, image), found {type(images).__name__}")
    for number, item in enumerate(images):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            found = f"{type(item).__name__} of {len(item)}" if isinstance(item, Sized) else type(item).__name__
            raise ImageError(
                f"images: expected (key, image), found {found} as item {number}; a generator makes pairs of rows: "
                "((row['id'], row['image']) for row in rows)"
            )
        key, image = item
        check_keys([key], 1)
        yield key, image


def _wanted(writer: GalleryWriter, options: IngestOptions) -> Callable[[ImageFile, str], bool]:
    return lambda file, digest: is_wanted(writer, file, digest, options.replace)


def _take_all(taken: _Taken, writer: GalleryWriter, extractor: Extractor, options: IngestOptions) -> None:
    """Extract and append what was read; a strict run keeps what came before the error that it raises."""
    _append_all(writer, taken, extractor, options.replace)
    if taken.stopped_by is not None:
        writer.commit()
        raise taken.stopped_by
    taken.report.notes += taken.facts.notes(extractor.spec.bits)


class _Taken:
    """The images to extract; the others are counted or reported as they go by."""

    def __init__(
        self,
        images: Iterable[ReadImage],
        report: IngestReport,
        options: IngestOptions,
        wanted: Callable[[ImageFile, str], bool] | None = None,
    ) -> None:
        """Begin.

        Args:
            images: what was read, in order.
            report: counts them.
            options: whether to stop at the first error, and to take the last of several images of one key.
            wanted: as for read_image, where keys may come twice; None: they are known to differ.
        """
        self._images, self.report, self._options, self._wanted = images, report, options, wanted
        self._waiting: dict[str, str] = {}  # digests by key, of images on their way to the writer
        self.facts = FactCounts()
        self.stopped_by: SpadeError | None = None  # the first error, if strict

    def __iter__(self) -> Iterator[ReadImage | None]:
        for image in self._images:
            image = self._checked_again(image)
            if image.views is not None:
                self.facts.add(image.facts)
                if image.file.key in self._waiting:
                    yield None
                self._waiting[image.file.key] = image.digest
                yield image
            elif image.error is None:
                self.report.unchanged += 1
            elif self._options.strict:
                self.stopped_by = image.error
                return
            else:
                self.report.skipped.append(Skipped(image.file.path, str(image.error)))

    def _checked_again(self, image: ReadImage) -> ReadImage:
        """Return an image without its views if its key has come since it was read: an iterable may repeat keys."""
        if image.views is None or self._wanted is None:
            return image
        waiting, file = self._waiting.get(image.file.key), image.file
        try:
            if waiting is None and not self._wanted(file, image.digest):
                return ReadImage(file, image.digest)
            if waiting not in (None, image.digest) and not self._options.replace:
                raise KeyConflictError(
                    f"{file.path}: key {file.key!r} came with other content before; replace=True takes the last"
                )
        except KeyConflictError as error:
            return ReadImage(file, error=error)
        return ReadImage(file, image.digest) if waiting == image.digest else image

    def failed(self, image: ReadImage) -> bool:
        """Report an image that was taken and has no features that fit; returns whether to go on."""
        if self._options.strict:
            self.stopped_by = image.error
            return False
        self._waiting.pop(image.file.key, None)
        self.report.skipped.append(Skipped(image.file.path, str(image.error)))
        return True

    def written(self, block: Block) -> None:
        """Forget images that the writer has: it knows their keys."""
        for key, digest in zip(block.keys, block.digests, strict=True):
            if self._waiting.get(key) == digest:
                del self._waiting[key]


def _append_all(writer: GalleryWriter, images: _Taken, extractor: Extractor, replace: bool) -> None:
    """Extract images batch by batch; while one goes through the network, a thread writes the one before."""
    writing: tuple[Future[Appended], Block] | None = None

    def wait() -> None:
        if writing is not None:
            count(images.report, writing[0].result())
            images.written(writing[1])

    with ThreadPoolExecutor(1, thread_name_prefix="writing") as pool:
        for block in extracted(images, extractor, images.failed):
            wait()
            parts = block.keys, block.features, block.digests, replace, block.paths
            writing = pool.submit(writer.append, *parts), block
        wait()
