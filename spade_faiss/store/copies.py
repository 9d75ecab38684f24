"""Images of equal content within one snapshot, however the copy came about: other name, folder, or lossless format.

A copy is known by its features, which every gallery has: a PNG and a BMP of one picture have other digests, but equal
pixels. Its image feature is equal but for rounding, as the order of a network's sums depends on the batch.

Squared distances over the squared norm, efficientnet_lite0, on nine sets of real images: an image and itself in
batches of 1, 3, 7 and 32 is up to 3e-12 away; with every pixel one grey level brighter, from 7e-6. JPEG copies are
2e-4 to 0.06 away at quality 98 and 0.02 to 0.6 at quality 75; different images from 0.0086. So lossy copies are as far
as different images are, also by their levels, and only equal pixels count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Ids
from ..errors import CorruptGalleryError, NotEnoughImagesError
from ..images.tiling import Box
from ..options import MIB
from ..system.prefetch import batched
from .snapshot import Snapshot

SAME_IMAGE = 1e-9  # squared distance of equal image features, over the squared norm
SAME_LEVEL = 1e-6  # likewise of levels, which float16 rounds by 2^-11
SEARCHED = 64  # images that are searched together
ROUNDING = 1e-6  # of a squared distance in float32, over the squared norms
NEAREST = 4  # images that are searched for first; more while all of them are equal
COUNTED_BYTES = 256 * MIB  # of image features that are read where it has to be quick: 52 000 images of 1280 dimensions
TOGETHER = 4096  # images whose image features are in memory at a time
READ = 16  # images whose levels are in memory at a time
GLANCE = 61  # of so many values of levels one is compared first; no multiple of usual widths

SHADOWS = 4  # random directions on which a pass over all images compares their image features
SIGMAS = 6  # a difference of length s is s / sqrt(d) long on a random direction, and 6 times that once in 5e8
LOOK_AHEAD = 1000  # images that a pass compares each image with, on the first direction

ReadLevels = Callable[[Ids], "list[Array]"]


class Copies:
    """Which images of a snapshot have equal content. It keeps what it has found. Threads may share one."""

    def __init__(self, snapshot: Snapshot, levels: ReadLevels | None = None) -> None:
        """Look at a snapshot.

        Args:
            snapshot: what the gallery holds.
            levels: reads levels, [(len(ids), c, h, w), ...]; None: those that the shards hold. Where the gallery
                recomputes patches there are none, and images count as equal by their image features.
        """
        self._snapshot = snapshot
        self._levels = levels or (snapshot.levels if snapshot.manifest.schema.has_levels else None)
        self._found: dict[int, Ids] = {}
        self._same_images: dict[int, list[int]] = {}  # by image in tiles

    def images(self) -> Ids:
        """Return the ids of all images, ascending: of those in tiles, the first tile of each."""
        return self._snapshot.ids() if self._snapshot.tiles is None else self._snapshot.tiles.first_rows()

    def tiles_of(self, images: Ids) -> tuple[Ids, Ids]:
        """Return the rows of some images, by their ids: all tiles, and for each the place of its image among them."""
        if self._snapshot.tiles is None:
            return images, np.arange(len(images))
        numbers = self._snapshot.tiles.image_of(images)
        rows = self._snapshot.tiles.rows_of(numbers.tolist())
        places = {number: place for place, number in enumerate(numbers.tolist())}
        return rows, np.array([places[number] for number in self._snapshot.tiles.image_of(rows).tolist()], np.int64)

    def of(self, ids: Sequence[int] | Ids) -> list[Ids]:
        """Return for each of some images all images of its content, itself included, ascending.

        Images in tiles are compared as wholes: of a tile, the tiles at its place in equal images are returned, as
        tiles of one colour are equal in images that are not.

        It takes one search of the image index for each content, and reads the levels of copies.

        Raises:
            CorruptGalleryError: the gallery's files are damaged.
            SourceError: an image file that patches are recomputed from is gone or has changed.
        """
        wanted = [int(row) for row in ids]
        return self._equal_rows(wanted) if self._snapshot.tiles is None else [self._equal_tiles(row) for row in wanted]

    def _equal_tiles(self, row: int) -> Ids:
        """Return the tiles at one tile's place of the images all of whose tiles are equal to those of its image."""
        tiles = self._snapshot.tiles
        assert tiles is not None
        image = int(tiles.image_of([row])[0])
        if image not in self._same_images:
            own, same = tiles.rows_of([image]), None
            for tile in own.tolist():
                others = tiles.image_of(tiles.at_same_place(tile, self._equal_rows([tile])[0])).tolist()
                same = set(others) if same is None else same & set(others)
                if len(same) == 1:
                    break
            self._same_images[image] = [one for one in same or () if len(tiles.rows_of([one])) == len(own)]
        return tiles.at_same_place(row, tiles.rows_of(self._same_images[image]))

    def _equal_rows(self, wanted: list[int]) -> list[Ids]:
        for some in batched([row for row in dict.fromkeys(wanted) if row not in self._found], SEARCHED):
            for row, near in zip(some, self._nearest(some), strict=True):
                if row not in self._found:
                    same = np.sort(self._equal(row, near[near != row]))
                    for one in same.tolist():
                        self._found.setdefault(one, same)
        return [self._found[row] for row in wanted]

    def count_contents(self, ids: Sequence[int]) -> int:
        """Count the different contents of some images, or tiles, as `nearest` does: of copies, one is found."""
        return len({int(same[0]) for same in self._equal_rows([int(row) for row in ids])})

    def first_of(self, ids: Sequence[int] | Ids) -> Ids:
        """Return one image for each content among some images: the one of the lowest id in the snapshot, ascending."""
        return np.unique([int(same[0]) for same in self.of(ids)]).astype(np.int64)

    def draw(self, ids: Ids, size: int, seed: int) -> Ids:
        """Draw images of `size` different contents from some, or of all contents; returns the first of each, ascending.

        Without copies these are `size` images drawn without replacement. In a gallery whose copies are counted (see
        repeated_if_quick) they are the same with copies that were added later.
        """
        rng = np.random.default_rng(seed)
        if (repeated := self.repeated_if_quick()) is not None:
            ids = np.setdiff1d(ids, self.tiles_of(repeated)[0])
        drawn = rng.choice(ids, min(size, len(ids)), replace=False)
        chosen = set(self.first_of(drawn).tolist())
        if len(chosen) < len(drawn) < len(ids):
            for some in batched(rng.permutation(np.setdiff1d(ids, drawn)).tolist(), SEARCHED):
                new = set(self.first_of(some).tolist()) - chosen
                chosen |= set(sorted(new)[: len(drawn) - len(chosen)])
                if len(chosen) == len(drawn):
                    break
        return np.array(sorted(chosen), np.int64)

    def with_copies(self, ids: Sequence[int] | Ids) -> Ids:
        """Return some images and all their copies, ascending; of an image in tiles, all its tiles."""
        if self._snapshot.tiles is not None:
            images = self._snapshot.tiles.image_of(np.concatenate([np.asarray(ids, np.int64), *self.of(ids)]))
            return self._snapshot.tiles.rows_of(set(images.tolist()))
        return np.unique(np.concatenate([np.asarray(ids, np.int64), *self.of(ids)])).astype(np.int64)

    def nearest(
        self, image_features: Array, k: int, without: Ids | None = None, nprobe: int | None = None
    ) -> tuple[list[Ids], list[Array]]:
        """Find the k nearest images of different contents: of copies, one takes one of the k.

        Args:
            image_features: (m, d) of the queries.
            k: how many; fewer are found where the snapshot has no more contents.
            without: as for Snapshot.search.
            nprobe: likewise.

        Returns:
            m arrays of ids and of squared distances, nearest first.
        """
        found, squared = self._snapshot.search(image_features, k, without, nprobe)
        most = len(self._snapshot) - (0 if without is None else len(without))
        ids, sq_distances = list(found), list(squared)
        for at, query in enumerate(image_features):
            kept, asked = self._distinct(query, ids[at], sq_distances[at]), k
            while len(kept) < k and asked < most:
                asked = min(most, 2 * asked)
                [ids[at]], [sq_distances[at]] = self._snapshot.search(query[None], asked, without, nprobe)
                kept = self._distinct(query, ids[at], sq_distances[at])
            ids[at], sq_distances[at] = ids[at][kept[:k]], sq_distances[at][kept[:k]]
        return ids, sq_distances

    def nearest_at_places(
        self, image_features: Array, places: Sequence[Box | None], k: int, without: Ids | None = None
    ) -> tuple[list[Ids], list[Array]]:
        """Do as nearest among the tiles at each query's place in its image; None: the first tile.

        Raises:
            NotEnoughImagesError: no image has a tile at a place.
        """
        assert self._snapshot.tiles is not None
        ids, sq_distances = [], []
        for query, place in zip(image_features, places, strict=True):
            rows = np.setdiff1d(self._snapshot.tiles.at_place(place), [] if without is None else without)
            if not len(rows):
                where = "the top left" if place is None else f"{place[:2]}"
                raise NotEnoughImagesError(
                    f"{self._snapshot.folder}: expected another normal image with a tile at {where}, found none: "
                    "tile_places 'same' takes images of the sizes that the gallery has"
                )
            squared = _squared_norms(self._snapshot.rows.read(rows) - query)
            order = np.argsort(squared, kind="stable")
            found, far = rows[order], squared[order].astype(np.float32)
            kept = self._distinct(query, found[: 2 * k], far[: 2 * k])
            if len(kept) < k < len(rows):
                kept = self._distinct(query, found, far)
            ids.append(found[kept[:k]])
            sq_distances.append(far[kept[:k]])
        return ids, sq_distances

    def _distinct(self, query: Array, ids: Ids, sq_distances: Array) -> NDArray[np.intp]:
        """Return the places, among the nearest images of a query, of those that are no copies of one before them."""
        places = np.arange(len(ids))
        reach = np.sqrt(np.maximum(sq_distances, 0, dtype=np.float64))
        longest = (np.sqrt(_squared_norms(query[None])) + reach) ** 2  # bounds the squared norms of images so far away
        error = SAME_IMAGE * longest
        tied = np.diff(sq_distances) <= (2 * reach * np.sqrt(error) + error + ROUNDING * longest)[1:]
        if not tied.any():
            return places
        kept = np.ones(len(ids), np.bool_)
        for run in np.split(places, np.flatnonzero(~tied) + 1):
            left = run if len(run) > 1 else run[:0]
            while len(left):
                first, others = int(ids[left[0]]), ids[left[1:]]
                same = np.isin(others, self._equal(first, self._as_near(first, others)))
                kept[left[1:][same]] = False
                left = left[1:][~same]
        return places[kept]

    def _nearest(self, ids: list[int]) -> list[Ids]:
        """Return for each of some images those whose image features are equal to its own."""
        features = self._snapshot.rows.read(np.array(ids))
        bounds = SAME_IMAGE * _squared_norms(features)
        found: list[Ids] = [np.empty(0, np.int64)] * len(ids)
        left, k = np.arange(len(ids)), NEAREST
        while len(left):
            k = min(k, len(self._snapshot))
            nearest, sq_distances = self._snapshot.search(features[left], k)
            close = sq_distances <= bounds[left, None]
            for at, some, row in zip(left, close, nearest, strict=True):
                found[at] = row[some]
            left, k = left[close.all(axis=1) & (k < len(self._snapshot))], 2 * k
        return found

    def _equal(self, row: int, others: Ids) -> Ids:
        """Return an image and those of the others that have equal levels too; their image features are equal."""
        snapshot, together = self._snapshot, np.array([row, *others])
        if self._levels is None or not len(others):
            return together
        checksums = snapshot.rows.checksums(together)[:, 1:]
        bits = (checksums[1:] == checksums[0]).all(axis=1)
        if not snapshot.manifest.schema.has_levels:  # nothing but the image feature was compared
            digests = np.array(snapshot.digests(together))
            bits &= digests[1:] == digests[0]
        same = [row, *others[bits].tolist()]
        if len(unsure := others[~bits]):
            own = self._levels(np.array([row]))
            for some in batched(unsure.tolist(), READ):
                levels = self._levels(np.array(some))
                same += [one for one, equal in zip(some, _equal_levels(own, levels), strict=True) if equal]
        return np.array(same)

    def repeated_if_quick(self) -> Ids | None:
        """Return what repeated does if it takes a second at most; None: too many images, or files are damaged."""
        if 4 * self._snapshot.manifest.spec.image_dim * len(self._snapshot) > COUNTED_BYTES:
            return None
        try:
            return self._repeated
        except CorruptGalleryError:  # verify says what
            return None

    @cached_property
    def _repeated(self) -> Ids:
        return self.repeated()

    def repeated(self) -> Ids:
        """Return the images whose content an image of a lower id has too, ascending: by a pass over all images.

        It reads every image feature, and the levels of copies whose bits differ. Of 1280 dimensions that is 5 GB and
        half a minute for a million images.
        """
        if self._snapshot.tiles is not None:
            images = self._snapshot.tiles.image_of(self._repeated_rows()).tolist()
            first = self._snapshot.tiles.first_rows()
            some = first[np.isin(self._snapshot.tiles.image_of(first), images)]
            return np.array([row for row, same in zip(some.tolist(), self.of(some), strict=True) if same[0] < row], int)
        return self._repeated_rows()

    def _repeated_rows(self) -> Ids:
        ids = self._snapshot.ids()
        repeated: list[int] = []
        for group in _groups(self._snapshot, ids):
            left = group
            while len(left) > 1:
                same = self._equal(int(left[0]), self._as_near(int(left[0]), left[1:]))
                repeated += sorted(same.tolist())[1:]
                left = np.setdiff1d(left, same)
        return np.array(sorted(repeated), np.int64)

    def _as_near(self, row: int, others: Ids) -> Ids:
        """Return those of some images whose image features are equal to that of one."""
        own = self._snapshot.rows.read(np.array([row]))
        bound, near = SAME_IMAGE * _squared_norms(own)[0], []
        for some in batched(others.tolist(), TOGETHER):
            difference = self._snapshot.rows.read(np.array(some)) - own
            near += np.array(some)[_squared_norms(difference) <= bound].tolist()
        return np.array(near, np.int64)

    def count_among(self, first: int) -> int:
        """Count the images from an id on whose content an image of a lower id has too."""
        ids = self.images()
        new = ids[ids >= first]
        if len(new) * SEARCHED < len(ids):  # a few are searched in less time than all are read
            return sum(int(same[0]) < row for row, same in zip(new.tolist(), self.of(new), strict=True))
        return int((self.repeated() >= first).sum())


