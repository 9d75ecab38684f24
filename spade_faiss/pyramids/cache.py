"""A cache of pyramid levels, bounded in bytes, that threads share."""

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

if TYPE_CHECKING:
    import torch
from .reader import Identity, PyramidSource

Level = TypeVar("Level", Array, "torch.Tensor")


@dataclass
class _Plan(Generic[Level]):
    """How each image of one read is come by; a slot is an image's place in the result, [(c, h, w), ...]."""

    ready: list[tuple[list[Level], list[Level]]] = field(default_factory=list)  # slot, levels
    mine: dict[Identity, tuple[int, Future[list[Level]]]] = field(default_factory=dict)  # to be read and kept
    waiting: list[tuple[int, list[Level], Future[list[Level]]]] = field(default_factory=list)  # id, slot; being read
    direct: list[tuple[int, list[Level]]] = field(default_factory=list)  # id, slot; to be read, no room to keep


class LevelCache(ABC, Generic[Level]):
    """The levels of the images that were needed last, at most `limit` bytes of them. Threads may share one.

    What a thread needs and another one is reading already is waited for, not read again. The bound counts what is
    being read as well. Where levels lie, and how they get there, is the subclass's.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.hits = 0  # images that were found here, or with a thread that was reading them
        self.misses = 0
        self._entries: OrderedDict[Identity, list[Level]] = OrderedDict()  # least recently needed first
        self._reading: dict[Identity, Future[list[Level]]] = {}
        self._bytes = 0  # of entries, and of what is being read to become one
        self._lock = threading.Lock()
        remember(self)

    def after_fork(self) -> None:
        """Be of use in a forked process: empty, as threads that were reading into it are not there."""
        self._lock = threading.Lock()
        self._entries, self._reading, self._bytes = OrderedDict(), {}, 0

    @abstractmethod
    def _empty(self, spec: ExtractorSpec, *n: int) -> list[Level]:
        """Return room for the levels of n images, [(n, c, h, w), ...], or of one, [(c, h, w), ...]."""

    @abstractmethod
    def _copy(self, target: Level, level: Level) -> None:
        """Write a level into such room."""

    @abstractmethod
    def _fetch(self, source: PyramidSource, ids: Sequence[int], out: Sequence[list[Level]]) -> None:
        """Do as PyramidSource.read_into, with such room."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """What it holds, at most `limit`."""
        return self._bytes

    def holds(self, source: PyramidSource, ids: Sequence[int] | Ids) -> int:
        """Return how many of these images it holds, or a thread is reading."""
        identities = [source.identity(int(row_id)) for row_id in ids]
        with self._lock:
            return sum(identity in self._entries or identity in self._reading for identity in identities)

    def fits(self, source: PyramidSource, n: int) -> bool:
        """Tell whether n images are within the bound."""
        return n * _bytes(source.spec) <= self.limit

    def read(self, source: PyramidSource, ids: Sequence[int] | Ids) -> list[Level]:
        """Return the levels of images, in that order: [(len(ids), c, h, w), ...], the caller's own.

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
            else:  # of the other thread's, and not for this one to raise
                self._fetch(source, [row_id], [slot])
        for slot, levels in plan.ready:
            for target, level in zip(slot, levels, strict=True):
                self._copy(target, level)
        return out

    def _plan(self, source: PyramidSource, ids: list[int], slots: list[list[Level]]) -> _Plan[Level]:
        plan, size = _Plan[Level](), _bytes(source.spec)
        identities = [source.identity(row_id) for row_id in ids]
        with self._lock:
            for identity in identities:  # all before anything is evicted, so that it is not one of these
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
        """Set bytes aside for one more image, at the cost of those least recently needed, but not of those wanted."""
        while self._bytes + size > self.limit:
            oldest = next(iter(self._entries), None)
            if oldest is None or oldest in wanted:
                return False
            del self._entries[oldest]
            self._bytes -= size
        self._bytes += size
        return True

    def _read_mine(self, source: PyramidSource, plan: _Plan[Level]) -> None:
        """Read what is missing, keep what there is room for, and hand it to the threads that wait for it."""
        ids = [row_id for row_id, _ in plan.mine.values()] + [row_id for row_id, _ in plan.direct]
        try:
            buffers = [self._empty(source.spec) for _ in plan.mine]
            if ids:
                self._fetch(source, ids, buffers + [slot for _, slot in plan.direct])
        except BaseException as error:
            with self._lock:
                for identity in plan.mine:
                    del self._reading[identity]
                self._bytes -= len(plan.mine) * _bytes(source.spec)
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
    """A LevelCache in memory: arrays, read from the source itself."""

    def _empty(self, spec: ExtractorSpec, *n: int) -> list[Array]:
        return [np.empty((*n, *shape), spec.dtype) for shape in spec.level_shapes]

    def _copy(self, target: Array, level: Array) -> None:
        np.copyto(target, level)

    def _fetch(self, source: PyramidSource, ids: Sequence[int], out: Sequence[list[Array]]) -> None:
        source.read_into(ids, out)


def _bytes(spec: ExtractorSpec) -> int:
    return sum(int(np.prod(shape)) for shape in spec.level_shapes) * np.dtype(spec.dtype).itemsize
