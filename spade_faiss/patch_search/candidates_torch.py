"""The likeliest candidates of some queries' patches, found and measured without a wait for the device.

Bounds of the products (`tiles_torch`) choose units: groups of patches or, where matches are distinct, neighbours. The
candidates of the likeliest units are measured. What all other patches are at least away says whether that was enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .patches_torch import Levels, Upsampler
from .tiles import least
from .tiles_torch import GROUPS, Operand, margin, padded_cells, scale_of

PAIRS = 2**27  # pairs of patches compared at a time: 512 MiB where the products are written to memory
VALUES = 2**26  # of patches upsampled at a time, and of candidates measured: 256 MiB
SPARE = 3  # units beyond kappa: usually enough to show that rounding has hidden nothing
OF_ONE = 2  # candidates of each neighbour, where matches are distinct


@dataclass(frozen=True)
class Likely:
    """Candidates in units: a unit is a group of patches or, where matches are distinct, a neighbour.

    Attributes:
        lows: (b, q, u) float32, the least bound of each unit.
        places: (b, q, u, p) int64, positions of the unit's candidates; -1: none.
        rest: (b, q, u) float32, the least bound of the unit's other patches.
        others: (b, q) float32, the least bound of all other units.
    """

    lows: torch.Tensor
    places: torch.Tensor
    rest: torch.Tensor
    others: torch.Tensor

    def joined(self, other: Likely) -> Likely:
        """Put the units of both beside each other."""
        pairs = ((self.lows, other.lows), (self.places, other.places), (self.rest, other.rest))
        lows, places, rest = (torch.cat(pair, dim=2) for pair in pairs)
        return Likely(lows, places, rest, torch.minimum(self.others, other.others))

    def nearest(self, count: int) -> Likely:
        """Keep so many units, and of the others the least bound."""
        if self.lows.shape[2] <= count:
            return self
        lows, at = self.lows.topk(count + 1, largest=False)
        others, at = torch.minimum(self.others, lows[..., -1]), at[..., :-1]
        places = self.places.gather(2, at[..., None].expand(*at.shape, self.places.shape[3]))
        return Likely(lows[..., :-1], places, self.rest.gather(2, at), others)


@dataclass(frozen=True)
class Search:
    """The search of b queries among k neighbours each. All tensors are at scale."""

    upsampler: Upsampler
    levels: list[torch.Tensor]  # of the neighbours, [(b, k, h, w, c), ...]
    scale: torch.Tensor  # () float32, a power of two
    own: torch.Tensor  # (b, q, c) float32 patches of the queries
    squares: torch.Tensor  # (b, q) see Upsampler.squares
    operand: Operand  # of these patches
    kappa: int
    distinct: bool

    @classmethod
    def of(cls, upsampler: Upsampler, query: Levels, gallery: Levels, kappa: int, distinct: bool) -> Search:
        """Load levels: of the queries [(b, 1, c, h, w), ...], of their neighbours [(b, k, c, h, w), ...]."""
        mine, theirs = upsampler.load(query), upsampler.load(gallery)
        scale = scale_of(*mine, *theirs)
        mine, theirs = ([level.mul_(scale) for level in side] for side in (mine, theirs))
        if len(mine) == 1:  # patches of any grid
            own = mine[0].flatten(1, 3)
            squares = own.square().sum(-1)
        else:
            # As they are gathered when they are measured, so that a copy is at 0.
            b, cells = len(mine[0]), torch.arange(upsampler.cells, device=scale.device)
            own = upsampler.at(mine, torch.arange(b, device=scale.device)[:, None], cells.expand(b, -1))
            squares = upsampler.squares(mine)[:, 0]
        operand = Operand.of(own, squares, margin(upsampler.channels, upsampler.side))
        return cls(upsampler, theirs, scale, own, squares, operand, kappa, distinct)

    @property
    def k(self) -> int:
        """Neighbours of a query."""
        return int(self.levels[0].shape[1])

    def choose(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Measure the likeliest candidates; nothing waits for the device.

        Returns:
            (b, q, kappa) squared distances, ascending, and positions; (b, q) whether rounding could have hidden a
            nearer patch.
        """
        (b, q, c), cells = self.own.shape, self.upsampler.cells
        step = max(1, min(PAIRS // (b * q * padded_cells(cells)), VALUES // (b * cells * c)))
        likely = self._compared(0, min(step, self.k)).nearest(self.kappa + SPARE)
        for first in range(step, self.k, step):
            found = self._compared(first, min(first + step, self.k))
            likely = likely.joined(found.nearest(self.kappa + SPARE)).nearest(self.kappa + SPARE)
        return self._decided(likely)

    def _compared(self, first: int, end: int) -> Likely:
        """Compare with neighbours first to end."""
        levels, upsampler = [level[:, first:end] for level in self.levels], self.upsampler
        theirs = Operand.of(
            upsampler.patches(levels), upsampler.squares(levels), margin(upsampler.channels, upsampler.side)
        )
        found = least(self.operand.values, theirs.values, theirs.halves - theirs.doubts)
        device = found.at.device
        cells = found.at.long() * GROUPS + torch.arange(GROUPS, device=device)
        places = cells + torch.arange(first, end, device=device)[:, None] * upsampler.cells
        places = torch.where(cells < upsampler.cells, places, -1)
        others = torch.full_like(found.first[:, :, 0, 0], torch.inf)
        if not self.distinct:
            return Likely(found.first.flatten(2), places.flatten(2)[..., None], found.second.flatten(2), others)
        lows, at = found.first.topk(OF_ONE + 1, largest=False)
        rest = torch.minimum(found.second.amin(-1), lows[..., -1])
        return Likely(lows[..., 0], places.gather(-1, at[..., :OF_ONE]), rest, others)

    def _decided(self, likely: Likely) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Measure what is likely, and return what `choose` does."""
        b, q, units, each = likely.places.shape
        sums = torch.empty(likely.places.shape, dtype=torch.float32, device=likely.places.device)
        step = max(1, VALUES // (b * units * each * self.own.shape[2]))
        images = torch.arange(b, device=sums.device)[:, None, None, None] * self.k
        for first in range(0, q, step):
            some = slice(first, first + step)
            sums[:, some] = self.measured(self.own[:, some, None, None], likely.places[:, some], images)
        places, nowhere = likely.places, self.k * self.upsampler.cells
        sums = torch.where(places < 0, torch.inf, sums)
        sums, places = ascending(sums, torch.where(places < 0, nowhere, places))
        if self.distinct:
            sums, places = sums[..., :1], places[..., :1]
        best, at = (each[..., : self.kappa] for each in ascending(sums.flatten(2), places.flatten(2)))
        if (spare := self.kappa - best.shape[-1]) > 0:  # there are fewer groups: all is in doubt
            best, at = F.pad(best, (0, spare), value=torch.inf), F.pad(at, (0, spare), value=nowhere)
        worst = best[..., -1:]
        counts = torch.minimum(sums[..., 0], worst) if self.distinct else worst
        is_decided = (likely.rest > self._reach(counts)).all(-1) & (likely.others > self._reach(worst)[..., 0])
        return best, at, ~is_decided

    def _reach(self, sq_distances: torch.Tensor) -> torch.Tensor:
        """Return the bounds beyond which nothing is as near as (b, q, n) squared distances."""
        at_scale = sq_distances.double() * (self.scale.double().square() * (1 + 1e-6))
        halves, doubts = self.operand.halves[..., None], self.operand.doubts[..., None]
        return (at_scale / 2 - halves).float() + doubts

    def measured(self, own: torch.Tensor, places: torch.Tensor, images: torch.Tensor | int) -> torch.Tensor:
        """Return squared distances of patches (..., c) to those at places (...), float32, from sums of squares.

        Args:
            own: patches of queries, (..., c).
            places: positions; where there is none, -1, anything is returned.
            images: number of the first of the query's neighbours, counted through b and k.
        """
        places = places.clamp(min=0)
        neighbours = torch.div(places, self.upsampler.cells, rounding_mode="floor")
        theirs = self.upsampler.at(self.levels, images + neighbours, places % self.upsampler.cells)
        sums = (own - theirs).double().square().sum(-1)
        return (sums / self.scale.double().square()).float()


def ascending(sums: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the last dimension by sums, equal ones by places."""
    order = places.argsort(dim=-1)
    sums, places = sums.gather(-1, order), places.gather(-1, order)
    sums, order = sums.sort(dim=-1, stable=True)
    return sums, places.gather(-1, order)
