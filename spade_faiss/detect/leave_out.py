"""Neighbours that a verdict must not rest on: a defect that hides in a few normal images must not excuse its like.

Averaging over kappa neighbours guards against a defect in one of them. Where as many as kappa show the same defect, it
looks normal. So some neighbours are left out of the comparison: those without which the map has the highest top,
measured against its mean. They are chosen for the whole map, not cell by cell, and so cost little where all are normal:
different patches of a normal image rest on different neighbours, those of a defect on the few that show it. How much
a map may gain is known of normal images, each compared with the others: of these, too, some are normal in a rare way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from ..patch_search.interpolation import taps
from .baseline import Baseline
from .level_matches import FLOOR, POWERS, LevelMatches, LevelStats
from .scoring import TOP
from .settings import Settings
from .standing import Standing

PLACES = 16  # of the finest grid, at which what is nearest is tried
TIE = 1e-4  # of a top: whichever processor computes them, the choice is the same
HUGE = np.float32(1e15)  # times a typical score, the highest; the square of its reciprocal is a float32


def most_left_out(share: float | None, kappa: int, k: int) -> int:
    """Return how many of k neighbours are left out: a share, rounded down, and kappa at least stay."""
    return max(0, min(int((share or 0) * k + 1e-9), k - kappa))


@dataclass(frozen=True)
class Left:
    """What is left of a query's matches.

    Attributes:
        levels: by level, with the matches in neighbours that are left out at the end.
        neighbours: which are left out.
        scale: what the map is multiplied by. Without some neighbours it is higher everywhere; only what rises more
            than that counts.
        rise: of the map's top against its mean, by leaving them out.
        rarity: how rare that is among normal images, from 0 to 1.
    """

    levels: list[LevelMatches]
    neighbours: tuple[int, ...] = ()
    scale: float = 1.0
    rise: float = 1.0
    rarity: float = 0.0

    def moved(self, found: Sequence[LevelMatches]) -> list[NDArray[np.bool_]]:
        """Return of each level (h, w) which patches had, as they were found, another nearest match."""
        pairs = zip(found, self.levels, strict=True)
        return [(one.matches[:, :, 0] != left.matches[:, :, 0]).any(axis=2) for one, left in pairs]

    def spaced(self, before: Sequence[NDArray[np.float32]], after: Sequence[NDArray[np.float32]], kappa: int) -> Left:
        """Return it with the spacing of each level, and the nearest kappa matches of each patch alone.

        A patch whose nearest match is left out lies where normal patches lie far apart: it is normal in a rare way, or
        a defect, which is as rare. The rarer the rise, the less that excuses it.

        Args:
            before: spacings where the patches were matched before some neighbours were left out.
            after: spacings where they are matched without them.
            kappa: number of matches.
        """
        weight = np.float32(self.rarity)
        levels = [
            LevelMatches(one.sq_distances[..., :kappa], one.matches[..., :kappa, :], old + weight * (new - old))
            for one, old, new in zip(self.levels, before, after, strict=True)
        ]
        return replace(self, levels=levels)


@dataclass(frozen=True)
class LeaveOut:
    """How neighbours are left out.

    Attributes:
        stats: of each level among normal images.
        power: of the mean of levels, see POWERS.
        kappa: neighbours that a distance is the mean of.
        most: neighbours that are left out.
        standing: of the neighbours. Those that are known as normal are never left out, and a patch whose nearest match
            is in one does not rest on the others.
        rises: of the maps of normal images, ascending; none: all rises are rare.
    """

    stats: tuple[LevelStats, ...]
    power: int
    kappa: int
    most: int
    standing: Standing
    rises: tuple[float, ...] = ()

    @classmethod
    def of(cls, settings: Settings, baseline: Baseline | None, k: int, standing: Standing | None) -> LeaveOut | None:
        """Return how a query leaves some of its k neighbours out; None: it does not.

        How many, the gallery says: a normal image that is compared with the others has fewer neighbours in a small one,
        and leaves out as many as a new image all the same. Else its score would be of another search.
        """
        kappa = min(settings.search.kappa or 1, k)
        most = min(most_left_out(settings.search.leave_out, kappa, settings.neighbours or k), k - kappa)
        if not most or baseline is None or not baseline.levels:
            return None
        standing = standing or Standing.nothing(k)
        return cls(baseline.levels, POWERS[str(settings.score.fusion)], kappa, most, standing, baseline.rises)

    def __call__(self, found: Sequence[LevelMatches]) -> Left:
        """Choose the neighbours without which the map's top is the highest against its mean.

        They are sought at the PLACES where the map would be the highest if each cell did without its own nearest
        `most`. Some sets are tried: for each place the neighbours that are nearest there, and of all of these the ones
        that are found one by one, each the one without which the top rises most. The former find a defect that several
        normal images show alike, none of which makes a difference alone. Spacings do not take part: they are known
        only of what is matched in the end.

        Args:
            found: levels, with the nearest kappa + most neighbours of each patch.
        """
        nearest = _Nearest.of(found, self)
        at_places = self._at_places(nearest)
        sets = [[], self._one_by_one(nearest, sorted(set().union(*at_places))), *at_places]
        _, tops = nearest.without_sets(self._marks(sets), self.standing.known)
        at = _highest(tops)
        chosen, rise = sets[at], float(tops[at] / tops[0])
        if not chosen:
            return Left(list(found))
        maps, _ = nearest.without_sets(self._marks([[], chosen]), self.standing.trusted)  # as the map is in the end
        means = maps.mean(axis=1, dtype=np.float64)
        left = [self._put_last(level, chosen) for level in found]
        return Left(left, tuple(chosen), float(means[0] / means[1]), rise, self._rarity(rise, chosen))

    def _rarity(self, rise: float, left_out: Sequence[int]) -> float:
        """Return the mean doubt of what is left out: without a small defect's like the top often hardly rises.

        What was not compared with the other normal images counts by the rise: 0 if half of these have it, 1 if none
        has, in between by rank.
        """
        share = np.searchsorted(self.rises, rise * (1 + TIE), side="right") / len(self.rises) if self.rises else 1.0
        doubts = self.standing.doubts[list(left_out)]
        return float(np.where(np.isnan(doubts), max(0.0, 2 * share - 1), doubts).mean())

    def _marks(self, sets: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
        """Return which neighbours are in each set, (sets, K)."""
        marks = np.zeros((len(sets), len(self.standing.trusted)), np.bool_)
        for number, one in enumerate(sets):
            marks[number, one] = True
        return marks

    def _put_last(self, level: LevelMatches, neighbours: Sequence[int]) -> LevelMatches:
        """Move the matches in some neighbours behind all others, where they are among the nearest kappa."""
        from .leave_out_kernels import put_last

        sq_distances, matches = level.sq_distances.copy(), level.matches.copy()
        number = sq_distances.shape[2]
        [out] = self._marks([neighbours])
        put_last(sq_distances.reshape(-1, number), matches.reshape(-1, number, 3), out, self.kappa)
        return replace(level, sq_distances=sq_distances, matches=matches)

    def _one_by_one(self, nearest: _Nearest, candidates: Sequence[int]) -> list[int]:
        """Choose among some neighbours as long as the top rises."""
        stay, chosen = list(candidates), list[int]()
        while stay and len(chosen) < self.most:
            worst = _highest(nearest.without_each(self._marks([chosen])[0], stay))
            if worst == 0:  # with all of them
                break
            chosen.append(stay.pop(worst - 1))
        return chosen

    def _at_places(self, nearest: _Nearest) -> list[list[int]]:
        """Return what is nearest at the PLACES where the map may become the highest."""
        known = self.standing.known
        [highest], _ = nearest.without_sets(self._marks([[]]), known, self.most)  # each cell without its own
        rows, columns = np.divmod(np.argsort(-highest, kind="stable")[:PLACES], nearest.grids[0][1])
        total = np.where(known, np.inf, np.zeros((len(rows), len(known))))
        start, finest = 0, nearest.grids[0]
        for (height, width), stats in zip(nearest.grids, self.stats, strict=True):
            cells = start + rows * height // finest[0] * width + columns * width // finest[1]
            start += height * width
            near, at = nearest.sq_distances[cells].astype(np.float64), nearest.neighbours[cells]
            far = np.repeat(near[:, -1:], len(known), axis=1)  # as the last that is known, at least
            np.put_along_axis(far, at, near, axis=1)
            total += far / (stats.low * stats.typical**2)
        order = np.argsort(total, axis=1, kind="stable")[:, : min(self.most, int((~known).sum()))]
        return [list(one) for one in dict.fromkeys(tuple(sorted(each)) for each in order.tolist())]


@dataclass(frozen=True)
class _Nearest:
    """The nearest neighbours of each cell of all levels, one level after the other.

    Attributes:
        grids: rows and columns of each level, finest first.
        sq_distances: (cells, n), ascending.
        neighbours: (cells, n) int32.
        way: how they are left out.
    """

    grids: tuple[tuple[int, int], ...]
    sq_distances: NDArray[np.float32]
    neighbours: NDArray[np.int32]
    way: LeaveOut

    @classmethod
    def of(cls, found: Sequence[LevelMatches], way: LeaveOut) -> _Nearest:
        grids = tuple((len(level.sq_distances), len(level.sq_distances[0])) for level in found)
        near, at = (
            np.concatenate([one.reshape(-1, one.shape[-1]) for one in each])
            for each in ([level.sq_distances for level in found], [level.matches[..., 0] for level in found])
        )
        return cls(grids, near, at, way)

    def without_sets(
        self, marks: NDArray[np.bool_], known: NDArray[np.bool_], spare: int = 0
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the maps without each set of neighbours, (sets, cells of the finest), and their tops.

        Args:
            marks: (sets, K), which are in each.
            known: (K,) neighbours whose distance alone counts where they are nearest.
            spare: neighbours that each cell does without besides: the nearest of its own that are not known.
        """
        from .leave_out_kernels import without_sets

        scores, way = np.empty((len(marks), len(self.neighbours)), np.float32), self.way
        without_sets(
            self.sq_distances, self.neighbours, marks, spare, way.kappa, known, self._factors, HUGE, scores
        )  # fmt: skip
        return self._fused(scores)

    def without_each(self, marks: NDArray[np.bool_], some: Sequence[int]) -> NDArray[np.float32]:
        """Return the tops of the map without marked neighbours (K,), and of those without each of some besides."""
        from .leave_out_kernels import without_each

        rows, way = np.zeros(len(marks), np.int64), self.way
        rows[some] = np.arange(1, len(some) + 1)
        scores = np.empty((len(some) + 1, len(self.neighbours)), np.float32)
        without_each(
            self.sq_distances, self.neighbours, marks, rows, way.kappa, way.standing.known, self._factors, HUGE, scores
        )  # fmt: skip
        return self._fused(scores)[1]

    @cached_property
    def _factors(self) -> NDArray[np.float32]:
        """What the roots of distances are multiplied by, (cells,)."""
        each = [np.float32(1 / (np.sqrt(stats.low) * stats.typical)) for stats in self.way.stats]
        return np.repeat(each, [height * width for height, width in self.grids])

    def _fused(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the maps of the scores of all levels, (n, cells), and their tops."""
        from .leave_out_kernels import fuse

        size = self.grids[0][0] * self.grids[0][1]
        maps = np.empty((len(scores), size), np.float32)
        tops = np.empty((len(scores), max(1, int(TOP * size))), np.float32)
        fuse(scores, np.array(self.grids), *_taps(self.grids), np.float32(FLOOR), self.way.power, maps, tops)
        return maps, tops[:, 0]


@lru_cache(maxsize=8)
def _taps(grids: tuple[tuple[int, int], ...]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return of which cells of its level each row and column of the finest is interpolated, and with what weights."""
    at, weights = (np.zeros((len(grids), 2, max(grids[0]), 2), dtype) for dtype in (np.int64, np.float32))
    for level, grid in enumerate(grids):
        for axis, (old, new) in enumerate(zip(grid, grids[0], strict=True)):
            at[level, axis, :new], weights[level, axis, :new] = taps(old, new)
    return at, weights


def _highest(tops: NDArray[np.float32]) -> int:
    """Return which of the tops of maps is the highest; of those that TIE, the first."""
    return int(np.argmax(tops >= tops.max() * (1 - TIE)))
