"""Calibration: normal images queried against the others."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..arrays import Ids
from ..errors import OptionError
from ..options import is_count
from ..store.copies import Copies
from ..store.snapshot import TEXTS_TOGETHER, Snapshot
from ..system.prefetch import batched
from ..system.progress import progress_bar
from .baseline import CHANCE, LogStats
from .calibration import DEFAULT_FALSE_ALARMS, Calibration, conformal_threshold
from .detector import Detector
from .leave_out import LeaveOut
from .pipeline import Pipeline
from .standing import doubts_of

FAR = 15  # spreads of logarithms above the median: the oddest normal images of six real sets are at 1 to 5
FEWEST = 50  # images that say of each other how much they are doubted; of 30 the highest quarter is mostly chance
EXAMPLES = 2  # keys that an error shows


@dataclass(frozen=True)
class Sampling:
    """Which normal images are queried, and which are left out with each."""

    sample: int | None = None  # number of images of different content, drawn with the seed; None: all
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
    """Query normal images against the others. Copies are left out together, and each content has one score.

    Of images in tiles, all tiles are queried, and left out together; an image has the scores of its highest tile.

    Where queries leave neighbours out, and FEWEST images are compared or more, it takes two rounds: the scores of the
    first say how much each image is doubted, see standing. Queries never leave out what is not doubted from then on;
    the thresholds are of such queries, the second round.

    Args:
        detector: with the settings that the thresholds are to hold for.
        false_alarms: alpha, the promised rate.
        sample: how many images, drawn with the seed; None: all.
        group: a regular expression; images whose keys give the same match (or the same first group in it) are left out
            together: pictures of one part are so alike that leaving out one alone is too kind.
        seed: seed of the sample.
        progress: a bar on stderr, where that is a terminal.

    Raises:
        OptionError: too few images for the rate, with the number it takes; a group that is no regular expression or
            matches no key; or scores that tie, so that a threshold would be 0 or beyond all scores.
        NotEnoughImagesError: an image has no other to be compared with.

    >>> calibration = sf.calibrate(detector, false_alarms=0.1)
    >>> len(calibration.image_scores), bool(calibration.image_threshold == calibration.image_scores.max())
    (12, True)
    """
    snapshot, sampling = detector.gallery.snapshot(), Sampling(sample, group, seed)
    ids = Copies(snapshot).images()
    size = min(sampling.sample or len(ids), len(ids))
    conformal_threshold(np.zeros(size), false_alarms)  # before hours are spent
    require_group(snapshot, group)
    pipeline = detector.pipeline(snapshot)  # one: another thread may write for as long as this takes
    chosen = pipeline.copies.draw(ids, size, seed)
    if len(chosen) == 1:
        pipeline.check_others(int(chosen[0]), pipeline.copies.with_copies(chosen))
    conformal_threshold(np.zeros(len(chosen)), false_alarms, len(ids) - len(chosen) if len(chosen) < size else 0)
    pipeline = _doubting(pipeline, {})  # whatever an earlier calibration says
    if len(chosen) >= FEWEST and LeaveOut.of(pipeline.settings, pipeline.baseline, pipeline.k, None):
        scores = _image_scores(pipeline, chosen, group, "compare", progress)
        together = pipeline.copies.of(chosen)
        each = np.repeat(doubts_of(scores[:, 0]), [len(same) for same in together]).tolist()
        pipeline = _doubting(pipeline, dict(zip(snapshot.digests(np.concatenate(together)), each, strict=True)))
    scores = _image_scores(pipeline, chosen, group, "calibrate", progress)
    found = Calibration(
        snapshot.manifest.generation, detector.settings(), false_alarms, group, scores[:, 0], scores[:, 1],
        pipeline.baseline,
    )  # fmt: skip
    if found.ties:
        raise OptionError(
            f"calibrate: {found.ties}; remove all but one of them, or name those that belong together (group=REGEX)"
        )
    _warn_of_odd_images(found, snapshot, chosen)
    return found


def _image_scores(pipeline: Pipeline, chosen: Ids, group: str | None, what: str, progress: bool) -> NDArray[np.float64]:
    """Do as normal_scores; images in tiles are named by their first tiles, and have the scores of the highest one."""
    rows, image_of = pipeline.copies.tiles_of(chosen)
    scores = np.full((len(chosen), 2), -np.inf)
    np.maximum.at(scores, image_of, normal_scores(pipeline, rows, group, what, progress))
    return scores


def _doubting(pipeline: Pipeline, doubts: Mapping[str, float]) -> Pipeline:
    """Return a run that knows how much images are doubted, by their digests."""
    baseline = pipeline.baseline and replace(pipeline.baseline, doubts=doubts)
    return pipeline.scored_by(baseline, pipeline.calibration)


def _warn_of_odd_images(found: Calibration, snapshot: Snapshot, chosen: Ids) -> None:
    """Warn if a threshold is the score of an image that is nothing like the others: defects will be under it too."""
    for name, scores, threshold in (
        ("image", found.image_scores, found.image_threshold),
        ("pixel", found.map_maxima, found.pixel_threshold),
    ):
        spreads = float(LogStats.of(scores.tolist()).distance(np.array([threshold]))[0])
        if len(scores) > CHANCE and spreads > FAR:
            [key] = snapshot.keys(chosen[np.flatnonzero(scores == threshold)[:1]])
            warnings.warn(
                f"the {name} threshold is the score of {key!r}, {spreads:.0f} spreads above the median of "
                f"{len(scores)} normal images, and defects will pass for normal under it: if that image is not normal, "
                "remove it (audit shows such images), or allow more false alarms",
                stacklevel=3,
            )
            return


def draw(snapshot: Snapshot, sampling: Sampling) -> Ids:
    """Return the ids of a seeded sample of normal images, or of all, ascending."""
    ids = snapshot.ids()
    size = min(sampling.sample or len(ids), len(ids))
    chosen: Ids = np.random.default_rng(sampling.seed).choice(ids, size, replace=False)
    return np.sort(chosen)


def normal_scores(pipeline: Pipeline, chosen: Ids, group: str | None, what: str, progress: bool) -> NDArray[np.float64]:
    """Query normal images of one snapshot against those of other content and other groups; see calibrate.

    Args:
        pipeline: a run over the snapshot.
        chosen: which of its images, (n,).
        group: see calibrate.
        what: the bar's description.
        progress: a bar on stderr, where that is a terminal.

    Returns:
        (n, 2): image scores and maxima of maps.
    """
    groups = leave_out_groups(pipeline.snapshot, chosen.tolist(), group)
    bar = progress_bar(chosen.tolist(), what, progress)
    found = pipeline.leave_one_out(bar, groups)
    scores = np.array([(one.image_score, one.map_max) for one in found], np.float64)
    return scores.reshape(len(chosen), 2)


def require_group(snapshot: Snapshot, group: str | None) -> None:
    """Check that a group is a regular expression that matches a key.

    Raises:
        OptionError: it is not.
    """
    if group is None:
        return
    pattern = _compiled(group)
    for rows in batched(snapshot.ids().tolist(), TEXTS_TOGETHER):
        if any(pattern.search(key) for key in snapshot.image_keys(rows)):
            return
    examples = " and ".join(map(repr, snapshot.keys(snapshot.ids()[:EXAMPLES])))
    raise OptionError(
        f"group: expected a pattern that matches keys of {snapshot.folder}, as {examples}, found {group!r}, "
        f"which matches none of {len(snapshot)}"
    )


def leave_out_groups(snapshot: Snapshot, ids: Sequence[int], group: str | None) -> list[Ids]:
    """Return, for each of some ids, the ids that are left out with it: its own, or all of its group.

    Raises:
        OptionError: the group is no regular expression.
    """
    if group is None:
        return [np.array([row]) for row in ids]
    pattern = _compiled(group)

    def name(key: str) -> str:
        match = pattern.search(key)
        return key if match is None else f"\0{match[1] if pattern.groups else match[0]}"

    names = [name(key) for key in snapshot.image_keys(ids)]
    members: dict[str, list[int]] = {name: [] for name in names}
    for rows in batched(snapshot.ids().tolist(), TEXTS_TOGETHER):
        for row, key in zip(rows, snapshot.image_keys(rows), strict=True):
            if (found := members.get(name(key))) is not None:
                found.append(row)
    if len(snapshot) == len(ids) == len(members) > 1:
        warnings.warn(f"group: {group!r} puts no two of {len(ids)} images together", stacklevel=2)
    return [np.array(members[name]) for name in names]


def _compiled(group: str) -> re.Pattern[str]:
    try:
        return re.compile(group)
    except re.error as error:
        raise OptionError(f"group: expected a regular expression, found {group!r}: {error}") from error
