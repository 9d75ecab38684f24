"""A cache of pyramid levels, bounded in bytes and shared by threads."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from ..arrays import Array, Ids
from ..extractors.spec import ExtractorSpec
from ..system.forks import remember
from .reader import Identity, PyramidSource

if TYPE_CHECKING:
    import torch

Level = TypeVar("Level", Array, "torch.Tensor")


@dataclass
class _Plan(Generic[Level]):
    """Where one read gets each image from. A slot is an image's place in the result, [(c, h, w), ...]."""

    ready: list[tuple[list[Level], list[Level]]] = field(default_factory=list)  # slot, cached levels
    mine: dict[Identity, tuple[int, Future[list[Level]]]] = field(default_factory=dict)  # this thread reads and caches
    waiting: list[tuple[int, list[Level], Future[list[Level]]]] = field(
        default_factory=list
    )  # id, slot; a thread reads
    direct: list[tuple[int, list[Level]]] = field(default_factory=list)  # id, slot; read without room to cache


class LevelCache(ABC, Generic[Level]):
    """Keeps the levels of the most recent images, at most `limit` bytes. Threads may share one.

    A thread that needs an image which another thread is reading waits for it. The limit counts images that are being
    read. The subclass says where levels lie and how they get there.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.hits = 0  # images that were cached, or that another thread was reading
        self.misses = 0
        self._entries: OrderedDict[Identity, list[Level]] = OrderedDict()  # least recent first
        self._reading: dict[Identity, Future[list[Level]]] = {}
        self._bytes = 0  # of entries and of images that are being read to become entries
        self._lock = threading.Lock()
        remember(self)

    def after_fork(self) -> None:
        """Replace the inherited lock and drop all entries: the threads that were reading do not exist in the child."""
        self._lock = threading.Lock()
        self._entries, self._reading, self._bytes = OrderedDict(), {}, 0

    @abstractmethod
    def _empty(self, spec: ExtractorSpec, *n: int) -> list[Level]:
        """Allocate the levels of n images, [(n, c, h, w), ...], or of one, [(c, h, w), ...]."""

    @abstractmethod
    def _copy(self, targets: list[Level], levels: list[Level]) -> None:
        """Copy levels into allocated ones."""

    @abstractmethod
    def _fetch(self, source: PyramidSource, ids: Sequence[int], out: Sequence[list[Level]]) -> None:
        """Read levels of n images into allocated ones; see PyramidSource.read_into."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes of cached levels, at most `limit`."""
        return self._bytes

    def holds(self, source: PyramidSource, ids: Sequence[int] | Ids) -> int:
        """Return how many of these images are cached or being read."""
        identities = [source.identity(int(row_id)) for row_id in ids]
        with self._lock:
            return sum(identity in self._entries or identity in self._reading for identity in identities)

    def fits(self, source: PyramidSource, n: int) -> bool:
        """Return whether n images fit the limit."""
        return n * _level_bytes(source.spec) <= self.limit

    def read(self, source: PyramidSource, ids: Sequence[int] | Ids) -> list[Level]:
        """Return a copy of the levels of images, in that order: [(len(ids), c, h, w), ...].

        Raises:
            Whatever the source raises.
        """
        out = self._empty(source.spec, len(ids))
        slots = [[level[position] for level in out] for position in range(len(ids))]
        plan = self._plan(source, [int(row_id) for row_id in ids], slots)
        self._read_mine(source, plan)
        for row_id, slot, future in plan.waiting:
            if future.exception() is None:
                plan.ready.append((slot, future.result()))
            else:  # the other thread raises its error; this one reads the image itself
                self._fetch(source, [row_id], [slot])
        if plan.ready:
            self._copy(
                [target for slot, _ in plan.ready for target in slot],
                [level for _, levels in plan.ready for level in levels],
            )
        return out

    def _plan(self, source: PyramidSource, ids: list[int], slots: list[list[Level]]) -> _Plan[Level]:
        plan, size = _Plan[Level](), _level_bytes(source.spec)
        identities = [source.identity(row_id) for row_id in ids]
        with self._lock:
            for identity in identities:  # before anything is evicted, so that none of these is
                if identity in self._entries:
                    self._entries.move_to_end(identity)
            wanted = set(identities)
            for identity, row_id, slot in zip(identities, ids, slots, strict=True):
                if identity in self._entries:
                    self.hits += 1
                    plan.ready.append((slot, self._entries[identity]))
                elif identity in self._reading:
                    self.hits += 1
                    plan.waiting.append((row_id, slot, self._reading[identity]))
                elif self._make_room(size, wanted):
                    self.misses += 1
                    self._reading[identity] = Future()
                    plan.mine[identity] = row_id, self._reading[identity]
                    plan.waiting.append((row_id, slot, self._reading[identity]))
                else:
                    self.misses += 1
                    plan.direct.append((row_id, slot))
        return plan

    def _make_room(self, size: int, wanted: set[Identity]) -> bool:
        """Reserve bytes for one more image; evicts the least recent ones, but none of those wanted."""
        while self._bytes + size > self.limit:
            oldest = next(iter(self._entries), None)
            if oldest is None or oldest in wanted:
                return False
            del self._entries[oldest]
            self._bytes -= size
        self._bytes += size
        return True

    def _read_mine(self, source: PyramidSource, plan: _Plan[Level]) -> None:
        """Read the images that are this thread's, cache those that fit, and pass them to the threads that wait."""
        ids = [row_id for row_id, _ in plan.mine.values()] + [row_id for row_id, _ in plan.direct]
        try:
            buffers = [self._empty(source.spec) for _ in plan.mine]
            if ids:
                self._fetch(source, ids, buffers + [slot for _, slot in plan.direct])
        except BaseException as error:
            with self._lock:
                for identity in plan.mine:
                    del self._reading[identity]
                self._bytes -= len(plan.mine) * _level_bytes(source.spec)
            for _, future in plan.mine.values():
                future.set_exception(error)
            raise
        with self._lock:
            for identity, levels in zip(plan.mine, buffers, strict=True):
                self._entries[identity] = levels
                del self._reading[identity]
        for (_, future), levels in zip(plan.mine.values(), buffers, strict=True):
            future.set_result(levels)


class PyramidCache(LevelCache[Array]):
    """A LevelCache of arrays in memory, which reads from the source."""

    def _empty(self, spec: ExtractorSpec, *n: int) -> list[Array]:
        return [np.empty((*n, *shape), spec.dtype) for shape in spec.level_shapes]

    def _copy(self, targets: list[Array], levels: list[Array]) -> None:
        for target, level in zip(targets, levels, strict=True):
            np.copyto(target, level)

    def _fetch(self, source: PyramidSource, ids: Sequence[int], out: Sequence[list[Array]]) -> None:
        source.read_into(ids, out)


def _level_bytes(spec: ExtractorSpec) -> int:
    """Return the bytes of one image's levels."""
    return sum(int(np.prod(shape)) for shape in spec.level_shapes) * np.dtype(spec.dtype).itemsize
