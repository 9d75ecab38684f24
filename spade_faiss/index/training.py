"""Trains an index on a bounded, seeded sample of the image features, which are read in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import faiss
import numpy as np

from ..arrays import Array, Ids
from ..errors import OptionError
from ..options import IndexOptions

SEED = 0
TRAIN_A_LIST = 64  # training points for each list, if there are enough images
TRANSFORM_SAMPLE = 20_000  # images that principal directions are computed from: 100 MB at 1280 dimensions
BLOCK = 4096  # image features handled at a time


class ImageFeatures(Protocol):
    """The image features of all images of a snapshot; an image's number is its id."""

    def __len__(self) -> int: ...

    def blocks(self, start: int = 0) -> Iterator[Array]:
        """Iterate over the image features from `start` on, in blocks (n, d) float32."""
        ...

    def read(self, ids: Ids) -> Array:
        """Return the image features of ids, (len(ids), d) float32."""
        ...


def sample_of(features: ImageFeatures, size: int, seed: int = SEED) -> Ids:
    """Draw up to `size` ids, ascending; the same seed draws the same ids."""
    n = len(features)
    return np.sort(np.random.default_rng(seed).choice(n, min(n, size), replace=False))


def in_blocks(features: ImageFeatures, ids: Ids) -> Iterator[Array]:
    """Read the image features of ids in blocks of up to BLOCK images."""
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
        """Return a FAISS transform that projects vectors on the first m directions."""
        linear = faiss.LinearTransform(len(self.mean), m, True)
        rows = self.directions[:m]
        faiss.copy_array_to_vector(rows.astype(np.float32).ravel(), linear.A)
        faiss.copy_array_to_vector((-rows @ self.mean).astype(np.float32), linear.b)
        linear.is_trained = True
        return linear


def train(index: Any, features: ImageFeatures, options: IndexOptions, factory: str) -> None:
    """Train an index: its vector transforms on few images, then the rest on the transformed sample.

    Raises:
        OptionError: too few images.
    """
    chain = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(_transforms(index))]
    inner = faiss.downcast_index(index.index) if chain else index
    ivf = faiss.try_extract_index_ivf(inner)
    if ivf:
        ivf.cp.seed = SEED
        ivf.cp.min_points_per_centroid = 1  # suppresses FAISS's warning: the number of lists is deliberate
    if hasattr(inner, "pq"):
        inner.pq.cp.min_points_per_centroid = 1
        inner.do_polysemous_training = (
            False  # takes most of the training time, for a kind of search that is not used here
        )
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
