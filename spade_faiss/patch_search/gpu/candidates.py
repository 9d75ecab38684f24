"""The likeliest candidates of some queries' patches, found and measured without a wait for the device.

Bounds of the products (`tiles`) choose units: groups of patches or, where matches are distinct, neighbours. The
candidates of the likeliest units are measured. What all other patches are at least away says whether that was enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .patches import Levels, Upsampler
from .tiles import apart, least, likeliest
from .tiles_torch import GROUPS, Operand, Window

BYTES = 2**30  # of neighbours' patches, upsampled at a time
GROUPED = 2**26  # least bounds of groups at a time: 12 bytes each
SPARE = 3  # units measured beyond kappa: usually enough to show that rounding has hidden nothing
KEPT = 32  # units kept beyond these: enough for nearly all patches in doubt


@dataclass(frozen=True)
class Likely:
    """Candidates in units, the likeliest first. A unit is a group of patches; where matches are distinct, a neighbour.

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
        count = min(count, self.lows.shape[2])
        lows, at = self.lows.topk(count + (count < self.lows.shape[2]), largest=False)
        others = torch.minimum(self.others, lows[..., -1]) if lows.shape[2] > count else self.others
        at = at[..., :count]
        places = self.places.gather(2, at[..., None].expand(*at.shape, self.places.shape[3]))
        return Likely(lows[..., :count], places, self.rest.gather(2, at), others)

    def first(self, count: int) -> Likely:
        """Return the first so many units."""
        others = torch.minimum(self.others, self.lows[..., count]) if count < self.lows.shape[2] else self.others
        return Likely(self.lows[..., :count], self.places[..., :count, :], self.rest[..., :count], others)


