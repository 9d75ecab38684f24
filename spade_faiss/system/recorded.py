"""Work of the same sizes on a GPU, recorded once and then started with one launch.

A network or a search is some hundred kernels. The host takes longer to start a small one than the GPU takes to run it,
and each start hands the interpreter to other threads. From the third time that the same sizes come on, a CUDA graph
starts them all: it reads from and writes to the same memory each time, so that inputs are copied there, and results are
read before the next one starts.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from ..arrays import Array
from .transfers import as_tensor, uploaded

AFTER = 2  # times that the same sizes are not recorded: they compile, and measure what is fastest
LATER = 100  # times, after which what could not be recorded is tried again
SPARE = 4  # one of so many parts of the GPU's memory must be free, or nothing is recorded: a graph keeps its own

_recording = threading.Lock()  # torch records on one stream

R = TypeVar("R")
T = TypeVar("T")
Inputs = Sequence[Array | torch.Tensor]
Call = Callable[[list[torch.Tensor]], R]  # of tensors on the device; nothing in it may wait for the device


@dataclass(frozen=True)
class _Recorded(Generic[R]):
    """What was recorded for inputs of some sizes."""

    inputs: list[torch.Tensor]
    graph: Any  # torch.cuda.CUDAGraph
    result: R
    pinned: dict[int, torch.Tensor] = field(default_factory=dict)  # by number of an input that comes from the host

    def start(self, inputs: Inputs) -> R:
        """Compute with other inputs of the same sizes; what the last start had to read is read."""
        for number, (given, target) in enumerate(zip(inputs, self.inputs, strict=True)):
            tensor = as_tensor(given)
            if not tensor.is_cuda and not tensor.is_pinned():
                if number not in self.pinned:
                    self.pinned[number] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                tensor = self.pinned[number].copy_(tensor)
            target.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.result


class Recorder(Generic[R]):
    """Records what is called again and again with inputs of the same sizes. For any number of threads."""

    def __init__(self, most: int) -> None:
        """Record so many kinds of work at most: of those, the ones that were called last."""
        self._most = most
        self._known: OrderedDict[Hashable, _Recorded[R] | int] = OrderedDict()  # or how often it was called
        self._lock = threading.Lock()
        self._running = threading.Lock()  # whoever holds it may start what is recorded, and read its results
        self._pool: Any = None  # of memory, for all that is recorded: one runs at a time

    @contextmanager
    def result(self, call: Call[R], inputs: Inputs, device: torch.device, kind: Hashable = None) -> Iterator[R]:
        """Give call(inputs), by what was recorded if there is something. It is to be read inside.

        Args:
            call: the work.
            inputs: arrays, or tensors on the device.
            device: of torch.
            kind: what the work depends on beside the sizes of its inputs.
        """
        recorded = self._recorded(call, inputs, device, kind) if device.type == "cuda" else None
        if recorded is not None and self._running.acquire(blocking=False):  # else another thread's results lie there
            try:
                yield recorded.start(inputs)
            except BaseException:
                torch.cuda.synchronize(device)  # the next start may write where this one reads
                raise
            finally:
                self._running.release()
            return
        yield call([uploaded(each, device) for each in inputs])

    def recorded(self) -> int:
        """Return how many kinds of work are recorded."""
        with self._lock:
            return sum(isinstance(each, _Recorded) for each in self._known.values())

    def _recorded(self, call: Call[R], inputs: Inputs, device: torch.device, kind: Hashable) -> _Recorded[R] | None:
        """Return what was recorded for these sizes; record it if it is time."""
        rounding = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()  # recorded as it is
        key = device, kind, rounding, tuple((tuple(each.shape), str(each.dtype)) for each in inputs)
        with self._lock:
            known = self._known.pop(key, 0)
            if isinstance(known, int):
                known = known + 1 if known < AFTER else self._try(call, inputs, device) or -LATER
            self._known[key] = known
            kept = [one for one, each in self._known.items() if isinstance(each, _Recorded)]
            if len(kept) > self._most:
                del self._known[kept[0]]
            return known if isinstance(known, _Recorded) else None

    def _try(self, call: Call[R], inputs: Inputs, device: torch.device) -> _Recorded[R] | None:
        """Record work; None: there is too little memory, or it cannot be recorded."""
        free, total = torch.cuda.mem_get_info(device)
        if free < total // SPARE:
            return None
        there = [torch.empty(tuple(each.shape), dtype=as_tensor(each).dtype, device=device) for each in inputs]
        try:
            for given, target in zip(inputs, there, strict=True):
                target.copy_(as_tensor(given))
            call(there)  # what libraries prepare for each thread cannot be recorded
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph()
            one = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
            with _recording, self._running, one:
                result = call(there)
            self._pool = self._pool or graph.pool()
            return _Recorded(there, graph, result)
        except RuntimeError:  # of CUDA; the work itself is the same without it
            torch.cuda.synchronize(device)
            return None


def branched(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Return the results of calls that do not need each other. Where they are recorded, they run at the same time."""
    if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return [call() for call in calls]
    here, results, streams = torch.cuda.current_stream(), [], []
    for call in calls:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            results.append(call())
        streams.append(stream)
    for stream in streams:
        here.wait_stream(stream)
    return results
