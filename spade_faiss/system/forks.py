"""Repair what a forked process inherits but cannot use: locks that a thread of the parent held, OpenMP's threads.

The child has neither those threads nor OpenMP's, and would wait for them for ever.
"""

from __future__ import annotations

import os
import sys
import weakref
from typing import Any, Protocol, TypeVar

import faiss


class Forked(Protocol):
    """An object with locks, or with files that are open in HDF5."""

    def after_fork(self) -> None:
        """Replace what cannot be used in the child, whose only thread calls this."""
        ...


L = TypeVar("L", bound=Any)
FORKS = hasattr(os, "register_at_fork")  # not on Windows

_known: weakref.WeakSet[Forked] = weakref.WeakSet()


def remember(one: Forked) -> None:
    """Call after_fork in every child that is forked from now on, while the object exists."""
    _known.add(one)


def _in_child() -> None:
    # The thread that forked still counts on OpenMP's other threads. A limit of one keeps it from waiting for them.
    faiss.omp_set_num_threads(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    for one in list(_known):
        one.after_fork()


def free_at_forks(lock: L) -> L:
    """Make every fork wait until a module's lock is free, and return the lock; for locks that are not held for long."""
    if FORKS:
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


if FORKS:
    os.register_at_fork(after_in_child=_in_child)