class Chosen(NamedTuple):
    """What was measured.

    Attributes:
        best: (b, q, kappa) squared distances, ascending, equal ones by position; inf: there are fewer.
        at: (b, q, kappa) positions.
        undecided: (b, q) whether rounding could have hidden a nearer patch.
        units: how many were kept, u, the likeliest first.
        floats: (b, q, 2 u + m + 5) what settles a patch in doubt: the least bounds of u units, those of their other
            patches and of all other units, the last of best, the squared distances of the nearest measured candidate of
            each of m units, half the patch's squared norm, its doubt, the scale.
        ints: (b, q, u + m) positions of the units' likeliest candidates, and of those that were measured.
    """

    best: torch.Tensor
    at: torch.Tensor
    undecided: torch.Tensor
    units: int
    floats: torch.Tensor
    ints: torch.Tensor

    @property
    def answer(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the host wants of it: best, at and undecided."""
        return self.best, self.at, self.undecided


@dataclass(frozen=True)
class Search:
    """The search of b queries among k neighbours each. All tensors are at scale."""

    upsampler: Upsampler
    mine: list[torch.Tensor]  # levels of the queries, [(b, 1, h, w, c), ...]
    levels: list[torch.Tensor]  # of the neighbours, [(b, k, h, w, c), ...]
    scale: torch.Tensor  # () float32, a power of two
    operand: Operand  # of the queries' patches, (b, q, c)
    kappa: int
    distinct: bool
    window: Window | None = None

    @classmethod
    def of(
        cls, query: list[torch.Tensor], gallery: Levels, kappa: int, distinct: bool, window: Window | None = None
    ) -> Search:
        """Load levels of queries [(b, 1, c, h, w), ...], on the device, and of neighbours [(b, k, c, h, w), ...]."""
        upsampler = Upsampler(query, gallery)
        (mine, theirs), scale = upsampler.load(query, gallery)
        return cls(upsampler, mine, theirs, scale, upsampler.own_operand(mine), kappa, distinct, window)

    def among(self, places: torch.Tensor, kappa: int) -> Search:
        """Return a search for the neighbours' own patches at positions (b, m), of a single level."""
        [level] = self.levels
        patches = level.flatten(1, 3)
        at = places.clamp(max=patches.shape[1] - 1)
        mine = [patches.gather(1, at[..., None].expand(*at.shape, patches.shape[2]))[:, None, :, None]]
        return replace(self, mine=mine, operand=self.upsampler.own_operand(mine), kappa=kappa)

    def own(self, query: int, lanes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return patches of a query, (n, c) float32, and what bounds their squared norms, see Upsampler.squares."""
        images, squares = torch.full_like(lanes, query), [level.square().sum(-1, keepdim=True) for level in self.mine]
        return self.upsampler.at(self.mine, images, lanes), self.upsampler.at(squares, images, lanes).sum(-1)

    @property
    def device(self) -> torch.device:
        """Where it searches."""
        return self.scale.device

    @property
    def k(self) -> int:
        """Neighbours of a query."""
        return int(self.levels[0].shape[1])

    def choose(self) -> Chosen:
        """Measure the likeliest candidates; nothing waits for the device."""
        (b, q, c), count = self.operand.values.shape, self.kappa + SPARE + KEPT
        patches = b * self.upsampler.cells * c * self.upsampler.bytes_per_value
        step = max(1, min(BYTES // patches, GROUPED // (b * q * GROUPS)))
        likely = self._compared(0, min(step, self.k), count)
        for first in range(step, self.k, step):
            likely = likely.joined(self._compared(first, min(first + step, self.k), count)).nearest(count)
        return self._decided(likely)

    def _compared(self, first: int, end: int, count: int) -> Likely:
        """Compare with neighbours first to end, and keep the likeliest so many units."""
        theirs = self.upsampler.operand([level[:, first:end] for level in self.levels])
        sides = self.operand.values, theirs.values, theirs.halves - theirs.doubts
        if self.distinct:
            found = apart(*sides)
            neighbours = torch.arange(first, end, device=self.device)[:, None]
            others = torch.full_like(self.operand.halves, torch.inf)
            places = self._places(neighbours, found.cells, found.lows)
            return Likely(found.lows[..., 0], places, found.rest, others).nearest(count)
        likely = likeliest(least(*sides, self.window), count)
        neighbours = torch.div(likely.groups, GROUPS, rounding_mode="floor") + first
        places = self._places(neighbours, likely.cells, likely.lows)
        return Likely(likely.lows, places[..., None], likely.seconds, likely.others)

    def _places(self, neighbours: torch.Tensor, cells: torch.Tensor, lows: torch.Tensor) -> torch.Tensor:
        """Return positions of cells of neighbours, int64; -1: no patch, or none that is compared."""
        size = self.upsampler.cells
        return torch.where((cells < size) & (lows != torch.inf), neighbours * size + cells, -1)

    def _decided(self, kept: Likely) -> Chosen:
        """Measure the likeliest of the units that were kept."""
        likely = kept.first(self.kappa + SPARE)
        b, q, units, each = likely.places.shape
        device = likely.places.device
        queries = torch.arange(b, device=device)[:, None, None, None].expand(likely.places.shape)
        lanes = torch.arange(q, device=device)[:, None, None].expand(likely.places.shape)
        sums = self.measured(*(part.reshape(-1) for part in (queries, lanes, likely.places))).view(b, q, units, each)
        places, nowhere = likely.places, self.k * self.upsampler.cells
        sums = torch.where(places < 0, torch.inf, sums)
        sums, places = (part[..., 0] for part in nearest_of(sums, torch.where(places < 0, nowhere, places), 1))
        best, at = nearest_of(sums, places, self.kappa)
        if (spare := self.kappa - best.shape[-1]) > 0:  # there are fewer groups: all is in doubt
            best, at = F.pad(best, (0, spare), value=torch.inf), F.pad(at, (0, spare), value=nowhere)
        worst = best[..., -1:]
        counts = torch.minimum(sums, worst) if self.distinct else worst
        is_decided = beyond(likely.rest, self.reach(counts)).all(-1) & beyond(likely.others, self.reach(worst)[..., 0])
        halves, doubts = self.operand.halves[..., None], self.operand.doubts[..., None]
        floats = (kept.lows, kept.rest, kept.others[..., None], worst, sums, halves, doubts, self.scale.expand(b, q, 1))
        ints = torch.cat([kept.places[..., 0], places], dim=2)
        return Chosen(best, at, ~is_decided, kept.lows.shape[2], torch.cat(floats, dim=2), ints)

    def reach(self, sq_distances: torch.Tensor, lanes: torch.Tensor | None = None) -> torch.Tensor:
        """Return the bounds beyond which nothing is as near as (b, q, n) squared distances; see also settled.

        Args:
            sq_distances: of all query patches; or of some, whose numbers (b, q) are `lanes`.
            lanes: see there.
        """
        at_scale = sq_distances.double() * (self.scale.double().square() * (1 + 1e-6))
        halves, doubts = self.operand.halves, self.operand.doubts
        if lanes is not None:
            halves, doubts = halves.gather(1, lanes), doubts.gather(1, lanes)
        return (at_scale / 2 - halves[..., None]).float() + doubts[..., None]

    def measured(self, queries: torch.Tensor, lanes: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return squared distances of pairs of patches, (pairs,) float32, from sums of squares.

        Args:
            queries: numbers of the queries, (pairs,) int64.
            lanes: numbers of their patches.
            places: positions of the others; where there is none, -1, anything is returned.
        """
        cells = self.upsampler.cells
        images = torch.where(places < 0, -1, queries * self.k + torch.div(places, cells, rounding_mode="floor"))
        sums = self.upsampler.sq_distances(self.mine, self.levels, (queries, lanes), (images, places % cells))
        return (sums / self.scale.double().square()).float()


def beyond(lows: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """Return which bounds show that nothing is within reach; where they are infinite, there is nothing."""
    return (lows > reach) | (lows == torch.inf)


def nearest_of(sums: torch.Tensor, places: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least sums (..., n) and their places, ascending, equal ones by place; fewer than count if n is less.

    Sums are at least 0: their bits are in their order, NaN last, and one number holds both.
    """
    keys = (sums.abs().view(torch.int32).long() << 32) | places  # NaN may have a sign
    count = min(count, keys.shape[-1])
    keys = keys.amin(-1, keepdim=True) if count == 1 else keys.topk(count, largest=False).values
    return (keys >> 32).int().view(torch.float32), keys & (2**32 - 1)
