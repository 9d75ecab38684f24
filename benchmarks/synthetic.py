"""Image features like real ones, any number of them: drawn from a mixture that was fitted to real ones.

Each cluster is a Gaussian of low rank: a mean, a few principal directions with their variances, and a small rest that
is the same in all directions. Draws are clipped at 0, as the real ones are means of activations that are not negative.
Blocks are seeded by their number: the same block is always the same, and none needs those before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

import spade_faiss as sf
from spade_faiss.images.decode import decode
from spade_faiss.images.sources import find_images
from spade_faiss.system.prefetch import batched

BLOCK = 5_000  # rows drawn at a time: 26 MB of 1280 dimensions
HELD_OUT = 1_000_000_000  # blocks from here on are for queries: no gallery gets that far
CLUSTERS = 16  # with RANK, what comes nearest to magnetic tile's intrinsic dimension and distances: see `likeness`
RANK = 16


@dataclass(frozen=True)
class Mixture:
    """C clusters of image features of d dimensions, to draw from; arrays only, to be kept in an .npz."""

    shares: np.ndarray  # (C,) of the images
    means: np.ndarray  # (C, d)
    directions: np.ndarray  # (C, rank, d), orthonormal rows
    deviations: np.ndarray  # (C, rank), along the directions
    rests: np.ndarray  # (C,) deviation in every direction, on top
    seed: int = 0

    @classmethod
    def fit(cls, features: np.ndarray, clusters: int = CLUSTERS, rank: int = RANK, seed: int = 0) -> Mixture:
        """Fit to (n, d) real features. Clusters of fewer than 2 rank images share one covariance, that of all."""
        n, d = features.shape
        clusters, rank = max(1, min(clusters, n // 2)), max(1, min(rank, d - 1, n - 1))
        kmeans = faiss.Kmeans(d, clusters, niter=30, seed=seed + 1, min_points_per_centroid=1)
        kmeans.train(np.ascontiguousarray(features, np.float32))
        nearest = kmeans.index.search(np.ascontiguousarray(features, np.float32), 1)[1][:, 0]
        members = [features[nearest == number].astype(np.float64) for number in np.unique(nearest)]
        means = [part.mean(axis=0) for part in members]
        centred = [part - mean for part, mean in zip(members, means, strict=True)]
        shared = _principal(np.concatenate(centred), rank)
        parts = [_principal(part, rank) if len(part) >= 2 * rank else shared for part in centred]
        directions, deviations, rests = (np.array(values, np.float32) for values in zip(*parts, strict=True))
        shares = np.array([len(part) / n for part in members])
        return cls(shares, np.array(means, np.float32), directions, deviations, rests, seed)

    def block(self, number: int, rows: int = BLOCK) -> np.ndarray:
        """Draw block `number`, (rows, d) float32."""
        rng = np.random.default_rng([self.seed, number])
        cluster = rng.choice(len(self.shares), rows, p=self.shares / self.shares.sum())
        drawn = rng.standard_normal((rows, self.means.shape[1]), np.float32)
        along = rng.standard_normal((rows, self.deviations.shape[1]), np.float32)
        for each in range(len(self.shares)):
            mine = cluster == each
            drawn[mine] = drawn[mine] * self.rests[each] + self.means[each]
            drawn[mine] += (along[mine] * self.deviations[each]) @ self.directions[each]
        return np.maximum(drawn, 0, out=drawn)

    def queries(self, rows: int) -> np.ndarray:
        """Draw rows that are in no gallery, (rows, d) float32."""
        return self.block(HELD_OUT, rows)


def _principal(centred: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the first principal directions (rank, d), the deviations along them, and that of the rest."""
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    variances = np.square(singular) / len(centred)
    rest = float(np.sqrt(variances[rank:].sum() / (centred.shape[1] - rank)))
    return directions[:rank], np.sqrt(np.maximum(variances[:rank] - rest**2, 0)), rest


def stream(real: np.ndarray, mixture: Mixture, n: int) -> Iterator[np.ndarray]:
    """Yield n rows in blocks, the real ones first: the first rows are the same whatever n is."""
    yield real[:n]
    left, number = n - len(real), 0
    while left > 0:
        yield mixture.block(number)[:left]
        left, number = left - BLOCK, number + 1


def likeness(real: np.ndarray, mixture: Mixture, held_out: np.ndarray) -> dict[str, dict[str, float]]:
    """Describe the real features beside as many synthetic ones, and `held_out` real ones among each of both."""
    drawn = mixture.queries(len(real))
    return {"real": _described(real, held_out), "synthetic": _described(drawn, held_out)}


def _described(features: np.ndarray, held_out: np.ndarray, k: int = 50) -> dict[str, float]:
    features, held_out = (np.ascontiguousarray(part, np.float32) for part in (features, held_out))
    k = min(k, len(features) - 1)
    sq = faiss.knn(features, features, k + 1)[0][:, 1:].astype(np.float64)
    to_held_out = faiss.knn(held_out, features, k)[0]
    spectrum = np.square(np.linalg.svd(features - features.mean(axis=0), compute_uv=False))
    explained = np.cumsum(spectrum) / spectrum.sum()
    values = {
        "intrinsic_dimension_mle": intrinsic_dimension(sq[:, : min(20, k)]),
        "intrinsic_dimension_two_nn": intrinsic_dimension(sq[:, :2]),
        **{f"directions_of_{share}_percent": np.searchsorted(explained, share / 100) + 1 for share in (50, 80, 95)},
        "sq_distance_1st_median": np.median(sq[:, 0]),
        f"sq_distance_{k}th_median": np.median(sq[:, -1]),
        "held_out_real_sq_distance_1st_median": np.median(to_held_out[:, 0]),
        f"held_out_real_sq_distance_{k}th_median": np.median(to_held_out[:, -1]),
        "share_of_zeros": np.mean(features <= 0),
    }
    return {name: round(float(value), 3) for name, value in values.items()}


def intrinsic_dimension(sq_distances: np.ndarray) -> float:
    """Estimate it from (n, k) ascending squared distances to others: Levina and Bickel's MLE; of 2 of them, TwoNN."""
    logs = np.log(np.maximum(sq_distances, 1e-12)) / 2
    return float(1 / np.mean(logs[:, -1:] - logs[:, :-1]))


def image_features(folder: Path, extractor: sf.Extractor) -> tuple[np.ndarray, list[Path]]:
    """Extract the image features of a folder: (n, d) float32, and the n paths."""
    paths = [source.path for source in find_images([folder])]
    views = (extractor.spec.view.apply(decode(path)) for path in paths)
    parts = [extractor.extract(batch).image for batch in batched(views, extractor.batch_size)]
    return np.concatenate(parts).astype(np.float32), paths
