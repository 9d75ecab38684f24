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

import numpy as np
from numpy.typing import NDArray

from .baseline import Baseline
from .level_matches import POWERS, F, LevelMatches, LevelStats, mean_of_levels
from .scoring import TOP
from .settings import Settings

PLACES = 16  # of the finest grid, at which what is nearest is tried
TIE = 1e-4  # of a top: whichever processor computes them, the choice is the same
HUGE = np.float32(1e15)  # times a typical score; the square of its reciprocal is a float32


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
        trusted: (K,) neighbours that a person has confirmed, which are never left out; see matching.trusting.
        rises: of the maps of normal images, ascending; none: all rises are rare.
    """

    stats: tuple[LevelStats, ...]
    power: int
    kappa: int
    most: int
    trusted: NDArray[np.bool_]
    rises: tuple[float, ...] = ()

    @classmethod
    def of(
        cls, settings: Settings, baseline: Baseline | None, k: int, trusted: NDArray[np.bool_] | None
    ) -> LeaveOut | None:
        """Return how a query leaves some of its k neighbours out; None: it does not."""
        kappa = min(settings.search.kappa or 1, k)
        most = most_left_out(settings.search.leave_out, kappa, k)
        if not most or baseline is None or not baseline.levels:
            return None
        trusted = np.zeros(k, np.bool_) if trusted is None else trusted
        return cls(baseline.levels, POWERS[str(settings.score.fusion)], kappa, most, trusted, baseline.rises)

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
        levels = [_Nearest.of(level) for level in found]
        with np.errstate(over="ignore"):  # of distances near the end of float32; see HUGE
            at_places = self._at_places(levels)
            sets = [[], self._one_by_one(levels, sorted(set().union(*at_places))), *at_places]
            maps = self._maps(self._without_sets(levels, sets), levels)
        at = _highest(maps)
        if not sets[at]:
            return Left(list(found))
        (before, after), means = _tops(maps[[0, at]]), maps[[0, at]].mean(axis=1, dtype=np.float64)
        rise = float(after / before)
        left = [self._put_last(level, sets[at]) for level in found]
        return Left(left, tuple(sets[at]), float(means[0] / means[1]), rise, self._rarity(rise))

    def _rarity(self, rise: float) -> float:
        """Return 0 for what half of normal images have, 1 for what none has; in between by rank."""
        if not self.rises:
            return 1.0
        share = np.searchsorted(self.rises, rise * (1 + TIE), side="right") / len(self.rises)
        return max(0.0, 2 * float(share) - 1)

    def _put_last(self, level: LevelMatches, neighbours: Sequence[int]) -> LevelMatches:
        """Move the matches in some neighbours behind all others, where they are among the nearest kappa."""
        marks = np.isin(np.arange(len(self.trusted)), neighbours)
        is_out = marks[level.matches[..., 0]]
        moved = is_out[..., : self.kappa].any(axis=2)
        order = np.argsort(is_out[moved], axis=1, kind="stable")
        sq_distances, matches = level.sq_distances.copy(), level.matches.copy()
        sq_distances[moved] = np.take_along_axis(sq_distances[moved], order, 1)
        matches[moved] = np.take_along_axis(matches[moved], order[..., None], 1)
        return replace(level, sq_distances=sq_distances, matches=matches)

    def _one_by_one(self, levels: Sequence[_Nearest], candidates: Sequence[int]) -> list[int]:
        """Choose among some neighbours as long as the top rises."""
        stay, chosen = list(candidates), list[int]()
        while stay and len(chosen) < self.most:
            worst = _highest(self._maps([self._without_each(level, stay) for level in levels], levels))
            if worst == 0:  # with all of them
                break
            chosen.append(stay.pop(worst - 1))
            levels = [level.without(chosen[-1]) for level in levels]
        return chosen

    def _at_places(self, levels: Sequence[_Nearest]) -> list[list[int]]:
        """Return what is nearest at the PLACES where the map may become the highest."""
        finest, own = levels[0].grid, []
        for level in levels:  # each cell without its own
            is_trusted = self.trusted[level.neighbours]
            own.append(self._without(level, (~is_trusted & (np.cumsum(~is_trusted, axis=0) <= self.most))[None]))
        [highest] = self._maps(own, levels)
        rows, columns = np.divmod(np.argsort(-highest, kind="stable")[:PLACES], finest[1])
        total = np.where(self.trusted, np.inf, np.zeros((len(rows), len(self.trusted))))
        for level, stats in zip(levels, self.stats, strict=True):
            height, width = level.grid
            cells = rows * height // finest[0] * width + columns * width // finest[1]
            near, at = level.sq_distances[:, cells].astype(np.float64), level.neighbours[:, cells]
            far = np.repeat(near[-1:].T, len(self.trusted), axis=1)  # as the last that is known, at least
            far[np.arange(len(cells)), at] = near
            total += far / (stats.low * stats.typical**2)
        order = np.argsort(total, axis=1, kind="stable")[:, : min(self.most, int((~self.trusted).sum()))]
        return [list(one) for one in dict.fromkeys(tuple(sorted(each)) for each in order.tolist())]

    def _without_sets(self, levels: Sequence[_Nearest], sets: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Return levels' distances without each set of neighbours, (sets, cells)."""
        marks = np.array([np.isin(np.arange(len(self.trusted)), one) for one in sets])
        return [self._without(level, marks[:, level.neighbours]) for level in levels]

    def _maps(self, distances: Sequence[NDArray[F]], levels: Sequence[_Nearest]) -> NDArray[F]:
        """Return the maps of levels' distances, each (n, cells), on the finest grid."""
        from torch import from_numpy  # here, as it takes long
        from torch.nn.functional import interpolate

        finest, scores = levels[0].grid, []
        for sq_distances, level, stats in zip(distances, levels, self.stats, strict=True):
            each = np.sqrt(sq_distances) * sq_distances.dtype.type(1 / (np.sqrt(stats.low) * stats.typical))
            np.minimum(each, HUGE, out=each)
            if level.grid != finest:
                grids = from_numpy(each.reshape(1, -1, *level.grid))
                each = interpolate(grids, finest, mode="bilinear", align_corners=False).numpy().reshape(len(each), -1)
            scores.append(each)
        return mean_of_levels(scores, self.power)

    def _without_each(self, level: _Nearest, some: Sequence[int]) -> NDArray[np.float32]:
        """Return a level's distances with all neighbours, and without each of n, (1 + n, cells)."""
        near, at, kappa, cells = level.sq_distances, level.neighbours, self.kappa, np.arange(level.neighbours.shape[1])
        total, trusted = near[:kappa].sum(axis=0), self.trusted[at[:2]]
        places = np.full(len(self.trusted), len(some) + 1)  # the last row is of no use
        places[some] = np.arange(1, len(some) + 1)
        distances = np.empty((len(some) + 2, len(cells)), np.float32)
        distances[:] = np.where(trusted[0], near[0], total / kappa)
        for one in range(kappa):
            nearest = 0 if one else 1  # of those that stay
            without = (total - near[one] + near[kappa]) / kappa
            distances[places[at[one]], cells] = np.where(trusted[nearest], near[nearest], without)
        return distances[:-1]

    def _without(self, level: _Nearest, is_out: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return a level's distances without some of the nearest of each cell; (n, number, cells) -> (n, cells)."""
        stays = ~is_out
        counts = stays & (np.cumsum(stays, axis=1, dtype=np.int16) <= self.kappa)
        mean: NDArray[np.float32] = np.einsum("ntc,tc->nc", counts, level.sq_distances, dtype=np.float32)
        mean /= np.float32(self.kappa)
        if not self.trusted.any():
            return mean
        nearest = np.argmax(stays, axis=1), np.arange(stays.shape[2])
        alone: NDArray[np.float32] = np.where(
            self.trusted[level.neighbours[nearest]], level.sq_distances[nearest], mean
        )
        return alone


@dataclass(frozen=True)
class _Nearest:
    """The nearest neighbours of each cell of a level, (number, cells), ascending."""

    grid: tuple[int, int]
    sq_distances: NDArray[np.float32]
    neighbours: NDArray[np.int32]

    @classmethod
    def of(cls, level: LevelMatches) -> _Nearest:
        height, width, number = level.sq_distances.shape
        near, at = (array.reshape(-1, number).T for array in (level.sq_distances, level.matches[..., 0]))
        return cls((height, width), np.ascontiguousarray(near), np.ascontiguousarray(at))

    def without(self, neighbour: int) -> _Nearest:
        """Return what is nearest without a neighbour, one less."""
        is_past = np.logical_or.accumulate(self.neighbours == neighbour)[:-1]
        near, at = (np.where(is_past, each[1:], each[:-1]) for each in (self.sq_distances, self.neighbours))
        return _Nearest(self.grid, near, at)


def _highest(maps: NDArray[np.float32]) -> int:
    """Return which of the maps (n, cells) has the highest top against its mean; of those that TIE, the first."""
    tops = _tops(maps)
    return int(np.argmax(tops >= tops.max() * (1 - TIE)))


def _tops(maps: NDArray[F]) -> NDArray[F]:
    """Return the mean of the highest values of each of n maps (n, cells) over the mean of all."""
    count = max(1, int(TOP * maps.shape[1]))
    tops: NDArray[F] = np.partition(maps, -count, axis=1)[:, -count:].mean(axis=1) / maps.mean(axis=1)
    return tops
