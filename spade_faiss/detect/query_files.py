"""A query over files and folders: every image in order, read ahead."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..arrays import Pixels
from ..errors import ImageError
from ..images.decode import decode
from ..images.sources import ImageFile, find_images
from ..ingest.pipeline import Skipped
from ..system.prefetch import read_ahead
from .detection import Detection
from .detector import Detector


@dataclass(frozen=True)
class _Read:
    """An image as the readers hand it on, or why there is none."""

    source: ImageFile
    pixels: Pixels | None
    seconds: float
    error: str = ""


def query_sources(
    detector: Detector,
    paths: Sequence[str | Path],
    skipped: list[Skipped],
    strict: bool = False,
    progress: bool = False,
) -> Iterator[tuple[ImageFile, Pixels, Detection]]:
    """Query every image of files and folders, in order, reading ahead.

    Args:
        detector: what to query.
        paths: files and folders.
        skipped: receives the images that cannot be read.
        strict: raise at the first such image instead.
        progress: a bar on stderr, where that is a terminal.

    Raises:
        ImageError: a source without images; with strict, the first image that cannot be read.
    """
    sources = find_images(paths)

    def read(source: ImageFile) -> _Read:
        start = time.perf_counter()
        try:
            return _Read(source, decode(source.path), time.perf_counter() - start)
        except ImageError as error:
            if strict:
                raise
            return _Read(source, None, 0.0, str(error))

    batch_size = detector.extractor.batch_size
    reads = read_ahead(sources, read, min(8, os.cpu_count() or 1), 2 * batch_size)
    taken: deque[_Read] = deque()  # by the detector, which is ahead of its detections
    with tqdm(total=len(sources), unit="image", disable=None if progress else True, desc="query") as bar:

        def pixels() -> Iterator[Pixels]:
            for image in reads:
                if image.pixels is None:
                    skipped.append(Skipped(image.source.path, image.error))
                    bar.update()
                else:
                    taken.append(image)
                    yield image.pixels

        for detection in detector.stream(pixels()):
            image = taken.popleft()
            assert image.pixels is not None
            detection.seconds["decode"] = image.seconds
            yield image.source, image.pixels, detection
            bar.update()
