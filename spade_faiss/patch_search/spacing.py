"""How close normal patches lie to each other where a query's patches were matched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..arrays import Array
from ..system.devices import as_arrays, as_typed, torch_device
from ..system.threads import in_one_thread
from ..system.transfers import as_tensor
from .bounds.gallery import BoundsGallery
from .bounds.kept import KeptLevel
from .bounds.panels import nth_of
from .bounds.search import search_prepared
from .bounds.shared import SharedGallery
from .bounds.sources import Floats, Ints
from .distinct import search_distinct
from .levels import check_levels
from .matched import NEAREST, mean_of_others, positions

KEPT_BYTES = 2**27  # of neighbours that are prepared for matches and spacing


def nearest_of_each(
    patches: Array, level: Any, like: Array, count: int, device: str | None = "cpu"
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the nearest patches of count neighbours, each by its nearest.

    Args:
        patches: (n, c).
        level: (K, c, h, w), an array, or a tensor on the device.
        like: (c, ...) whose mean is subtracted from both sides on the CPU: the last digits of distances depend on it.
        count: of neighbours, at most K.
        device: as for search_patches.

    Returns:
        sq_distances (n, count), ascending, and positions (n, count) counted through neighbour, row, column.
    """
    on, turned = torch_device(device), np.ascontiguousarray(patches.T)
    with as_typed(on):
        if on != "cpu":
            return search_distinct(turned, level, count, on)
        with np.errstate(over="ignore", invalid="ignore"):
            gallery = in_one_thread(BoundsGallery, as_arrays([level]), [like], 0, None, True)
        return search_prepared(gallery, [turned], count, True)


