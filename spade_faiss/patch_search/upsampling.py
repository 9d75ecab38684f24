"""Bilinear upsampling of pyramid levels to patches; shared by the engines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ..arrays import Array
from ..system.transfers import as_tensor as as_tensor

BLOCK = 2**15  # values of a level that are read at a time


def shift_of(level: Array) -> torch.Tensor:
    """Return roughly the mean of each channel of a (c, h, w) level, as (c, 1, 1).

    Subtracting it from both sides leaves distances unchanged, and |q|^2 + |x|^2 - 2 q x loses fewer digits. It is a
    multiple of a power of two near the channel's spread: features with few digits stay exact, and of a mean that is
    far larger than the spread little is left.
    """
    flat = level.reshape(len(level), -1)
    step, shifts = max(1, BLOCK // flat.shape[1]), []
    for start in range(0, len(flat), step):  # some channels at a time, which stay in a core's cache
        block = flat[start : start + step].astype(np.float64)
        means = block.mean(axis=1)
        block -= means[:, None]
        spreads = np.sqrt(np.einsum("ij,ij->i", block, block) / block.shape[1])
        quanta = 2.0 ** np.floor(np.log2(np.maximum(spreads, 1e-30)))
        shifts.append(np.rint(means / quanta) * quanta)
    return torch.from_numpy(np.concatenate(shifts)).float().reshape(-1, 1, 1)


def shifts_of(query: list[Array], gallery: Sequence[Array | torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the shift of each level, or None where float32 holds its differences without one.

    That is where no level is float64, and the level is not interpolated: its values then arrive as they are.

    Args:
        query: levels [(c, h, w), ...], the finest first.
        gallery: levels [(K, c, h, w), ...].
    """
    is_wide = any(level.dtype in (np.float64, torch.float64) for level in (*query, *gallery))
    return [shift_of(level) if is_wide or level.shape != (len(level), *query[0].shape[1:]) else None for level in query]


def fill_patches(out: NDArray[np.float32], levels: list[Array], shifts: list[torch.Tensor]) -> None:
    """Upsample the levels [(c, h, w), ...] of one image to the finest grid and concatenate them, into out (h * w, C).

    The (c, 1, 1) shift of each level is subtracted first.
    """
    height, width = levels[0].shape[1:]
    target, start = torch.from_numpy(out).view(height, width, -1), 0
    for level, shift in zip(levels, shifts, strict=True):
        stop = start + len(level)
        maps = (as_tensor(level) - shift)[None]
        if maps.shape[2:] != (height, width):
            # Channels last is the fast layout for interpolate, and the order of a patch.
            maps = maps.contiguous(memory_format=torch.channels_last)
            maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
        target[..., start:stop] = maps[0].permute(1, 2, 0)
        start = stop