def _equal_levels(own: list[Array], others: list[Array]) -> NDArray[np.bool_]:
    """Return for each of n others whether all its levels equal those of one image, up to rounding.

    Few values of most others tell that they do not: only the rest are compared as a whole.
    """
    equal = np.ones(len(others[0]), np.bool_)
    for step in (GLANCE, 1):
        for one, level in zip(own, others, strict=True):
            left = np.flatnonzero(equal)
            wide = one.astype(np.float32).reshape(1, -1)
            difference = level.reshape(len(level), -1)[left, ::step].astype(np.float32) - wide[:, ::step]
            equal[left] = _squared_norms(difference) <= SAME_LEVEL * _squared_norms(wide)
    return equal


def _squared_norms(vectors: Array) -> NDArray[np.float64]:
    norms: NDArray[np.float64] = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
    return norms


def _groups(snapshot: Snapshot, ids: Ids) -> Iterator[Ids]:
    """Yield groups of images, each ascending, such that copies are in one; few others are."""
    checksums, shadows, norms = _shadows(snapshot, ids)
    _, first, bits = np.unique(checksums, return_index=True, return_inverse=True)
    order = np.argsort(shadows[first, 0])
    distinct = first[order]  # one of each image feature, by its place on the first direction
    places, reach = shadows[distinct], np.sqrt(SAME_IMAGE) * np.sqrt(norms[distinct])
    reach *= min(1.0, SIGMAS / np.sqrt(snapshot.manifest.spec.image_dim))
    pairs = [(np.arange(len(ids)), first[bits])]
    for step in range(1, min(LOOK_AHEAD, len(distinct) - 1) + 1):
        near = np.flatnonzero(places[step:, 0] - places[:-step, 0] <= reach[:-step])
        if not len(near):
            break
        near = near[(abs(places[near + step] - places[near]) <= reach[near, None]).all(axis=1)]
        if len(near):
            pairs.append((distinct[near], distinct[near + step]))
    count, labels = _components(pairs, len(ids)) if len(pairs) > 1 else (len(first), bits)
    order = np.argsort(labels, kind="stable")
    ends_at = np.bincount(labels, minlength=count).cumsum()
    sizes = np.diff(ends_at, prepend=0)
    for group in np.flatnonzero(sizes > 1):
        yield ids[order[ends_at[group] - sizes[group] : ends_at[group]]]


