"""Which normal images are least like the others: contamination in the normal set is found before it hides defects.

A defect among the normal images matches itself in every image that shows it, and is then called normal for ever after.
Compared with the others alone, it stands out. Copies of one image are left out together. Several contaminations of one
kind vouch for each other: name the images that belong together with `group`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..arrays import Pixels
from ..errors import ImageError
from ..images.view import View
from ..store.source_images import SourceImages
from .baseline import LogStats
from .detection import Detection
from .detector import Detector
from .normal_scores import Sampling, draw, leave_out_groups, normal_scores, require_group

GREY = 128  # of a picture whose file is not at hand


@dataclass(frozen=True)
class Suspect:
    """A normal image, and how far it is from the others.

    Attributes:
        key: of the image.
        image_score: as a query's.
        map_max: maximum of its map.
        outlier_score: spreads of logarithms above the median of normal images; the larger one of both scores.
        copies: other images of the gallery with the same content, which were left out with it.

    >>> suspect = sf.find_suspects(detector)[0]
    >>> suspect.oddity == suspect.outlier_score  # its former name
    True
    """

    key: str
    image_score: float
    map_max: float
    outlier_score: float
    copies: int = 0

    @property
    def oddity(self) -> float:
        """The outlier score under its former name."""
        return self.outlier_score

    def to_json(self) -> dict[str, str | float]:
        """Return it as JSON values, with the outlier score under its former name.

        >>> list(sf.find_suspects(detector)[0].to_json())
        ['key', 'image_score', 'map_max', 'oddity']
        """
        values: dict[str, str | float] = {"key": self.key, "image_score": self.image_score, "map_max": self.map_max}
        return {**values, "oddity": self.outlier_score}


def find_suspects(
    detector: Detector, *, sample: int | None = None, group: str | None = None, seed: int = 0, progress: bool = False
) -> list[Suspect]:
    """Query normal images against the others; returns them, the least like the others first.

    Args:
        detector: over the gallery.
        sample: how many images, drawn with the seed; None: all.
        group: see calibrate.
        seed: seed of the sample.
        progress: a bar on stderr, where that is a terminal.

    Raises:
        OptionError: sample, seed or group is none, or the group matches no key.
        NotEnoughImagesError: an image has no other to be compared with.
        MemberError: a member of the cluster is missing, even if queries go on without it (partial="allow").

    >>> [suspect.key for suspect in sf.find_suspects(detector, sample=2)]
    ['...png', '...png']
    """
    snapshot = detector.gallery.snapshot()
    detector.require_whole(snapshot)
    require_group(snapshot, group)  # before hours are spent
    # One run: another thread may write for as long as this takes. And what images say of each other is to be found out.
    pipeline = detector.pipeline(snapshot, doubts=False)
    ids = draw(pipeline.snapshot, Sampling(sample, group, seed))
    classes = pipeline.copies.of(ids)
    scores = normal_scores(pipeline, ids, group, "audit", progress)
    detector.require_whole(snapshot)  # nor was any lost meanwhile
    _, distinct = np.unique([same[0] for same in classes], return_index=True)  # copies count once
    stats = [LogStats.of(column.tolist()) for column in scores[distinct].T]
    outlier_scores = np.max([one.distance(column) for one, column in zip(stats, scores.T, strict=True)], axis=0)
    suspects = [
        Suspect(key, float(image), float(peak), float(outlier_score), len(same) - 1)
        for key, (image, peak), outlier_score, same in zip(
            pipeline.snapshot.keys(ids), scores, outlier_scores, classes, strict=True
        )
    ]
    return sorted(suspects, key=lambda suspect: (-suspect.outlier_score, suspect.key))


def suspect_images(
    detector: Detector, suspects: list[Suspect], source_images: SourceImages, group: str | None = None
) -> Iterator[tuple[Suspect, Pixels, Detection]]:
    """Query suspects again, for their maps; yields each with its picture, which is grey if the file is missing."""
    ids, pipeline = detector.gallery.ids([suspect.key for suspect in suspects]), detector.pipeline(doubts=False)
    groups = leave_out_groups(pipeline.snapshot, ids, group)
    for suspect, detection in zip(suspects, pipeline.leave_one_out(ids, groups), strict=True):
        yield suspect, _picture(suspect.key, detector.gallery.spec.view, source_images), detection


def _picture(key: str, view: View, source_images: SourceImages) -> Pixels:
    try:
        return view.resize(source_images.decode(key))
    except ImageError:
        return np.full((*view.resized, 3), GREY, np.uint8)
