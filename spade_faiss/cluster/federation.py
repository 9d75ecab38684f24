"""A Detector over a cluster: queries, leave-one-out, calibration and audit over the images of all members."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..arrays import Array, Ids
from ..detect.calibration import Calibration
from ..detect.detector import Detector
from ..detect.kept_baseline import images_of
from ..detect.matching import Matched
from ..detect.pipeline import Pipeline
from ..detect.query import Query, Stopwatch, Tile
from ..detect.settings import Settings
from ..errors import MemberError
from ..images.tiling import Box
from ..pyramids.reader import StoredPyramids
from ..store.snapshot import Snapshot
from ..store.trusted import Trusted
from ..system.prefetch import read_ahead
from .cluster import Cluster
from .matching import match_across
from .members import Members
from .snapshot import FederatedSnapshot

AHEAD = 8  # queries at most that members work on at the same time


class FederatedPipeline(Pipeline):
    """The six stages of a query, of which read and match are the members' work."""

    @property
    def members(self) -> Members:
        """The members of the snapshot."""
        assert isinstance(self.snapshot, FederatedSnapshot)
        return self.snapshot.members

    def stored(self, ids: Iterable[int], without: Iterable[Ids] | None = None) -> Iterator[Query]:
        """Retrieve the neighbours of stored images; see Pipeline.stored."""
        away = self.members.missing
        for query in super().stored(ids, without):
            yield self._without(query, away)
            away = self.members.missing

    def _prepare(self, tiles: Sequence[Tile]) -> tuple[list[Query], Exception | None]:
        away = self.members.missing
        queries, error = super()._prepare(tiles)
        return [self._without(query, away) for query in queries], error

    def _without(self, query: Query, away: Iterable[str]) -> Query:
        """Note who took no part in a retrieval: who was away before it, and may be back by now, and who is now."""
        return replace(query, missing=frozenset((*away, *self.members.missing)))

    def _reads(self, queries: Iterable[Query]) -> Iterator[tuple[Query, Any]]:
        """Yield each query with its matches; members work on several queries at the same time."""
        ahead = min(AHEAD, 1 + self.members.parallel)
        return read_ahead(queries, self._with_read, ahead, ahead) if ahead > 1 else map(self._with_read, queries)

    def _with_read(self, query: Query) -> tuple[Query, Any]:
        while True:
            try:
                found = super()._with_read(query)
                self.snapshot.keys(query.ids[: self.k])  # kept: nothing is asked of a member after this
                return found
            except MemberError:
                if not self.members.tolerant or query.key is not None or query.image_feature is None:
                    raise
            away = self.members.missing
            ids, sq_distances = self._retrieve(query.image_feature[None], query.watch, [query.place])
            query = self._without(replace(query, ids=ids[0], sq_distances=sq_distances[0]), away)

    def _retrieve(
        self, image_features: Array, watch: Stopwatch, places: Sequence[Box | None], without: Ids | None = None
    ) -> tuple[list[Ids], list[Array]]:
        while True:  # each turn that fails finds one more member lost
            try:
                return super()._retrieve(image_features, watch, places, without)
            except MemberError:
                if not self.members.tolerant or without is not None or not self.members.present():
                    raise

    def _read(self, query: Query) -> Any:
        """Return the matches of a query."""
        with query.watch("match"):
            ids = query.ids[: self.k]
            settings = query.settings_of(self.settings)
            return match_across(query.levels, ids, self.members, settings, self.baseline, self.standing(ids))

    def _match(self, query: Query, neighbour_levels: Any) -> Matched:
        return neighbour_levels or Matched.none(query.levels[0].shape[1:])


class Federation(Detector):
    """Compares images with the normal images of all members of a cluster, as a Detector does with those of a gallery.

    What it finds equals, bit for bit, what a Detector finds over one gallery of all images, member after member, where
    image indexes are flat and the patch search runs on CPUs. Its arguments are those of a Detector, with a cluster as
    the gallery. `normal` has no effect: members have the image files, see Cluster.open.

    >>> cluster = sf.Cluster.create("plant.cluster", {"hall": "toy.gallery"})
    >>> federation = sf.Federation(cluster, toy, sf.SearchOptions(k=5))
    >>> found, expected = federation.query("test/000.png"), detector.query("test/000.png")
    >>> found.neighbours.keys == expected.neighbours.keys[:5], found.missing
    (True, ())
    """

    gallery: Cluster

    def keep_baseline(self) -> bool:
        """Share the scale of normal images with other processes; see Detector.keep_baseline.

        Nothing is shared where queries go on without members that are lost: their images would be missing.

        >>> sf.Federation(sf.Cluster.open("plant.cluster"), toy).keep_baseline()  # the published settings need none
        True
        """
        if self.gallery.options.partial == "allow":
            return not self.needs_baseline or self._known.has_doubts
        return super().keep_baseline()

    def require_whole(self, snapshot: Snapshot) -> None:
        """Check that no member is missing: what is found out about all normal images must not be about some of them.

        Raises:
            MemberError: some are; it names them.

        >>> federation = sf.Federation(sf.Cluster.open("plant.cluster"), toy)
        >>> federation.require_whole(federation.gallery.snapshot())
        """
        assert isinstance(snapshot, FederatedSnapshot)
        snapshot.members.look_again()
        if missing := snapshot.members.missing:
            raise MemberError(
                f"{self.gallery.path}: expected all members, found {', '.join(map(repr, missing))} missing: "
                "calibration and audit are of all normal images; open the cluster again when all can be reached"
            )

    def _images_of(self, snapshot: Snapshot) -> dict[str, Any]:
        assert isinstance(snapshot, FederatedSnapshot)
        members, ids = snapshot.members, snapshot.ids()
        cuts = np.searchsorted(ids, members.starts).tolist()
        return {
            "members": [
                images_of(snapshot, manifest, ids[cuts[number] : cuts[number + 1]], int(members.starts[number]))
                for number, manifest in enumerate(members.manifests)
            ]
        }

    def _stored_calibration(self) -> Calibration | None:
        return self.gallery.calibration

    def _stored_trust(self) -> Trusted:
        members = self.gallery.snapshot().members
        found = members.gather(dict.fromkeys(members.present(), ("trusted",)))
        return {key: digest for one in found.values() for key, digest in one.items()}

    def _pipeline(self, snapshot: Snapshot, settings: Settings | None = None) -> Pipeline:
        assert isinstance(snapshot, FederatedSnapshot)
        snapshot.members.look_again()
        pyramids = StoredPyramids(snapshot, self.search.verify_reads)
        return FederatedPipeline(
            snapshot, self.extractor, settings or self._settings, pyramids, self._caches, self.trusted
        )
