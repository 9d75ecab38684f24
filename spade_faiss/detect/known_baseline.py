"""What a detector knows of normal images: a calibration's word, what another process has kept, or what it measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import CorruptGalleryError, MemberError
from .baseline import Baseline
from .kept_baseline import keep, read_kept
from .measure_baseline import measure
from .measure_doubts import with_doubts_of_sample
from .pipeline import Pipeline


class KnownBaseline:
    """The baseline of one detector, which asks for it under a lock.

    Attributes:
        baseline: None: it was neither given nor measured yet.
        has_doubts: whether it is known how much images are doubted, or that nothing asks for it.
    """

    def __init__(self, given: Baseline | None) -> None:
        """Begin with a calibration's, which says all that is to be known; None: there is none."""
        self.baseline = given
        self.has_doubts = given is not None
        self._generation: int | None = None  # at which it was measured; None: it was not
        self._is_kept = False

    def take(self, identity: Callable[[], dict[str, Any]]) -> None:
        """Take what another process has kept, if nothing is known; see kept_baseline."""
        if self.baseline is None and (about := _told(identity)) is not None:
            self.baseline = read_kept(about)
            self.has_doubts = self._is_kept = self.baseline is not None

    def measured(
        self, begin: Callable[[], Pipeline], doubts: bool, identity: Callable[[], dict[str, Any]] | None
    ) -> Baseline:
        """Return the baseline; what is not known is measured first.

        Args:
            begin: begins a run over the snapshot that is to be compared.
            doubts: find out how much images are doubted.
            identity: of the baseline, by which other processes may share it; None: they may not.
        """
        if identity:
            self.take(identity)
        if self.baseline is None:
            pipeline = begin()
            self.baseline, self._generation = measure(pipeline), pipeline.snapshot.manifest.generation
        if doubts and not self.has_doubts:
            pipeline = begin().scored_by(self.baseline)
            self.baseline, self.has_doubts = with_doubts_of_sample(pipeline), True
            if self._generation != pipeline.snapshot.manifest.generation:
                self._generation = None  # the sample and its doubts are of two commits
        if identity and self.has_doubts and self._generation is not None and not self._is_kept:
            self._is_kept = True
            about = _told(identity)
            if about is not None and about["generation"] == self._generation:
                keep(about, self.baseline)
        return self.baseline


def _told(identity: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Return an identity; None: not all rows can be read. A query that reads them says so."""
    try:
        return identity()
    except (CorruptGalleryError, MemberError):
        return None
