"""The search of all patches on a torch device, for a GPU; pyramid/plan.py explains the bound of rounding errors.

Neighbours are upsampled to patches some at a time (`patches`), multiplied with the query's by tiles, and the
least bound of each group of patches is kept (`tiles`). The likeliest few are measured as sums of squares
(`candidates`). Where rounding could have hidden a nearer patch, what it could be is measured too
(`refined`). So far nothing waits for the device, several queries may go together, and what is searched again and
again is recorded (`recorded`). What is still in doubt is settled by the host (`settled`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from ...errors import FeatureError
from ...system.transfers import stacked
from ..cosine import torch_directions
from ..pyramid.plan import Floats, Ints
from ..settings import Radius
from .candidates import Search
from .patches import Levels
from .recorded import Choices, chosen
from .refined import refined
from .settled import settle
from .tiles_torch import ALIGNED, Window

VALUES = 2**25  # of neighbours whose unit vectors are computed at a time: float64
PART = 2**30  # values of neighbours on the device at a time: 4 GiB

Found = tuple[Floats, Ints]  # of one query: (q, kappa) squared distances and positions


def search_together(
    queries: Sequence[Levels], galleries: Levels, kappa: int, device: str, distinct: bool = False
) -> list[Found]:
    """Search for several queries of the same shapes in one go, each among its own neighbours.

    Args:
        queries: b queries, each [(c, h, w), ...], arrays, or tensors on the device; the finest level first. A single
            level may have any grid.
        galleries: levels [(b, k, c, h, w), ...], arrays or tensors on the device.
        kappa: number of nearest patches.
        device: "cuda:N", or another of torch's.
        distinct: whether a patch's matches lie in as many neighbours, each the nearest of its neighbour.

    Returns:
        for each query sq_distances (q, kappa), ascending, and matches (q, kappa): positions counted through neighbour,
        row, column. Equal distances are in the order of positions.

    Raises:
        FeatureError: a squared distance does not fit float32.
    """
    return search_torch(queries, galleries, device, Wanted(kappa, distinct))


@dataclass(frozen=True)
class Wanted:
    """What is searched for.

    Attributes:
        kappa: number of nearest patches.
        distinct: see search_together.
        radius: rows and columns on either side of a patch's position that are compared; None: all.
        is_cosine: whether to compare unit vectors; all levels are of one grid.
    """

    kappa: int
    distinct: bool = False
    radius: Radius | None = None
    is_cosine: bool = False

    def search(self, mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> Search:
        """Load levels that are on the device; see Search.of."""
        if self.is_cosine:
            mine, theirs = [_directions(mine)], [_directions(theirs)]
        window = Window(theirs[0].shape[4], *self.radius) if self.radius else None
        return Search.of(mine, theirs, self.kappa, self.distinct, window)


def search_torch(queries: Sequence[Levels], galleries: Levels, device: str, wanted: Wanted) -> list[Found]:
    """Search as search_together for what is wanted, part by part of the neighbours."""
    k, cells, kappa = galleries[0].shape[1], galleries[0].shape[3] * galleries[0].shape[4], wanted.kappa
    own = [stacked(level)[:, None] for level in zip(*queries, strict=True)]
    step = max(1, PART // (len(queries) * sum(int(np.prod(level.shape[2:])) for level in galleries)))
    parts = []
    for first in range(0, k, step):
        some = [level[:, first : first + step] for level in galleries]
        most = some[0].shape[1] * (1 if wanted.distinct else cells)
        few = replace(wanted, kappa=min(kappa, most))

        def choose(mine: list[torch.Tensor], theirs: list[torch.Tensor], few: Wanted = few) -> Choices:
            search = few.search(mine, theirs)
            return [(search, refined(search, search.choose()))]

        with chosen(choose, own, some, torch.device(device), few) as ([found], answer):
            best, at, undecided = answer
            settle(*found, best, at, undecided)
        parts.append((best, at + first * cells))
    best, at = parts[0]
    if len(parts) > 1:
        best, at = (np.concatenate(each, axis=2) for each in zip(*parts, strict=True))
        order = np.lexsort((at, best), axis=2)[:, :, :kappa]
        best, at = np.take_along_axis(best, order, 2), np.take_along_axis(at, order, 2)
    require_finite(best)
    return list(zip(best, at, strict=True))


def _directions(levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the unit vectors of levels [(b, k, c, h, w), ...] of one grid as a level of whole lines of channels."""
    b, k = levels[0].shape[:2]
    flat = [level.flatten(0, 1) for level in levels]
    step = max(1, VALUES // sum(int(np.prod(level.shape[1:])) for level in flat))
    units = torch.cat([torch_directions([level[at : at + step] for level in flat]) for at in range(0, b * k, step)])
    return F.pad(units, (0, 0, 0, 0, 0, -units.shape[1] % ALIGNED)).view(b, k, -1, *units.shape[2:])


def require_finite(sq_distances: Floats) -> None:
    """Check what was found.

    Raises:
        FeatureError: a squared distance does not fit float32.
    """
    if not np.isfinite(sq_distances).all():
        raise FeatureError("levels: expected values whose squared distances fit float32, found larger ones; scale them")
