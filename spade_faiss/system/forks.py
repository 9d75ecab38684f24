"""What a forked process cannot use as its parent left it: a lock that some thread held, the threads of OpenMP.

Neither is there in the child, which would wait for them for ever.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import Protocol

import faiss


class Forked(Protocol):
    """Something with locks, or with open files that HDF5 knows of."""

    def after_fork(self) -> None:
        """Make it anew in the child; its only thread calls this."""
        ...


FORKS = hasattr(os, "register_at_fork")  # not on Windows

_known: weakref.WeakSet[Forked] = weakref.WeakSet()


def remember(one: Forked) -> None:
    """Have after_fork called in every child that is forked from now on."""
    _known.add(one)


def _in_child() -> None:
    # The thread that forked believes that it has OpenMP's others still. With one it asks none of them.
    faiss.omp_set_num_threads(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    for one in list(_known):
        one.after_fork()


def free_at_forks(lock: threading.Lock) -> threading.Lock:
    """Let a fork wait until nobody holds a module's lock; for those that are held briefly."""
    if FORKS:
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


if FORKS:
    os.register_at_fork(after_in_child=_in_child)
