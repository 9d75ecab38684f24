"""Levels on a torch device, and the patches of the finest grid that they are upsampled to.

Levels lie with their channels last, so that the channels of a patch are beside each other: products read them so, and
a few patches are gathered at the speed of memory. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from ..arrays import Array
from ..system.transfers import uploaded
from .interpolation import taps
from .upsampling import shift_of

Levels = Sequence[Array | torch.Tensor]


@lru_cache(maxsize=256)
def _taps(old: int, new: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return interpolation.taps on a device; kept, as every query has the same."""
    cells, weights = taps(old, new)
    return uploaded(cells, device), uploaded(weights, device)


class Upsampler:
    """Loads levels of some queries, and of neighbours, and turns them into patches of the finest grid."""

    def __init__(self, queries: Sequence[Sequence[Array]], galleries: Levels, device: torch.device) -> None:
        """Take the shifts of b queries, each [(c, h, w), ...], and the grids of (b, k, c, h, w), the finest first."""
        self.device = device
        self.grids: list[tuple[int, int]] = [(level.shape[3], level.shape[4]) for level in galleries]
        self.channels = sum(map(len, queries[0]))
        self.cells = self.grids[0][0] * self.grids[0][1]
        self.side = 0 if len(set(self.grids)) == 1 else max(self.grids[0])  # that is interpolated to
        shifts = ([shift_of(level)[:, 0, 0].numpy() for level in query] for query in queries)
        self._shifts = [uploaded(np.stack(level), device) for level in zip(*shifts, strict=True)]  # (b, c)

    def load(self, levels: Levels) -> list[torch.Tensor]:
        """Return levels [(b, k, c, h, w), ...] on the device, shifted, float32 and channels last: (b, k, h, w, c)."""
        loaded = []
        for level, shift in zip(levels, self._shifts, strict=True):
            values = uploaded(level, self.device).movedim(2, -1)
            if values.dtype != torch.float64:  # float32 holds the differences of what is narrower
                values = values.to(torch.float32)
            loaded.append((values - shift[:, None, None, None]).to(torch.float32).contiguous())
        return loaded

    def patches(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Upsample loaded levels [(b, k, h, w, c), ...] to patches, (b, k, cells, channels)."""
        return torch.cat([self._lifted(level) for level in levels], dim=-1)

    def squares(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the upsampled squares of the norms of what patches are interpolated from, (b, k, cells).

        They are at least the squared norms of the patches, and bound what rounding does to the interpolation.
        """
        maps = [self._lifted(level.square().sum(-1, keepdim=True))[..., 0] for level in levels]
        return torch.stack(maps).sum(0)

    def _lifted(self, level: torch.Tensor) -> torch.Tensor:
        """Upsample a level (b, k, h, w, c) to (b, k, cells, c)."""
        b, k, height, width, channels = level.shape
        if (height, width) != self.grids[0]:
            maps = level.reshape(b * k, height, width, channels).movedim(-1, 1)
            maps = F.interpolate(maps, self.grids[0], mode="bilinear", align_corners=False)
            level = maps.movedim(1, -1).reshape(b, k, *self.grids[0], channels)
        return level.flatten(2, 3)

    def at(self, levels: Sequence[torch.Tensor], images: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Return some patches of loaded levels, (..., channels).

        Args:
            levels: [(b, k, h, w, c), ...].
            images: (...) int64, counted through b and k.
            cells: (...) int64, of the finest grid.
        """
        parts = []
        y, x = torch.div(cells, self.grids[0][1], rounding_mode="floor"), cells % self.grids[0][1]
        for level, (height, width) in zip(levels, self.grids, strict=True):
            values = level.reshape(-1, level.shape[-1])
            if (height, width) == self.grids[0]:
                parts.append(values[images * (height * width) + cells])
                continue
            (rows, high), (columns, wide) = (
                _taps(old, new, self.device) for old, new in zip((height, width), self.grids[0], strict=True)
            )
            part = torch.zeros(*cells.shape, level.shape[-1], dtype=torch.float32, device=self.device)
            for up in range(2):
                for left in range(2):
                    at = (images * height + rows[y, up]) * width + columns[x, left]
                    part += values[at] * (high[y, up] * wide[x, left])[..., None]
            parts.append(part)
        return torch.cat(parts, dim=-1)
