"""A query over image files: every image in order, decoded ahead of the search."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..arrays import Pixels
from ..errors import ImageError
from ..images.decode import decode
from ..images.sources import ImageFile
from ..ingest.pipeline import Skipped
from ..system.prefetch import read_ahead
from ..system.progress import progress_bar
from .detection import Detection
from .detector import Detector
from .pipeline import Decoded


@dataclass(frozen=True)
class _Read:
    """An image as the readers hand it on, or why there is none."""

    file: ImageFile
    decoded: Decoded | None
    error: str = ""


def query_files(
    detector: Detector,
    files: Sequence[ImageFile],
    skipped: list[Skipped] | None = None,
    progress: bool = False,
) -> Iterator[tuple[ImageFile, Pixels, Detection]]:
    """Query image files, in their order, reading ahead; yields each with its (H, W, 3) pixels and what was found.

    Args:
        detector: what to query.
        files: the images.
        skipped: receives the images that cannot be read. None: the first such image is raised.
        progress: a bar on stderr, where that is a terminal.

    Raises:
        ImageError: an image that cannot be read, where `skipped` is None.
    """

    def read(file: ImageFile) -> _Read:
        start = time.perf_counter()
        try:
            return _Read(file, Decoded(decode(file.path), time.perf_counter() - start))
        except ImageError as error:
            if skipped is None:
                raise
            return _Read(file, None, str(error))

    reads = read_ahead(files, read, min(8, os.cpu_count() or 1), 2 * detector.extractor.batch_size)
    taken: deque[tuple[ImageFile, Decoded]] = deque()  # by the detector, which is ahead of its detections
    with progress_bar(len(files), "query", progress) as bar:

        def decoded() -> Iterator[Decoded]:
            for image in reads:
                if image.decoded is not None:
                    taken.append((image.file, image.decoded))
                    yield image.decoded
                elif skipped is not None:
                    skipped.append(Skipped(image.file.path, image.error))
                    bar.update()

        for detection in detector.stream(decoded()):
            file, image = taken.popleft()
            yield file, image.pixels, detection
            bar.update()
