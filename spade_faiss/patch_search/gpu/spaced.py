"""Distinct matches and the spacing where they lie, of all levels of a query in one go, on a torch device.

The matched patches are searched for while they are on the device. Where a match was in doubt, and turns out to be
another, that patch is searched for again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ...arrays import Array
from ...system.devices import as_typed
from ...system.recorded import branched
from ...system.transfers import uploaded
from ..matched import NEAREST, mean_of_others
from ..pyramid.plan import Bools, Floats, Ints
from .candidates import Chosen, Search
from .patches import Levels
from .recorded import Choices, chosen
from .refined import refined
from .search import PART, Found, require_finite, search_together
from .settled import searched, settle

Spaced = tuple[Floats, Ints, Floats]  # (q, kappa) squared distances and positions, (q,) spacing


def search_spaced_torch(queries: Sequence[Array], galleries: Levels, kappa: int, device: str) -> list[Spaced]:
    """Search each level of a query apart among K >= 2 neighbours; see spacing.search_spaced.

    Args:
        queries: levels [(c, m), ...].
        galleries: of the neighbours, [(K, c, h, w), ...], arrays, or tensors on the device.
        kappa: number of neighbours, at most K.
        device: "cuda:N", or another of torch's.
    """
    k = len(galleries[0])
    if sum(int(np.prod(level.shape)) for level in galleries) > PART:
        return [_one_after_the_other(*each, kappa, device) for each in zip(queries, galleries, strict=True)]
    count = min(NEAREST, k - 1) + 1

    def choose(own: torch.Tensor, others: torch.Tensor) -> Choices:
        search = Search.of([own], [others], kappa, True)
        found = refined(search, search.choose())
        around = search.among(found.at[..., 0], count)
        return [(search, found), (around, refined(around, around.choose()))]

    def choose_spaced(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> Choices:
        levels = branched([partial(choose, *sides) for sides in zip(mine, theirs, strict=True)])
        return [each for level in levels for each in level]

    own = [level[None, None, :, None] for level in queries]
    others = [level[None] for level in galleries]
    with chosen(choose_spaced, own, others, torch.device(device), kappa) as (choices, answers):
        return [_settled(choices[2 * at : 2 * at + 2], answers[6 * at : 6 * at + 6]) for at in range(len(own))]


def search_apart_torch(queries: Sequence[torch.Tensor], galleries: Levels, kappa: int, device: str) -> list[Found]:
    """Search as search_spaced_torch does, for the distinct matches alone.

    Args:
        queries: levels [(c, m), ...], tensors on the device.
        galleries: as for search_spaced_torch.
        kappa: likewise.
        device: likewise.
    """
    if sum(int(np.prod(level.shape)) for level in galleries) > PART:
        pairs: Any = zip(queries, galleries, strict=True)
        return [search_together([[own[:, None]]], [level[None]], kappa, device, True)[0] for own, level in pairs]

    def choose(own: torch.Tensor, others: torch.Tensor) -> Choices:
        search = Search.of([own], [others], kappa, True)
        return [(search, refined(search, search.choose()))]

    def choose_apart(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> Choices:
        levels = branched([partial(choose, *sides) for sides in zip(mine, theirs, strict=True)])
        return [each for level in levels for each in level]

    own, others = [level[None, None, :, None] for level in queries], [level[None] for level in galleries]
    result = []
    with chosen(choose_apart, own, others, torch.device(device), kappa) as (choices, answers):
        for number, (search, found) in enumerate(choices):
            best, at, undecided = answers[3 * number : 3 * number + 3]
            settle(search, found, best, at, undecided)
            require_finite(best)
            result.append((best[0], at[0]))
    return result


def _settled(choices: Sequence[tuple[Search, Chosen]], answers: Sequence[Any]) -> Spaced:
    """Put right what is in doubt, of one level's search and of that for what was matched."""
    ((search, found), (around, found_near)), (best, at, undecided, near, near_at, near_undecided) = choices, answers
    before: Ints = at[0, :, 0].copy()
    settle(search, found, best, at, undecided)
    others = np.flatnonzero(at[0, :, 0] != before)
    near_undecided[0, others] = False
    settle(around, found_near, near, near_at, near_undecided)
    if len(others):
        again = search.among(uploaded(at[:, others, 0], search.device), near.shape[2])
        near[0, others], near_at[0, others] = searched(again, 0, np.arange(len(others)))
    require_finite(best)
    require_finite(near)
    cells = search.upsampler.cells
    is_own: Bools = near_at[0] // cells == at[0, :, :1] // cells
    return best[0], at[0], mean_of_others(near[0], is_own)


def _one_after_the_other(query: Array, level: Any, kappa: int, device: str) -> Spaced:
    """Search a level of more neighbours than are on the device at a time."""
    [(sq_distances, matches)] = search_together([[query[:, None]]], [level[None]], kappa, device, distinct=True)
    return sq_distances, matches, spacing_torch(level, matches[:, 0], NEAREST, device)


def spacing_torch(level: Any, places: Ints, number: int, device: str) -> Floats:
    """Measure the spacing at positions of a level, of any shape; see spacing.spacing.

    A patch that was matched twice is measured twice: all searches have one size then, and are recorded once.
    """
    return spacings_torch([level], [places], number, device)[0]


def spacings_torch(galleries: Levels, places: Sequence[Ints], number: int, device: str) -> list[Floats]:
    """Measure the spacing at positions of each level, as spacing_torch does, all levels in one go."""
    count = min(number, len(galleries[0]) - 1) + 1
    with as_typed(device):
        there = [uploaded(level, torch.device(device)) for level in galleries]
        own = [_patches(level, at).T.contiguous() for level, at in zip(there, places, strict=True)]
        searched_for = search_apart_torch(own, there, count, device)
    result = []
    for level, at, (sq_distances, found) in zip(galleries, places, searched_for, strict=True):
        size = level.shape[2] * level.shape[3]
        is_own = found // size == at.reshape(-1, 1) // size
        result.append(mean_of_others(sq_distances, is_own).reshape(at.shape))
    return result


def _patches(level: torch.Tensor, places: Ints) -> torch.Tensor:
    """Return the patches (n, c) of a level at n positions."""
    size, at = level.shape[2] * level.shape[3], uploaded(places.reshape(-1), level.device)
    found: torch.Tensor = level.flatten(2)[torch.div(at, size, rounding_mode="floor"), :, at % size]
    return found
