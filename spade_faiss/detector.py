"""A query, from an image to its anomaly map."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import NotEnoughImagesError
from .features import Array, Extractor, Features
from .gallery import Gallery
from .generation import Generation
from .image_index import Ids
from .images import Pixels, batched, decode
from .options import DEFAULT_K, ScoreOptions, SearchOptions
from .patch_search import search_patches
from .scoring import anomaly_map, knn_score

ImageLike = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True)
class Neighbours:
    """The K normal images nearest to a query, nearest first."""

    keys: list[str]
    sq_distances: NDArray[np.float32]  # (K,) of image features


@dataclass(frozen=True)
class Detection:
    """What a query found.

    Attributes:
        image_score: higher is more anomalous.
        anomaly_map: (H, W) float32 at the image's size, higher is more anomalous; 0 outside the region.
        region: (left, top, right, bottom), half-open: the pixels of the image that were looked at.
        neighbours: the K normal images that were searched.
        sq_distances: (h, w, kappa) float32 of the finest grid, ascending.
        matches: (h, w, kappa, 3) int32: neighbour (as in `neighbours`), row and column of each matched patch.
        seconds: time of each stage; of stages that work on a batch, this image's share.
        path: where the image came from, if it was a path.
    """

    image_score: float
    anomaly_map: NDArray[np.float32]
    region: tuple[int, int, int, int]
    neighbours: Neighbours
    sq_distances: NDArray[np.float32]
    matches: NDArray[np.int32]
    seconds: dict[str, float] = field(default_factory=dict)
    path: str | None = None

    @property
    def map_max(self) -> float:
        """The largest pixel score."""
        return float(self.anomaly_map.max())


class Detector:
    """Compares images with a gallery of normal ones. Threads may share one."""

    def __init__(
        self,
        gallery: Gallery,
        extractor: Extractor,
        search: SearchOptions | None = None,
        score: ScoreOptions | None = None,
    ) -> None:
        """Check that everything fits together.

        Raises:
            SpecMismatchError: the extractor is not the one that made the gallery, or has other settings.
            NotEnoughImagesError: the gallery is empty, or has fewer images than the k or k_score that was given.
        """
        gallery.spec.require(extractor.spec, str(gallery.path))
        self.gallery = gallery
        self.extractor = extractor
        self.search = search or SearchOptions()
        self.score = score or ScoreOptions()
        n = len(gallery)
        for name, given in (("k", self.search.k), ("k_score", self.search.k_score)):
            if n < (given or 1):
                raise NotEnoughImagesError(
                    f"{name}: expected at most the number of normal images in {gallery.path}, {n}, "
                    f"found {given or DEFAULT_K}"
                )

    @property
    def k(self) -> int:
        """Neighbours whose patches are searched."""
        return self._k_of(self.gallery.snapshot())

    def _k_of(self, generation: Generation) -> int:
        return self.search.k or min(DEFAULT_K, len(generation))

    def query(self, image: ImageLike) -> Detection:
        """Look for anomalies in one image.

        Args:
            image: a path, a PIL image, or an (H, W, 3) uint8 RGB array.

        Raises:
            ImageError: the image cannot be read.
            CorruptGalleryError: the gallery's files are damaged.
        """
        return self.query_batch([image])[0]

    def query_batch(self, images: Sequence[ImageLike]) -> list[Detection]:
        """Look for anomalies in several images; extraction and retrieval are done in batches."""
        return list(self.stream(images))

    def stream(self, images: Iterable[ImageLike]) -> Iterator[Detection]:
        """Do as query_batch, but hand on each detection as it is made: memory does not grow with their number."""
        generation = self.gallery.snapshot()
        for batch in batched(images, self.extractor.batch_size):
            watch = _Stopwatch(len(batch))
            pixels = self._decode(batch, watch)
            features = self._extract(pixels, watch)
            ids, sq_distances = self._retrieve(generation, features, watch)
            for row, image in enumerate(batch):
                own = watch.of_one_image()
                yield self._localise(
                    generation, features[row : row + 1], ids[row], sq_distances[row], pixels[row], image, own
                )

    def leave_one_out(self, ids: Sequence[int]) -> Iterator[Detection]:
        """Query stored normal images, each against the others (k of them, or all), at the size of the resized image.

        Raises:
            NotEnoughImagesError: there is no other image.
        """
        generation = self.gallery.snapshot()
        height, width = self.gallery.spec.view.resized
        blank = np.zeros((height, width, 3), np.uint8)
        for row_id in ids:
            features = generation.features([row_id])
            watch = _Stopwatch(1)
            found, sq_distances = self._retrieve(generation, features, watch, without=np.array([row_id]))
            yield self._localise(generation, features, found[0], sq_distances[0], blank, None, watch)

    # The stages of a query, in their order.

    def _decode(self, images: Sequence[ImageLike], watch: _Stopwatch) -> list[Pixels]:
        with watch("decode"):
            return [decode(image) for image in images]

    def _extract(self, pixels: Sequence[Pixels], watch: _Stopwatch) -> Features:
        with watch("extract"):
            return self.extractor.extract([self.extractor.spec.view.apply(image) for image in pixels])

    def _retrieve(
        self, generation: Generation, features: Features, watch: _Stopwatch, without: Ids | None = None
    ) -> tuple[Ids, Array]:
        with watch("retrieve"):
            wanted = max(self._k_of(generation), self.search.k_score or 0)
            if without is not None:
                wanted = max(1, min(wanted, len(generation) - len(without)))
            return generation.search(features.image, wanted, without, self.search.nprobe)

    def _localise(
        self,
        generation: Generation,
        features: Features,
        ids: Ids,
        sq_distances: Array,
        pixels: Pixels,
        image: Any,
        watch: _Stopwatch,
    ) -> Detection:
        k = self._k_of(generation)
        with watch("read"):
            levels = generation.levels(ids[:k])
            neighbours = Neighbours(generation.keys(ids[:k]), sq_distances[:k])
        with watch("match"):
            query = [level[0] for level in features.levels]
            options = self.search
            patch_distances, matches = search_patches(
                query, levels, options.kappa, options.engine, options.device, options.block_bytes
            )
        with watch("score"):
            view, size = self.gallery.spec.view, pixels.shape[:2]
            scores = anomaly_map(patch_distances, size, view, self.score.sigma)
            by_map = self.score.image_score == "map_max"
            image_score = float(scores.max()) if by_map else knn_score(sq_distances, self.search.k_score or k)
        path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
        return Detection(
            image_score, scores, view.region(size), neighbours, patch_distances, matches, watch.seconds, path
        )


class _Stopwatch:
    """Seconds by stage. What is timed for a batch is shared out among its images."""

    def __init__(self, images: int) -> None:
        self.seconds: dict[str, float] = {}
        self._images = images

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    def of_one_image(self) -> _Stopwatch:
        own = _Stopwatch(1)
        own.seconds = {stage: seconds / self._images for stage, seconds in self.seconds.items()}
        return own
