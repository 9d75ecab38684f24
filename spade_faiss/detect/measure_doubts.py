"""Finding out how much each normal image is doubted by the others: all that a calibration compares, or a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..arrays import Ids
from ..store.copies import Copies
from .baseline import Baseline
from .leave_out import LeaveOut
from .normal_scores import image_scores, with_others
from .pipeline import Pipeline
from .standing import doubts_of

FEWEST = 50  # images that say of each other how much they are doubted; of 30 the highest quarter is mostly chance
SAMPLE = 256  # queries of these, at most, without a calibration
SEED = 0  # of the sample


def leaves_out(pipeline: Pipeline) -> bool:
    """Return whether queries leave some of their neighbours out: then they ask how much these are doubted."""
    return LeaveOut.of(pipeline.settings, pipeline.baseline, pipeline.k, None) is not None


def without_doubts(pipeline: Pipeline) -> Pipeline:
    """Return a run that does not know how much any image is doubted."""
    return _doubting(pipeline, {})


def with_doubts(pipeline: Pipeline, chosen: Ids, group: str | None = None, progress: bool = False) -> Pipeline:
    """Return a run that knows how much some images are doubted: each is queried against the others.

    Where queries leave none of their neighbours out, or the images are fewer than FEWEST, it knows of none.

    Args:
        pipeline: over the snapshot, on the scale of its normal images.
        chosen: the images, each of another content.
        group: see calibrate.
        progress: a bar on stderr, where that is a terminal.
    """
    pipeline = without_doubts(pipeline)
    if len(chosen) < FEWEST or not leaves_out(pipeline):
        return pipeline
    scores = image_scores(pipeline, chosen, group, "compare", progress)
    together = pipeline.copies.of(chosen)
    each = np.repeat(doubts_of(scores[:, 0]), [len(same) for same in together]).tolist()
    return _doubting(pipeline, dict(zip(pipeline.snapshot.digests(np.concatenate(together)), each, strict=True)))


def sample_of(copies: Copies, images: int) -> int:
    """Return how many images are compared without a calibration: SAMPLE queries at most, one for each tile.

    Args:
        copies: of the snapshot.
        images: number of its rows, tiles each.
    """
    wholes = len(copies.images())
    number = min(wholes, SAMPLE * wholes // images)
    return number if number >= FEWEST else 0


def with_doubts_of_sample(pipeline: Pipeline) -> Baseline:
    """Return a run's baseline with the doubts of a seeded sample.

    These are all images of a small gallery, and few of a large one: its calibration knows of more.
    """
    copies = pipeline.copies
    if leaves_out(pipeline) and (size := sample_of(copies, len(pipeline.snapshot))):
        pipeline = with_doubts(pipeline, with_others(pipeline, copies.draw(copies.images(), size, SEED)))
    assert pipeline.baseline is not None
    return pipeline.baseline


def _doubting(pipeline: Pipeline, doubts: Mapping[str, float]) -> Pipeline:
    baseline = pipeline.baseline and replace(pipeline.baseline, doubts=doubts)
    return pipeline.scored_by(baseline, pipeline.calibration)
