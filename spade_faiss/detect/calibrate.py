"""Calibration: normal images queried against the others."""

from __future__ import annotations

import warnings

import numpy as np

from ..arrays import Ids
from ..errors import OptionError
from ..options import plain
from ..store.copies import Copies
from ..store.snapshot import Snapshot
from ..store.trusted import trusted_ids
from .baseline import CHANCE, LogStats
from .calibration import DEFAULT_FALSE_ALARMS, Calibration, conformal_threshold
from .detector import Detector
from .measure_doubts import with_doubts
from .normal_scores import Sampling, image_scores, require_group, require_others

FAR = 15  # spreads of logarithms above the median: the oddest normal images of six real sets are at 1 to 5


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

    Where queries leave neighbours out, and 50 images are compared or more, it takes two rounds: the scores of the first
    say how much each image is doubted, see measure_doubts. Queries never leave out what is not doubted from then on;
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
        MemberError: a member of the cluster is missing, even if queries go on without it (partial="allow").

    >>> calibration = sf.calibrate(detector, false_alarms=0.1)
    >>> len(calibration.image_scores), bool(calibration.image_threshold == calibration.image_scores.max())
    (12, True)
    """
    false_alarms = plain(false_alarms)
    given, detector = detector, detector.uncalibrated()  # whose scale may be a calibration's
    detector.share_caches(given)
    snapshot, sampling = detector.gallery.snapshot(), Sampling(sample, group, seed)
    detector.require_whole(snapshot)
    ids = Copies(snapshot).images()
    size = min(sampling.sample or len(ids), len(ids))
    conformal_threshold(np.zeros(size), false_alarms, sampled=size < len(ids))  # before hours are spent
    require_group(snapshot, group)
    # One run: another thread may write for as long as this takes.
    pipeline = detector.pipeline(snapshot, doubts=False)
    chosen = pipeline.copies.draw(ids, size, seed)
    if len(chosen) == 1:
        pipeline.check_others(int(chosen[0]), pipeline.copies.with_copies(chosen))
    conformal_threshold(np.zeros(len(chosen)), false_alarms, len(ids) - len(chosen) if len(chosen) < size else 0)
    require_others(pipeline, chosen)
    pipeline = with_doubts(pipeline, chosen, group, progress)  # whatever an earlier calibration says
    scores = image_scores(pipeline, chosen, group, "calibrate", progress)
    detector.require_whole(snapshot)  # nor was any lost meanwhile
    found = Calibration(
        snapshot.manifest.generation, detector.settings(), false_alarms, group, scores[:, 0], scores[:, 1],
        pipeline.baseline, _excusing(detector, snapshot),
    )  # fmt: skip
    if found.ties:
        raise OptionError(
            f"calibrate: {found.ties}; remove all but one of them, or name those that belong together (group=REGEX)"
        )
    _warn_of_odd_images(found, snapshot, chosen)
    return found


def _excusing(detector: Detector, snapshot: Snapshot) -> tuple[str, ...]:
    """Return the digests of the trusted images, where these make a difference."""
    if (detector.search.kappa or 0) < 2 and not detector.search.leave_out:
        return ()
    return tuple(sorted(set(snapshot.digests(trusted_ids(snapshot, detector.trusted)))))


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
