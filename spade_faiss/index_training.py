"""Making a FAISS index at size: a bounded, seeded sample to train with; as many lists visited as a recall needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import faiss
import numpy as np

from .errors import OptionError
from .features import Array
from .options import DEFAULT_K, IndexOptions
from .rows import Ids

SEED = 0
TRAIN_A_LIST = 64  # training points for a list where there are enough
TRANSFORM_SAMPLE = 20_000  # images that principal directions are computed from: 100 MB of 1280 dimensions
BLOCK = 4096  # image features handled at a time
HELD_OUT = 200  # normal images that a recall is measured on
# Candidates for each neighbour; what more would find, more lists do.
FACTORS = (1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
CODE_SECONDS = 1.5e-8  # to compare a query with a code, about
CANDIDATE_SECONDS = 4e-6  # to read an image feature and compare it exactly
TIE = 1e-6  # relative; of squared distances that are taken to be equal


class ImageFeatures(Protocol):
    """All image features of a generation; an image's number is its id."""

    def __len__(self) -> int: ...

    def blocks(self, start: int = 0) -> Iterator[Array]:
        """Open a new pass over those from `start` on, in blocks of (n, d) float32."""
        ...

    def read(self, ids: Ids) -> Array:
        """Return some of them, (len(ids), d) float32."""
        ...


@dataclass(frozen=True)
class Tuning:
    """How an index is searched, and what was measured of that."""

    nprobe: int | None  # IVF lists visited
    candidates: float  # for each neighbour, compared exactly; 1: its own distances are exact
    # share of the k nearest that it finds: of held-out normal images, or of points between two of these, which are as
    # unlike the others as images with defects, or more; the lesser one. None: not measured
    recall: float | None
    k: int  # neighbours that it was measured for


def sample_of(features: ImageFeatures, size: int, seed: int = SEED) -> Ids:
    """Draw ids, ascending, the same ones every time."""
    n = len(features)
    return np.sort(np.random.default_rng(seed).choice(n, min(n, size), replace=False))


def in_blocks(features: ImageFeatures, ids: Ids) -> Iterator[Array]:
    """Read image features of ids, a block at a time."""
    for start in range(0, len(ids), BLOCK):
        yield features.read(ids[start : start + BLOCK])


@dataclass(frozen=True)
class Principal:
    """The principal directions of a sample of image features."""

    mean: Array  # (d,)
    directions: Array  # (d, d), a row each
    variances: Array  # (d,), descending

    @classmethod
    def of(cls, features: ImageFeatures) -> Principal:
        """Compute them from a bounded sample; takes a second or two for 1280 dimensions."""
        sample = np.concatenate([*in_blocks(features, sample_of(features, TRANSFORM_SAMPLE))]).astype(np.float64)
        mean = sample.mean(axis=0)
        sample -= mean
        found, directions = np.linalg.eigh(sample.T @ sample / len(sample))
        return cls(mean, directions.T[::-1], np.maximum(found[::-1], 0))

    def transform(self, m: int) -> Any:
        """Return what takes vectors to the first m directions, for FAISS."""
        linear = faiss.LinearTransform(len(self.mean), m, True)
        rows = self.directions[:m]
        faiss.copy_array_to_vector(rows.astype(np.float32).ravel(), linear.A)
        faiss.copy_array_to_vector((-rows @ self.mean).astype(np.float32), linear.b)
        linear.is_trained = True
        return linear


def train(index: Any, features: ImageFeatures, options: IndexOptions, factory: str) -> None:
    """Train an index: what transforms vectors first, on few images; then the rest, on the transformed sample.

    Raises:
        OptionError: there are too few images for it.
    """
    chain = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(_transforms(index))]
    inner = faiss.downcast_index(index.index) if chain else index
    ivf = faiss.try_extract_index_ivf(inner)
    if ivf:
        ivf.cp.seed = SEED
        ivf.cp.min_points_per_centroid = 1  # the number of lists was chosen here, or by the user: no warning
    if hasattr(inner, "pq"):
        inner.pq.cp.min_points_per_centroid = 1
        inner.do_polysemous_training = False  # most of the time it takes, for a search that is not used here
    wanted = options.train_images or (max(TRAIN_A_LIST * ivf.nlist, 10_000) if ivf else 100_000)
    ids = sample_of(features, wanted)
    try:
        if chain:
            few = np.concatenate([*in_blocks(features, sample_of(features, min(wanted, TRANSFORM_SAMPLE)))])
            for transform in chain:
                if not transform.is_trained:
                    transform.train(few)
                few = transform.apply_py(few)
        sample = np.concatenate([_transformed(chain, block) for block in in_blocks(features, ids)])
        if not inner.is_trained:
            inner.train(sample)
        index.is_trained = True
    except RuntimeError as error:
        reason = str(error).rpartition("failed: ")[2].strip()
        raise OptionError(
            f"index {factory}: cannot be trained on {len(ids)} images: {reason}; use flat, or fewer lists"
        ) from error


