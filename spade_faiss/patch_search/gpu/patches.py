"""Levels on a torch device, and the patches of the finest grid that they are upsampled to.

Levels lie with their channels last, so that the channels of a patch are beside each other: products read them so, and
a few patches are gathered at the speed of memory. Nothing here waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from ...arrays import Array
from ...system.transfers import uploaded
from ..interpolation import taps
from .tiles_torch import Operand, margin, power_of, scale_of, slow

Levels = Sequence[Array | torch.Tensor]

At = tuple[torch.Tensor, torch.Tensor]
VALUES = 2**26  # of patches that are measured at a time: 256 MiB
NARROW, WIDE = 2, 18  # bytes per value of an operand in the making: float16; float32 and what rounding lost as well


@lru_cache(maxsize=256)
def _taps(old: int, new: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return interpolation.taps on a device; kept, as every query has the same."""
    cells, weights = taps(old, new)
    return uploaded(cells, device), uploaded(weights, device)


def _shift(levels: torch.Tensor) -> torch.Tensor:
    """Return upsampling.shift_of levels (b, c, h, w), as (b, c) float32."""
    values = levels.double().flatten(2)
    quantum = torch.exp2(values.std(2, correction=0).clamp(min=1e-30).log2().floor())
    return (torch.round(values.mean(2) / quantum) * quantum).float()


@lru_cache(maxsize=8)
def _kernels(device: torch.device) -> Any:
    """Return patches_triton if it works there, else None: torch does the same in more passes."""
    if device.type != "cuda":
        return None
    try:
        from . import patches_triton
    except ImportError:  # no Triton
        return None
    try:
        patches_triton.load(*(torch.ones(shape, device=device) for shape in ((1, 1, 2, 2, 2), (1, 2), ())))
        there = torch.ones(1, 1, 2, 2, 2, device=device)
        two = _taps(2, 2, device), _taps(2, 2, device)
        patches_triton.rounded_patches([there, there[:, :, :1, :1]], [two, (_taps(1, 2, device), _taps(1, 2, device))])
    except Exception as error:  # a compiler says many things; the answer is the same without it
        warnings.warn(slow(error), stacklevel=2)
        return None
    return patches_triton


