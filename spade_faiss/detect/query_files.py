"""A query over image files: every image in order, decoded ahead of the search."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import Pixels
from ..errors import ImageError
from ..images.decode import decode, read_file
from ..images.facts import FactCounts
from ..images.inputs import ImageLike, held
from ..images.reading import Viewed, decoding_gate, view_of
from ..images.sources import ImageFile
from ..ingest.image_reader import ReadImage, read_given, reading_threads, reads_ahead
from ..ingest.pipeline import Skipped
from ..options import MIB
from ..store.source_images import content_digest
from ..system.prefetch import ByteGate, read_ahead
from ..system.progress import progress_bar
from .detection import Detection
from .detector import Detector
from .query import Decoded

KEPT_BYTES = 128 * MIB  # of pixels that wait for their detections; those beyond it are decoded again


@dataclass(frozen=True)
class _Read:
    """An image as the readers hand it on, or why there is none."""

    file: ImageFile
    viewed: Viewed | None
    seconds: float = 0.0
    error: str = ""
    digest: str = ""  # of the content, where its pixels were not kept


def query_given(
    detector: Detector,
    images: Iterable[tuple[str, ImageLike]],
    skipped: list[Skipped] | None = None,
    progress: bool = False,
    notes: list[str] | None = None,
) -> Iterator[tuple[ReadImage, Detection]]:
    """Query images that an iterable gives, each with a key, as query_files does, in bounded memory.

    Args:
        detector: what to query.
        images: pairs (key, image), taken in the caller's thread, up to two batches ahead.
        skipped: receives the images that cannot be read. None: the first such image is raised.
        progress: a bar on stderr, where that is a terminal.
        notes: receives, at the end, lines on what images hold and the query did not use.

    Raises:
        ImageError: an image that cannot be read, where `skipped` is None.
    """
    spec, gate, facts = detector.gallery.spec, decoding_gate(), FactCounts()
    given = ((key, held(image)) for key, image in images)
    reads = read_ahead(
        given, lambda pair: read_given(*pair, spec, gate), reading_threads(), reads_ahead(detector.extractor)
    )
    taken: deque[ReadImage] = deque()

    def decoded() -> Iterator[Decoded]:
        for image in reads:
            if image.views is not None:
                facts.add(image.facts)
                taken.append(image)
                yield Decoded(image.views, image.size, 0.0)
            elif skipped is None:
                assert image.error is not None
                raise image.error
            else:
                skipped.append(Skipped(image.file.path, str(image.error)))

    for detection in progress_bar(detector.stream(decoded()), "query", progress):
        yield taken.popleft(), detection
    if notes is not None:
        notes += facts.notes(spec.bits)


def query_files(
    detector: Detector,
    files: Sequence[ImageFile],
    skipped: list[Skipped] | None = None,
    progress: bool = False,
    notes: list[str] | None = None,
    with_pixels: bool = True,
) -> Iterator[tuple[ImageFile, Pixels, Detection]]:
    """Query image files, in their order, reading ahead; yields each with its (H, W, 3) pixels and what was found.

    What is decoded ahead is bounded in bytes: reading.DECODE_BYTES at the same time, and KEPT_BYTES of pixels until
    their detections are handed out. The pixels of more images than that are decoded again then, and an image that has
    changed or is gone by then counts as one that cannot be read.

    Args:
        detector: what to query.
        files: the images.
        skipped: receives the images that cannot be read. None: the first such image is raised.
        progress: a bar on stderr, where that is a terminal.
        notes: receives, at the end, lines on what images hold and the query did not use.
        with_pixels: False: the pixels are not needed, and empty.

    Raises:
        ImageError: an image that cannot be read, where `skipped` is None.
    """
    spec, gate, kept = detector.gallery.spec, decoding_gate(), ByteGate(KEPT_BYTES)

    def read(file: ImageFile) -> _Read:
        start = time.perf_counter()
        try:
            content, room = read_file(file.path), kept if with_pixels else None
            viewed = view_of(content, os.fspath(file.path), spec.tiling, spec.bits, gate, room)
            digest = content_digest(content) if with_pixels and viewed.pixels is None else ""
            return _Read(file, viewed, time.perf_counter() - start, digest=digest)
        except ImageError as error:
            if skipped is None:
                raise
            return _Read(file, None, error=str(error))

    reads = read_ahead(files, read, reading_threads(), reads_ahead(detector.extractor))
    taken: deque[_Read] = deque()  # by the detector, which is ahead of its detections
    facts = FactCounts()
    with progress_bar(len(files), "query", progress) as bar:

        def decoded() -> Iterator[Decoded]:
            for image in reads:
                if image.viewed is not None:
                    facts.add(image.viewed.facts)
                    taken.append(image)
                    yield Decoded(image.viewed.views, image.viewed.size, image.seconds)
                elif skipped is not None:
                    skipped.append(Skipped(image.file.path, image.error))
                    bar.update()

        for detection in detector.stream(decoded()):
            image = taken.popleft()
            bar.update()
            try:
                pixels = _pixels_of(image, kept, spec.bits) if with_pixels else np.empty((0, 0, 3), np.uint8)
            except ImageError as error:
                if skipped is None:
                    raise
                skipped.append(Skipped(image.file.path, str(error)))
                continue
            yield image.file, pixels, detection
            del image, pixels
    if notes is not None:
        notes += facts.notes(spec.bits)


def _pixels_of(image: _Read, kept: ByteGate, bits: int | None) -> Pixels:
    """Return the pixels that were kept, or decode the file again; raises an ImageError if it is another by now."""
    if image.viewed is not None and image.viewed.pixels is not None:
        kept.leave(image.viewed.pixels.nbytes)
        return image.viewed.pixels
    content = read_file(image.file.path)
    if content_digest(content) != image.digest:
        raise ImageError(f"{image.file.path}: changed while it was queried; query it again")
    return decode(content, os.fspath(image.file.path), bits)


def query_one_by_one(
    detector: Detector, files: Sequence[ImageFile], skipped: list[Skipped] | None, notes: list[str], with_pixels: bool
) -> Iterator[tuple[ImageFile, Pixels, Detection]]:
    """Do as query_files, with nothing read ahead: no image is decoded before the one before it is handed out."""
    for file in files:
        own: list[str] = []
        yield from query_files(detector, [file], skipped, notes=own, with_pixels=with_pixels)
        notes += [f"{file.key}: {text}" for text in own]