def _components(pairs: list[tuple[Ids, Ids]], n: int) -> tuple[int, Ids]:
    """Return how many components the pairs join n nodes to, and the component of each node."""
    # Imported here: it takes half a second, and images that are nearly but not quite equal are rare.
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ends = np.concatenate([start for start, _ in pairs]), np.concatenate([end for _, end in pairs])
    graph = coo_matrix((np.ones(len(ends[0]), np.bool_), ends), (n, n))
    count, labels = connected_components(graph, directed=False)
    return int(count), labels


def _shadows(snapshot: Snapshot, ids: Ids) -> tuple[NDArray[np.uint64], Array, NDArray[np.float64]]:
    """Return the checksums (n,), projections (n, SHADOWS) and squared norms (n,) of image features."""
    d = snapshot.manifest.spec.image_dim
    directions = np.random.default_rng(0).standard_normal((d, SHADOWS))
    directions = (directions / np.linalg.norm(directions, axis=0)).astype(np.float32)
    shadows, norms = [np.empty((0, SHADOWS))], [np.empty(0)]
    for some in batched(ids.tolist(), TOGETHER):
        features = snapshot.rows.read(np.array(some))
        shadows.append(features.astype(np.float32) @ directions)
        norms.append(_squared_norms(features))
    return snapshot.rows.image_checksums(ids), np.concatenate(shadows), np.concatenate(norms)
