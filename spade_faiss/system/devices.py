"""Which device a stage runs on: the policy of `auto`, and the GPU's resources.

`auto` is the first GPU that a stage's library sees. There the image index and each patch search stay on the CPU all the
same where they are expected to be faster by what a GPU was measured to cost, see `gpu_costs`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ..errors import DeviceError

gpu_lock = threading.Lock()  # FAISS's GPU resources are not for two threads at a time


def torch_device(wanted: str | None) -> str:
    """Resolve a torch device: "cpu" or "cuda:N". `auto` is the first GPU that torch sees, else the CPU.

    Args:
        wanted: auto, cpu, cuda or cuda:N; None: auto.

    Raises:
        DeviceError: an unknown name, or a GPU that torch does not see.
    """
    import torch

    return _resolved(wanted, _counted(torch.cuda.device_count), "torch")


def faiss_device(wanted: str | None) -> str:
    """Resolve the FAISS device of the image index and the flat engine.

    Args and errors are those of torch_device, with the GPUs that FAISS sees.
    """
    import faiss

    return _resolved(wanted, getattr(faiss, "get_num_gpus", lambda: 0)(), "FAISS")


@cache
def _counted(device_count: Callable[[], int]) -> int:
    """Ask torch once: where there is no GPU it loads NVIDIA's library again for each answer."""
    return int(device_count())


def _resolved(wanted: str | None, gpus: int, library: str) -> str:
    if wanted in (None, "auto"):
        return "cuda:0" if gpus else "cpu"
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
