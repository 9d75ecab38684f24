"""A run: queries of one snapshot of a gallery, through six stages.

decode, extract, retrieve -> a Query; read, match, score -> a Detection. Each stage is a method of Pipeline, in this
order below; stream() and leave_one_out() are what runs them. A Pipeline never changes, so threads may share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Ids, Pixels
from ..errors import NotEnoughImagesError
from ..extractors.features import Features, require_rows
from ..extractors.registry import Extractor
from ..images.decode import decode
from ..images.inputs import ImageLike, held, require_several
from ..images.tiling import Box, place_of, size_of
from ..pyramids.reader import PyramidSource
from ..store.copies import Copies
from ..store.snapshot import Snapshot
from ..store.trusted import Trusted
from ..system.devices import torch_device
from ..system.prefetch import batched, one_ahead
from .baseline import Baseline
from .caches import Caches
from .calibration import Calibration, Judgement
from .detection import Detection, Neighbours, TileMatches
from .matching import Matched, match
from .mosaic import Mosaic, ScoredTile
from .query import AnyImage, Decoded, Query, Stopwatch, Tile, path_of
from .scorer import Scorer
from .settings import Settings
from .standing import Standing, Standings

Choice = Callable[[Sequence[Query]], int]  # the index of the query that comes next, among those left of a batch


class Pipeline:
    """The six stages of a query over one snapshot, and the ways to run them."""

    def __init__(
        self,
        snapshot: Snapshot,
        extractor: Extractor,
        settings: Settings,
        pyramids: PyramidSource,
        caches: Caches,
        trusted: Trusted | None = None,
    ) -> None:
        """Begin a run; neither on the scale of normal images nor judged: see scored_by.

        Args:
            snapshot: what the gallery holds.
            extractor: the one that made it.
            settings: the options of a query, filled in.
            pyramids: where the snapshot's levels come from.
            caches: where levels stay between queries.
            trusted: images that a person has confirmed, see matching.trusting; None: none.
        """
        self.snapshot = snapshot
        self.extractor = extractor
        self.k = settings.k_of(len(snapshot))  # neighbours that are searched
        self.settings = settings
        self.pyramids = pyramids
        self.baseline: Baseline | None = None
        self.calibration: Calibration | None = None
        self.copies = Copies(snapshot, lambda ids: caches.host.read(pyramids, ids))
        self._caches = caches
        self._standings = Standings(snapshot, self.copies, trusted or {})
        self._tiling = snapshot.manifest.spec.tiling
        self._view = self._tiling.view

    def scored_by(self, baseline: Baseline | None, calibration: Calibration | None = None) -> Pipeline:
        """Return it with distances on the scale of normal images, and judging by a calibration."""
        other = copy(self)
        other.baseline, other.calibration = baseline, calibration
        return other

    def finding(self, kappa: int) -> Pipeline:
        """Return it finding so many matches of each patch, as they are: nobody has confirmed an image."""
        other = copy(self)
        other._standings = Standings(self.snapshot, self.copies, {})
        other.settings = replace(self.settings, search=replace(self.settings.search, kappa=kappa))
        return other

    # The ways to run.

    def stream(self, images: Iterable[AnyImage]) -> Iterator[Detection]:
        """Query images in their order; see Detector.stream."""
        require_several(images)
        for _, detection in self._searched(self._one_by_one(self._queries(images), lambda _: 0)):
            yield detection

    def batch(self, images: Sequence[AnyImage]) -> list[Detection]:
        """Query images, in each batch the one next that has the most neighbours in memory; returns them in order.

        Tiles keep their order, as maps are sums over them, which rounding would make depend on it.
        """
        require_several(images)
        cache = self._caches.for_neighbours(self.pyramids, self.k)

        def most_in_memory(queries: Sequence[Query]) -> int:
            if self._tiling.tile is not None:
                return 0
            return max(range(len(queries)), key=lambda at: cache.holds(self.pyramids, queries[at].ids[: self.k]))

        found = self._searched(self._one_by_one(self._queries(images), most_in_memory))
        return [detection for _, detection in sorted(found, key=lambda pair: pair[0])]

    def leave_one_out(self, ids: Iterable[int], without: Iterable[Ids] | None = None) -> Iterator[Detection]:
        """Query stored images, each against the others; see Detector.leave_one_out."""
        for _, detection in self._searched(self.stored(ids, without)):
            yield detection

    def stored(self, ids: Iterable[int], without: Iterable[Ids] | None = None) -> Iterator[Query]:
        """Retrieve the neighbours of stored images, among the images of other content.

        Args:
            ids: the images.
            without: for each, the ids that it is not compared with, and neither with their copies, nor with other
                tiles of these images; None: itself.

        Raises:
            NotEnoughImagesError: no image is left to compare one with.
        """
        pairs = zip(ids, without, strict=True) if without is not None else ((one, np.array([one])) for one in ids)
        for row_id, left_out in pairs:
            watch = Stopwatch()
            with watch("retrieve"):
                left_out = self.copies.with_copies(left_out)
                # Baselines are measured on first copies, and leave them out by key.
                [key] = self.snapshot.keys(self.copies.of([row_id])[0][:1])
            self.check_others(row_id, left_out)
            features = self.snapshot.image_feature(row_id)[None]
            place = place_of(self.snapshot.keys([row_id])[0])
            found, sq_distances = self._retrieve(features, watch, [place], left_out)
            levels = [level[0] for level in self.levels([row_id])]
            of_new = self._neighbours_of_new(found[0], left_out, place)
            yield Query(
                levels, found[0], sq_distances[0], self._view.resized, None, watch, key=key, neighbours_of_new=of_new,
                in_baseline=self._in_baseline(row_id, key, left_out),
            )  # fmt: skip

    def _neighbours_of_new(self, found: Ids, left_out: Ids, place: Box | None) -> int:
        """Return how many neighbours a new image has where a stored one has these: in a small gallery, fewer than k."""
        if len(found) < self.k and self.snapshot.tiles is not None and self.settings.search.tile_places == "same":
            left_out = np.intersect1d(left_out, self.snapshot.tiles.at_place(place))
        return self.k if len(found) >= self.k else min(self.k, self.copies.count_contents([*found, *left_out]))

    def _in_baseline(self, row_id: int, key: str, left_out: Ids) -> NDArray[np.float64] | None:
        """Return what a stored image has added to the baseline, if it is not what its query finds: see Query."""
        damping = self.scorer.damping
        if damping is None or key not in damping.keys or len(left_out) == len(self.copies.with_copies([row_id])):
            return None
        [query] = self.stored([row_id])
        own: NDArray[np.float64] = self.matched(query).sq_distances.mean(axis=2, dtype=np.float64)
        return own

    def check_others(self, row_id: int, left_out: Ids) -> None:
        """Check that there are images to compare a stored one with, beside those that are left out with it.

        Raises:
            NotEnoughImagesError: there are none; says why.
        """
        n = len(self.snapshot)
        if len(left_out) < n:
            return
        if len(self.copies.images()) == 1:
            why = "the gallery has one image"
        elif len(self.copies.with_copies(np.array([row_id]))) == n:
            why = f"all {n} images are copies of one"
        else:
            why = f"all {n} images are left out with it, as its group (group=REGEX) and their copies"
        raise NotEnoughImagesError(
            f"{self.snapshot.folder}: expected other normal images to compare {self.snapshot.shown(row_id)!r} with, "
            f"found none: {why}; add normal images"
        )

    def levels(self, ids: Sequence[int] | Ids) -> list[Array]:
        """Return the pyramid levels of images, [(len(ids), c, h, w), ...]: those needed lately are in memory."""
        return self._caches.host.read(self.pyramids, ids)

    @cached_property
    def overlaps(self) -> bool:
        """Whether the network and the search do not compete for the same cores."""
        devices = getattr(self.extractor, "device", "cpu"), torch_device(self.settings.search.device)
        return any(device != "cpu" for device in devices)

    def _queries(self, images: Iterable[AnyImage]) -> Iterator[tuple[list[Query], Exception | None]]:
        """Decode, extract and retrieve batch by batch, one of them ahead where a GPU takes part."""
        return one_ahead(batched(self._tiles(images), self.extractor.batch_size), self._prepare, self.overlaps)

    def _tiles(self, images: Iterable[AnyImage]) -> Iterator[Tile]:
        """Yield the tiles of images; without tiles the images as they are, to be decoded batch by batch."""
        for position, image in enumerate(map(held, images)):
            if self._tiling.tile is None:
                yield Tile(position, image)
                continue
            watch = Stopwatch()
            try:
                if not isinstance(image, Decoded):
                    pixels = self._decode(image, watch)
                    with watch("decode"):
                        views = self._tiling.views(pixels)
                    size = pixels.shape[0], pixels.shape[1]
                    image = Decoded(views, size, watch.seconds["decode"], path_of(image))
                boxes = self._tiling.boxes(image.size) if len(image.views) > 1 else [None]
            except Exception as error:
                yield Tile(position, image, error=error)
                return
            yield from (Tile(position, image, number, box) for number, box in enumerate(boxes))

    def _prepare(self, tiles: Sequence[Tile]) -> tuple[list[Query], Exception | None]:
        """Decode, extract and retrieve a batch, up to the first image that cannot be read."""
        error: Exception | None = None
        views, sizes, watch = [], [], Stopwatch(len(tiles))
        try:
            for tile in tiles:
                if tile.error is not None:
                    raise tile.error
                image = tile.image
                if isinstance(image, Decoded):
                    views.append(image.views[tile.number])
                    sizes.append(image.size)
                    continue
                pixels = self._decode(image, watch)
                with watch("extract"):
                    views.append(self._view.apply(pixels))  # and the whole image can be let go
                sizes.append((pixels.shape[0], pixels.shape[1]))
        except Exception as raised:
            error = raised
        if not views:
            return [], error
        features = self._extract(views, watch)
        ids, sq_distances = self._retrieve(features.image, watch, [tile.place for tile in tiles[: len(views)]])
        found = []
        for row, (tile, size) in enumerate(zip(tiles, sizes, strict=False)):
            levels = [level[row] for level in features.levels]
            image, own = tile.image, watch.of_one_image()
            if isinstance(image, Decoded):
                own.seconds["decode"] = image.seconds if tile.number == 0 else 0.0
            found.append(
                Query(
                    levels,
                    ids[row],
                    sq_distances[row],
                    size,
                    path_of(image),
                    own,
                    tile.position,
                    tile.number,
                    tile.box,
                    image_feature=features.image[row],
                )
            )
        return found, error

    def _one_by_one(self, batches: Iterable[tuple[list[Query], Exception | None]], next_of: Choice) -> Iterator[Query]:
        """Hand on the queries of batches, keeping none, and raise what ended a batch early."""
        for queries, error in batches:
            while queries:
                yield queries.pop(next_of(queries))
            if error is not None:
                raise error

    def _searched(self, queries: Iterable[Query]) -> Iterator[tuple[int, Detection]]:
        """Read, match and score queries.

        Yields:
            the position of each among the images of the run, and what was found.
        """
        mosaics: dict[int, Mosaic] = {}  # by position: images of which tiles are missing

        for query, levels in self._reads(queries):
            found = self._match(query, levels)
            del levels  # else those of the one after the next are read while these are here
            position, detection = query.position, self._score(query, found, mosaics)
            del query, found
            if detection is not None:
                yield position, detection

    def _reads(self, queries: Iterable[Query]) -> Iterator[tuple[Query, Any]]:
        """Yield each query with what was read for it; a thread reads for the next one while one is searched."""
        background = self.snapshot.manifest.schema.has_levels or self.overlaps  # recomputing takes the network
        return one_ahead(queries, self._with_read, background)

    def _with_read(self, query: Query) -> tuple[Query, Any]:
        return query, self._read(query) if self._is_suspicious(query) else None

    # The stages, in their order.

    def _decode(self, image: ImageLike, watch: Stopwatch) -> Pixels:
        with watch("decode"):
            return decode(image, bits=self.snapshot.manifest.spec.bits)

    def _extract(self, views: Sequence[Pixels], watch: Stopwatch) -> Features:
        with watch("extract"):
            return require_rows(self.extractor.extract(views), len(views), self.extractor.spec.name)

    def _retrieve(
        self, image_features: Array, watch: Stopwatch, places: Sequence[Box | None], without: Ids | None = None
    ) -> tuple[list[Ids], list[Array]]:
        """Return the neighbours of m queries, nearest first, and their squared distances; copies count once."""
        search = self.settings.search
        with watch("retrieve"):
            wanted = max(self.k, search.k_score or 0)
            if without is not None:
                wanted = max(1, min(wanted, len(self.snapshot) - len(without)))
            if search.tile_places == "same":
                return self.copies.nearest_at_places(image_features, places, wanted, without)
            return self.copies.nearest(image_features, wanted, without, search.nprobe)

    def _read(self, query: Query) -> Any:
        """Return the neighbours' levels: a list of arrays, or of tensors on the device that they are searched on."""
        with query.watch("read"):
            ids = query.ids[: self.k]
            return self._caches.for_neighbours(self.pyramids, len(ids)).read(self.pyramids, ids)

    def _match(self, query: Query, neighbour_levels: Any) -> Matched:
        """Match a query's patches with what was read; None: they are not searched."""
        if neighbour_levels is None:
            return Matched.none(query.levels[0].shape[1:])
        with query.watch("match"):
            standing = self.standing(query.ids[: self.k])
            kept = self._caches.prepared_of(self.pyramids, query.ids[: self.k])
            settings = query.settings_of(self.settings)
            return match(query.levels, neighbour_levels, settings, self.baseline, standing, kept)

    def _score(self, query: Query, matched: Matched, mosaics: dict[int, Mosaic]) -> Detection | None:
        """Make the map and the image score, and judge them; None for a tile, unless it is the last of its image."""
        neighbours = Neighbours(self.snapshot.keys(query.ids[: self.k]), query.sq_distances[: self.k])
        sq_distances, matches = matched.sq_distances, matched.matches
        with query.watch("score"):
            size = size_of(query.box) if query.box else query.image_size
            scorer = self.scorer
            own = scorer.own(query, sq_distances)
            scores = scorer.map_of(sq_distances, size, own)
            # At the size that calibration saw: the same image at another size is the same case.
            at_view = scorer.map_of(sq_distances, self._view.resized, own)
            image_score, peak = scorer.image_score(query, at_view), float(at_view.max())
            if query.box is None:
                judgement = self._judge(query, image_score, peak, scores)
        if query.box is None:
            region, seconds = self._view.region(size), query.watch.seconds
            return Detection(
                image_score, scores, region, neighbours, sq_distances, matches, seconds, query.path, judgement,
                levels=matched.levels, left_out=matched.left_out, missing=tuple(sorted(query.missing)),
            )  # fmt: skip
        mosaic = mosaics.get(query.position) or Mosaic(self._tiling, query.image_size)
        mosaics[query.position] = mosaic
        found = TileMatches(query.box, neighbours, sq_distances, matches, matched.left_out)
        mosaic.add(query.tile, ScoredTile(found, image_score, peak, query.missing), scores, query.watch.seconds)
        return self._whole(mosaics.pop(query.position), query) if mosaic.is_whole else None

    def _whole(self, mosaic: Mosaic, query: Query) -> Detection:
        """Judge an image by its tiles, whose last was queried: it is as anomalous as the highest of them."""
        tiles, highest, watch = [tile.found for tile in mosaic.tiles], mosaic.highest, Stopwatch()
        with watch("score"):
            judgement = self._judge(query, highest.image_score, mosaic.peak, mosaic.anomaly_map)
        seconds = {**mosaic.seconds, "score": mosaic.seconds["score"] + watch.seconds["score"]}
        neighbours, sq_distances, matches = highest.found.neighbours, highest.found.sq_distances, highest.found.matches
        missing = tuple(sorted(frozenset().union(*(tile.missing for tile in mosaic.tiles))))
        return Detection(
            highest.image_score, mosaic.anomaly_map, mosaic.region, neighbours, sq_distances, matches, seconds,
            query.path, judgement, tuple(tiles), left_out=highest.found.left_out, missing=missing,
        )  # fmt: skip

    def _judge(self, query: Query, image_score: float, peak: float, scores: NDArray[np.float32]) -> Judgement | None:
        if self.calibration is None or query.key is not None:
            return None
        return self.calibration.judge(image_score, peak, scores, self.settings.score.min_region)

    # What the stages consist of; a baseline is measured with these.

    def standing(self, ids: Ids) -> Standing | None:
        """Return the standing of some neighbours; None: nothing is known of any."""
        return self._standings.among(ids, self.baseline.doubts if self.baseline else {})

    def matched(self, query: Query) -> Matched:
        """Read a query's neighbours and match its patches."""
        return self._match(query, self._read(query))

    @property
    def scorer(self) -> Scorer:
        """What makes scores of distances, on the scale of normal images if there is one."""
        return Scorer(self.settings, self.baseline, self._view, self.k)

    def _is_suspicious(self, query: Query) -> bool:
        """Whether the patches of a query are searched: its image score may say already that it is normal."""
        if self.calibration is None or query.key is not None or self.settings.search.localise == "all":
            return True
        return self.scorer.knn_score(query) > self.calibration.image_threshold