@dataclass(frozen=True)
class Searched:
    """Neighbours that were searched on the CPU, distinct matches of a query, ready for what is nearest to patches."""

    gallery: BoundsGallery
    matches: Ints  # (q, >= kappa) positions

    @classmethod
    def by(
        cls, query: Array, level: Array, kappa: int, kept: KeptLevel | None = None
    ) -> tuple[Searched, tuple[Floats, NDArray[np.int32]]]:
        """Search one level (c, h, w) of a query among neighbours (K, c, h, w), and return what was found with it.

        Found are sq_distances (h, w, kappa) and matches (h, w, kappa, 3): neighbour, row and column. `kept` is what
        other queries have prepared of these neighbours.

        Raises:
            FeatureError: levels that do not fit, or a squared distance that does not fit float32.
        """
        check_levels([query], [level], False, finest_first=False)
        grid, flat = query.shape[1:], query.reshape(len(query), -1)
        gallery, sq_distances, places = _searched(flat, level, kappa, kept)
        matches = np.stack(np.unravel_index(places[:, :kappa], (len(level), *grid)), axis=-1).astype(np.int32)
        return cls(gallery, places), (sq_distances[:, :kappa].reshape(*grid, -1), matches.reshape(*grid, -1, 3))

    def spacing(self) -> Floats:
        """Measure the spacing (q,) where each patch has its nearest match; see spacing_of."""
        with np.errstate(over="ignore", invalid="ignore"):
            return spacing_of(self.gallery, self.matches)

    def spacing_of_others(self, spacing: Floats, matches: NDArray[np.int32], others: NDArray[np.bool_]) -> Floats:
        """Measure the spacing (h, w) again where the first of matches (h, w, m, 3) are others (h, w)."""
        if not others.any():
            return spacing
        again: Floats = spacing.copy()
        places = positions(matches[others], others.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            again[others] = spacing_of(self.gallery, places)
        return again

    def nearest(self, patches: Array, cells: NDArray[np.int64], count: int) -> tuple[Floats, Ints]:
        """Find the nearest patches of `count` neighbours, each by its nearest; see nearest_of_each.

        Args:
            patches: (n, c).
            cells: (n,) a patch of the query that each is near, as it was matched with it.
            count: of neighbours, at most K.
        """
        reach = _reach(self.gallery, patches, self.matches[cells], count)
        return search_prepared(self.gallery, [np.ascontiguousarray(patches.T)], count, True, reach)


def _searched(
    query: Array, level: Array, kappa: int, kept: KeptLevel | None = None
) -> tuple[BoundsGallery, Floats, Ints]:
    """Search as search_distinct on the CPU; returns the neighbours as they were prepared, too.

    At least NEAREST + 1 matches are returned, or one of each neighbour: what is near a matched patch is known of these.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if kept is not None and SharedGallery.serves(level, query, kept):
            gallery: BoundsGallery = in_one_thread(SharedGallery, level, query, kept)
        else:
            gallery = in_one_thread(BoundsGallery, [level], [query], KEPT_BYTES, None, True)
    return gallery, *search_prepared(gallery, [query], min(max(kappa, NEAREST + 1), len(level)), True)


def search_spaced(
    query: Array, gallery: Any, kappa: int, device: str = "cpu", kept: KeptLevel | None = None
) -> tuple[Floats, Ints, Floats]:
    """Search as search_distinct, among K >= 2 neighbours, and measure the spacing where the nearest was matched.

    Args:
        query: as for search_distinct.
        gallery: as for search_distinct.
        kappa: as for search_distinct.
        device: as for search_distinct.
        kept: on the CPU, what other queries have prepared of these neighbours; None: nothing.

    Returns:
        as search_distinct, and the spacing (m,): see `spacing`. On the CPU, neighbours are prepared once for both.
    """
    if device != "cpu":
        from .gpu.spaced import search_spaced_torch

        return search_spaced_torch([query], [gallery], kappa, device)[0]
    [level] = as_arrays([gallery])
    prepared, sq_distances, matches = _searched(query, level, kappa, kept)
    return sq_distances[:, :kappa], matches[:, :kappa], spacing_of(prepared, matches)


def spacing(
    level: Any, matches: NDArray[np.int32], number: int = NEAREST, device: str | None = "cpu"
) -> NDArray[np.float32]:
    """Measure the mean squared distance of matched patches to their nearest patches in other neighbours.

    Args:
        level: (K, c, h, w) of the neighbours, K >= 2; an array, or a tensor on the device.
        matches: (h, w, 3) neighbour, row and column.
        number: of other neighbours that count, each by its nearest patch; fewer where there are fewer.
        device: as for search_patches.

    Returns:
        (h, w) float32.
    """
    places, on = positions(matches, level.shape[2:]), torch_device(device)
    if on != "cpu":
        from .gpu.spaced import spacing_torch

        return spacing_torch(level, places, number, on)
    [level] = as_arrays([level])
    with np.errstate(over="ignore", invalid="ignore"):
        gallery = in_one_thread(BoundsGallery, [level], [level[0]], 0, None, True)
    return spacing_of(gallery, places.reshape(-1, 1), number).reshape(matches.shape[:2])


def spacing_of(gallery: BoundsGallery, matches: NDArray[np.int64], number: int = NEAREST) -> NDArray[np.float32]:
    """Measure the spacing where patches were matched in a gallery of one level, K >= 2.

    Args:
        gallery: the neighbours.
        matches: (q, kappa) positions; the first of each row are the matched patches. The others, in other neighbours,
            are near them: what is farther than these need not be looked at.
        number: as for `spacing`.

    Returns:
        (q,) float32.
    """
    places, rows, which = np.unique(matches[:, 0], return_index=True, return_inverse=True)
    patches = gallery.cells_of(places)
    count = min(number, gallery.k - 1)
    reach = _reach(gallery, patches, matches[rows, 1:], count)
    query = np.ascontiguousarray(patches.T)
    if query.dtype != gallery.levels[0].dtype:  # as it is stored: loops are compiled for one type
        query = torch.from_numpy(query).to(as_tensor(gallery.levels[0]).dtype).numpy()
    sq_distances, at = search_prepared(gallery, [query], count + 1, True, reach)
    is_own = at // gallery.n == places[:, None] // gallery.n
    return mean_of_others(sq_distances, is_own)[which.reshape(-1)]


def _reach(gallery: BoundsGallery, patches: Array, others: Ints, nth: int) -> Floats:
    """Return what the nth nearest neighbour's nearest patch is not farther than, for patches (n, c).

    Args:
        gallery: of one level.
        patches: of that level.
        others: (n, m) positions, in m neighbours, that are near the patches; if m < nth, nothing is known.
        nth: counted from 1.
    """
    reach = np.full(len(patches), np.inf, np.float32)
    if others.shape[1] < nth:
        return reach
    if gallery.has_all and patches.dtype == np.float32:
        near = np.empty(len(patches))
        nth_of(gallery.kept_at, np.ascontiguousarray(patches), others, (gallery.n, gallery.length), nth, near)
        reach[:] = near * (1 + 1e-5)
    else:
        cells = gallery.levels[0].reshape(gallery.k, patches.shape[1], -1)
        own, places = np.divmod(others, gallery.n)
        wide = patches.astype(np.float64)
        every = [np.square(cells[one, :, at] - wide).sum(axis=1) for one, at in zip(own.T, places.T, strict=True)]
        # The search's patches are float32, less a shift that may be far larger than the distances.
        rounding = 2.0**-20 * np.sqrt(np.square(wide - gallery.shifts[0].numpy().T).sum(axis=1))
        reach[:] = (np.sqrt(np.sort(every, axis=0)[nth - 1]) + rounding) ** 2 * (1 + 1e-5)
    return reach