def _transforms(index: Any) -> int:
    return int(index.chain.size()) if isinstance(index, faiss.IndexPreTransform) else 0


def _transformed(chain: list[Any], block: Array) -> Array:
    for transform in chain:
        block = transform.apply_py(np.ascontiguousarray(block))
    return block


def tune(
    search: Callable[[Array, int, int], Ids],
    nlist: int | None,
    lossy: bool,
    features: ImageFeatures,
    target: float,
    visited: Sequence[int] | None = None,
) -> Tuning:
    """Find the least work that gives a recall, by comparing some normal images, and points between, with all others.

    Args:
        search: (queries, how many, lists to visit) -> ids (m, how many), -1 where there are no more.
        nlist: lists that there are; None: it has none.
        lossy: whether what is found can be compared exactly, so that more than k are worth fetching.
        features: of all images in the index.
        target: recall.
        visited: numbers of lists to try, ascending; None: up to all.
    """
    held_out = sample_of(features, HELD_OUT, SEED + 1)
    k = min(DEFAULT_K, len(features) - 1)
    normal = np.concatenate([*in_blocks(features, held_out)])
    between = (normal + np.roll(normal, len(normal) // 2, axis=0)) / 2
    queries, own = np.concatenate([normal, between]), np.concatenate([held_out, np.full_like(held_out, -1)])
    nearest, told_apart = _nearest(queries, own, features, k)
    queries, own, is_between = queries[told_apart], own[told_apart], (own < 0)[told_apart]
    if not len(queries):  # all alike: whatever is found is right
        return Tuning(None, 1.0, None, k)
    factors = [factor for factor in (FACTORS if lossy else FACTORS[:1]) if factor * k < len(features) - 1] or [1.0]
    best, least = Tuning(None, 1.0, -1.0, k), np.inf
    for nprobe in visited or _rising(nlist):
        visiting = nprobe * len(features) / nlist * CODE_SECONDS if nlist else 0.0
        if visiting > least:
            break
        recalls: dict[float, float] = {}
        for factor in factors[-1:] if nlist else factors:  # in lists the first are those that fewer would be
            found = search(queries, int(np.ceil(factor * k)) + 1, nprobe)
            others = [row[row != mine] for row, mine in zip(found, own, strict=True)]
            fewer = factors if nlist else [factor]
            recalls |= {few: _recall(others, nearest, int(np.ceil(few * k)), is_between) for few in fewer}
        wanted = min(target, max(recalls.values()))
        candidates = next(factor for factor, recall in recalls.items() if recall >= wanted)
        seconds = visiting + candidates * k * CANDIDATE_SECONDS if wanted == target else np.inf
        if seconds < least or (least == np.inf and recalls[candidates] > (best.recall or 0)):
            best, least = Tuning(nprobe if nlist else None, candidates, recalls[candidates], k), seconds
    return best


def _nearest(queries: Array, own: Ids, features: ImageFeatures, k: int) -> tuple[Array, Array]:
    """Compare queries with every image.

    Returns:
        ids (m, k) of the nearest other images, and the rows of those queries whose k-th is nearer than the next one;
        ids have only these.
    """
    ids, sq_distances = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    start = 0
    for block in features.blocks():
        found, at = faiss.knn(queries, np.ascontiguousarray(block), min(k + 2, len(block)))
        found[at + start == own[:, None]] = np.inf
        ids, sq_distances = np.hstack([ids, at + start]), np.hstack([sq_distances, found])
        order = np.argsort(sq_distances, axis=1, kind="stable")[:, : k + 1]
        ids, sq_distances = np.take_along_axis(ids, order, 1), np.take_along_axis(sq_distances, order, 1)
        start += len(block)
    told_apart = np.flatnonzero(sq_distances[:, k] > sq_distances[:, k - 1] * (1 + TIE))
    return ids[told_apart, :k], told_apart


def _rising(nlist: int | None) -> Iterator[int]:
    """Yield numbers of lists to visit, each some 20 % more; the last one is all."""
    step = 1.0
    while nlist and step < nlist:
        yield int(step)
        step = max(step * 1.2, step + 1)
    yield nlist or 0


def _recall(found: list[Ids], nearest: Array, fetched: int, is_between: Array) -> float:
    """Return the share of the nearest among the first found: of normal images or of points between, the lesser one."""
    pairs = zip(found, nearest, strict=True)
    shares = np.array([np.isin(true, row[:fetched], assume_unique=True).mean() for row, true in pairs])
    return float(min(shares[group].mean() for group in (is_between, ~is_between) if group.any()))
