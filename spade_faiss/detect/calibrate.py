"""Calibration: normal images queried against the others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..arrays import Ids
from ..errors import OptionError
from ..options import is_count
from ..store.snapshot import TEXTS_TOGETHER, Snapshot
from ..system.prefetch import batched
from ..system.progress import progress_bar
from .calibration import DEFAULT_FALSE_ALARMS, Calibration, conformal_threshold
from .detector import Detector
from .pipeline import Pipeline


@dataclass(frozen=True)
class Sampling:
    """Which normal images are queried, and which are left out with each."""

    sample: int | None = None  # number of images, drawn with the seed; None: all
    group: str | None = None  # regular expression on keys; see calibrate
    seed: int = 0

    def __post_init__(self) -> None:
        sample, seed = self.sample, self.seed
        if not (sample is None or is_count(sample)) or not (is_count(seed) or seed == 0):
            raise OptionError(f"sample, seed: expected whole numbers >= 1 and >= 0, found {sample} and {seed}")


def calibrate(
    detector: Detector,
    false_alarms: float = DEFAULT_FALSE_ALARMS,
    *,
    sample: int | None = None,
    group: str | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Query normal images against the others.

    Args:
        detector: with the settings that the thresholds are to hold for.
        false_alarms: alpha, the promised rate.
        sample: how many images, drawn with the seed; None: all.
        group: a regular expression; images whose keys give the same match (or the same first group in it) are left out
            together: pictures of one part are so alike that leaving out one alone is too kind.
        seed: seed of the sample.
        progress: a bar on stderr, where that is a terminal.

    Raises:
        OptionError: too few images for the rate, with the number it takes; or no regular expression.
        NotEnoughImagesError: an image has no other to be compared with.

    >>> calibration = sf.calibrate(detector, false_alarms=0.1)
    >>> len(calibration.image_scores), bool(calibration.image_threshold == calibration.image_scores.max())
    (12, True)
    """
    snapshot, sampling = detector.gallery.snapshot(), Sampling(sample, group, seed)
    n = len(draw(snapshot, sampling))
    conformal_threshold(np.zeros(n), false_alarms)  # before hours are spent
    pipeline = detector.pipeline(snapshot)  # one: another thread may write for as long as this takes
    _, scores = normal_scores(pipeline, sampling, "calibrate", progress)
    return Calibration(
        snapshot.manifest.generation, detector.settings(), false_alarms, group, scores[:, 0], scores[:, 1],
        pipeline.baseline,
    )  # fmt: skip


def draw(snapshot: Snapshot, sampling: Sampling) -> Ids:
    """Return the ids of a seeded sample of normal images, or of all, ascending."""
    ids = snapshot.ids()
    size = min(sampling.sample or len(ids), len(ids))
    chosen: Ids = np.random.default_rng(sampling.seed).choice(ids, size, replace=False)
    return np.sort(chosen)


def normal_scores(pipeline: Pipeline, sampling: Sampling, what: str, progress: bool) -> tuple[Ids, NDArray[np.float64]]:
    """Query normal images of one snapshot against the others; see calibrate.

    Args:
        pipeline: a run over the snapshot.
        sampling: which of its images.
        what: the bar's description.
        progress: a bar on stderr, where that is a terminal.

    Returns:
        ids (n,), and (n, 2): image scores and maxima of maps.
    """
    chosen = draw(pipeline.snapshot, sampling)
    groups = leave_out_groups(pipeline.snapshot, chosen.tolist(), sampling.group)
    bar = progress_bar(chosen.tolist(), what, progress)
    found = pipeline.leave_one_out(bar, groups)
    scores = np.array([(one.image_score, one.map_max) for one in found], np.float64)
    return chosen, scores.reshape(len(chosen), 2)


def leave_out_groups(snapshot: Snapshot, ids: Sequence[int], group: str | None) -> list[Ids]:
    """Return, for each of some ids, the ids that are left out with it: its own, or all of its group.

    Raises:
        OptionError: the group is no regular expression.
    """
    if group is None:
        return [np.array([row]) for row in ids]
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise OptionError(f"group: expected a regular expression, found {group!r}: {error}") from error

    def name(key: str) -> str:
        match = pattern.search(key)
        return key if match is None else "\0" + (match[1] if pattern.groups else match[0])

    names = [name(key) for key in snapshot.keys(ids)]
    members: dict[str, list[int]] = {name: [] for name in names}
    for rows in batched(snapshot.ids().tolist(), TEXTS_TOGETHER):
        for row, key in zip(rows, snapshot.keys(rows), strict=True):
            if (found := members.get(name(key))) is not None:
                found.append(row)
    return [np.array(members[name]) for name in names]
