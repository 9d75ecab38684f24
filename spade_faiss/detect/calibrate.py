"""Calibration: normal images queried against the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..errors import OptionError
from ..options import is_count
from ..store.snapshot import TEXTS_TOGETHER, Snapshot
from ..system.prefetch import batched

if TYPE_CHECKING:
    from .detector import Detector
from .calibration import DEFAULT_FALSE_ALARMS, Calibration, conformal_threshold


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
        seed: of the sample.
        progress: a bar on stderr, where that is a terminal.

    Raises:
        OptionError: too few images for the rate, with the number it takes; or no regular expression.
        NotEnoughImagesError: an image has no other to be compared with.
    """
    generation = detector.gallery.snapshot()  # once: another thread may write for as long as this takes
    n = len(draw(generation, sample, seed))
    conformal_threshold(np.zeros(n), false_alarms)  # before hours are spent
    _, scores = normal_scores(detector, generation, sample, group, seed, progress, "calibrate")
    return Calibration(
        generation.manifest.generation, detector.settings(), false_alarms, group, scores[:, 0], scores[:, 1],
        detector.baseline(),
    )  # fmt: skip


def draw(generation: Snapshot, sample: int | None, seed: int) -> NDArray[np.int64]:
    """Return the ids of a seeded sample of normal images, or of all, ascending.

    Raises:
        OptionError: no such sample or seed.
    """
    if not (sample is None or is_count(sample)) or not (is_count(seed) or seed == 0):
        raise OptionError(f"sample, seed: expected whole numbers >= 1 and >= 0, found {sample} and {seed}")
    ids = generation.ids()
    chosen: NDArray[np.int64] = np.random.default_rng(seed).choice(
        ids, min(sample or len(ids), len(ids)), replace=False
    )
    return np.sort(chosen)


def normal_scores(
    detector: Detector,
    generation: Snapshot,
    sample: int | None,
    group: str | None,
    seed: int,
    progress: bool,
    what: str,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Query normal images of one generation against the others; see calibrate.

    Returns:
        ids (n,), and (n, 2): image scores and maxima of maps.
    """
    chosen = draw(generation, sample, seed)
    groups = leave_out_groups(generation, chosen.tolist(), group)
    bar = tqdm(chosen.tolist(), unit="image", disable=None if progress else True, desc=what)
    found = detector.leave_one_out(bar, groups, generation)
    scores = np.array([(one.image_score, one.map_max) for one in found], np.float64)
    return chosen, scores.reshape(len(chosen), 2)


def leave_out_groups(generation: Snapshot, ids: Sequence[int], group: str | None) -> list[NDArray[np.int64]]:
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

    names = [name(key) for key in generation.keys(ids)]
    members: dict[str, list[int]] = {name: [] for name in names}
    for rows in batched(generation.ids().tolist(), TEXTS_TOGETHER):
        for row, key in zip(rows, generation.keys(rows), strict=True):
            if (found := members.get(name(key))) is not None:
                found.append(row)
    return [np.array(members[name]) for name in names]


def false_alarm_rate(scores: NDArray[np.float64], new: Iterable[float], false_alarms: float) -> float:
    """Return the share of new normal scores above the threshold from others: what the promise is checked with."""
    threshold = conformal_threshold(scores, false_alarms)
    return float(np.mean([score > threshold for score in new]))
