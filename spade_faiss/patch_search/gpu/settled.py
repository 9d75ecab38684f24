"""Query patches in doubt, on a torch device: every patch that rounding could have hidden is found and measured.

First all patches of the units where one could be hidden are measured: of those that were kept when candidates were
chosen. For what is still in doubt, products in float32 bound all distances, some neighbours at a time, and what is
within the bound of the nearest found so far is measured. How much there is to measure depends on the data, so the host
waits for the device here: only for patches that `candidates` could not decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...arrays import ROUNDING
from ...system.transfers import downloaded, uploaded
from ..pyramid.plan import BFLOAT16, Bools, Floats, Ints
from .candidates import Chosen, Search, beyond
from .tiles_torch import GROUPS, padded_cells

VALUES = 2**26  # of patches upsampled at a time: 256 MiB
PAIRS = 2**22  # bounded at a time; few where many patches are in doubt, as what is found first spares work later
LOOKED = 2**24  # pairs measured of units in doubt; beyond them bounds in float32 are quicker


def settle(search: Search, chosen: Chosen, best: Floats, at: Ints, undecided: Bools) -> None:
    """Put what is in doubt right, of several queries: `chosen.answer` on the host, in place."""
    for number in np.flatnonzero(undecided.any(axis=1)).tolist():
        lanes = np.flatnonzero(undecided[number])
        best[number, lanes], at[number, lanes] = settled(search, chosen, number, lanes)


def settled(search: Search, chosen: Chosen, query: int, lanes: Ints) -> tuple[Floats, Ints]:
    """Search for some patches of a query that candidates could not decide.

    Args:
        search: of several queries.
        chosen: what was measured.
        query: number of the query.
        lanes: (u,) its patches.

    Returns:
        (u, kappa) squared distances, ascending, and positions.
    """
    found = _looked(search, chosen, query, lanes)
    if found is None:
        return searched(search, query, lanes)
    best, at, is_left = found
    if is_left.any():
        best[is_left], at[is_left] = searched(search, query, lanes[is_left])
    return best, at


def _looked(search: Search, chosen: Chosen, query: int, lanes: Ints) -> tuple[Floats, Ints, Bools] | None:
    """Measure all patches of the units in doubt; see settled. Also return (u,) what is in doubt still.

    None: there are too many.
    """
    some = query, uploaded(lanes, search.device)
    floats, ints = downloaded(chosen.floats[some], chosen.ints[some])
    kept = chosen.units
    measured = ints.shape[1] - kept
    lows, rest, others, worst, sums, halves, doubts, scale = np.split(
        floats, np.cumsum([kept, kept, 1, 1, measured, 1, 1]), axis=1
    )
    likely, places = ints[:, :kept], ints[:, kept:]

    def reach(sq_distances: Floats) -> Floats:  # as Search.reach
        at_scale = sq_distances.astype(np.float64) * (np.square(scale.astype(np.float64)) * (1 + 1e-6))
        bounds: Floats = (at_scale / 2 - halves).astype(np.float32) + doubts
        return bounds

    is_left = ~_beyond(others, reach(worst))[:, 0]
    doubtful = ~_beyond(lows, reach(worst))
    counts = np.minimum(sums, worst) if search.distinct else worst
    doubtful[:, :measured] = ~_beyond(rest[:, :measured], reach(counts))
    doubtful &= ~is_left[:, None] & (likely >= 0)
    lane, unit = np.nonzero(doubtful)
    cells = search.upsampler.cells
    members = np.arange(cells if search.distinct else padded_cells(cells) // GROUPS)
    if len(lane) * len(members) > LOOKED:
        return None
    neighbours, first = np.divmod(likely[lane, unit][:, None], cells)
    inside = np.tile(members, (len(lane), 1)) if search.distinct else first % GROUPS + GROUPS * members
    found = _measured(search, query, lanes[lane][:, None], neighbours, inside)
    at = neighbours * cells + inside
    if search.distinct:  # of each neighbour the nearest, the first of those that are equally near
        nearest = found.argmin(axis=1)[:, None]
        found, at = np.take_along_axis(found, nearest, 1), np.take_along_axis(at, nearest, 1)
    known, near = np.nonzero(~doubtful[:, :measured]), np.nonzero(found <= worst[lane])  # nothing farther counts
    all_lanes = np.concatenate([known[0], lane[near[0]]])
    all_sums, all_at = np.concatenate([sums[known], found[near]]), np.concatenate([places[known], at[near]])
    return *_least(all_lanes, all_sums, all_at, len(lanes), search.kappa), is_left


def _measured(search: Search, query: int, lanes: Ints, neighbours: Ints, cells: Ints) -> Floats:
    """Return squared distances of patches to those in cells (p, m); inf beyond the last cell. Others are (p, 1)."""
    known = np.minimum(cells, search.upsampler.cells - 1)
    each = np.broadcast_arrays(query, lanes, query * search.k + neighbours, known)
    ids = uploaded(np.stack(each).reshape(4, -1), search.device)
    sums = search.upsampler.sq_distances(search.mine, search.levels, (ids[0], ids[1]), (ids[2], ids[3]))
    [found] = downloaded((sums / search.scale.double().square()).float())
    is_patch = known == cells
    if search.window:
        is_patch &= search.window.has(lanes, known)
    return np.where(is_patch, found.reshape(cells.shape), np.float32(np.inf))


def _beyond(lows: Floats, reach: Floats) -> Bools:
    """Do as candidates.beyond."""
    is_beyond: Bools = (lows > reach) | (lows == np.inf)
    return is_beyond


def _least(lanes: Ints, sums: Floats, places: Ints, count: int, kappa: int) -> tuple[Floats, Ints]:
    """Return the least kappa sums of each lane, equal ones in the order of places; what is missing is inf."""
    order = np.lexsort((places, sums, lanes))
    lanes, sums, places = lanes[order], sums[order], places[order]
    rank = np.arange(len(lanes)) - np.searchsorted(lanes, lanes)
    among = rank < kappa
    best, at = np.full((count, kappa), np.inf, np.float32), np.zeros((count, kappa), np.int64)
    best[lanes[among], rank[among]], at[lanes[among], rank[among]] = sums[among], places[among]
    return best, at


def searched(search: Search, query: int, lanes: Ints) -> tuple[Floats, Ints]:
    """Search for some patches of a query without candidates chosen before; see settled."""
    state = _Settling.of(search, query, uploaded(lanes, search.device))
    cells = search.upsampler.cells
    step = max(1, min(PAIRS // (len(lanes) * cells), VALUES // (cells * search.upsampler.channels)))
    for first in range(0, search.k, step):
        state.compare(first, min(first + step, search.k))
    best, at = downloaded(state.best, state.at)
    return best, at


@dataclass
class _Settling:
    """The nearest so far, of u patches."""

    search: Search
    query: int
    lanes: torch.Tensor  # (u,)
    own: torch.Tensor  # (u, c)
    halves: torch.Tensor  # (u,) half the squared norms
    doubts: torch.Tensor  # (u,) what products in float32 may be off by
    best: torch.Tensor  # (u, kappa) squared distances
    at: torch.Tensor  # (u, kappa) positions

    @classmethod
    def of(cls, search: Search, query: int, lanes: torch.Tensor) -> _Settling:
        """Begin with nothing found."""
        (own, squares), shape = search.own(query, lanes), (len(lanes), search.kappa)
        best = torch.full(shape, torch.inf, dtype=torch.float32, device=own.device)
        at = torch.full(shape, search.k * search.upsampler.cells, dtype=torch.int64, device=own.device)
        doubts = _rounding(search) * squares
        return cls(search, query, lanes, own, search.operand.halves[query, lanes], doubts, best, at)

    def compare(self, first: int, end: int) -> None:
        """Compare with neighbours first to end, after those before them."""
        search, upsampler = self.search, self.search.upsampler
        levels = [level[self.query, first:end][None] for level in search.levels]
        patches, squares = upsampler.patches(levels)[0], upsampler.squares(levels)[0]  # (n, cells, c), (n, cells)
        halves = patches.square().sum(-1) / 2
        bounds = halves - (self.own @ patches.flatten(0, 1).T).view(-1, *halves.shape)  # (u, n, cells)
        lows, highs = bounds - _rounding(search) * squares, bounds + _rounding(search) * squares
        if search.window:
            cells = torch.arange(upsampler.cells, device=lows.device)
            outside = ~search.window.has(self.lanes[:, None, None], cells)
            lows, highs = lows.masked_fill(outside, torch.inf), highs.masked_fill(outside, torch.inf)
        near = ~beyond(lows, self._reach(highs)).flatten(1)
        # What is as near as the last of the nearest, at 0, counts only before it.
        start = first * upsampler.cells
        at = torch.arange(start, start + near.shape[1], device=near.device)
        near &= ~(self.best[:, -1:] <= 0) | (at < self.at[:, -1:])
        lanes, places = torch.nonzero(near, as_tuple=True)
        sums = search.measured(torch.full_like(lanes, self.query), self.lanes[lanes], places + start)
        if len(lanes):
            self._keep(lanes, sums, places + start)

    def _reach(self, highs: torch.Tensor) -> torch.Tensor:
        """Return the lows beyond which nothing in a neighbour counts, (u, n, 1), by upper bounds (u, n, cells)."""
        at_scale = self.best[:, -1].double() * (self.search.scale.double().square() * (1 + 1e-6))
        reach = ((at_scale / 2 - self.halves).float() + self.doubts)[:, None, None]
        count = 1 if self.search.distinct else self.search.kappa
        if count > highs.shape[2]:
            return reach.expand(*highs.shape[:2], 1)
        likely = highs.amin(2) if count == 1 else highs.topk(count, largest=False).values[..., -1]
        return torch.minimum(reach, (likely + 2 * self.doubts[:, None])[..., None])

    def _keep(self, lanes: torch.Tensor, sums: torch.Tensor, places: torch.Tensor) -> None:
        """Keep the nearest of what was found so far and of m more, of other patches of the gallery."""
        (u, kappa), device = self.best.shape, lanes.device
        lanes = torch.cat([torch.arange(u, device=device).repeat_interleave(kappa), lanes])
        sums, places = torch.cat([self.best.flatten(), sums]), torch.cat([self.at.flatten(), places])
        order = places.argsort()
        for key in (sums, lanes):
            order = order[key[order].argsort(stable=True)]
        lanes, sums, places = lanes[order], sums[order], places[order]
        if self.search.distinct:  # of each neighbour the first
            neighbours = lanes * (self.search.k + 1) + places // self.search.upsampler.cells
            order = neighbours.argsort(stable=True)
            is_first = torch.ones(len(order), dtype=torch.bool, device=device)
            is_first[order[1:]] = neighbours[order[1:]] != neighbours[order[:-1]]
            lanes, sums, places = lanes[is_first], sums[is_first], places[is_first]
        begin = torch.searchsorted(lanes, torch.arange(u, device=device))
        rank = torch.arange(len(lanes), device=device) - begin[lanes]
        among = rank < kappa
        self.best.fill_(torch.inf)
        self.at.fill_(self.search.k * self.search.upsampler.cells)
        self.best[lanes[among], rank[among]] = sums[among]
        self.at[lanes[among], rank[among]] = places[among]


def _rounding(search: Search) -> float:
    """Return what products in float32 may be off by for each side, as a share of its squares."""
    result = 2 * ROUNDING * search.upsampler.channels**0.5 + (2 * search.upsampler.side + 16) * 2.0**-23
    if torch.get_float32_matmul_precision() != "highest":  # torch may then multiply float32 as bfloat16
        result += 1.02 * BFLOAT16
    return float(result)
