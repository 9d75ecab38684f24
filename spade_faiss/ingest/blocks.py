"""Images through the network in blocks of whole images: a gallery takes an image with all of its tiles, or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..arrays import Pixels
from ..errors import FeatureError
from ..extractors.features import Features, require_rows
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


def extracted(
    images: Iterable[ReadImage | None], extractor: Extractor, failed: Callable[[ReadImage], bool] | None = None
) -> Iterator[Block]:
    """Extract images; without tiles, a block is a batch, and else the tiles of enough images for one, at least.

    Args:
        images: None ends a block early, as an image must not be in one block with another of its key.
        extractor: what extracts them.
        failed: told of images whose features do not fit the gallery, with the error; returns whether to go on.

    Raises:
        FeatureError: `failed` is None and an image's features do not fit, or those of no image of a block do.
    """
    for some in _enough(images, extractor.batch_size):
        blocks, others = _blocks(some, extractor)
        yield from blocks
        for image in others:
            assert image.error is not None
            if failed is None:
                raise image.error
            if not failed(image):
                return


def _enough(images: Iterable[ReadImage | None], batch_size: int) -> Iterator[list[ReadImage]]:
    waiting: list[ReadImage] = []
    for image in images:
        if image is not None:
            waiting.append(image)
        if waiting and (image is None or sum(len(one.views or ()) for one in waiting) >= batch_size):
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _blocks(images: list[ReadImage], extractor: Extractor) -> tuple[list[Block], list[ReadImage]]:
    """Extract images together or, if some do not fit, one by one; returns blocks, and those images with their errors.

    Raises:
        FeatureError: none of several images fits: that is the network's fault.
    """
    try:
        return [_block(images, extractor)], []
    except FeatureError as error:
        if len(images) == 1:
            named = FeatureError(f"{images[0].file.path}: {error}")
            return [], [replace(images[0], views=None, error=named)]
    each = [_blocks([image], extractor) for image in images]
    others = [image for _, bad in each for image in bad]
    if len(others) == len(images) and others[0].error is not None:
        raise others[0].error
    return [block for good, _ in each for block in good], others


def _block(images: list[ReadImage], extractor: Extractor) -> Block:
    tiling = extractor.spec.tiling
    keys = [tiling.keys(image.file.key, image.size) for image in images]
    owners = [image for image, own in zip(images, keys, strict=True) for _ in own]
    views = [view for image in images for view in image.views or ()]
    parts = [_fitting(some, extractor) for some in batched(views, extractor.batch_size)]
    return Block(
        [key for own in keys for key in own],
        parts[0] if len(parts) == 1 else _joined(parts),
        [image.digest for image in owners],
        [absolute(image.file) for image in owners],
    )


def _fitting(views: list[Pixels], extractor: Extractor) -> Features:
    """Extract views together, and check the features here, where it is known whose they are.

    Raises:
        FeatureError: features of another number of images, of other shapes, NaN, infinity or too large for the gallery.
    """
    return require_rows(extractor.spec.cast(extractor.extract(views)), len(views), extractor.spec.name)


def _joined(parts: list[Features]) -> Features:
    levels = zip(*(part.levels for part in parts), strict=True)
    return Features(np.concatenate([part.image for part in parts]), [np.concatenate(level) for level in levels])
