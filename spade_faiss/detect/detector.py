"""A query, from an image to its anomaly map."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..arrays import Array, Ids, Pixels
from ..errors import CorruptGalleryError, NotEnoughImagesError, OptionError
from ..extractors.features import Features
from ..extractors.registry import Extractor
from ..gallery.gallery import Gallery
from ..images.decode import decode
from ..images.sources import ImageFile
from ..options import DEFAULT_K, ScoreOptions, SearchOptions
from ..patch_search.search import search_patches
from ..pyramids.cache import LevelCache, PyramidCache
from ..pyramids.device_cache import device_cache
from ..pyramids.reader import PyramidSource
from ..pyramids.recomputed import pyramids_of
from ..store.snapshot import Snapshot
from ..system.devices import as_arrays, beside, search_device
from ..system.forks import remember
from ..system.prefetch import batched, one_ahead
from .baseline import Baseline
from .calibration import Calibration
from .detection import Detection, Neighbours, Retrieved, Stopwatch, one_by_one
from .measure_baseline import measure
from .scoring import anomaly_map, knn_score
from .settings import query_options

ImageLike = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]


class Detector:
    """Compares images with a gallery of normal ones. Threads may share one, and so may processes, forked or spawned."""

    def __init__(
        self,
        gallery: Gallery,
        extractor: Extractor,
        search: SearchOptions | None = None,
        score: ScoreOptions | None = None,
        calibrated: bool = True,
        normal: Sequence[str | Path | ImageFile] = (),
    ) -> None:
        """Check that everything fits together.

        Args:
            gallery: of normal images.
            extractor: the one that made it.
            search: retrieval and patch search; None: as the gallery was calibrated, or else as its recipe says.
            score: distances to scores; None: likewise.
            calibrated: judge by the gallery's calibration, where it has one of the same settings.
            normal: of a gallery that recomputes patches, where its image files may be, besides where they were:
                folders that it was built from, or the files.

        Raises:
            SpecMismatchError: the extractor is not the one that made the gallery, or has other settings.
            NotEnoughImagesError: the gallery is empty, or has fewer images than the k or k_score that was given.
            CorruptGalleryError: calibration.json was damaged or edited.
            DeviceError: engine "pyramid" is to run on a GPU that torch does not see.
            OptionError: localise "suspicious" with an image score from the map, or without a calibration for these
                settings.
        """
        gallery.spec.require(extractor.spec, str(gallery.path))
        self.gallery = gallery
        self.extractor = extractor
        self._normal = tuple(normal)
        self.search, self.score = query_options(gallery, search, score, calibrated)
        n = len(gallery)
        for name, given in (("k", self.search.k), ("k_score", self.search.k_score)):
            if n < (given or 1):
                raise NotEnoughImagesError(
                    f"{name}: expected at most the number of normal images in {gallery.path}, {n}, "
                    f"found {given or DEFAULT_K}"
                )
        self.calibration = self._read_calibration() if calibrated else None
        self._baseline = self.calibration.baseline if self.calibration else None
        self._calibrated = calibrated
        if self._baseline and not self._baseline.fits(gallery.spec.level_shapes):
            raise CorruptGalleryError(f"{gallery.path}: calibration of another pyramid; calibrate again")
        self._lock = threading.Lock()
        remember(self)
        self._cache = PyramidCache(self.search.cache_bytes)
        self._device_cache = device_cache(self.search, self._cache)
        by = self.score.image_score
        if self.search.localise == "suspicious" and by != "knn":
            raise OptionError(f"localise: 'suspicious' goes by image_score 'knn', found {by!r}, which needs the map")
        if self.calibration is None and self.search.localise == "suspicious":
            raise OptionError(
                f"localise: 'suspicious' needs the thresholds of {gallery.path}, found none for these settings; "
                "run `spade-faiss calibrate`, or localise all"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Be made anew in another process, of the last commit there is then; the extractor has to be picklable."""
        given = self.gallery, self.extractor, self.search, self.score, self._calibrated, self._normal
        return type(self), given

    def after_fork(self) -> None:
        """Be of use in a forked process, with a lock that nobody holds."""
        self._lock = threading.Lock()

    def settings(self) -> dict[str, Any]:
        """Return the settings that scores depend on, as JSON values: thresholds hold for these only."""
        search = {name: getattr(self.search, name) for name in ("k", "kappa", "k_score", "nprobe", "level_weights")}
        return search | {name: getattr(self.score, name) for name in ("image_score", "positions", "sigma")}

    @property
    def needs_baseline(self) -> bool:
        """Whether the scale of normal images matters to the settings."""
        weights, positions = self.search.level_weights, self.score.positions
        return not weights == positions == "equal" or self.score.image_score == "map"

    def baseline(self) -> Baseline | None:
        """Return what normal images look like: the calibration's, or measured at the first need; None: not needed.

        It takes SAMPLE queries to measure.
        """
        if not self.needs_baseline:
            return None
        with self._lock:
            if self._baseline is None:
                self._baseline = measure(self, self.gallery.snapshot())
            return self._baseline

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

    def _k_of(self, generation: Snapshot) -> int:
        return self.search.k or min(DEFAULT_K, len(generation))

    def query(self, image: ImageLike) -> Detection:
        """Look for anomalies in one image.

        Args:
            image: a path, a PIL image, or an (H, W, 3) uint8 RGB array.

        Raises:
            ImageError: the image cannot be read.
            CorruptGalleryError: the gallery's files are damaged.
            SourceError: an image file that the gallery recomputes patches from is gone or has changed.
        """
        return self.query_batch([image])[0]

    def query_batch(self, images: Sequence[ImageLike]) -> list[Detection]:
        """Look for anomalies in several images, as stream does, and return all that is found, in their order.

        Within a batch, the query comes next that has the most neighbours in memory.
        """
        generation, order = self.gallery.snapshot(), list[int]()

        def next_of(queries: Sequence[Retrieved]) -> int:
            source, k = self._pyramids(generation), self._k_of(generation)
            cache = self._cache_for(source, k)
            return max(range(len(queries)), key=lambda at: cache.holds(source, queries[at].ids[:k]))

        found = list(self._stream(generation, images, next_of, order))
        return [detection for _, detection in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]

    def stream(self, images: Iterable[ImageLike]) -> Iterator[Detection]:
        """Do as query_batch, but hand on each detection as it is made: memory does not grow with their number.

        While one query is searched, a thread reads the neighbours of the next; where a GPU takes part, another one
        decodes and extracts the next batch. Images are taken from an iterator in the caller's thread, up to two batches
        ahead of what is handed on. What cannot be read is raised at its turn, after the detections before it.
        """
        yield from self._stream(self.gallery.snapshot(), images)

    def _stream(
        self,
        generation: Snapshot,
        images: Iterable[ImageLike],
        next_of: Callable[[Sequence[Retrieved]], int] = lambda queries: 0,
        order: list[int] | None = None,
    ) -> Iterator[Detection]:
        """Query images, in each batch the one next that `next_of` chooses; `order` receives their positions."""
        baseline = self.baseline()
        batches = batched(images, self.extractor.batch_size)
        retrieved = one_ahead(batches, partial(self._retrieved, generation), self._overlaps())
        yield from self._detections(generation, baseline, one_by_one(retrieved, next_of, order))

    def _overlaps(self) -> bool:
        """Tell whether the network and the search do not compete for the same cores."""
        devices = getattr(self.extractor, "device", "cpu"), search_device(self.search.device)
        return any(device != "cpu" for device in devices)

    def _retrieved(self, generation: Snapshot, images: Sequence[ImageLike]) -> tuple[list[Retrieved], Exception | None]:
        """Decode, extract and retrieve a batch, up to the first image that cannot be read."""
        error: Exception | None = None
        views, sizes, watch = [], [], Stopwatch(len(images))
        try:
            for image in images:
                pixels = self._decode(image, watch)
                with watch("extract"):
                    views.append(self.extractor.spec.view.apply(pixels))  # and the whole image can be let go
                sizes.append(pixels.shape[:2])
        except Exception as raised:
            error = raised
        if not views:
            return [], error
        features = self._extract(views, watch)
        ids, sq_distances = self._retrieve(generation, features.image, watch)
        found = []
        for row, (image, size) in enumerate(zip(images, sizes, strict=False)):
            levels = [level[row] for level in features.levels]
            path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
            found.append(Retrieved(levels, ids[row], sq_distances[row], size, path, watch.of_one_image()))
        return found, error

    def _detections(
        self, generation: Snapshot, baseline: Baseline | None, queries: Iterable[Retrieved]
    ) -> Iterator[Detection]:
        """Read, match and score queries; the next one's neighbours are read while one is searched."""
        background = generation.manifest.patches == "stored" or self._overlaps()  # recomputing takes the network

        def read(query: Retrieved) -> tuple[Retrieved, list[Any] | None]:
            return query, self._read(generation, query) if self._is_searched(generation, query) else None

        for query, levels in one_ahead(queries, read, background):
            detection = self._detect(generation, baseline, query, levels)
            del query, levels  # else those of the one after the next are read while these are here
            yield detection

    def leave_one_out(
        self, ids: Iterable[int], without: Iterable[Ids] | None = None, generation: Snapshot | None = None
    ) -> Iterator[Detection]:
        """Query stored normal images, each against the others (k of them, or all), at the size of the resized image.

        Args:
            ids: the images.
            without: for each, the ids that it is not compared with; None: itself.
            generation: that these ids are of; None: the one that is open.

        Raises:
            NotEnoughImagesError: there is no other image.
        """
        generation, baseline = generation or self.gallery.snapshot(), self.baseline()
        yield from self._detections(generation, baseline, self.stored(generation, ids, without))

    def stored(
        self, generation: Snapshot, ids: Iterable[int], without: Iterable[Ids] | None = None
    ) -> Iterator[Retrieved]:
        """Retrieve the neighbours of stored images; see leave_one_out."""
        pairs = zip(ids, without, strict=True) if without is not None else ((one, np.array([one])) for one in ids)
        for row_id, left_out in pairs:
            watch = Stopwatch(1)
            found, sq_distances = self._retrieve(generation, generation.image_feature(row_id)[None], watch, left_out)
            levels, size = [level[0] for level in self.levels(generation, [row_id])], self.gallery.spec.view.resized
            [key] = generation.keys([row_id])
            yield Retrieved(levels, found[0], sq_distances[0], size, None, watch, key)

    def distances(self, generation: Snapshot, query: Retrieved, level_scales: Sequence[float]) -> Array:
        """Return the (h, w, kappa) squared distances of a query's patches, with each level multiplied by its scale."""
        return self._match(query, self._read(generation, query), level_scales)[0]

    def levels(self, generation: Snapshot, ids: Sequence[int] | Ids) -> list[Array]:
        """Return the pyramid levels of images, [(len(ids), c, h, w), ...]: those needed lately are in memory."""
        return self._cache.read(self._pyramids(generation), ids)

    def _pyramids(self, generation: Snapshot) -> PyramidSource:
        return pyramids_of(generation, self.extractor, self._normal, self.search.verify_reads)

    def _cache_for(self, source: PyramidSource, n: int) -> LevelCache[Any]:
        """Return the cache for a query's n neighbours: the GPU's where they fit its bound, as they are copied there."""
        on_device = self._device_cache
        return on_device if on_device is not None and on_device.fits(source, n) else self._cache

    # The stages of a query, in their order.

    def _decode(self, image: ImageLike, watch: Stopwatch) -> Pixels:
        with watch("decode"):
            return decode(image)

    def _extract(self, views: Sequence[Pixels], watch: Stopwatch) -> Features:
        with watch("extract"):
            return self.extractor.extract(views)

    def _retrieve(
        self, generation: Snapshot, image_features: Array, watch: Stopwatch, without: Ids | None = None
    ) -> tuple[Ids, Array]:
        with watch("retrieve"):
            wanted = max(self._k_of(generation), self.search.k_score or 0)
            if without is not None:
                wanted = max(1, min(wanted, len(generation) - len(without)))
            return generation.search(image_features, wanted, without, self.search.nprobe)

    def _is_searched(self, generation: Snapshot, query: Retrieved) -> bool:
        """Tell whether the patches of a query are searched, or its image score says already that it is normal."""
        if self.calibration is None or query.key is not None or self.search.localise == "all":
            return True
        return self._knn(generation, query) > self.calibration.image_threshold

    def _knn(self, generation: Snapshot, query: Retrieved) -> float:
        return knn_score(query.sq_distances, self.search.k_score or self._k_of(generation))

    def _read(self, generation: Snapshot, query: Retrieved) -> list[Any]:
        """Return the neighbours' levels: arrays, or tensors on the device that they are searched on."""
        with query.watch("read"):
            source, ids = self._pyramids(generation), query.ids[: self._k_of(generation)]
            return self._cache_for(source, len(ids)).read(source, ids)

    def _detect(
        self, generation: Snapshot, baseline: Baseline | None, query: Retrieved, levels: list[Any] | None
    ) -> Detection:
        """Match and score a query; `levels` are its neighbours', None where it is not searched."""
        k, view = self._k_of(generation), self.gallery.spec.view
        calibration = self.calibration if query.key is None else None
        knn = self._knn(generation, query)
        neighbours = Neighbours(generation.keys(query.ids[:k]), query.sq_distances[:k])
        if levels is None:
            found, matches = _nothing_searched(query.levels)
        else:
            found, matches = self._match(query, levels, baseline.level_scales if baseline else ())
        with query.watch("score"):
            scores = self.map_of(found, query.image_size, baseline, query.key)
            # At the size that calibration saw: the same image at another size is the same case.
            at_view = self.map_of(found, view.resized, baseline, query.key)
            image_score = self._image_score(knn, at_view, baseline)
            judgement = None
            if calibration:
                judgement = calibration.judge(image_score, float(at_view.max()), scores, self.score.min_region)
        region = view.region(query.image_size)
        return Detection(
            image_score, scores, region, neighbours, found, matches, query.watch.seconds, query.path, judgement
        )

    def map_of(
        self, sq_distances: Array, size: tuple[int, int], baseline: Baseline | None, key: str | None
    ) -> NDArray[np.float32]:
        """Make the map of (h, w, kappa) distances at a size; `key` is that of the normal image, where it is one."""
        if sq_distances.shape[2] == 0:  # the patch search was skipped
            return np.zeros(size, np.float32)
        if baseline and self.score.positions == "damped":
            sq_distances = baseline.damped(sq_distances.mean(axis=2, dtype=np.float64), key)[..., None]
        return anomaly_map(sq_distances, size, self.gallery.spec.view, self.score.sigma)

    def _image_score(self, knn: float, at_view: NDArray[np.float32], baseline: Baseline | None) -> float:
        if self.score.image_score == "knn":
            return knn
        if self.score.image_score == "map_max" or baseline is None:
            return float(at_view.max())
        return baseline.image_score(at_view)

    def _match(
        self, query: Retrieved, neighbour_levels: list[Any], level_scales: Sequence[float]
    ) -> tuple[Array, Array]:
        options = self.search
        with query.watch("match"):
            own, others = _scaled(query.levels, level_scales), _scaled(neighbour_levels, level_scales)
            found = search_patches(
                beside(own, others), others, options.kappa, options.engine, options.device, options.block_bytes
            )
            sq_distances, matches = as_arrays(found)
            return (sq_distances * np.float32(level_scales[0] ** 2) if level_scales else sq_distances), matches


def _scaled(levels: list[Any], scales: Sequence[float]) -> list[Any]:
    """Multiply all levels but the finest by their scales over its own: the largest is then not copied."""
    if not scales:
        return levels
    # NumPy multiplies float16 in float32, torch only what is float32 already.
    wide = (level if isinstance(level, np.ndarray) else level.float() for level in levels[1:])
    coarser = zip(wide, scales[1:], strict=True)
    return [levels[0], *(level * np.float32(scale / scales[0]) for level, scale in coarser)]


def _nothing_searched(levels: list[Array]) -> tuple[Array, Array]:
    grid = levels[0].shape[1:]
    return np.empty((*grid, 0), np.float32), np.empty((*grid, 0, 3), np.int32)
