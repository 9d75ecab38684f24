"""What the engines share: patches of a pyramid, and the weights of bilinear upsampling."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ..arrays import Array


def shift_of(level: Array) -> torch.Tensor:
    """Roughly the mean of each channel of a (c, h, w) level, as (c, 1, 1).

    Distances do not change when it is taken from both sides, but |q|^2 + |x|^2 - 2 q x then loses fewer digits. It is a
    multiple of a power of two near the level's spread, so that features with few digits stay exact.
    """
    values = level.astype(np.float64)
    quantum = 2.0 ** np.floor(np.log2(max(values.std(), 1e-30)))
    means = np.rint(values.mean(axis=(1, 2), keepdims=True) / quantum) * quantum
    return torch.from_numpy(means).float()


def as_tensor(level: Array | torch.Tensor) -> torch.Tensor:
    """Return a level as a contiguous tensor, of the same memory where torch can."""
    if isinstance(level, torch.Tensor):
        return level.contiguous()
    level = np.ascontiguousarray(level)
    # A copy where torch would warn that it could be used to write into a read-only array.
    return torch.from_numpy(level if level.flags.writeable else level.copy())


def fill_patches(out: NDArray[np.float32], levels: list[Array], shifts: list[torch.Tensor]) -> None:
    """Upsample the levels [(c, h, w), ...] of one image to the finest grid and concatenate, into out (h * w, C).

    From each level its (c, 1, 1) shift is taken first.
    """
    height, width = levels[0].shape[1:]
    target, start = torch.from_numpy(out).view(height, width, -1), 0
    for level, shift in zip(levels, shifts, strict=True):
        stop = start + len(level)
        maps = (as_tensor(level) - shift)[None]
        if maps.shape[2:] != (height, width):
            # Channels last is both the fast way through interpolate and the order of a patch.
            maps = maps.contiguous(memory_format=torch.channels_last)
            maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
        target[..., start:stop] = maps[0].permute(1, 2, 0)
        start = stop


def taps(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which cells of a row of `old` a row of `new` cells is interpolated from, and how much of each.

    As torch.nn.functional.interpolate(mode="bilinear", align_corners=False) defines it.

    Returns:
        indices and weights, (new, 2); a cell that takes all from one has that twice.
    """
    centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    first = np.floor(centres).astype(np.int64)
    share = (centres - first).astype(np.float32)
    return np.stack([first, first + (share > 0)], axis=1), np.stack([1 - share, share], axis=1)
