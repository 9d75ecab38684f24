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

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Ids
from ..system.prefetch import batched
from .snapshot import Snapshot

SAME_IMAGE = 1e-9  # squared distance of equal image features, over the squared norm
SAME_LEVEL = 1e-6  # likewise of levels, which float16 rounds by 2^-11
SEARCHED = 64  # images that are searched together
NEAREST = 4  # images that are searched for first; more while all of them are equal
TOGETHER = 4096  # images whose image features are in memory at a time
READ = 16  # images whose levels are in memory at a time

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

    def of(self, ids: Sequence[int] | Ids) -> list[Ids]:
        """Return for each of some images all images of its content, itself included, ascending.

        It takes one search of the image index for each content, and reads the levels of copies.

        Raises:
            CorruptGalleryError: the gallery's files are damaged.
            SourceError: an image file that patches are recomputed from is gone or has changed.
        """
        wanted = [int(row) for row in ids]
        for some in batched([row for row in dict.fromkeys(wanted) if row not in self._found], SEARCHED):
            for row, near in zip(some, self._nearest(some), strict=True):
                if row not in self._found:
                    same = np.sort(self._equal(row, near[near != row]))
                    for one in same.tolist():
                        self._found.setdefault(one, same)
        return [self._found[row] for row in wanted]

    def first_of(self, ids: Sequence[int] | Ids) -> Ids:
        """Return one image for each content among some images: the one of the lowest id in the snapshot, ascending."""
        return np.unique([int(same[0]) for same in self.of(ids)]).astype(np.int64)

    def draw(self, ids: Ids, size: int, seed: int) -> Ids:
        """Draw images of `size` different contents from some, or of all contents; returns the first of each, ascending.

        Without copies these are `size` images drawn without replacement.
        """
        rng = np.random.default_rng(seed)
        drawn = rng.choice(ids, min(size, len(ids)), replace=False)
        chosen = set(self.first_of(drawn).tolist())
        if len(chosen) < len(drawn) < len(ids):
            for some in batched(rng.permutation(np.setdiff1d(ids, drawn)).tolist(), SEARCHED):
                new = set(self.first_of(some).tolist()) - chosen
                chosen |= set(sorted(new)[: len(drawn) - len(chosen)])
                if len(chosen) == len(drawn):
                    break
        return np.array(sorted(chosen), np.int64)

    def with_copies(self, ids: Ids) -> Ids:
        """Return some images and all their copies, ascending."""
        return np.unique(np.concatenate([np.asarray(ids, np.int64), *self.of(ids)])).astype(np.int64)

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

    def repeated(self) -> Ids:
        """Return the images whose content an image of a lower id has too, ascending: by a pass over all images.

        It reads every image feature, and the levels of copies whose bits differ. Of 1280 dimensions that is 5 GB and
        half a minute for a million images.
        """
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
        ids = self._snapshot.ids()
        new = ids[ids >= first]
        if len(new) * SEARCHED < len(ids):  # a few are searched in less time than all are read
            return sum(int(same[0]) < row for row, same in zip(new.tolist(), self.of(new), strict=True))
        return int((self.repeated() >= first).sum())


def _equal_levels(own: list[Array], others: list[Array]) -> NDArray[np.bool_]:
    """Return for each of n others whether all its levels equal those of one image, up to rounding."""
    equal = np.ones(len(others[0]), np.bool_)
    for one, level in zip(own, others, strict=True):
        wide = one.astype(np.float32).reshape(1, -1)
        difference = level.astype(np.float32).reshape(len(level), -1) - wide
        equal &= _squared_norms(difference) <= SAME_LEVEL * _squared_norms(wide)
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
