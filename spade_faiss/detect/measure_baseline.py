"""Measures a gallery's baseline: a sample of its images, each compared with the others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..system.prefetch import batched

if TYPE_CHECKING:
    from ..store.snapshot import Snapshot
    from .detector import Detector
from .baseline import Baseline, LogStats

SAMPLE = 64  # normal images that are compared with the others: enough for a median and a mean at every position
SEED = 0  # of the sample


def measure(detector: Detector, generation: Snapshot) -> Baseline:
    """Compare a seeded sample of a gallery's images with the others.

    With one image there is nothing to compare: distances keep their own scale, and positions are equal.
    """
    ids = generation.ids()
    chosen = np.sort(np.random.default_rng(SEED).choice(ids, min(SAMPLE, len(ids)), replace=False)).tolist()
    scales = _level_scales(detector, generation, chosen) if detector.search.level_weights == "spread" else ()
    if len(ids) < 2:
        grid = generation.manifest.spec.level_shapes[0][1:]
        return Baseline(frozenset(), scales, np.zeros(grid), LogStats(1, 1), LogStats(1, 1))
    queries = detector.stored(generation, chosen)
    found = [(detector.distances(generation, query, scales), query.key) for query in queries]
    total = np.sum([sq_distances.mean(axis=2) for sq_distances, _ in found], axis=0)
    bare = Baseline(frozenset(generation.keys(chosen)), scales, total, LogStats(1, 1), LogStats(1, 1))
    size = detector.gallery.spec.view.resized
    maps = [detector.map_of(sq_distances, size, bare, key) for sq_distances, key in found]
    return replace(
        bare,
        peak=LogStats.of([float(one.max()) for one in maps]),
        mean=LogStats.of([float(one.mean(dtype=np.float64)) for one in maps]),
    )


def _level_scales(detector: Detector, generation: Snapshot, ids: list[int]) -> tuple[float, ...]:
    """Return, for each level, 1 over the root of the mean squared distance of its vectors from their mean."""
    scales = []
    sums = [np.zeros((2, shape[0])) for shape in generation.manifest.spec.level_shapes]  # of values and of squares
    for some in batched(ids, detector.extractor.batch_size):  # memory does not grow with the sample
        for total, levels in zip(sums, detector.levels(generation, some), strict=True):
            for level in levels:
                values = level.astype(np.float64).reshape(len(level), -1)
                total += values.mean(axis=1), np.square(values).mean(axis=1)
    for values, squares in (total / len(ids) for total in sums):
        variance = float(np.maximum(squares - values**2, 0).sum())
        scales.append(1 / np.sqrt(variance) if variance > 1e-12 * squares.sum() else 1.0)
    return tuple(map(float, scales))
