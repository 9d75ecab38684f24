"""From an image file to the view that the network gets: read, compared with the gallery, decoded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..arrays import Pixels
from ..errors import ImageError, KeyConflictError, SpadeError
from ..extractors.registry import Extractor
from ..extractors.spec import ExtractorSpec
from ..images.annotations import two_valued
from ..images.decode import decode, read_file
from ..images.facts import NO_FACTS, Facts
from ..images.inputs import ImageLike, opened
from ..images.reading import DECODE_BYTES, view_of
from ..images.sources import ImageFile
from ..store.source_images import content_digest, pixels_digest
from ..store.writer import GalleryWriter
from ..system.prefetch import ByteGate

MAX_THREADS = 8  # that read and decode


@dataclass(frozen=True)
class ReadImage:
    """What came of reading an image file: views and the content's digest, or an error, or neither if not wanted."""

    file: ImageFile
    digest: str = ""
    views: list[Pixels] | None = None  # of its tiles
    size: tuple[int, int] = (0, 0)  # (H, W)
    error: SpadeError | None = None
    facts: Facts = NO_FACTS


def read_image(
    file: ImageFile, spec: ExtractorSpec, gate: ByteGate, wanted: Callable[[ImageFile, str], bool] | None = None
) -> ReadImage:
    """Read an image file, and decode it if it is wanted.

    Args:
        file: the image file.
        spec: of the extractor, whose view is applied.
        gate: bounds what is decoded at the same time.
        wanted: decides by file and content digest; None: every image is wanted.
    """
    try:
        content = read_file(file.path)
        digest = content_digest(content)
        if wanted is not None and not wanted(file, digest):
            return ReadImage(file, digest)
        kept = ByteGate(DECODE_BYTES) if file.photo else None
        viewed = view_of(content, str(file.path), spec.tiling, spec.bits, gate, kept)
        if viewed.pixels is not None and two_valued(viewed.pixels):
            raise ImageError(
                f"{file.path}: looks like a mask of {file.photo}, by its name and its two values; "
                "give it by itself if it is an image"
            )
        return ReadImage(file, digest, viewed.views, viewed.size, facts=viewed.facts)
    except (ImageError, KeyConflictError) as error:
        return ReadImage(file, error=error)


def read_given(
    key: str,
    image: ImageLike,
    spec: ExtractorSpec,
    gate: ByteGate,
    wanted: Callable[[ImageFile, str], bool] | None = None,
    from_files: bool = False,
) -> ReadImage:
    """Do as read_image for an image that a caller gave under a key, whatever it is.

    Args:
        key: of the image.
        image: a path, a file's bytes, an open file, a PIL image, an array or a tensor; see decode.
        spec: as for read_image; so are `gate` and `wanted`.
        gate: see spec.
        wanted: see spec.
        from_files: whether the gallery recomputes patches, for which it has to have the path of a file.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(ImageFile(Path(image), key), spec, gate, wanted)
    file = ImageFile(Path(key), key)  # its path stands for the image in reports
    try:
        if from_files:
            raise ImageError(
                f"{key}: expected the path of an image file, from which the gallery recomputes patches, found "
                f"{type(image).__name__}; save it as a file, or take patches='stored'"
            )
        given = opened(image, key)
        if isinstance(given, bytes):
            digest, pixels = content_digest(given), None
        else:
            pixels = decode(given, key, spec.bits)
            digest = pixels_digest(pixels)
        if wanted is not None and not wanted(file, digest):
            return ReadImage(file, digest)
        if pixels is None:
            assert isinstance(given, bytes)
            viewed = view_of(given, key, spec.tiling, spec.bits, gate)
            return ReadImage(file, digest, viewed.views, viewed.size, facts=viewed.facts)
        height, width = pixels.shape[:2]
        return ReadImage(file, digest, spec.tiling.views(pixels), (height, width))
    except (ImageError, KeyConflictError) as error:
        return ReadImage(file, error=error)


def is_wanted(writer: GalleryWriter, file: ImageFile, digest: str, replace: bool) -> bool:
    """Return whether the gallery should take an image; False: it has the same content under that key.

    Raises:
        KeyConflictError: it has other content under that key, and `replace` is False.
    """
    state = writer.status(file.key, digest, absolute(file))
    if state == "differs" and not replace:
        raise KeyConflictError(
            f"{file.path}: key {file.key!r} is in the gallery with other content; replace=True takes the new content"
        )
    return state in ("new", "differs") or (state == "moved" and replace)


def absolute(file: ImageFile) -> str:
    """Return the path that a gallery keeps of an image file."""
    return str(file.path.absolute())  # not resolved: a link may be what stays when the files move


def reads_ahead(extractor: Extractor) -> int:
    """Return how many images are read before the network needs them: fewer where the views of one are many tiles."""
    return 2 * extractor.batch_size if extractor.spec.tile is None else reading_threads()


def reading_threads(processes: int = 1) -> int:
    """Return the number of threads that read and decode in each of so many processes."""
    return max(1, min(MAX_THREADS, (os.cpu_count() or 1) // processes))
