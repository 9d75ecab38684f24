"""A query, from an image to its anomaly map."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .calibration import Calibration, Judgement, Region
from .errors import NotEnoughImagesError, OptionError
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
        anomaly_map: (H, W) float32 at the image's size, higher is more anomalous; 0 outside the region, and where the
            patch search was skipped.
        region: (left, top, right, bottom), half-open: the pixels of the image that were looked at.
        neighbours: the K normal images that were searched.
        sq_distances: (h, w, kappa) float32 of the finest grid, ascending; kappa is 0 where the search was skipped.
        matches: (h, w, kappa, 3) int32: neighbour (as in `neighbours`), row and column of each matched patch.
        seconds: time of each stage; of stages that work on a batch, this image's share.
        path: where the image came from, if it was a path.
        judgement: verdict, p-value and regions, where the gallery is calibrated.
    """

    image_score: float
    anomaly_map: NDArray[np.float32]
    region: tuple[int, int, int, int]
    neighbours: Neighbours
    sq_distances: NDArray[np.float32]
    matches: NDArray[np.int32]
    seconds: dict[str, float] = field(default_factory=dict)
    path: str | None = None
    judgement: Judgement | None = None

    @property
    def verdict(self) -> str | None:
        """Either "normal" or "anomalous"; None where the gallery is not calibrated."""
        return self.judgement.verdict if self.judgement else None

    @property
    def regions(self) -> list[Region]:
        """Regions above the pixel threshold, worst first; none where the gallery is not calibrated."""
        return self.judgement.regions if self.judgement else []

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
        calibrated: bool = True,
    ) -> None:
        """Check that everything fits together.

        Args:
            gallery: of normal images.
            extractor: the one that made it.
            search: retrieval and patch search.
            score: distances to scores.
            calibrated: judge by the gallery's calibration, where it has one of the same settings.

        Raises:
            SpecMismatchError: the extractor is not the one that made the gallery, or has other settings.
            NotEnoughImagesError: the gallery is empty, or has fewer images than the k or k_score that was given.
            CorruptGalleryError: calibration.json was damaged or edited.
            OptionError: localise "suspicious" with an image score from the map, or without a calibration for these
                settings.
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
        self.calibration = self._read_calibration() if calibrated else None
        if self.search.localise == "suspicious" and self.score.image_score != "knn":
            raise OptionError("localise: 'suspicious' goes by image_score 'knn', found 'map_max', which needs the map")
        if self.calibration is None and self.search.localise == "suspicious":
            raise OptionError(
                f"localise: 'suspicious' needs the thresholds of {gallery.path}, found none for these settings; "
                "run `spade-faiss calibrate`, or localise all"
            )

    def settings(self) -> dict[str, Any]:
        """Return the settings that scores depend on, as JSON values: thresholds hold for these only."""
        search = {name: getattr(self.search, name) for name in ("k", "kappa", "k_score", "nprobe")}
        return search | {"image_score": self.score.image_score, "sigma": self.score.sigma}

    def _read_calibration(self) -> Calibration | None:
        found = Calibration.read(self.gallery.path)
        if found is not None and found.settings != self.settings():
            warnings.warn(
                f"no verdicts: {self.gallery.path} was calibrated for {found.settings}, not {self.settings()}",
                stacklevel=3,
            )
            return None
        if found is not None and found.generation != self.gallery.generation:
            warnings.warn(
                f"{self.gallery.path} has changed since it was calibrated (generation {found.generation}, now "
                f"{self.gallery.generation}): its false-alarm rate is not promised any more; calibrate again",
                stacklevel=3,
            )
        return found

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
            ids, sq_distances = self._retrieve(generation, features.image, watch)
            for row, image in enumerate(batch):
                levels = [level[row] for level in features.levels]
                path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
                one = _Retrieved(levels, ids[row], sq_distances[row], pixels[row].shape[:2], path, watch.of_one_image())
                yield self._detect(generation, one)

    def leave_one_out(self, ids: Iterable[int], without: Iterable[Ids] | None = None) -> Iterator[Detection]:
        """Query stored normal images, each against the others (k of them, or all), at the size of the resized image.

        Args:
            ids: the images.
            without: for each, the ids that it is not compared with; None: itself.

        Raises:
            NotEnoughImagesError: there is no other image.
        """
        generation, size = self.gallery.snapshot(), self.gallery.spec.view.resized
        pairs = zip(ids, without, strict=True) if without is not None else ((one, np.array([one])) for one in ids)
        for row_id, left_out in pairs:
            features, watch = generation.features([row_id]), _Stopwatch(1)
            found, sq_distances = self._retrieve(generation, features.image, watch, left_out)
            levels = [level[0] for level in features.levels]
            yield self._detect(
                generation, _Retrieved(levels, found[0], sq_distances[0], size, None, watch), judge=False
            )

    # The stages of a query, in their order.

    def _decode(self, images: Sequence[ImageLike], watch: _Stopwatch) -> list[Pixels]:
        with watch("decode"):
            return [decode(image) for image in images]

    def _extract(self, pixels: Sequence[Pixels], watch: _Stopwatch) -> Features:
        with watch("extract"):
            return self.extractor.extract([self.extractor.spec.view.apply(image) for image in pixels])

    def _retrieve(
        self, generation: Generation, image_features: Array, watch: _Stopwatch, without: Ids | None = None
    ) -> tuple[Ids, Array]:
        with watch("retrieve"):
            wanted = max(self._k_of(generation), self.search.k_score or 0)
            if without is not None:
                wanted = max(1, min(wanted, len(generation) - len(without)))
            return generation.search(image_features, wanted, without, self.search.nprobe)

    def _detect(self, generation: Generation, query: _Retrieved, judge: bool = True) -> Detection:
        k, view = self._k_of(generation), self.gallery.spec.view
        calibration = self.calibration if judge else None
        knn = knn_score(query.sq_distances, self.search.k_score or k)
        neighbours = Neighbours(generation.keys(query.ids[:k]), query.sq_distances[:k])
        if calibration and self.search.localise == "suspicious" and knn <= calibration.image_threshold:
            found, matches = _nothing_searched(query.levels)
        else:
            found, matches = self._match(query, self._read(generation, query.ids[:k], query.watch))
        with query.watch("score"):
            by_map = self.score.image_score == "map_max"
            scores = self._map(found, query.image_size)
            image_score = float(scores.max()) if by_map else knn
            judgement = None
            if calibration:
                # At the size that calibration saw: the same image at another size is the same case.
                peak = float(self._map(found, view.resized).max())
                judgement = calibration.judge(peak if by_map else knn, peak, scores, self.score.min_region)
        region = view.region(query.image_size)
        return Detection(
            image_score, scores, region, neighbours, found, matches, query.watch.seconds, query.path, judgement
        )

    def _map(self, sq_distances: Array, size: tuple[int, int]) -> NDArray[np.float32]:
        if sq_distances.shape[2] == 0:  # the patch search was skipped
            return np.zeros(size, np.float32)
        return anomaly_map(sq_distances, size, self.gallery.spec.view, self.score.sigma)

    def _read(self, generation: Generation, ids: Ids, watch: _Stopwatch) -> list[Array]:
        with watch("read"):
            return generation.levels(ids)

    def _match(self, query: _Retrieved, neighbour_levels: list[Array]) -> tuple[Array, Array]:
        options = self.search
        with query.watch("match"):
            return search_patches(
                query.levels, neighbour_levels, options.kappa, options.engine, options.device, options.block_bytes
            )


@dataclass(frozen=True)
class _Retrieved:
    """A query between retrieval and localisation."""

    levels: list[Array]  # [(c, h, w), ...]
    ids: Ids
    sq_distances: Array
    image_size: tuple[int, int]
    path: str | None
    watch: _Stopwatch


def _nothing_searched(levels: list[Array]) -> tuple[Array, Array]:
    grid = levels[0].shape[1:]
    return np.empty((*grid, 0), np.float32), np.empty((*grid, 0, 3), np.int32)


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
