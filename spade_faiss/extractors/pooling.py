"""Averaging of pyramid levels over neighbourhoods."""

from __future__ import annotations

from ..arrays import Array


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
    from torch.nn import functional as F

    return [
        F.avg_pool2d(torch.from_numpy(level), p, stride=1, padding=p // 2, count_include_pad=count_include_pad).numpy()
        for level in levels
    ]
