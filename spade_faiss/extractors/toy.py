"""The toy extractor: no network, features that can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays import Array, Pixels
from ..errors import OptionError
from ..options import FeatureOptions
from .features import Features
from .pooling import average_neighbourhoods
from .spec import ExtractorSpec
from .tokens import require_no_tokens


class ToyExtractor:
    """Means of pixels, in NumPy; see registry.Extractor.

    Level `stride4` is the mean RGB, in [0, 1], of each 4 x 4 pixels; `stride8`, `stride16` and `stride32` are the same
    for larger squares. The image feature is the mean RGB of the four quadrants (top left, top right, bottom left,
    bottom right): d = 12.
    """

    LEVELS = ("stride4", "stride8", "stride16", "stride32")

    def __init__(self, options: FeatureOptions) -> None:
        require_no_tokens("toy", options)
        resized, crop = options.sizes(default=(32, 32))
        names = options.levels or tuple(name for name in self.LEVELS if int(name[6:]) in options.strides)
        if not names or not set(names) <= set(self.LEVELS) or list(names) != sorted(set(names), key=self.LEVELS.index):
            raise OptionError(f"levels: expected some of {self.LEVELS}, finest first, found {names}")
        self._strides = [int(name.removeprefix("stride")) for name in names]
        unit = max(2, *self._strides)
        if crop[0] % unit or crop[1] % unit:
            raise OptionError(f"image size: extractor toy expects multiples of {unit} px, found {crop}")
        self.batch_size = options.batch_size
        self.spec = ExtractorSpec(
            name="toy",
            level_shapes=tuple((3, crop[0] // stride, crop[1] // stride) for stride in self._strides),
            image_dim=12,
            dtype=options.dtype,
            neighbourhood=options.neighbourhood,
            count_include_pad=options.count_include_pad or None,
            level_names=tuple(names),
            resized=resized,
            crop=crop,
            bits=options.bits,
            tile=options.tile_size,
            overlap=options.overlap,
        )

    def extract(self, views: Sequence[Pixels]) -> Features:
        """See Extractor.extract."""
        batch = np.stack(views).astype(np.float32).transpose(0, 3, 1, 2) / 255  # (n, 3, h, w)
        height, width = batch.shape[2:]
        quadrants = _block_means(batch, height // 2, width // 2)
        levels = [_block_means(batch, stride, stride) for stride in self._strides]
        levels = average_neighbourhoods(levels, self.spec.neighbourhood, bool(self.spec.count_include_pad))
        image = quadrants.transpose(0, 2, 3, 1).reshape(len(views), 12)
        return self.spec.cast(Features(image, levels))


def _block_means(batch: Array, height: int, width: int) -> Array:
    """Average (n, c, h, w) over blocks of height x width pixels."""
    n, c, h, w = batch.shape
    means: Array = batch.reshape(n, c, h // height, height, w // width, width).mean(axis=(3, 5))
    return means
