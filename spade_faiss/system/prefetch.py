"""Threads that compute results before they are needed, in order and in bounded memory; items in batches."""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import NoReturn, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class ByteGate:
    """Lets threads in while what they hold together stays within a number of bytes. One alone is always let in."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._changed = threading.Condition()

    def enter(self, size: int) -> bool:
        """Hold so many bytes if there is room; returns whether there was. `leave` makes room again."""
        with self._changed:
            if self._held and self._held + size > self._limit:
                return False
            self._held += size
            return True

    def leave(self, size: int) -> None:
        """Make room for others."""
        with self._changed:
            self._held -= size
            self._changed.notify_all()

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Wait until there is room for so many bytes, and hold them for the block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._held += size
        try:
            yield
        finally:
            self.leave(size)


def read_ahead(items: Iterable[T], function: Callable[[T], R], workers: int = 4, ahead: int = 32) -> Iterator[R]:
    """Yield function(item) in the order of the items, computed by threads up to `ahead` items before they are needed.

    Memory is bounded by `ahead` results. An exception of the function is raised at its item's turn.
    """
    iterator, pool = iter(items), ThreadPoolExecutor(workers, thread_name_prefix="read-ahead")
    try:
        waiting: deque[Future[R]] = deque(pool.submit(function, item) for item in islice(iterator, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(iterator, 1))
            yield result
    finally:
        _shut_down(pool)


def one_ahead(items: Iterable[T], function: Callable[[T], R], background: bool = True) -> Iterator[R]:
    """Yield function(item) in the order of the items; while the caller works on one, a thread computes the next.

    The caller's thread takes the items, one ahead of what is yielded. It also computes the first result, which has
    nothing to overlap with. Memory is bounded by two results. An exception of the items or of the function is raised
    at its item's turn. Closing early waits for the one result that is being computed.

    Args:
        items: one is taken ahead of its need.
        function: computes the result of one item.
        background: False: the caller's thread computes each result at its turn.
    """
    if not background:
        yield from map(function, items)
        return
    iterator, pool = iter(items), ThreadPoolExecutor(1, thread_name_prefix="one-ahead")
    waiting: deque[Callable[[], R]] = deque(partial(function, item) for item in islice(iterator, 1))
    try:
        while waiting:
            results = [waiting.popleft()()]
            try:
                waiting.extend(pool.submit(function, item).result for item in islice(iterator, 1))
            except Exception as error:
                waiting.append(partial(_raise, error))
            yield results.pop()  # popped, so that this frame does not keep it while the next is computed
    finally:
        _shut_down(pool)


_collecting = set[int]()  # threads that collect garbage now


def _note_collection(phase: str, _: object) -> None:
    (_collecting.add if phase == "start" else _collecting.discard)(threading.get_ident())


gc.callbacks.append(_note_collection)


def _shut_down(pool: ThreadPoolExecutor) -> None:
    """Drop what has not begun and wait for the threads, unless the garbage collector closes their generator.

    It may do so in any thread at any place: in one of these, which cannot wait for itself, or in one that is starting
    and holds the lock that a thread needs to end.
    """
    with suppress(RuntimeError):  # one of these may drop the last reference, too
        pool.shutdown(wait=threading.get_ident() not in _collecting, cancel_futures=True)


def _raise(error: Exception) -> NoReturn:
    raise error


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items, the last one possibly shorter.

    An exception of the items is raised after the list of those before it.
    """
    iterator, error = iter(items), None
    while error is None:
        batch: list[T] = []
        try:
            for item in islice(iterator, size):
                batch.append(item)  # one by one: what comes before an exception is kept
        except Exception as raised:
            error = raised
        if not batch:
            break
        yield batch
    if error is not None:
        raise error
