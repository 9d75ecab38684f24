"""The window engine in plain torch, for a GPU: see window.py.

For each offset, a slice of the query is compared with a slice of some neighbours. Squares are float64. Tensors on the
device are searched in place; arrays are uploaded some neighbours at a time, when they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch.nn import functional as F

from ..arrays import Array
from ..errors import FeatureError
from ..system.transfers import downloaded, uploaded
from .cosine import torch_directions
from .pyramid_plan import Floats, Ints
from .settings import Radius
from .upsampling import shifts_of

Levels = Sequence[Array | torch.Tensor]

VALUES = 2**25  # of neighbours compared at a time: their squares take 256 MiB
CANDIDATES = 2**25  # sorted at a time


def search_window_torch(
    query: list[Array], gallery: Levels, kappa: int, radius: Radius, is_cosine: bool, device: str
) -> tuple[Floats, Ints]:
    """Search all neighbours on a torch device; see window.search_window."""
    search = _Search(query, gallery, radius, is_cosine, device)
    k, patches = len(gallery[0]), search.grid[0] * search.grid[1]
    best = torch.full((patches, kappa), torch.inf, dtype=torch.float32, device=search.device)
    best_at = torch.zeros(patches, kappa, dtype=torch.int64, device=search.device)
    step = max(1, min(VALUES // search.own.numel(), CANDIDATES // (patches * len(search.offsets))))
    for first in range(0, k, step):
        sq_distances, places = search.compare(first, min(first + step, k))
        both, both_at = torch.cat([best, sq_distances], dim=1), torch.cat([best_at, places], dim=1)
        # A stable sort: what is equal stays in the order of positions.
        order = torch.sort(both, dim=1, stable=True).indices[:, :kappa]
        best, best_at = both.gather(1, order), both_at.gather(1, order)
    found, places_found = downloaded(best, best_at)
    if not np.isfinite(found).all():
        raise FeatureError("levels: expected values whose squared distances fit float32, found larger ones; scale them")
    return found, places_found


class _Search:
    """One query's search."""

    def __init__(self, query: list[Array], gallery: Levels, radius: Radius, is_cosine: bool, device: str) -> None:
        self.gallery, self.device, self.is_cosine = gallery, torch.device(device), is_cosine
        self.grid: tuple[int, int] = query[0].shape[1:]
        shifts = [None] * len(query) if is_cosine else shifts_of(query, gallery)
        self.shifts = [None if shift is None else uploaded(shift, self.device) for shift in shifts]
        self.own = self._patches([level[None] for level in query])
        rows, columns = (min(far, side - 1) for far, side in zip(radius, self.grid, strict=True))
        self.offsets = list(product(range(-rows, rows + 1), range(-columns, columns + 1)))

    def _patches(self, levels: Levels) -> torch.Tensor:
        """Load levels [(n, c, h, w), ...] onto the device as patches (n, C, h, w) float32."""
        loaded = [uploaded(level, self.device) for level in levels]
        if self.is_cosine:
            return torch_directions(loaded)
        parts = []
        for values, shift in zip(loaded, self.shifts, strict=True):
            part = (values if shift is None else values - shift).float()
            if part.shape[2:] != self.grid:
                part = F.interpolate(part, self.grid, mode="bilinear", align_corners=False)
            parts.append(part)
        return torch.cat(parts, dim=1)

    def compare(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare neighbours first to end; return squared distances and positions (h * w, n), positions ascending."""
        theirs, (height, width) = self._patches([level[first:end] for level in self.gallery]), self.grid
        shape = end - first, len(self.offsets), height, width
        sq_distances = torch.full(shape, torch.inf, dtype=torch.float32, device=self.device)
        for number, (dy, dx) in enumerate(self.offsets):
            rows, columns = slice(max(0, -dy), min(height, height - dy)), slice(max(0, -dx), min(width, width - dx))
            below, right = slice(rows.start + dy, rows.stop + dy), slice(columns.start + dx, columns.stop + dx)
            differences = (self.own[:, :, rows, columns] - theirs[:, :, below, right]).double()
            sq_distances[:, number, rows, columns] = differences.square().sum(1).float()
        shifts = uploaded(np.array([dy * width + dx for dy, dx in self.offsets]), self.device)
        neighbours = torch.arange(first, end, device=self.device) * (height * width)
        cells = torch.arange(height * width, device=self.device)
        places = (neighbours[:, None] + shifts).flatten() + cells[:, None]
        return sq_distances.permute(2, 3, 0, 1).reshape(height * width, -1), places
