"""Which device a stage runs on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import DeviceError

gpu_lock = threading.Lock()  # FAISS's GPU resources are not for two threads at a time


def torch_device(wanted: str | None) -> str:
    """Turn auto, cpu, cuda or cuda:N into a device that torch has: "cpu" or "cuda:N".

    Raises:
        DeviceError: a GPU was asked for by name and torch sees none, or not that one.
    """
    import torch

    return _resolve(wanted, torch.cuda.device_count(), "torch")


def faiss_device(wanted: str | None) -> str:
    """Turn auto, cpu, cuda or cuda:N into a device that FAISS has; see torch_device."""
    import faiss

    return _resolve(wanted, getattr(faiss, "get_num_gpus", lambda: 0)(), "FAISS")


def _resolve(wanted: str | None, gpus: int, library: str) -> str:
    if wanted in (None, "auto"):
        return "cuda:0" if gpus else "cpu"
    if wanted == "cpu":
        return "cpu"
    kind, _, number = str(wanted).partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise DeviceError(f"device: expected auto, cpu, cuda or cuda:N, found {wanted!r}")
    index = int(number or 0)
    if index >= gpus:
        raise DeviceError(
            f"device {wanted}: {library} sees {gpus} GPUs here; choose cpu, or auto to take what there is"
        )
    return f"cuda:{index}"


def gpu_number(device: str) -> int:
    """Return the N of cuda:N."""
    return int(device.partition(":")[2])


@lru_cache(maxsize=1)
def gpu_resources() -> Any:
    """Return the one StandardGpuResources of this process: each would reserve its own scratch memory."""
    import faiss

    return faiss.StandardGpuResources()


def free_gpu_bytes(device: str) -> int:
    """Return the bytes free on a GPU now."""
    import torch

    return int(torch.cuda.mem_get_info(gpu_number(device))[0])


def as_arrays(levels: Sequence[Any]) -> list[Any]:
    """Return tensors as NumPy arrays, and arrays as they are."""
    if all(isinstance(level, np.ndarray) for level in levels):
        return list(levels)
    import torch

    # NumPy has no bfloat16, which float32 holds exactly.
    return [(level.float() if level.dtype == torch.bfloat16 else level).detach().cpu().numpy() for level in levels]


def beside(levels: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Return arrays as tensors on the device of the others, or as they are where those are arrays too."""
    if isinstance(others[0], np.ndarray):
        return list(levels)
    import torch

    return [torch.tensor(np.ascontiguousarray(level), device=others[0].device) for level in levels]
