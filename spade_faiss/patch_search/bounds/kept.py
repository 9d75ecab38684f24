"""Neighbours that searches have prepared, kept for later ones: those of the images of one line are often the same.

What neighbours are prepared for, a way, is then not chosen anew for each query. It changes the time that a search
takes, and not its answer.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...system.forks import remember

if TYPE_CHECKING:
    from .gallery import Frame
    from .plan import Projection
    from .prepared import Prepared

AGAIN = 64  # searches that take a way before it is chosen anew; twice as many each time that it comes out the same,
MOST = 4096  # but so many at most
MORE = 4  # times the patches to measure of the first of them, and it is, too


@dataclass
class Way:
    """How the neighbours of a level are prepared."""

    frame: Frame
    projection: Projection
    searches: int = 0  # that have taken it
    share: float | None = None  # of all pairs of patches that the first of them had to measure
    until: int = field(default_factory=lambda: AGAIN)  # searches that may take it

    def is_like(self, other: Way) -> bool:
        """Return whether neighbours are multiplied in the same way."""
        mine, theirs = self.projection, other.projection
        return (mine.kind, mine.width) == (theirs.kind, theirs.width)


@dataclass(frozen=True)
class _Kept:
    way: Way
    one: Prepared

    @property
    def bytes(self) -> int:
        return sum(int(each.nbytes) for each in (self.one.cells, *self.one.held))


class KeptNeighbours:
    """Neighbours as recent searches have prepared them, at most `limit` bytes. Threads may share them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._entries: OrderedDict[tuple[int, Hashable], _Kept] = OrderedDict()  # least recent first
        self._ways: dict[int, Way] = {}
        self._lock = threading.Lock()
        remember(self)

    def __len__(self) -> int:
        return len(self._entries)

    def after_fork(self) -> None:
        """Replace the inherited lock, which another thread may have held."""
        self._lock = threading.Lock()

    def levels(self, names: Sequence[Hashable], number: int) -> list[KeptLevel]:
        """Return what is kept of so many levels of the images with these names."""
        return [KeptLevel(self, level, list(names)) for level in range(number)]

    def way(self, level: int) -> Way | None:
        """Return how neighbours are prepared; None: that has to be chosen."""
        with self._lock:
            found = self._ways.get(level)
            if found is not None:
                found.searches += 1
                if found.searches > found.until:
                    return None
            return found

    def choose(self, level: int, way: Way) -> None:
        """Prepare neighbours in another way."""
        with self._lock:
            before = self._ways.get(level)
            if before is not None and before.is_like(way):
                way.until = min(2 * before.until, MOST)
            self._ways[level] = way

    def tell(self, level: int, way: Way, share: float) -> None:
        """Say what share of pairs of patches a search had to measure."""
        with self._lock:
            if way.share is None:
                way.share = share
            elif share > MORE * way.share and self._ways.get(level) is way:
                del self._ways[level]  # the images are of another kind

    def take(self, level: int, names: Sequence[Hashable], way: Way) -> list[Prepared | None]:
        """Return which of these neighbours are prepared in this way."""
        found: list[Prepared | None] = []
        with self._lock:
            for name in names:
                kept = self._entries.get((level, name))
                found.append(kept.one if kept is not None and kept.way is way else None)
                if kept is not None:
                    self._entries.move_to_end((level, name))
        return found

    def keep(self, level: int, name: Hashable, way: Way, one: Prepared) -> None:
        """Keep a neighbour, and let go of those that were not needed for longest."""
        kept = _Kept(way, one)
        with self._lock:
            before = self._entries.pop((level, name), None)
            self._entries[level, name] = kept
            self.bytes += kept.bytes - (before.bytes if before else 0)
            while self.bytes > self.limit and self._entries:
                _, oldest = self._entries.popitem(last=False)
                self.bytes -= oldest.bytes


@dataclass(frozen=True)
class KeptLevel:
    """What is kept of one level of the neighbours of a query."""

    store: KeptNeighbours
    level: int
    names: list[Hashable]  # of the neighbours: the same name is the same image
