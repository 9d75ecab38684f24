"""How far each of a query's neighbours is known as normal: by a person's word, or by that of the other normal images.

A person may have confirmed an image, see Gallery.trust. And a calibration compares each normal image with the others:
the higher it scores, the more these doubt it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..arrays import Ids
from ..store.copies import Copies
from ..store.snapshot import Snapshot
from ..store.trusted import Trusted, trusted_ids

DOUBTED = 0.25  # of the images: of defects that hide among normal images, nearly all have scores among these


def doubts_of(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return from the scores of normal images, (n,), how much each is doubted: by rank, from 0 to 1 for the highest.

    Of the highest quarter; the others vouch for the rest, whose doubts are 0.

    >>> doubts_of(np.array([3.0, 1.0, 9.0, 2.0, 4.0, 7.0, 5.0, 8.0])).tolist()
    [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.5]
    """
    above = len(scores) - np.searchsorted(np.sort(scores), scores, side="right")
    doubts: NDArray[np.float64] = np.maximum(0, 1 - above / (DOUBTED * len(scores)))
    return doubts


@dataclass(frozen=True)
class Standing:
    """What is known of a query's K neighbours.

    Attributes:
        trusted: (K,) bool, whether a person has confirmed it.
        doubts: (K,) from 0 to 1, how much the other normal images doubt it; NaN: it was not compared with them.
    """

    trusted: NDArray[np.bool_]
    doubts: NDArray[np.float64]

    @classmethod
    def nothing(cls, k: int) -> Standing:
        """Return that nothing is known of any of k neighbours."""
        return cls(np.zeros(k, np.bool_), np.full(k, np.nan))

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which are known as normal, (K,): by a person's word or, as they are not doubted, by that of the others."""
        known: NDArray[np.bool_] = self.trusted | (self.doubts == 0)
        return known


class Standings:
    """The standing of the images of one snapshot."""

    def __init__(self, snapshot: Snapshot, copies: Copies, trusted: Trusted) -> None:
        """Keep what is trusted: digests by key."""
        self._snapshot = snapshot
        self._copies = copies
        self._trusted = trusted

    @cached_property
    def _ids(self) -> Ids:
        """The ids of trusted images and of their copies, as only one of a content is a neighbour, and of all tiles."""
        return self._copies.with_copies(trusted_ids(self._snapshot, self._trusted))

    def among(self, ids: Ids, doubts: Mapping[str, float]) -> Standing | None:
        """Return the standing of some neighbours; None: nothing is known of any image.

        Args:
            ids: of the neighbours, (K,).
            doubts: of images by their digests.
        """
        if not self._trusted and not doubts:
            return None
        trusted = np.isin(ids, self._ids) if self._trusted else np.zeros(len(ids), np.bool_)
        digests = self._snapshot.digests(ids) if doubts else [""] * len(ids)
        return Standing(trusted, np.array([doubts.get(digest, np.nan) for digest in digests]))
