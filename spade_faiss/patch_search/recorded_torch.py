"""Searches of the same sizes on a GPU, recorded once and then started with one launch.

A search is some hundred kernels, and the host takes longer to start a small one than the GPU takes to run it. From the
third search of the same sizes on, a CUDA graph starts them all: it reads from and writes to the same memory each time,
so that inputs are copied there, and results are read before the next one starts.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..system.transfers import as_tensor, uploaded
from .candidates_torch import Chosen, Search
from .patches_torch import Levels

AFTER = 2  # searches of the same sizes that are not recorded: they compile, and measure what is fastest
RECORDED = 8  # sizes
SPARE = 4  # one of so many parts of the GPU's memory must be free, or nothing is recorded: a graph keeps its own

Found = tuple[Search, Chosen]


@dataclass
class _Recorded:
    """A recorded search. Whoever holds the lock may start it, and read its results."""

    sides: list[list[torch.Tensor]]
    graph: Any  # torch.cuda.CUDAGraph
    found: Found
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, sides: Sequence[Levels], kappa: int, distinct: bool, device: torch.device) -> _Recorded:
        """Record the search of queries [(b, 1, c, h, w), ...] among neighbours [(b, k, c, h, w), ...]."""
        there = [[torch.empty(as_tensor(level).shape, dtype=as_tensor(level).dtype, device=device) for level in side]
                 for side in sides]  # fmt: skip
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            search = Search.of(there[0], there[1], kappa, distinct)
            found = search, search.choose()
        return cls(there, graph, found)

    def start(self, sides: Sequence[Levels]) -> Found:
        """Search with other inputs of the same sizes."""
        for side, there in zip(sides, self.sides, strict=True):
            for level, target in zip(side, there, strict=True):
                tensor = as_tensor(level)
                target.copy_(tensor if tensor.is_cuda else tensor.pin_memory(), non_blocking=True)
        self.graph.replay()
        return self.found


_lock = threading.Lock()
_known: OrderedDict[tuple[Any, ...], _Recorded | int | None] = OrderedDict()  # how often it was searched; None: cannot


@contextmanager
def chosen(queries: Levels, galleries: Levels, kappa: int, distinct: bool, device: torch.device) -> Iterator[Found]:
    """Choose and measure candidates, by a recorded search where there is one. Results are to be read inside.

    Args:
        queries: levels of b queries [(b, 1, c, h, w), ...].
        galleries: of their neighbours [(b, k, c, h, w), ...], arrays, or tensors on the device.
        kappa: number of nearest patches.
        distinct: see pyramid_torch.search_together.
        device: of torch.
    """
    recorded = _recorded((queries, galleries), kappa, distinct, device) if device.type == "cuda" else None
    if recorded is not None and recorded.lock.acquire(blocking=False):  # else another thread's results lie there
        try:
            yield recorded.start((queries, galleries))
        finally:
            recorded.lock.release()
        return
    search = Search.of([uploaded(level, device) for level in queries], galleries, kappa, distinct)
    yield search, search.choose()


def _recorded(sides: Sequence[Levels], kappa: int, distinct: bool, device: torch.device) -> _Recorded | None:
    """Return the recorded search of these sizes; record it if it is time."""
    sizes = tuple((tuple(level.shape), str(level.dtype)) for side in sides for level in side)
    key = device, kappa, distinct, sizes
    with _lock:
        known = _known.pop(key, 0)
        if isinstance(known, int):
            known = known + 1 if known < AFTER else _try(sides, kappa, distinct, device)
        _known[key] = known
        kept = [one for one, each in _known.items() if isinstance(each, _Recorded)]
        if len(kept) > RECORDED:
            del _known[kept[0]]
        return known if isinstance(known, _Recorded) else None


def _try(sides: Sequence[Levels], kappa: int, distinct: bool, device: torch.device) -> _Recorded | None:
    """Record a search; None: there is too little memory, or it cannot be recorded."""
    free, total = torch.cuda.mem_get_info(device)
    if free < total // SPARE:
        return None
    try:
        return _Recorded.of(sides, kappa, distinct, device)
    except RuntimeError:  # of CUDA; the search itself is the same without it
        torch.cuda.synchronize(device)
        return None
