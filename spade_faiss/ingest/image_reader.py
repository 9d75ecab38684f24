"""Image files to views for the network, read ahead by threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from ..arrays import Pixels
from ..errors import ImageError, KeyConflictError, SpadeError
from ..extractors.registry import Extractor
from ..extractors.spec import ExtractorSpec
from ..images.decode import decode, read_file
from ..images.sources import ImageFile
from ..store.source_images import content_digest
from ..store.writer import GalleryWriter


def reads_ahead(extractor: Extractor) -> int:
    """Return how many images are read before they are needed."""
    return 2 * extractor.batch_size


def reading_threads(processes: int = 1) -> int:
    """Return how many threads read and decode in each of so many processes."""
    return max(1, min(8, (os.cpu_count() or 1) // processes))


@dataclass(frozen=True)
class Read:
    """An image as the readers hand it on: a view with its digest, or why there is none."""

    source: ImageFile
    digest: str = ""
    view: Pixels | None = None
    error: SpadeError | None = None  # neither a view nor an error: it is not wanted


def read_image(source: ImageFile, spec: ExtractorSpec, wanted: Callable[[ImageFile, str], bool] | None = None) -> Read:
    """Read an image, and decode it if it is wanted with the digest that it has."""
    try:
        content = read_file(source.path)
        digest = content_digest(content)
        if wanted is not None and not wanted(source, digest):
            return Read(source, digest)
        return Read(source, digest, spec.view.apply(decode(content, str(source.path))))
    except (ImageError, KeyConflictError) as error:
        return Read(source, error=error)


def is_wanted(writer: GalleryWriter, source: ImageFile, digest: str, replace: bool) -> bool:
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


def absolute(source: ImageFile) -> str:
    """Return the path that a gallery keeps of an image file."""
    return str(source.path.absolute())  # not resolved: a link may be what stays when the files move
