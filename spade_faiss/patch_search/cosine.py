"""Cosine distance, 1 - cos, as half a squared distance of unit vectors: every engine that knows L2 serves.

For unit vectors a and b, |a - b|^2 / 2 = 1 - <a, b>. Unit vectors are rounded to float32. A zero vector has no
direction, and is at 1 from everything, another zero vector too: among the neighbours it gets a channel of its own, at
right angles to all others; the query's are answered without a search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..arrays import Array
from ..system.threads import single_threads, torch_threads
from .pyramid.plan import Floats, Ints
from .settings import SearchSettings, first_places
from .upsampling import as_tensor
from .window import kernels

NEAR = 1e-5  # rounding moves a distance of 1 by less than this


def fill_directions(out: Floats, levels: Sequence[Array], pad: int = 0) -> bool:
    """Set out to the unit vectors of one image.

    Args:
        out: (C + 1, n) float32, contiguous; the last channel is 1 where there is no direction, else 0.
        levels: [(c, h, w), ...] of one grid, C channels together.
        pad: where the h * w cells begin in out.

    Returns:
        whether some cell is a zero vector.
    """
    cells = levels[0][0].size
    target = out[:-1, pad : pad + cells]
    if any(level.dtype == np.float64 for level in levels):  # float32 may not hold what it holds
        joined = np.concatenate([level.astype(np.float64) for level in levels]).reshape(len(target), -1)
        largest = np.abs(joined).max(axis=0)
        target[:] = joined / np.where(largest == 0, 1, largest)
    else:
        start = 0
        for level in levels:
            torch.from_numpy(target[start : start + len(level)]).copy_(as_tensor(level).reshape(len(level), -1))
            start += len(level)
    return bool(kernels.normalise(out, pad, cells))


def torch_directions(levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the unit vectors of levels [(n, c, h, w), ...] as (n, C + 1, h, w) float32; see fill_directions."""
    joined = torch.cat([level.double() if level.dtype == torch.float64 else level.float() for level in levels], dim=1)
    largest = joined.abs().amax(1, keepdim=True)
    nothing = largest == 0
    scaled = joined.double() / torch.where(nothing, 1, largest).double()
    norms = scaled.square().sum(1, keepdim=True).sqrt()
    units = (scaled / torch.where(nothing, 1, norms)).float()
    return torch.cat([units, nothing.float()], dim=1)


def directions(query: list[Array], gallery: list[Array]) -> tuple[list[Array], list[Array]]:
    """Return levels [(c, h, w), ...] and [(K, c, h, w), ...] of one grid as one level of unit vectors, float32.

    There is one more channel, whether there are zero vectors or not: the sum of a pair's differences must not depend on
    what else is compared.
    """
    (height, width), channels, k = query[0].shape[1:], sum(map(len, query)), len(gallery[0])
    own = np.empty((channels + 1, height * width), np.float32)
    fill_directions(own, query)
    mine = own.reshape(-1, height, width)
    theirs = np.empty((k, channels + 1, height * width), np.float32)

    def fill(number: int) -> None:
        fill_directions(theirs[number], [level[number] for level in gallery])

    list(single_threads(torch_threads()).map(fill, range(k)))
    return [mine], [theirs.reshape(k, -1, height, width)]


def settled(
    sq_distances: Floats, places: Ints, query: list[Array], gallery: list[Any], settings: SearchSettings
) -> tuple[Floats, Ints]:
    """Turn squared distances of unit vectors into cosine distances; those of zero vectors are exactly 1.

    Args:
        sq_distances: (h * w, kappa).
        places: (h * w, kappa) positions counted through neighbour, row, column.
        query: levels [(c, h, w), ...] of one grid, as they were given.
        gallery: levels [(K, c, h, w), ...], likewise.
        settings: of the search.
    """
    grid: tuple[int, int] = query[0].shape[1:]
    distances = np.minimum(sq_distances / 2, np.float32(2))
    lanes, entries = np.nonzero(np.abs(distances - 1) < NEAR)
    nothing = _are_zero(gallery, np.unravel_index(places[lanes, entries], (len(gallery[0]), *grid)))
    distances[lanes[nothing], entries[nothing]] = 1
    blank = np.flatnonzero(~np.any([level.any(axis=0) for level in query], axis=0))
    distances[blank], places[blank] = 1, first_places(blank, settings.kappa, grid, settings.radius(grid))
    order = np.lexsort((places, distances), axis=1)
    return np.take_along_axis(distances, order, 1), np.take_along_axis(places, order, 1)


def _are_zero(gallery: list[Any], at: tuple[Ints, ...]) -> NDArray[np.bool_]:
    """Return which patches at (neighbour, row, column), each (m,), are zero vectors."""
    nothing: NDArray[np.bool_]
    if isinstance(gallery[0], np.ndarray):
        neighbours, rows, columns = at
        nothing = ~np.any([(level[neighbours, :, rows, columns] != 0).any(axis=1) for level in gallery], axis=0)
        return nothing
    neighbour, row, column = (torch.from_numpy(each).to(gallery[0].device) for each in at)
    nothing = ~torch.stack([(level[neighbour, :, row, column] != 0).any(1) for level in gallery]).any(0).cpu().numpy()
    return nothing
