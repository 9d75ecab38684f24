"""Arrays to a torch device and back, through pinned memory where that is a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..arrays import Array

LARGE = 2**24  # bytes


def as_tensor(level: Array | torch.Tensor) -> torch.Tensor:
    """Return an array as a contiguous tensor, sharing its memory if possible."""
    if isinstance(level, torch.Tensor):
        return level.contiguous()
    level = np.ascontiguousarray(level)
    # A read-only array is copied: torch would warn that the tensor is writable.
    return torch.from_numpy(level if level.flags.writeable else level.copy())


def stacked(levels: Sequence[Array | torch.Tensor]) -> Array | torch.Tensor:
    """Stack arrays, or tensors; one alone is not copied."""
    if len(levels) == 1:
        return levels[0][None]
    if isinstance(levels[0], torch.Tensor):
        return torch.stack(list(levels))  # type: ignore[arg-type]
    return np.stack(levels)


def stacked_for(device: torch.device, arrays: Sequence[Array]) -> torch.Tensor:
    """Return arrays stacked on the host; on their way to a GPU, in pinned memory."""
    if device.type != "cuda":
        return torch.from_numpy(np.stack(arrays))
    like = torch.from_numpy(np.empty(0, arrays[0].dtype))
    pinned = torch.empty((len(arrays), *arrays[0].shape), dtype=like.dtype, pin_memory=True)
    np.stack(arrays, out=pinned.numpy())
    return pinned


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
    return [_own(copy) for copy in copies]


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the bytes of tensors one after the other, (n,) uint8: one copy brings all of them to the host."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def parted(content: Array, like: Sequence[torch.Tensor]) -> list[Array]:
    """Return the arrays whose bytes were joined: those of tensors of these shapes and dtypes."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in like]
    parts = np.split(content, np.cumsum(sizes)[:-1])
    dtypes = (torch.empty(0, dtype=tensor.dtype).numpy().dtype for tensor in like)
    return [
        part.copy().view(dtype).reshape(tensor.shape) for part, dtype, tensor in zip(parts, dtypes, like, strict=True)
    ]


def _own(pinned: torch.Tensor) -> Array:
    """Return a copy in memory of its own: pinned memory is for the next, not for whoever keeps results.

    Torch copies with all threads, which takes longer to begin than a small copy takes.
    """
    return pinned.clone().numpy() if pinned.numel() * pinned.element_size() > LARGE else pinned.numpy().copy()
