"""Networks that OpenVINO runs on the CPU, converted from torch in this process.

Each image passes the network alone. So its features depend neither on the other images of its batch nor on their
number, and a build by several processes equals one by a single process bit for bit. It is the fastest way, too: the
activations of one image stay in the processor's caches.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import first_line
from ..options import Precision
from ..system.devices import as_typed
from ..system.forks import remember
from ..system.threads import torch_threads

# views (n, h, w, 3) uint8 -> image features (n, d), levels [(n, c, h, w), ...], both float32
Forward = Callable[[Tensor], tuple[Tensor, list[Tensor]]]

MOST_STREAMS = 16  # images at a time; with more threads than that, several threads compute one image
TELEMETRY = "openvino_telemetry"


class ConversionError(Exception):
    """Why OpenVINO cannot run a network, as a clause that follows "found that"."""


class _Started:
    """The core that this process has started, and whether the process that it was forked from had one."""

    def __init__(self) -> None:
        self.core: Any = None
        self.before_fork = False
        remember(self)

    def after_fork(self) -> None:
        """Leave the parent's core alone, and keep it: freeing it would wait for threads that are not here."""
        if self.core is not None:
            self.before_fork = True
            _keep_for_ever(self.core)
        cpu_core.cache_clear()


_started = _Started()


def _keep_for_ever(one: Any) -> None:
    """Never free an object, not even when the process ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


def is_installed() -> bool:
    """Return whether OpenVINO is there to be imported."""
    return find_spec("openvino") is not None


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Hide the module by which OpenVINO reports its imports and conversions to a web service, unless told not to.

    It would fork this process for that, too. Without the module OpenVINO takes a stub of its own.
    """
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == TELEMETRY}
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[TELEMETRY]
        sys.modules.update(hidden)


def load_openvino() -> Any:
    """Import OpenVINO.

    Raises:
        ConversionError: it is not installed, or its libraries do not fit this machine.
    """
    try:
        with _without_telemetry():
            import openvino
    except (ImportError, OSError) as error:
        raise ConversionError(
            f"openvino cannot be imported ({first_line(error)}); pip install 'spade-faiss[openvino]'"
        ) from error
    return openvino


@lru_cache(maxsize=1)
def cpu_core() -> Any:
    """Return the one openvino.Core of this process, which has a CPU plug-in.

    Raises:
        ConversionError: there is no OpenVINO, or none for this CPU.
    """
    openvino = load_openvino()
    if _started.before_fork:  # it would wait for threads that the parent's have been
        raise ConversionError("OpenVINO does not run in a process that was forked from one that had started it")
    try:
        core = openvino.Core()
        devices = list(core.available_devices)
    except RuntimeError as error:
        raise ConversionError(f"OpenVINO does not start ({first_line(error)})") from error
    if "CPU" not in devices:
        found = ", ".join(devices) or "no device"
        raise ConversionError(f"OpenVINO {openvino.get_version()} has no CPU plug-in here, but {found}")
    _started.core = core
    return core


def platform() -> dict[str, str]:
    """Return what a converted network depends on beside itself: OpenVINO's version, the CPU and its abilities.

    Raises:
        ConversionError: as for cpu_core.
    """
    core = cpu_core()
    abilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {
        "openvino": load_openvino().get_version(),
        "cpu": core.get_property("CPU", "FULL_DEVICE_NAME"),
        "abilities": " ".join([torch.backends.cpu.get_cpu_capability(), *sorted(abilities)]),
    }


