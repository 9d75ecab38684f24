"""Measuring a baseline: a sample of a gallery's images, each compared with the others."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..system.prefetch import batched
from .baseline import Baseline, LogStats
from .leave_out import LeaveOut, most_left_out
from .level_matches import LevelMatches, LevelStats
from .matching import Matched, fused, trusted_levels
from .normal_scores import has_others
from .pipeline import Pipeline
from .query import Query
from .settings import Settings
from .standing import Standing

SAMPLE = 64  # normal images that are compared with the others: enough for a median and a mean at every position
SEED = 0  # of the sample

_Found = tuple[Query, Standing | None, tuple[LevelMatches, ...]]  # of an image; see _rises


def measure(pipeline: Pipeline) -> Baseline:
    """Compare a seeded sample of a snapshot's images with the others.

    Copies count once, and are left out together. With images of one content there is nothing to compare: distances
    keep their own scale, and positions are equal.

    Args:
        pipeline: over the snapshot, with the settings that the baseline is for.
    """
    snapshot = pipeline.snapshot
    ids, spec = snapshot.ids(), snapshot.manifest.spec
    drawn = pipeline.copies.draw(ids, SAMPLE, SEED)
    kept = has_others(pipeline, drawn)
    chosen = drawn[kept if kept.any() else ~kept].tolist()
    scales = _level_scales(pipeline, chosen) if pipeline.settings.search.level_weights == "spread" else ()
    bare = Baseline(frozenset(), scales, np.zeros(spec.level_shapes[0][1:]), LogStats(1, 1), LogStats(1, 1))
    if len(pipeline.copies.with_copies(chosen[:1])) == len(ids):
        if pipeline.settings.is_relative:
            warnings.warn(
                f"{snapshot.folder}: expected at least 2 normal images of different content, found 1: scores have no "
                "scale of normal images; add normal images",
                stacklevel=2,
            )
        return bare
    weighted, kappa = pipeline.scored_by(bare), pipeline.settings.search.kappa or 1
    more = most_left_out(pipeline.settings.search.leave_out, kappa, pipeline.k)
    if more:
        weighted = weighted.finding(kappa + more)
    matched: list[tuple[Matched, str | None]] = []
    to_leave_out: list[_Found] = []
    for query in weighted.stored(chosen):
        one = weighted.matched(query)
        if more:
            standing = pipeline.standing(query.ids[: pipeline.k])
            to_leave_out.append((query, standing, one.levels))
            if standing is not None:
                one = replace(one, levels=tuple(trusted_levels(one.levels, standing.trusted)))
        matched.append((one.slim(kappa), query.key))
    if pipeline.settings.is_relative:
        apart = zip(*(one.levels for one, _ in matched), strict=True)
        bare = replace(bare, levels=tuple(LevelStats.of(level) for level in apart))
        bare = replace(bare, rises=_rises(to_leave_out, bare, pipeline.settings))
        matched = [(fused(one.levels, bare, pipeline.settings), key) for one, key in matched]
    found = [(one.sq_distances, key) for one, key in matched]
    total = np.sum([sq_distances.mean(axis=2) for sq_distances, _ in found], axis=0)
    bare = replace(bare, keys=frozenset(snapshot.keys(chosen)), total=total)
    damped = pipeline.scored_by(bare).scorer
    maps = [damped.map_of(one, spec.view.resized, one.mean(axis=2, dtype=np.float64)) for one, _ in found]
    measured = replace(
        bare,
        peak=LogStats.of([float(one.max()) for one in maps]),
        mean=LogStats.of([float(one.mean(dtype=np.float64)) for one in maps]),
    )
    if pipeline.settings.score.image_score == "map" and (ties := measured.ties):
        warnings.warn(f"image scores tell little: {snapshot.folder}: {ties}", stacklevel=2)
    return measured


def _rises(found: Sequence[_Found], baseline: Baseline, settings: Settings) -> tuple[float, ...]:
    """Return how much the maps of normal images rise by leaving neighbours out, ascending; see LeaveOut.

    Args:
        found: of each image the query, the standing of its neighbours, and levels with the nearest kappa + most of
            them at least.
        baseline: with the figures of levels.
        settings: of queries.
    """
    rises = []
    for query, standing, levels in found:
        k = min(settings.k_of(len(query.ids)), len(query.ids))
        if leave_out := LeaveOut.of(query.settings_of(settings), baseline, k, standing):
            number = leave_out.kappa + leave_out.most
            nearest = [LevelMatches(one.sq_distances[..., :number], one.matches[..., :number, :]) for one in levels]
            rises.append(leave_out(nearest).rise)
    return tuple(sorted(rises))


def _level_scales(pipeline: Pipeline, ids: list[int]) -> tuple[float, ...]:
    """Return, for each level, 1 over the root of the mean squared distance of its vectors from their mean."""
    scales = []
    sums = [np.zeros((2, shape[0])) for shape in pipeline.snapshot.manifest.spec.level_shapes]  # of values, of squares
    for some in batched(ids, pipeline.extractor.batch_size):  # memory does not grow with the sample
        for total, levels in zip(sums, pipeline.levels(some), strict=True):
            for level in levels:
                values = level.astype(np.float64).reshape(len(level), -1)
                total += values.mean(axis=1), np.square(values).mean(axis=1)
    for values, squares in (total / len(ids) for total in sums):
        variance = float(np.maximum(squares - values**2, 0).sum())
        scales.append(1 / np.sqrt(variance) if variance > 1e-12 * squares.sum() else 1.0)
    return tuple(map(float, scales))
