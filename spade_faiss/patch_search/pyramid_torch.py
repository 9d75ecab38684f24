"""The pyramid engine in plain torch, for a GPU; pyramid.py explains the identity and the bound of rounding errors.

The query's levels are upsampled before the products, which are then upsampled on the gallery's side only. Products
are in float32, for a band of rows of one neighbour at a time. Tensors on the device are searched in place; arrays are
uploaded one neighbour at a time, when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from ..arrays import ROUNDING, Array
from ..errors import FeatureError
from . import pyramid_kernels as kernels
from .flat import SPARE
from .interpolation import taps
from .pyramid_plan import BFLOAT16, Floats, Ints
from .upsampling import as_tensor, shift_of

Levels = Sequence[Array | torch.Tensor]

TILE = 2**25  # pairs of patches compared at a time: 128 MiB


def search_pyramid_torch(query: list[Array], gallery: Levels, kappa: int, device: str) -> tuple[Floats, Ints]:
    """Search all neighbours on a torch device; see pyramid.search_pyramid."""
    search = _Search(query, gallery, kappa, device)
    search.choose()
    search.settle()
    order = np.lexsort((search.best_at, search.best), axis=1)
    best = np.take_along_axis(search.best, order, 1)
    if not np.isfinite(best).all():
        raise FeatureError("levels: expected values whose squared distances fit float32, found larger ones; scale them")
    return best, np.take_along_axis(search.best_at, order, 1)


class _Search:
    """One query's search: choose() measures the likeliest candidates, settle() what rounding could have hidden."""

    def __init__(self, query: list[Array], gallery: Levels, kappa: int, device: str) -> None:
        self.gallery, self.device, self.grid = gallery, torch.device(device), query[0].shape[1:]
        self.shifts = [shift_of(level).to(self.device) for level in query]
        self.parts = self._upsampled(query)
        self.sq_norms = torch.stack([part.square().sum(0) for part in self.parts]).sum(0)
        channels, patches = sum(map(len, self.parts)), self.grid[0] * self.grid[1]
        self.doubt = 2 * ROUNDING * channels**0.5
        if torch.get_float32_matmul_precision() != "highest":  # torch may then multiply float32 as bfloat16
            self.doubt += 1.02 * BFLOAT16
        self.taps = [
            [
                [torch.from_numpy(part).to(self.device) for part in taps(old, new)]
                for old, new in zip(level.shape[1:], self.grid, strict=True)
            ]
            for level in query
        ]
        self.best, self.best_at = np.full((patches, kappa), np.inf, np.float32), np.full((patches, kappa), -1, np.int64)

    def _native(self, levels: Levels) -> list[torch.Tensor]:
        """Load levels [(c, h, w), ...] onto the device, shifted."""
        return [
            (as_tensor(level).to(self.device) - shift).float() for level, shift in zip(levels, self.shifts, strict=True)
        ]

    def _upsampled(self, levels: Levels) -> list[torch.Tensor]:
        """Load levels and upsample them to (c, h * w)."""
        return [self._resize(level[None])[0].flatten(1) for level in self._native(levels)]

    def _resize(self, maps: torch.Tensor) -> torch.Tensor:
        """Upsample maps (n, c, h, w) to the finest grid."""
        if maps.shape[2:] == self.grid:
            return maps
        return F.interpolate(maps, self.grid, mode="bilinear", align_corners=False)

    def _bands(self, lanes: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (position of the first, lows (patches, lanes)) for bands of the gallery, in order.

        A low minus the query patch's own doubt is a lower bound of (squared distance - |a|^2) / 2.
        """
        height, width = self.grid
        parts = [part[:, lanes] for part in self.parts]
        step = max(1, TILE // (width * len(lanes)))
        for neighbour in range(len(self.gallery[0])):
            native = self._native([level[neighbour] for level in self.gallery])
            norms, bounds = torch.zeros(2, height * width, dtype=torch.float32, device=self.device)
            for level in native:
                norms += self._resize(level[None])[0].square().sum(0).flatten()
                bounds += self._resize(level.square().sum(0)[None, None]).flatten()
            limits = norms / 2 - self.doubt * bounds
            for top in range(0, height, step):
                end = min(top + step, height)
                products = torch.zeros(end - top, width, len(lanes), dtype=torch.float32, device=self.device)
                for level, part, (rows, columns) in zip(native, parts, self.taps, strict=True):
                    self._add_products(products, level, part, [each[top:end] for each in rows], columns)
                lows = limits[top * width : end * width, None] - products.flatten(0, 1)
                yield (neighbour * height + top) * width, lows

    def _add_products(
        self,
        out: torch.Tensor,
        level: torch.Tensor,
        part: torch.Tensor,
        rows: list[torch.Tensor],
        columns: list[torch.Tensor],
    ) -> None:
        """Add the inner products with one level's rows, upsampled, to out (rows, w, lanes)."""
        first, last = int(rows[0][0, 0]), int(rows[0][-1, 1]) + 1
        products = level[:, first:last].flatten(1).t() @ part
        products = products.view(last - first, level.shape[2], -1)
        if level.shape[1:] == self.grid:
            out += products
            return
        mixed = [products[rows[0][:, side] - first] * rows[1][:, side, None, None] for side in range(2)]
        for side in range(2):
            out += (mixed[0] + mixed[1])[:, columns[0][:, side]] * columns[1][:, side, None]

    def choose(self) -> None:
        """Measure the likeliest candidates of every query patch."""
        lanes = torch.arange(len(self.best), device=self.device)
        wanted = self.best.shape[1] + SPARE
        lows, places = (
            torch.empty(0, len(lanes), dtype=torch.float32, device=self.device),
            torch.empty(0, len(lanes), dtype=torch.int64, device=self.device),
        )
        for start, band in self._bands(lanes):
            found, at = band.topk(min(wanted, len(band)), dim=0, largest=False)
            lows, places = torch.cat([lows, found]), torch.cat([places, at + start])
            lows, at = lows.topk(min(wanted, len(lows)), dim=0, largest=False)
            places = places.gather(0, at)
        self._measure(lanes.expand(len(places), -1).flatten(), places.flatten())
        everything = len(places) == len(self.gallery[0]) * len(self.best)
        self.last = torch.full_like(lows[-1], np.inf) if everything else lows[-1]  # patches left out are no lower

    def _reach(self) -> torch.Tensor:
        """Return the lows beyond which nothing can be among the nearest, (h * w,)."""
        worst = torch.from_numpy(self.best[:, 0].astype(np.float64) * (1 + 1e-6)).to(self.device)
        reach: torch.Tensor = ((worst - self.sq_norms) / 2).float() + self.doubt * self.sq_norms
        return reach

    def settle(self) -> None:
        """Measure every patch within the doubt, if rounding could have left a nearer one out of the candidates."""
        lanes = torch.nonzero(~(self.last > self._reach())).flatten()
        step = max(1, TILE // len(self.best))
        for first in range(0, len(lanes), step):
            some = lanes[first : first + step]
            for start, band in self._bands(some):
                at, which = torch.nonzero(band <= self._reach()[some], as_tuple=True)
                mine, places = some[which], at + start
                # An exact match can only be beaten by an earlier one.
                exact = torch.from_numpy(np.where(self.best[:, 0] == 0, self.best_at[:, 0], np.iinfo(np.int64).max))
                earlier = places < exact.to(self.device)[mine]
                self._measure(mine[earlier], places[earlier])

    def _measure(self, lanes: torch.Tensor, places: torch.Tensor) -> None:
        """Measure candidates (m,) as sums of squares, and keep the best."""
        known = torch.from_numpy(self.best_at).to(self.device)
        fresh = (known[lanes] != places[:, None]).all(1)
        lanes, places = lanes[fresh], places[fresh]
        neighbours = torch.div(places, len(self.best), rounding_mode="floor")
        step = max(1, TILE // sum(map(len, self.parts)))
        for neighbour in np.unique(neighbours.cpu().numpy()).tolist():
            theirs = self._upsampled([level[neighbour] for level in self.gallery])
            chosen = torch.nonzero(neighbours == neighbour).flatten()
            for first in range(0, len(chosen), step):
                rows = chosen[first : first + step]
                at, sums = (
                    places[rows] - neighbour * len(self.best),
                    torch.zeros(len(rows), dtype=torch.float32, device=self.device).double(),
                )
                for part, other in zip(self.parts, theirs, strict=True):
                    sums += (part[:, lanes[rows]] - other[:, at]).double().square().sum(0)
                found = [each.cpu().numpy() for each in (lanes[rows], places[rows], sums.float())]
                kernels.keep_nearest(found[0], found[1], found[2], self.best, self.best_at)