class _Module(torch.nn.Module):
    """A forward pass with a flat tuple of outputs, as a module that can be traced."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self._run = forward

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        image, levels = self._run(batch)
        return (image, *levels)


def convert(forward: Forward, example: Tensor, shape: list[int] | None = None) -> Any:
    """Convert a forward pass in float32.

    Args:
        forward: a torch network's, on the CPU.
        example: what it is traced with, as (1, h, w, 3) uint8.
        shape: the input's, -1 where any size will do; None: the example's.

    Returns:
        an openvino.Model.

    Raises:
        ConversionError: OpenVINO, or torch's tracer, does not support the network.
    """
    openvino = load_openvino()
    try:
        with _without_telemetry(), warnings.catch_warnings(), as_typed("cpu"):
            warnings.simplefilter("ignore")  # on tracing; what is traced wrongly gives other features, which is checked
            return openvino.convert_model(_Module(forward), example_input=example, input=shape or list(example.shape))
    except Exception as error:  # a network's own code runs in it
        raise ConversionError(f"OpenVINO cannot convert the network ({first_line(error)})") from error


class OpenVinoNetwork:
    """A converted network, compiled when it first runs. Threads may share it; in a forked process torch runs it."""

    def __init__(self, model: Any, precision: Precision, by_torch: Forward) -> None:
        """Wrap a converted network.

        Args:
            model: an openvino.Model whose input is (1, h, w, 3) uint8, and whose outputs are image feature and levels.
            precision: what it multiplies in.
            by_torch: the network that it was converted from.
        """
        self._model = model
        self._precision = precision
        self._by_torch = by_torch
        self._compiled: dict[tuple[int, int], Any] = {}  # by threads and streams
        self._lock = threading.Lock()
        self._forked = False
        remember(self)

    def after_fork(self) -> None:
        """Leave OpenVINO alone, and keep its objects: it would wait for the parent's threads, or end the process."""
        for inherited in (self._model, *self._compiled.values()):
            _keep_for_ever(inherited)
        self._compiled, self._lock, self._forked = {}, threading.Lock(), True

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the outputs for one image, without the batch: (d,), then (c, h, w) of each level."""
        return [tuple(output.shape)[1:] for output in self._model.outputs]

    def __call__(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run it on views (n, h, w, 3) uint8; returns image features (n, d) and levels [(n, c, h, w), ...].

        One image is computed by as many threads as torch has; of several, each by a thread.

        Raises:
            ConversionError: OpenVINO cannot compile it for this CPU.
        """
        if self._forked:
            return self._by_torch(batch)
        images = batch.contiguous().numpy()
        found = [np.empty((len(images), *shape), np.float32) for shape in self.shapes]
        with self._lock:
            threads = torch_threads()
            streams = min(threads, MOST_STREAMS) if len(images) > 1 else 1
            compiled = self._compiled_for(threads, streams)
            if streams == 1:
                for number in range(len(images)):
                    results = compiled([images[number : number + 1]], share_inputs=True, share_outputs=True)
                    for output, target in enumerate(found):
                        target[number] = results[output][0]
            else:
                _run_streams(compiled, images, found)
        image, *levels = map(torch.from_numpy, found)
        return image, levels

    def _compiled_for(self, threads: int, streams: int) -> Any:
        """Return the model compiled for so many threads, which the images that are computed at a time share."""
        if any(key[0] != threads for key in self._compiled):
            self._compiled = {}
        if (threads, streams) not in self._compiled:
            wanted = "bf16" if self._precision == "bfloat16" else "f32"
            options = {
                "INFERENCE_PRECISION_HINT": wanted,
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": streams,
                "ENABLE_CPU_PINNING": False,  # every process would pin its threads to the same cores
            }
            try:
                compiled = cpu_core().compile_model(self._model, "CPU", options)
                given = compiled.get_property("INFERENCE_PRECISION_HINT")
            except RuntimeError as error:
                raise ConversionError(f"OpenVINO cannot compile it ({first_line(error)})") from error
            if given != getattr(load_openvino().Type, wanted):  # OpenVINO itself says nothing
                raise ConversionError(f"this CPU computes in {given.to_string()}, not {self._precision}, by OpenVINO")
            self._compiled[threads, streams] = compiled
        return self._compiled[threads, streams]


def _run_streams(compiled: Any, images: Any, found: list[Any]) -> None:
    """Run a model on each of (n, h, w, 3), several at a time, into (n, ...) of each output."""

    def keep(request: Any, number: int) -> None:
        for output, target in enumerate(found):
            target[number] = request.get_output_tensor(output).data[0]

    queue = load_openvino().AsyncInferQueue(compiled, compiled.get_property("NUM_STREAMS"))
    queue.set_callback(keep)
    for number in range(len(images)):
        queue.start_async([images[number : number + 1]], number, share_inputs=True)
    queue.wait_all()
