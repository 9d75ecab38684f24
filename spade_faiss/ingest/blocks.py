"""Images through the network in blocks of whole images: a gallery takes an image with all of its tiles, or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..extractors.features import Features
from ..extractors.registry import Extractor
from ..system.prefetch import batched
from .image_reader import ReadImage, absolute


@dataclass(frozen=True)
class Block:
    """What a gallery takes of some images, for each of their tiles."""

    keys: list[str]
    features: Features
    digests: list[str]
    paths: list[str]


def extracted(images: Iterable[ReadImage | None], extractor: Extractor) -> Iterator[Block]:
    """Extract images; without tiles, a block is a batch, and else the tiles of enough images for one, at least.

    Args:
        images: None ends a block early, as an image must not be in one block with another of its key.
        extractor: what extracts them.
    """
    waiting: list[ReadImage] = []
    for image in images:
        if image is not None:
            waiting.append(image)
        if waiting and (image is None or sum(len(one.views or ()) for one in waiting) >= extractor.batch_size):
            yield _block(waiting, extractor)
            waiting = []
    if waiting:
        yield _block(waiting, extractor)


def _block(images: list[ReadImage], extractor: Extractor) -> Block:
    tiling = extractor.spec.tiling
    keys = [tiling.keys(image.file.key, image.size) for image in images]
    owners = [image for image, own in zip(images, keys, strict=True) for _ in own]
    views = [view for image in images for view in image.views or ()]
    parts = [extractor.extract(some) for some in batched(views, extractor.batch_size)]
    return Block(
        [key for own in keys for key in own],
        parts[0] if len(parts) == 1 else _joined(parts),
        [image.digest for image in owners],
        [absolute(image.file) for image in owners],
    )


def _joined(parts: list[Features]) -> Features:
    levels = zip(*(part.levels for part in parts), strict=True)
    return Features(np.concatenate([part.image for part in parts]), [np.concatenate(level) for level in levels])
