"""Query patches in doubt, on a torch device: every patch that rounding could have hidden is found and measured.

Products in float32 bound distances, a neighbour at a time. What is within the bound of the nearest found so far is
measured as a sum of squares. The number of these depends on the data, so the host waits for the device here: only for
patches that `pyramid_torch` could not decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arrays import ROUNDING
from ..system.transfers import downloaded, uploaded
from .candidates_torch import Search
from .pyramid_plan import BFLOAT16, Floats, Ints

VALUES = 2**26  # of candidates measured at a time: 256 MiB


def settled(search: Search, query: int, lanes: Ints) -> tuple[Floats, Ints]:
    """Search for some patches of a query without candidates chosen before.

    Args:
        search: of several queries.
        query: number of the query.
        lanes: (u,) its patches.

    Returns:
        (u, kappa) squared distances, ascending, and positions.
    """
    state = _Settling.of(search, query, uploaded(lanes, search.own.device))
    for neighbour in range(search.k):
        state.compare(neighbour)
    best, at = downloaded(state.best, state.at)
    return best, at


@dataclass
class _Settling:
    """The nearest so far, of u patches."""

    search: Search
    query: int
    own: torch.Tensor  # (u, c)
    halves: torch.Tensor  # (u,) half the squared norms
    doubts: torch.Tensor  # (u,) what products in float32 may be off by
    best: torch.Tensor  # (u, kappa) squared distances
    at: torch.Tensor  # (u, kappa) positions

    @classmethod
    def of(cls, search: Search, query: int, lanes: torch.Tensor) -> _Settling:
        """Begin with nothing found."""
        own, shape = search.own[query, lanes], (len(lanes), search.kappa)
        best = torch.full(shape, torch.inf, dtype=torch.float32, device=own.device)
        at = torch.full(shape, search.k * search.upsampler.cells, dtype=torch.int64, device=own.device)
        doubts = _rounding(search) * search.squares[query, lanes]
        return cls(search, query, own, search.operand.halves[query, lanes], doubts, best, at)

    def compare(self, neighbour: int) -> None:
        """Compare with a neighbour, after those before it."""
        search, upsampler = self.search, self.search.upsampler
        levels = [level[self.query, neighbour][None, None] for level in search.levels]
        patches, squares = upsampler.patches(levels)[0, 0], upsampler.squares(levels)[0, 0]
        bounds = patches.square().sum(-1) / 2 - self.own @ patches.T  # (u, cells)
        lows, highs = bounds - _rounding(search) * squares, bounds + _rounding(search) * squares
        near = ~(lows > self._reach(highs)[:, None])
        # What is as near as the last of the nearest, at 0, counts only before it.
        first = neighbour * upsampler.cells
        cells = torch.arange(first, first + upsampler.cells, device=near.device)
        near &= ~(self.best[:, -1:] <= 0) | (cells < self.at[:, -1:])
        lanes, places = torch.nonzero(near, as_tuple=True)
        sums = torch.empty(len(lanes), dtype=torch.float32, device=lanes.device)
        step = max(1, VALUES // upsampler.channels)
        for start in range(0, len(lanes), step):
            some = slice(start, start + step)
            sums[some] = search.measured(self.own[lanes[some]], places[some] + first, self.query * search.k)
        if len(lanes):
            self._keep(lanes, sums, places + first)

    def _reach(self, highs: torch.Tensor) -> torch.Tensor:
        """Return the lows beyond which nothing in a neighbour counts, (u,), by upper bounds (u, cells)."""
        at_scale = self.best[:, -1].double() * (self.search.scale.double().square() * (1 + 1e-6))
        reach = (at_scale / 2 - self.halves).float() + self.doubts
        count = 1 if self.search.distinct else self.search.kappa
        if count > highs.shape[1]:
            return reach
        likely = highs.kthvalue(count, dim=1).values if count > 1 else highs.amin(1)
        return torch.minimum(reach, likely + 2 * self.doubts)

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
