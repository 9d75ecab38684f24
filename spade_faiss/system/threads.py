"""Threads in which torch computes with one thread each."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from .forks import free_at_forks

T = TypeVar("T")
_lock = free_at_forks(threading.Lock())
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}  # by process, because a fork has none of its parent's threads


def torch_threads() -> int:
    """Return torch's number of threads here, also in a thread that asks for it while a pool is made."""
    with _lock:
        return torch.get_num_threads()


def single_threads(number: int) -> ThreadPoolExecutor:
    """Return a pool of `number` threads that is kept: torch's setting is for a thread, but reaches those made later.

    It is put back at once, so that nobody else's new thread starts with it.
    """
    key = os.getpid(), number
    with _lock:
        if key not in _pools:
            before, all_there = torch.get_num_threads(), threading.Barrier(number)

            def start() -> None:
                torch.get_num_threads()  # or its first product would take the number for new threads after all
                torch.set_num_threads(1)
                all_there.wait()

            pool = ThreadPoolExecutor(number, "spade-faiss-search")
            try:
                for future in [pool.submit(start) for _ in range(number)]:
                    future.result()
            finally:
                torch.set_num_threads(before)
            _pools[key] = pool
        return _pools[key]


def in_one_thread(call: Callable[..., T], *args: Any) -> T:
    """Call it with torch computing in one thread: for little work, more only wait for each other on a busy machine."""
    if torch_threads() == 1:
        return call(*args)

    def quietly() -> T:
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused where it ends up
            return call(*args)

    return single_threads(1).submit(quietly).result()
