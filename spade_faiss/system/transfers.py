"""Arrays to a torch device and back, through pinned memory where that is a GPU."""

from __future__ import annotations

import numpy as np
import torch

from ..arrays import Array


def as_tensor(level: Array | torch.Tensor) -> torch.Tensor:
    """Return an array as a contiguous tensor, sharing its memory if possible."""
    if isinstance(level, torch.Tensor):
        return level.contiguous()
    level = np.ascontiguousarray(level)
    # A read-only array is copied: torch would warn that the tensor is writable.
    return torch.from_numpy(level if level.flags.writeable else level.copy())


def uploaded(level: Array | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return an array on the device. To a GPU it is copied from pinned memory, while the host goes on."""
    tensor = as_tensor(level)
    if tensor.device == device:
        return tensor
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def downloaded(*tensors: torch.Tensor) -> list[Array]:
    """Return tensors as arrays; all copies from a GPU are under way before any is waited for."""
    if tensors[0].device.type != "cuda":
        return [tensor.numpy() for tensor in tensors]
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [copy.numpy() for copy in copies]
