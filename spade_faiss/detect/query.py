"""An image on its way through the stages of a run: decoded, cut into tiles, and retrieved for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Ids, Pixels
from ..images.inputs import ImageLike
from ..images.tiling import Box
from .settings import Settings


class Stopwatch:
    """Seconds by stage. What is timed for a batch is shared out among its images."""

    def __init__(self, images: int = 1) -> None:
        self.seconds: dict[str, float] = {}
        self._images = images

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block; blocks of one stage are added up."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def of_one_image(self) -> Stopwatch:
        """Share out what was timed so far."""
        own = Stopwatch()
        own.seconds = {stage: seconds / self._images for stage, seconds in self.seconds.items()}
        return own


@dataclass(frozen=True)
class Decoded:
    """The network's views of an image that somebody has decoded already, in so many seconds."""

    views: list[Pixels]  # of its tiles
    size: tuple[int, int]  # (H, W) of the image
    seconds: float
    path: str | None = None


AnyImage = ImageLike | Decoded


@dataclass(frozen=True)
class Tile:
    """A tile of an image, or all of it, on its way to the network; or why the image cannot be decoded."""

    position: int  # of the image, among those of the run
    image: AnyImage  # decoded, unless it is seen whole
    number: int = 0  # of the tile
    box: Box | None = None  # of the tile; None: all of the image
    error: Exception | None = None

    @property
    def place(self) -> Box | None:
        """The place of the tile, as keys have it: the first has none."""
        return self.box if self.number else None


@dataclass(frozen=True)
class Query:
    """An image between retrieval and localisation."""

    levels: list[Array]  # [(c, h, w), ...]
    ids: Ids  # of the neighbours
    sq_distances: Array  # of the neighbours' image features
    image_size: tuple[int, int]  # (H, W) of the whole image
    path: str | None
    watch: Stopwatch
    position: int = 0  # among the images of the run
    tile: int = 0  # among the tiles of the image
    box: Box | None = None  # of the tile; None: all of the image
    key: str | None = None  # of the normal image that is queried, or of its first copy, if it is one of the gallery's
    image_feature: Array | None = None  # (d,); None: of a normal image that is queried
    missing: frozenset[str] = frozenset()  # members of a cluster that did not take part
    in_baseline: NDArray[np.float64] | None = None  # (h, w) what it has added; None: what it finds here
    neighbours_of_new: int | None = None  # how many an image has that is none of the gallery's; None: it is such a one

    def settings_of(self, settings: Settings) -> Settings:
        """Return the settings of a run for this query."""
        return replace(settings, neighbours=self.neighbours_of_new)

    @property
    def place(self) -> Box | None:
        """The place of the tile, as keys have it: the first has none."""
        return self.box if self.tile else None


def path_of(image: AnyImage) -> str | None:
    """Return the path that an image was given by, if it was."""
    if isinstance(image, Decoded):
        return image.path
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
