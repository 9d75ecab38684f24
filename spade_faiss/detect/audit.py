"""Which normal images are least like the others: contamination in the normal set is found before it hides defects.

A defect among the normal images matches itself in every image that shows it, and is then called normal for ever after.
Compared with the others alone, it stands out. Several contaminations of one kind vouch for each other: name the images
that belong together with `group`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..arrays import Pixels
from ..errors import ImageError
from ..store.source_images import SourceImages
from .baseline import LogStats
from .calibrate import leave_out_groups, normal_scores
from .detection import Detection
from .detector import Detector

GREY = 128  # of a picture whose file is not at hand


@dataclass(frozen=True)
class Suspect:
    """A normal image, and how far it is from the others."""

    key: str
    image_score: float
    map_max: float
    oddity: (
        float  # the larger of both scores' distances from their medians over normal images, in spreads of logarithms
    )


def find_suspects(
    detector: Detector, *, sample: int | None = None, group: str | None = None, seed: int = 0, progress: bool = False
) -> list[Suspect]:
    """Query normal images against the others; returns them, the least like the others first.

    Args:
        detector: over the gallery.
        sample: how many images, drawn with the seed; None: all.
        group: see calibrate.
        seed: of the sample.
        progress: a bar on stderr, where that is a terminal.

    Raises:
        OptionError: sample, seed or group is none.
        NotEnoughImagesError: an image has no other to be compared with.
    """
    generation = detector.gallery.snapshot()  # once: another thread may write for as long as this takes
    ids, scores = normal_scores(detector, generation, sample, group, seed, progress, "audit")
    typical = [LogStats.of(column.tolist()) for column in scores.T]
    oddities = np.max([one.distance(column) for one, column in zip(typical, scores.T, strict=True)], axis=0)
    keys = generation.keys(ids)
    suspects = [
        Suspect(key, float(image), float(peak), float(oddity))
        for key, (image, peak), oddity in zip(keys, scores, oddities, strict=True)
    ]
    return sorted(suspects, key=lambda suspect: (-suspect.oddity, suspect.key))


def suspect_images(
    detector: Detector, suspects: list[Suspect], originals: SourceImages, group: str | None = None
) -> Iterator[tuple[Suspect, Pixels, Detection]]:
    """Query suspects again, for their maps; yields each with its picture, which is grey where the file is missing."""
    ids = detector.gallery.ids([suspect.key for suspect in suspects])
    groups = leave_out_groups(detector.gallery.snapshot(), ids, group)
    for suspect, detection in zip(suspects, detector.leave_one_out(ids, groups), strict=True):
        yield suspect, _picture(suspect.key, detector, originals), detection


def _picture(key: str, detector: Detector, originals: SourceImages) -> Pixels:
    view = detector.gallery.spec.view
    try:
        return view.resize(originals.decode(key))
    except ImageError:
        return np.full((*view.resized, 3), GREY, np.uint8)
