"""The match stage: every patch of a query against all patches of its neighbours, levels concatenated or apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..options import SearchOptions
from ..patch_search.bounds.kept import KeptLevel
from ..patch_search.search import search_finite, search_in_steps, search_levels_finite, search_spaced_finite
from ..system.devices import as_arrays
from .baseline import Baseline
from .leave_out import LeaveOut, Left
from .level_matches import POWERS, LevelMatches, averaged, relative
from .settings import Settings
from .standing import Standing


@dataclass(frozen=True)
class Matched:
    """What the patches of a query were matched with.

    Attributes:
        sq_distances: (h, w, kappa) float32 of the finest grid; of levels that are searched apart, what fusion made of
            them, (h, w, 1).
        matches: (h, w, kappa, 3) int32: neighbour, row and column on the finest grid.
        levels: of levels that are searched apart, each.
        left_out: neighbours that were left out; see LeaveOut.
    """

    sq_distances: NDArray[np.float32]
    matches: NDArray[np.int32]
    levels: tuple[LevelMatches, ...] = ()
    left_out: tuple[int, ...] = ()

    @classmethod
    def none(cls, grid: tuple[int, ...]) -> Matched:
        """Return what a query has whose patches are not searched: kappa is 0."""
        return cls(np.empty((*grid, 0), np.float32), np.empty((*grid, 0, 3), np.int32))

    def slim(self, kappa: int) -> Matched:
        """Return what fusion needs of it: of each level the mean over the nearest kappa, and one match."""
        levels = (
            replace(
                one,
                sq_distances=one.sq_distances[..., :kappa].mean(axis=2, dtype=np.float64)[..., None].astype(np.float32),
                matches=one.matches[:, :, :1].copy(),
            )
            for one in self.levels
        )
        return replace(self, levels=tuple(levels))


def match(
    query: list[Array],
    neighbours: list[Any],
    settings: Settings,
    baseline: Baseline | None,
    standing: Standing | None = None,
    kept: Sequence[KeptLevel] | None = None,
) -> Matched:
    """Match the patches of a query.

    Args:
        query: levels [(c, h, w), ...], finest first.
        neighbours: levels [(K, c, h, w), ...], arrays or tensors on the device that they are searched on.
        settings: of the query.
        baseline: the scale of normal images; None: distances as they are.
        standing: of the neighbours; None: nothing is known of any.
        kept: what other queries have prepared of these neighbours, by level; None: nothing.
    """
    scales, search = baseline.level_scales if baseline else (), settings.search
    if search.matching == "by_level":
        leave_out = LeaveOut.of(settings, baseline, len(neighbours[0]), standing)
        if leave_out:
            left = match_in_steps(query, neighbours, search, leave_out, kept)
        else:
            left = Left(match_levels(query, neighbours, search, settings.is_relative, kept))
        return fused_left(left, baseline, settings, standing)
    own, others = scaled(query, scales), scaled(neighbours, scales)
    # What has the checksum it was stored with is finite, as it was then.
    sq_distances, matches = as_arrays(search_finite(own, others, search, scan=not search.verify_reads))
    if standing is not None:
        sq_distances, matches = trusting(sq_distances, matches, standing.trusted)
    return Matched(sq_distances * np.float32(scales[0] ** 2) if scales else sq_distances, matches)


def match_levels(
    query: Sequence[Array], neighbours: Sequence[Any], options: SearchOptions, with_spacing: bool,
    kept: Sequence[KeptLevel] | None = None,
) -> list[LevelMatches]:  # fmt: skip
    """Search each level of a query, [(c, h, w), ...], among those of its neighbours, [(K, c, h, w), ...].

    Args:
        query: levels.
        neighbours: levels, arrays or tensors.
        options: of the search, filled in.
        with_spacing: whether to measure the spacing of what was matched.
        kept: what other queries have prepared of these neighbours, by level; None: nothing.
    """
    if options.distinct:  # a small gallery has fewer, and so has an image that is compared with the others
        options = replace(options, kappa=min(options.kappa or 1, len(neighbours[0])))
    scan, with_spacing = not options.verify_reads, with_spacing and len(neighbours[0]) > 1
    if options.distinct and with_spacing:
        found = search_spaced_finite(query, neighbours, options, scan, kept)
        return [LevelMatches(*as_arrays(one)) for one in found]
    matches = [LevelMatches(*as_arrays(one)) for one in search_levels_finite(query, neighbours, options, scan)]
    if not with_spacing:
        return matches
    from ..patch_search.spacing import spacing  # here, as it takes torch and numba

    return [
        replace(one, spacing=spacing(level, one.matches[:, :, 0], device=options.device))
        for one, level in zip(matches, neighbours, strict=True)
    ]


def match_in_steps(
    query: Sequence[Array], neighbours: Sequence[Any], options: SearchOptions, leave_out: LeaveOut,
    kept: Sequence[KeptLevel] | None = None,
) -> Left:  # fmt: skip
    """Search as match_levels does, leave neighbours out, and measure the spacing of what is left, too."""
    wanted = replace(options, kappa=leave_out.kappa + leave_out.most)
    in_steps, spacing = search_in_steps(query, neighbours, wanted, not options.verify_reads, kept)
    arrays = [as_arrays(one) for one in in_steps]
    found, before = [LevelMatches(*one[:2]) for one in arrays], [one[2] for one in arrays]
    left, after = leave_out(found), before
    if left.rarity:
        after = as_arrays(spacing([one.matches for one in left.levels], left.moved(found)))
    return left.spaced(before, after, leave_out.kappa)


def fused_left(left: Left, baseline: Baseline | None, settings: Settings, standing: Standing | None) -> Matched:
    """Make one map of what is left of levels that were searched apart; see `fused` and `trusting`."""
    levels = left.levels if standing is None else trusted_levels(left.levels, standing.trusted)
    found = fused(levels, baseline, settings)
    if not left.neighbours:
        return found
    return replace(found, sq_distances=found.sq_distances * np.float32(left.scale), left_out=left.neighbours)


def trusted_levels(levels: Sequence[LevelMatches], trusted: NDArray[np.bool_]) -> list[LevelMatches]:
    """Return what was matched on each level as `trusting` has it."""
    pairs = (trusting(one.sq_distances, one.matches, trusted) for one in levels)
    return [replace(one, sq_distances=d, matches=at) for one, (d, at) in zip(levels, pairs, strict=True)]


def trusting(
    sq_distances: NDArray[np.float32], matches: NDArray[np.int32], trusted: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Take a patch's nearest match for all of its kappa, where it lies in an image that a person has confirmed.

    Averaging over kappa guards against defects among the normal images, which nobody has looked at. It also needs
    kappa images of a kind before that kind is normal, where one confirmed image is to be enough. A mean never grows by
    this, and with kappa 1 nothing changes.

    Args:
        sq_distances: (h, w, kappa), ascending.
        matches: (h, w, kappa, 3).
        trusted: (K,) which neighbours are confirmed.

    Returns:
        both in new arrays.
    """
    alone = trusted[matches[:, :, 0, 0]][..., None]
    return np.where(alone, sq_distances[:, :, :1], sq_distances), np.where(alone[..., None], matches[:, :, :1], matches)


def fused(found: Sequence[LevelMatches], baseline: Baseline | None, settings: Settings) -> Matched:
    """Make one map of levels that were searched apart: relative to normal images where a baseline has their figures."""
    if baseline and baseline.levels:
        grid, matches = relative(found, baseline.levels, POWERS[str(settings.score.fusion)])
    else:
        grid, matches = averaged(found, baseline.level_scales if baseline else ())
    return Matched(grid[..., None].astype(np.float32), matches, tuple(found))


def scaled(levels: list[Any], scales: Sequence[float]) -> list[Any]:
    """Multiply all levels but the finest by their scales over its own: the largest is then not copied."""
    if not scales:
        return levels
    # NumPy multiplies float16 in float32, torch only what is float32 already.
    wide = (level if isinstance(level, np.ndarray) else level.float() for level in levels[1:])
    coarser = zip(wide, scales[1:], strict=True)
    return [levels[0], *(level * np.float32(scale / scales[0]) for level, scale in coarser)]
