"""Averaging of pyramid levels over neighbourhoods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arrays import Array

if TYPE_CHECKING:
    import torch


def average_neighbourhoods(levels: list[Array], p: int, count_include_pad: bool = False) -> list[Array]:
    """Average each position of (n, c, h, w) levels over the p x p positions around it.

    Args:
        levels: of one or more images.
        p: odd; 1: no averaging.
        count_include_pad: whether positions beyond the border count as zeros; else only those on the map count.
    """
    if p == 1:
        return levels
    import torch

    tensors = average_tensors([torch.from_numpy(level) for level in levels], p, count_include_pad)
    return [level.numpy() for level in tensors]


def average_tensors(levels: list[torch.Tensor], p: int, count_include_pad: bool = False) -> list[torch.Tensor]:
    """Average tensors where they are; see average_neighbourhoods."""
    from torch.nn import functional as F

    if p == 1:
        return levels
    return [F.avg_pool2d(level, p, stride=1, padding=p // 2, count_include_pad=count_include_pad) for level in levels]
