"""What earlier searches by bounds have found out about features of the same kind, so that not every search has to.

Whether and in which directions patches are projected changes the time that a search takes, not its answer. The images
of one line are alike: what suits one query suits the next. Every AGAIN-th search finds it out anew.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...system.forks import free_at_forks
from .plan import Projection

if TYPE_CHECKING:
    from .gallery import Frame

AGAIN = 16
KINDS = 64  # that are remembered, the recent ones
MORE = 1.25  # times the variance that directions may leave of another sample, and LITTLE
LITTLE = 0.005
ALIKE = 4.0  # times as large, at most, are the squares of patches that a frame suits


@dataclass
class Choice:
    """What was found out."""

    projections: list[Projection]  # none: bounds leave so much that another engine is faster
    left: float  # share of the sample's variance that the directions leave; 1: there are none
    frame: Frame | None  # of the patches, without a shift
    size: float  # mean square of the sample's patches in it
    searches: int = 1  # that have taken it


class Choices:
    """The choices for some kinds of features, by whatever tells these apart; threads may share them."""

    def __init__(self) -> None:
        self._lock = free_at_forks(threading.Lock())
        self._choices: OrderedDict[Hashable, Choice] = OrderedDict()

    def frame(self, kind: Hashable) -> Frame | None:
        """Return where an earlier search's patches lay, if its directions may suit others of the kind."""
        with self._lock:
            found = self._choices.get(kind)
        return found.frame if found is not None and found.projections else None

    def take(self, kind: Hashable, sample: torch.Tensor | None = None) -> Choice | None:
        """Return what an earlier search chose; None: find out.

        Args:
            kind: of the features.
            sample: (c, s) patches about their mean, which the directions have to explain as they did the earlier one's;
                None: only what says that bounds leave too much is wanted.
        """
        with self._lock:
            found = self._choices.get(kind)
        if found is None or (sample is None and found.projections):
            return None
        if sample is not None and not explains(found, sample):
            return None
        with self._lock:
            found.searches += 1
            if found.searches > AGAIN:
                self._choices.pop(kind, None)
                return None
        return found

    def keep(
        self, kind: Hashable, projections: list[Projection], sample: torch.Tensor, frame: Frame | None = None
    ) -> None:
        """Remember what was chosen for a kind, with a sample as for `take`; the frame is without a shift."""
        choice = Choice(projections, left_of(projections, sample), frame, size_of(sample))
        with self._lock:
            self._choices[kind] = choice
            self._choices.move_to_end(kind)
            while len(self._choices) > KINDS:
                self._choices.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._choices.clear()


def explains(choice: Choice, sample: torch.Tensor) -> bool:
    """Return whether the directions leave about as little of a sample (c, s) as of the earlier one.

    Patches that are far smaller or larger need another scale.
    """
    if choice.frame is not None and not choice.size / ALIKE <= size_of(sample) <= choice.size * ALIKE:
        return False
    return left_of(choice.projections, sample) <= MORE * choice.left + LITTLE


def size_of(sample: torch.Tensor) -> float:
    """Return the mean squared length of patches (c, s)."""
    return float(sample.square().sum()) / sample.shape[1]


def left_of(projections: Sequence[Projection], sample: torch.Tensor) -> float:
    """Return the share of a sample's squares (c, s) that the directions of the widest projection leave."""
    directions = [one.directions for one in projections if one.directions is not None]
    total = float(sample.square().sum())
    if not directions or not 0 < total < float("inf"):
        return 1.0
    along = max(directions, key=len) @ sample
    return 1 - float(along.square().sum()) / total


CHOICES = Choices()  # of this process
