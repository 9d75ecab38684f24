"""Which device a stage runs on: the policy of `auto`, and the GPU's resources.

`auto` differs by stage. A network runs on a GPU that torch sees. The image index and the patch search stay on the CPU
until `gpu_costs` holds what a GPU was measured to cost.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ..errors import DeviceError
from . import gpu_costs

gpu_lock = threading.Lock()  # FAISS's GPU resources are not for two threads at a time


def network_device(wanted: str | None) -> str:
    """Resolve the device of a network: "cpu" or "cuda:N". `auto` is the first GPU that torch sees, else the CPU.

    Args:
        wanted: auto, cpu, cuda or cuda:N; None: auto.

    Raises:
        DeviceError: an unknown name, or a GPU that torch does not see.
    """
    gpus = _torch_gpus()
    return _first(gpus) if _is_auto(wanted) else _named(wanted, gpus, "torch")


def search_device(wanted: str | None) -> str:
    """Resolve the torch device of the patch search; `auto` is the first GPU if gpu_costs knows one, else the CPU.

    Args and errors are those of network_device.
    """
    return _search_place(wanted, _torch_gpus(), "torch")


def faiss_device(wanted: str | None) -> str:
    """Resolve the FAISS device of the image index and the flat engine; `auto` as for search_device.

    Args and errors are those of network_device, with the GPUs that FAISS sees.
    """
    import faiss

    return _search_place(wanted, getattr(faiss, "get_num_gpus", lambda: 0)(), "FAISS")


def _torch_gpus() -> int:
    import torch

    return _counted(torch.cuda.device_count)


@cache
def _counted(device_count: Callable[[], int]) -> int:
    """Ask torch once: where there is no GPU it loads NVIDIA's library again for each answer."""
    return int(device_count())


def _is_auto(wanted: str | None) -> bool:
    return wanted in (None, "auto")


def _first(gpus: int) -> str:
    return "cuda:0" if gpus else "cpu"


def _search_place(wanted: str | None, gpus: int, library: str) -> str:
    """Resolve a device of the index or the patch search."""
    if not _is_auto(wanted):
        return _named(wanted, gpus, library)
    if gpu_costs.MEASURED is not None:
        return _first(gpus)
    if gpus:
        _warn_of_cpu()
    return "cpu"


@lru_cache(maxsize=1)
def _warn_of_cpu() -> None:
    """Warn, once per process."""
    warnings.warn(
        "a GPU is there, but the image index and the patch search stay on the CPU: nothing has been measured on a GPU "
        "yet; ask for it with device='cuda'",
        stacklevel=2,
    )


def _named(wanted: str | None, gpus: int, library: str) -> str:
    """Resolve a device that was asked for by name."""
    if wanted == "cpu":
        return "cpu"
    kind, _, number = str(wanted).partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise DeviceError(f"device: expected auto, cpu, cuda or cuda:N, found {wanted!r}")
    index = int(number or 0)
    if index >= gpus:
        raise DeviceError(f"device {wanted}: {library} sees {gpus} GPUs here; choose cpu or auto")
    return f"cuda:{index}"


@contextmanager
def as_typed(*devices: str) -> Iterator[None]:
    """Compute with torch in the tensors' own types, without gradients, whatever torch.autocast the caller is in.

    Args:
        devices: "cpu" or "cuda:N", where is computed; the CPU always counts.
    """
    import torch

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for kind in sorted({"cpu", *(device.partition(":")[0] for device in devices)}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def gpu_number(device: str) -> int:
    """Return the N of cuda:N."""
    return int(device.partition(":")[2])


@lru_cache(maxsize=1)
def gpu_resources() -> Any:
    """Return the one StandardGpuResources of this process: each would reserve its own scratch memory."""
    import faiss

    return faiss.StandardGpuResources()


def free_gpu_bytes(device: str) -> int:
    """Return the free bytes of a GPU's memory."""
    import torch

    return int(torch.cuda.mem_get_info(gpu_number(device))[0])


def as_arrays(levels: Sequence[Any]) -> list[Any]:
    """Return tensors as NumPy arrays; arrays are returned as they are."""
    if all(isinstance(level, np.ndarray) for level in levels):
        return list(levels)
    import torch

    # NumPy has no bfloat16, which float32 holds exactly.
    return [(level.float() if level.dtype == torch.bfloat16 else level).detach().cpu().numpy() for level in levels]
