"""Which neighbours of a query a person has confirmed as normal."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..arrays import Ids
from ..store.copies import Copies
from ..store.snapshot import Snapshot
from ..store.trusted import Trusted, trusted_ids


class TrustedImages:
    """The trusted images of one snapshot; see Gallery.trust."""

    def __init__(self, snapshot: Snapshot, copies: Copies, trusted: Trusted) -> None:
        """Keep what is trusted: digests by key."""
        self._snapshot = snapshot
        self._copies = copies
        self._trusted = trusted

    @cached_property
    def _ids(self) -> Ids:
        """The ids of trusted images and of their copies, as only one of a content is a neighbour, and of all tiles."""
        return self._copies.with_copies(trusted_ids(self._snapshot, self._trusted))

    def among(self, ids: Ids) -> NDArray[np.bool_] | None:
        """Return which of some neighbours are trusted; None: none of them."""
        if not self._trusted:
            return None
        found = np.isin(ids, self._ids)
        return found if found.any() else None
