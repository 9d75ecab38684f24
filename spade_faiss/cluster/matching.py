"""The match stage across members: each answers for the neighbours that it holds, and the answers are merged.

The kappa least of a union lie among the kappa least of its parts, so merging by distance, then neighbour, row and
column, is exact. It gives what one gallery gives bit for bit, because the distance of a pair of patches depends on no
other patch: every engine measures the pairs that it returns one by one. Three choices depend on all neighbours
together, and are made here for all members: the engine, where "auto" goes by the number of neighbours; kappa, which may
be more than one member has patches for; and the patches whose spacing is measured, which are centred together.

One round finds the matches. Where scores are relative to the spacing of normal patches, two more follow: the owners of
the matched patches send them, and every owner of a neighbour finds the nearest patches of its own to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Ids
from ..detect.baseline import Baseline
from ..detect.leave_out import LeaveOut, Left
from ..detect.level_matches import LevelMatches
from ..detect.matching import Matched, fused_left, match, trusting
from ..detect.settings import Settings
from ..detect.standing import Standing
from ..options import Engine, SearchOptions
from ..patch_search.cost_model import faster
from ..patch_search.matched import NEAREST, MatchedPatches
from ..patch_search.settings import SearchSettings
from .members import Members, Share

Shape = tuple[int, int, int]
# Channels up to which the flat engine adds up a pair's differences in one order: NumPy's einsum works in pieces of so
# many values, and beyond it the pieces begin elsewhere for each pair.
EINSUM_BUFFER = 8192


def match_across(
    query: list[Array],
    ids: Ids,
    members: Members,
    settings: Settings,
    baseline: Baseline | None,
    standing: Standing | None = None,
) -> Matched:
    """Match the patches of a query with those of its neighbours, where these are.

    Args:
        query: levels [(c, h, w), ...], finest first.
        ids: of the neighbours, nearest first.
        members: who hold them.
        settings: of the query.
        baseline: the scale of normal images; None: distances as they are.
        standing: of the neighbours; None: nothing is known of any.

    Raises:
        MemberError: a member is lost.
    """
    scales, apart = baseline.level_scales if baseline else (), settings.search.matching == "by_level"
    shares = members.shares(ids)
    grids: list[Shape] = [level.shape for level in query]
    search, together = settings.search, [[one] for one in grids] if apart else [grids]
    leave_out = LeaveOut.of(settings, baseline, len(ids), standing)
    if search.distinct:  # as match_levels and match_in_steps have it
        search = replace(search, kappa=min(search.kappa or 1, len(ids)) + (leave_out.most if leave_out else 0))
    SearchSettings.of(search).check([(h, w) for [(_, h, w), *_] in together], len(ids))
    plans = [plan(search, part, len(ids)) for part in together]
    parts = [
        [clamped(one, grid[1:], len(share.at)) for one, grid in zip(plans, grids, strict=False)] for share in shares
    ]
    if any(None in options for options in parts):
        return match(query, _levels(ids, members, search.verify_reads), settings, baseline, standing)
    asked, spaced = members.shared(query), apart and settings.is_relative and len(ids) > 1
    answers = members.gather(
        {
            share.member: ("match", asked, share.rows, options, scales, spaced)
            for share, options in zip(shares, parts, strict=True)
        }
    )
    found = [
        merged([answers[share.member][number] for share in shares], shares, one.kappa or 1)
        for number, one in enumerate(plans)
    ]
    if not apart:
        [(sq_distances, matches)] = found
        if standing is not None:
            sq_distances, matches = trusting(sq_distances, matches, standing.trusted)
        return Matched(sq_distances * np.float32(scales[0] ** 2) if scales else sq_distances, matches)
    left = Left([LevelMatches(*one) for one in found])
    if leave_out:
        left = leave_out(left.levels)
    if spaced:
        # One gallery is centred by the query where it is searched for both at once, else by its first image.
        like = asked if search.distinct else [level[0] for level in _levels(ids[:1], members, search.verify_reads)]
        wanted = [[matches] for _, matches in found]
        if left.rarity:
            wanted = [[before, level.matches] for [before], level in zip(wanted, left.levels, strict=True)]
        each = spacings_of([np.stack(one) for one in wanted], shares, members, (like, len(ids), search.device))
        kappa = leave_out.kappa if leave_out else search.kappa or 1
        left = left.spaced([one[0] for one in each], [one[-1] for one in each], kappa)
    return fused_left(left, baseline, settings, standing)


def plan(search: SearchOptions, shapes: Sequence[Shape], k: int) -> SearchOptions:
    """Return the options of a search whose choices do not depend on how its neighbours are shared out.

    Args:
        search: as they are for one gallery.
        shapes: (c, h, w) of the levels that are searched together, finest first.
        k: number of neighbours, of all members.
    """
    if SearchSettings.of(search).radius(shapes[0][1:]) is not None or search.distinct:
        return search
    engine: str = search.engine
    if engine == "auto":
        on_cpu = search.device in (None, "auto", "cpu")
        engine = faster(shapes, k, search.kappa or 1) if on_cpu else "pyramid"
    if sum(shape[0] for shape in shapes) >= EINSUM_BUFFER:
        engine = "pyramid"
    return replace(search, engine=cast(Engine, engine), window="all")


def clamped(search: SearchOptions, grid: tuple[int, int], k: int) -> SearchOptions | None:
    """Return a member's options: kappa is at most what its k neighbours have.

    None: the window holds fewer patches in a corner of the grid than in its middle, and kappa fits the latter only.
    """
    settings, kappa = SearchSettings.of(search), search.kappa or 1
    if search.distinct:
        return replace(search, kappa=min(kappa, k))
    radius = settings.radius(grid)
    if radius is None:
        return replace(search, kappa=min(kappa, k * grid[0] * grid[1]))
    corner = k * min(grid[0], radius[0] + 1) * min(grid[1], radius[1] + 1)
    return search if kappa <= corner else None


def merged(found: Sequence[tuple[Array, Array]], shares: Sequence[Share], kappa: int) -> tuple[Array, Array]:
    """Return the kappa nearest of what members have found, ties in the order of neighbour, row and column.

    Args:
        found: of each share, (h, w, <= kappa) squared distances and (h, w, <= kappa, 3) matches.
        shares: whose places are the neighbours.
        kappa: how many.
    """
    height, width = found[0][0].shape[:2]
    matches = []
    for (_, own), share in zip(found, shares, strict=True):
        neighbour = share.at[own[..., 0]].astype(np.int32)
        matches.append(np.concatenate([neighbour[..., None], own[..., 1:]], axis=-1))
    sq_distances, together = np.concatenate([one for one, _ in found], axis=2), np.concatenate(matches, axis=2)
    neighbour, row, column = np.moveaxis(together.astype(np.int64), -1, 0)
    order = np.lexsort(((neighbour * height + row) * width + column, sq_distances), axis=2)[..., :kappa]
    return np.take_along_axis(sq_distances, order, 2), np.take_along_axis(together, order[..., None], 2)


def spacings_of(
    matches: Sequence[NDArray[np.int32]], shares: Sequence[Share], members: Members, wanted: tuple[Any, int, str | None]
) -> list[NDArray[np.float32]]:
    """Measure how close normal patches lie to each other where a query's were matched; see patch_search.spacing.

    Args:
        matches: of each level, (..., h, w, m, 3): neighbour, row and column; the first of m count.
        shares: who holds the neighbours.
        members: of the cluster.
        wanted: levels whose means are subtracted, number of neighbours, and the device that they are searched on.
    """
    like, k, device = wanted
    matched = [MatchedPatches.of(each[..., 0, :], each.shape[-4:-2]) for each in matches]
    held = {share.member: [_held(one, share) for one in matched] for share in shares}
    patches = members.gather(
        {share.member: ("patches", share.rows, [one[1:] for one in held[share.member]]) for share in shares}
    )
    together = []
    for number, one in enumerate(matched):
        first = patches[shares[0].member][number]
        every = np.empty((len(one.cells), first.shape[1]), first.dtype)
        for share in shares:
            every[held[share.member][number][0]] = patches[share.member][number]
        together.append(every)
    count, asked = min(NEAREST, k - 1) + 1, members.shared(together)
    search = count, device
    cells = [np.unique(one.which, return_index=True)[1] % one.size for one in matched]  # which patches are near these
    nearest = members.gather({one.member: ("nearest_patches", asked, one.rows, like, cells, search) for one in shares})
    result = []
    for number, one in enumerate(matched):
        sq_distances, at = [], []
        for share in shares:
            own, places = nearest[share.member][number]
            neighbours, cells = np.divmod(places, one.size)
            sq_distances.append(own)
            at.append(share.at[neighbours] * one.size + cells)
        all_squared, all_at = np.hstack(sq_distances), np.hstack(at)
        order = np.lexsort((all_at, all_squared), axis=1)[:, :count]
        result.append(one.spacing(np.take_along_axis(all_squared, order, 1), np.take_along_axis(all_at, order, 1)))
    return result


def _held(matched: MatchedPatches, share: Share) -> tuple[Ids, Ids, Ids]:
    """Return which matched patches a member holds: their places, neighbours among its rows, and cells."""
    at = np.flatnonzero(np.isin(matched.neighbours, share.at))
    return at, np.searchsorted(share.at, matched.neighbours[at]), matched.cells[at]


def _levels(ids: Ids, members: Members, verify: bool) -> list[Any]:
    """Return the neighbours' levels, for a search here."""
    spec = members.manifests[0].spec
    levels = [np.empty((len(ids), *shape), spec.dtype) for shape in spec.level_shapes]
    for share, own in members.ask_owners(ids, "levels", verify):
        for level, values in zip(levels, own, strict=True):
            level[share.at] = values
    return levels
