"""What a build will need: disk, memory, time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ..errors import FeatureError, ImageError
from ..extractors.registry import Extractor
from ..extractors.spec import ExtractorSpec
from ..images.decode import decode
from ..images.sources import ImageFile
from ..index.factory import about_bytes
from ..options import MIB, Patches
from .image_reader import reads_ahead

TRIED = 100  # images, until one can be read and timed


@dataclass(frozen=True)
class Estimate:
    """What a build will need."""

    images: int
    disk_bytes: int
    free_bytes: int  # on the disk it goes to
    memory_bytes: int  # beyond the network and the libraries
    seconds_per_image: float
    bytes_per_image: dict[Patches, int]  # on disk without the index, for patches stored and recomputed

    def __str__(self) -> str:
        minutes = self.images * self.seconds_per_image / 60
        disk = f"{self.disk_bytes / MIB:.0f} MiB on disk ({self.free_bytes / MIB:.0f} free)"
        space = f"{disk}, about {self.memory_bytes / MIB:.0f} MiB of memory"
        pace = f"{self.seconds_per_image * 1000:.0f} ms an image, about {minutes:.1f} min"
        stored, recomputed = (self.bytes_per_image[patches] / 1000 for patches in ("stored", "recompute"))
        ways = f"patches stored: {stored:.0f} kB an image; recomputed (patches='recompute'): {recomputed:.1f} kB"
        return (
            f"{self.images} images: {space} beyond the network, {pace}; {ways}, and about "
            f"{self.seconds_per_image * 1000:.0f} ms for each neighbour of a query"
        )


def estimate(
    files: Sequence[ImageFile], extractor: Extractor, folder: Path, patches: Patches = "stored", workers: int = 1
) -> Estimate:
    """Estimate what a build needs. The first image that can be used is extracted, to measure the time.

    The others count as if they were of its size, where images are cut into tiles.

    Args:
        files: the images.
        extractor: of the gallery.
        folder: on the disk that the gallery goes to.
        patches: as the gallery has them.
        workers: processes, which need memory each. The time is that of one process, whatever their number.
    """
    spec = extractor.spec
    tiles, seconds = _first_image(files, extractor)
    n = len(files) * tiles
    index = about_bytes(n, spec.image_dim)
    block = max(extractor.batch_size, tiles)  # an image is written with all its tiles
    batches = 3 * block * spec.bytes_per_image + reads_ahead(extractor) * tiles * _view_bytes(spec)
    free = shutil.disk_usage(folder).free
    sizes = {way: tiles * spec.bytes_with(way) for way in get_args(Patches)}
    return Estimate(len(files), len(files) * sizes[patches] + index, free, index + workers * batches, seconds, sizes)


def _first_image(files: Sequence[ImageFile], extractor: Extractor) -> tuple[int, float]:
    """Return the tiles of the first image that can be read, and the seconds that it takes; 0 if none can be."""
    tiling, bits = extractor.spec.tiling, extractor.spec.bits
    for file in files[:TRIED]:
        try:
            views = tiling.views(decode(file.path, bits=bits))
            batch = (views * extractor.batch_size)[: extractor.batch_size]
            extractor.extract(batch)  # warms up
        except (ImageError, FeatureError):
            continue
        start = time.perf_counter()
        tiling.views(decode(file.path, bits=bits))
        decoded = time.perf_counter()
        extractor.extract(batch)
        extracted = (time.perf_counter() - decoded) / len(batch)
        return len(views), decoded - start + len(views) * extracted
    return 1, 0.0


def _view_bytes(spec: ExtractorSpec) -> int:
    height, width = spec.view.crop
    return 3 * height * width
