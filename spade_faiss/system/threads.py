"""Threads in which torch computes with one thread each."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from .forks import free_at_forks

S = TypeVar("S")
T = TypeVar("T")
_lock = free_at_forks(threading.Lock())
# By process, because a forked process has none of its parent's threads; by number, and how many each may start.
_pools: dict[tuple[int, int, int], ThreadPoolExecutor] = {}
_own = threading.local()


def torch_threads() -> int:
    """Return how many threads work of this thread may have: torch's number, or what side_by_side was called with.

    Waits while single_threads has changed torch's number.
    """
    with _lock:
        return getattr(_own, "number", None) or torch.get_num_threads()


def single_threads(number: int) -> ThreadPoolExecutor:
    """Return a pool of `number` threads in which torch computes with one thread each. Pools are kept and shared.

    torch's setting belongs to a thread, but threads that start later inherit it. So it is restored at once.
    """
    return _threads(number, 1)


def side_by_side(call: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """Return call(item) of each, in threads of their own where torch has several: while one waits, others compute.

    In each, torch computes with one thread, and torch_threads is what it is here.
    """
    threads = torch_threads()
    if threads == 1 or len(items) < 2:
        return [call(item) for item in items]
    return list(_threads(len(items), threads).map(call, items))


def in_single_threads(number: int, call: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """Return call(item) of each, in so many threads in which torch computes with one; 1: in this one."""
    if number == 1 or len(items) < 2:
        return [call(item) for item in items]
    return list(single_threads(number).map(_quiet(call), items))


def _quiet(call: Callable[..., T]) -> Callable[..., T]:
    """Return what calls it with no warning of an overflow: the caller refuses such results."""

    def quietly(*args: Any) -> T:
        with np.errstate(over="ignore", invalid="ignore"):
            return call(*args)

    return quietly


def _threads(number: int, each: int) -> ThreadPoolExecutor:
    """Return a pool of so many threads in which torch computes with one, and whose work may have so many."""
    key = os.getpid(), number, each
    with _lock:
        if key not in _pools:
            before, all_there = torch.get_num_threads(), threading.Barrier(number)

            def start() -> None:
                torch.get_num_threads()  # else the thread's first product would take the inherited number after all
                torch.set_num_threads(1)
                _own.number = each
                all_there.wait()

            pool = ThreadPoolExecutor(number, "spade-faiss-search")
            try:
                for future in [pool.submit(start) for _ in range(number)]:
                    future.result()
            except BaseException:  # as where no more threads may be started: those that wait for them are to end
                all_there.abort()
                pool.shutdown(wait=False)
                raise
            finally:
                torch.set_num_threads(before)
            _pools[key] = pool
        return _pools[key]


def in_one_thread(call: Callable[..., T], *args: Any) -> T:
    """Return call(*args), computed by torch in one thread: for little work, more threads only wait for each other."""
    with _lock:
        is_one = torch.get_num_threads() == 1
    return call(*args) if is_one else single_threads(1).submit(_quiet(call), *args).result()