def _shifted(level: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return a level (b, k, c, h, w) less its shift (b, c), float32, channels last."""
    values, shift = level.movedim(2, -1), shift[:, None, None, None]
    out = torch.empty(values.shape, dtype=torch.float32, device=level.device)
    if values.dtype == torch.float64:  # float32 may not hold the differences
        return out.copy_(values - shift)
    return out.copy_(values).sub_(shift)


class Upsampler:
    """Loads levels of some queries, and of neighbours, and turns them into patches of the finest grid."""

    def __init__(self, own: Sequence[torch.Tensor], galleries: Levels) -> None:
        """Take the shifts of queries [(b, 1, c, h, w), ...] on the device, and the grids of (b, k, c, h, w)."""
        self.device = own[0].device
        self.grids: list[tuple[int, int]] = [(level.shape[3], level.shape[4]) for level in galleries]
        self.channels = sum(level.shape[2] for level in own)
        self.cells = self.grids[0][0] * self.grids[0][1]
        self.kernels = _kernels(self.device)
        self.bytes_per_value = NARROW if self.kernels else WIDE
        self.side = 0 if len(set(self.grids)) == 1 else max(self.grids[0])  # that is interpolated to
        self._shifts = [_shift(level[:, 0]) for level in own]  # (b, c)
        self._taps = [tuple(_taps(old, new, self.device) for old, new in zip(grid, self.grids[0], strict=True))
                      for grid in self.grids]  # fmt: skip

    def load(self, *sides: Levels) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
        """Load levels of several sides, each [(b, k, c, h, w), ...].

        Returns:
            each side on the device, shifted, at scale, float32 and channels last: [(b, k, h, w, c), ...]; the scale.
        """
        there = [[uploaded(level, self.device) for level in side] for side in sides]
        kernels = self.kernels
        if kernels and all(level.dtype in (torch.float16, torch.float32) for side in there for level in side):
            pairs = [list(zip(side, self._shifts, strict=True)) for side in there]
            sizes = [kernels.size(level, shift) for side in pairs for level, shift in side]
            scale = power_of(torch.stack(sizes).amax())
            return [[kernels.load(level, shift, scale) for level, shift in side] for side in pairs], scale
        loaded = [[_shifted(*each) for each in zip(side, self._shifts, strict=True)] for side in there]
        scale = scale_of(*(level for side in loaded for level in side))
        return [[level.mul_(scale) for level in side] for side in loaded], scale

    def operand(self, levels: Sequence[torch.Tensor]) -> Operand:
        """Upsample loaded levels [(b, k, h, w, c), ...] to one side of a product."""
        share = margin(self.channels, self.side)
        if self.kernels is None:
            return Operand.of(self.patches(levels), self.squares(levels), share)
        values, sums = self.kernels.rounded_patches(levels, self._taps)
        norms, residuals, squares = sums
        return Operand.rounded(values, norms, residuals, squares, share)

    def own_operand(self, levels: Sequence[torch.Tensor]) -> Operand:
        """Upsample loaded levels of queries [(b, 1, h, w, c), ...] likewise, (b, q, c); a single one has any grid."""
        share = margin(self.channels, self.side)
        if self.kernels is None:
            if len(levels) == 1:
                own = levels[0].flatten(1, 3)
                return Operand.of(own, own.square().sum(-1), share)
            return Operand.of(self.patches(levels)[:, 0], self.squares(levels)[:, 0], share)
        values, sums = self.kernels.rounded_patches(levels, self._taps)
        norms, residuals, squares = sums[:, :, 0]
        return Operand.rounded(values[:, 0], norms, residuals, squares, share)

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
            levels: [(b, k, h, w, c), ...]; a single one may have another grid than those of the gallery.
            images: (...) int64, counted through b and k.
            cells: (...) int64, of the finest grid.
        """
        parts = []
        y, x = torch.div(cells, self.grids[0][1], rounding_mode="floor"), cells % self.grids[0][1]
        for level, ((rows, high), (columns, wide)) in zip(levels, self._taps, strict=True):
            values, (height, width) = level.reshape(-1, level.shape[-1]), level.shape[2:4]
            if (height, width) == self.grids[0] or len(levels) == 1:
                parts.append(values[images * (height * width) + cells])
                continue
            part = torch.zeros(*cells.shape, level.shape[-1], dtype=torch.float32, device=self.device)
            for up in range(2):
                for left in range(2):
                    at = (images * height + rows[y, up]) * width + columns[x, left]
                    part += values[at] * (high[y, up] * wide[x, left])[..., None]
            parts.append(part)
        return torch.cat(parts, dim=-1)

    def sq_distances(
        self, mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], own_at: At, at: At
    ) -> torch.Tensor:
        """Return squared distances of pairs of patches of loaded levels, float64, as sums of squares.

        Args:
            mine: levels of the queries, [(b, 1, h, w, c), ...].
            theirs: of their neighbours, [(b, k, h, w, c), ...].
            own_at: images and cells of the queries' patches, (pairs,) each; see `at`.
            at: of the neighbours' patches; where the image is -1, anything is returned.
        """
        if self.kernels:
            found: torch.Tensor = self.kernels.sq_distances(mine, theirs, self._taps, own_at, at)
            return found
        sums, step = [], max(1, VALUES // self.channels)
        for first in range(0, len(at[0]), step):
            some = slice(first, first + step)
            own = self.at(mine, own_at[0][some], own_at[1][some])
            sums.append((own - self.at(theirs, at[0][some], at[1][some])).double().square().sum(-1))
        return torch.cat(sums) if sums else torch.empty(0, dtype=torch.float64, device=self.device)
