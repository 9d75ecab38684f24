"""What a detector knows of normal images: a calibration's word, what another process has kept, or what it measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import CorruptGalleryError, MemberError
from ..store.manifest import Manifest
from .baseline import Baseline
from .kept_baseline import keep, read_kept
from .measure_baseline import measure
from .measure_doubts import with_doubts_of_sample
from .pipeline import Pipeline


class KnownBaseline:
    """The baseline of one detector at one commit of its gallery. The detector asks for it under a lock.

    Attributes:
        baseline: None: it was neither given nor measured yet.
        has_doubts: whether it is known how much images are doubted, or that nothing asks for it.
    """

    def __init__(self, given: Baseline | None) -> None:
        """Begin with a calibration's, which says all that is to be known; None: there is none."""
        self._given = given
        self._manifest: Manifest | None = None  # of the commit that it is of, unless it was given
        self._forget()

    def _forget(self) -> None:
        self.baseline = self._given
        self.has_doubts = self._given is not None
        self._is_kept = False

    def turn_to(self, manifest: Manifest) -> None:
        """Forget what was measured over another commit."""
        if self._manifest != manifest:
            self._manifest = manifest
            self._forget()

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
            begin: begins a run over a snapshot of the commit.
            doubts: find out how much images are doubted.
            identity: of the baseline, by which other processes may share it; None: they may not.
        """
        if identity:
            self.take(identity)
        if self.baseline is None:
            self.baseline = measure(begin())
        if doubts and not self.has_doubts:
            self.baseline, self.has_doubts = with_doubts_of_sample(begin().scored_by(self.baseline)), True
        if identity and self.has_doubts and self._given is None and not self._is_kept:
            self._is_kept = True
            if (about := _told(identity)) is not None:
                keep(about, self.baseline)
        return self.baseline


def _told(identity: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Return an identity; None: not all rows can be read. A query that reads them says so."""
    try:
        return identity()
    except (CorruptGalleryError, MemberError):
        return None
