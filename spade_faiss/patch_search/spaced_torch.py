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

from ..arrays import Array
from ..system.devices import as_typed
from ..system.recorded import branched
from ..system.transfers import uploaded
from .candidates_torch import Chosen, Search
from .matched import NEAREST, mean_of_others
from .patches_torch import Levels
from .pyramid_plan import Bools, Floats, Ints
from .pyramid_torch import PART, require_finite, search_together
from .recorded_torch import Choices, chosen
from .refined_torch import refined
from .settled_torch import searched, settle

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
    with as_typed(device):
        there, size = uploaded(level, torch.device(device)), level.shape[2] * level.shape[3]
        at = uploaded(places.reshape(-1), there.device)
        neighbours = torch.div(at, size, rounding_mode="floor")
        patches = there.flatten(2)[neighbours, :, at % size]  # (patches, c)
        count = min(number, len(level) - 1) + 1
        own = [[patches.T.contiguous()[:, None]]]
        [(sq_distances, found)] = search_together(own, [there[None]], count, device, distinct=True)
    is_own = found // size == places.reshape(-1, 1) // size
    return mean_of_others(sq_distances, is_own).reshape(places.shape)
