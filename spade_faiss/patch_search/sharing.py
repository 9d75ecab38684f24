"""Work that several threads take from one list, each with a worker of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from ..system.threads import single_threads, torch_threads

T = TypeVar("T")
Contra = TypeVar("Contra", contravariant=True)


class Runs(Protocol[Contra]):
    """A worker."""

    def run(self, work: Iterator[Contra]) -> None:
        """Do pieces of work until there are no more."""
        ...


def share_out(work: Sequence[T], workers: Sequence[Runs[T]]) -> None:
    """Let the workers take turns in the order of the work: one here, several in threads of their own."""
    if len(workers) == 1:
        workers[0].run(iter(work))
        return
    lock, items = threading.Lock(), iter(work)

    def shared() -> Iterator[T]:
        while True:
            with lock:
                item = next(items, None)
            if item is None:
                return
            yield item

    try:
        list(single_threads(max(torch_threads(), len(workers))).map(lambda worker: worker.run(shared()), workers))
    finally:
        with lock:
            items = iter(())  # after an error or Ctrl-C no worker goes on
