"""The kappa nearest patches, among those of the K neighbours, for every patch of a query.

Concatenated (`search_patches`), a patch is one position of the finest grid: every level upsampled to it bilinearly
(align_corners=False), concatenated. By level (`search_levels`), each level is searched apart, as a pyramid of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..errors import OptionError
from ..options import SearchOptions
from ..system.devices import as_arrays, as_typed, faiss_device, torch_device
from .bounds.kept import KeptLevel
from .cost_model import bounds_budget, faster, gpu_pays
from .levels import as_levels, check_levels, check_neighbours
from .matched import NEAREST, positions
from .settings import ENGINES, SearchSettings

__all__ = ["ENGINES", "search_finite", "search_levels", "search_levels_finite", "search_patches"]


def search_patches(
    query_levels: Sequence[Any],
    neighbour_levels: Sequence[Any],
    kappa: int = 1,
    engine: str = "auto",
    device: str | None = None,
    block_bytes: int = SearchOptions.block_bytes,
    metric: str = "l2",
    window: float | str | None = None,
) -> tuple[Any, Any]:
    """Find the kappa nearest gallery patches of every query patch, all levels together.

    Args:
        query_levels: pyramid of the query, finest level first: [(c, h, w), ...], NumPy or torch, any float dtype.
        neighbour_levels: pyramids of the K neighbours: [(K, c, h, w), ...] of the same grids and channels.
        kappa: number of nearest patches, at most K * h * w of the finest grid, or of a window in its corner.
        engine: "flat", a temporary FAISS index; "pyramid", products at native resolution, or by tiles on a GPU;
            "bounds", products in a few directions, which rule most patches out, on the CPU; "auto", the one that is
            expected to be the fastest on the CPU, and "pyramid" on a GPU. A window has an engine of its own, which
            "auto" takes.
        device: auto or None (a GPU where it is expected to be faster), cpu, cuda, cuda:N.
        block_bytes: memory limit of the flat engine's temporary gallery; one neighbour always fits.
        metric: "l2", squared L2; "cosine", 1 - cos from 0 to 2, for levels of one grid: a zero vector has no direction,
            and is at 1 from everything. The other levels are copied as float32.
        window: only patches at most this far from the query patch's own position, in rows and in columns, are
            compared: cells of the finest grid (a whole number), or a share of its sides (a fraction); None or "all":
            everywhere.

    Returns:
        sq_distances (h, w, kappa) float32, ascending, and matches (h, w, kappa, 3) int32: (neighbour, row, column).
        Ties are ordered by neighbour, row, column. NumPy for NumPy, torch (on the same device) for torch.

    Every engine but "flat" searches tensors in place on a GPU. The CPU's engines copy them to the host.

    Raises:
        FeatureError: shapes that do not fit each other, NaN or infinity.
        OptionError: an unknown engine, metric or window, an engine named beside a window, a window as large as the
            finest grid, kappa larger than the number of gallery patches, cosine of levels of different grids.
        DeviceError: an unknown device, or a GPU that is not there.

    Example:
        >>> query = [np.array([[[5.0, 7.0]]])]  # one channel on a grid of 1 x 2
        >>> neighbours = [np.array([[[[0.0, 1.0]]], [[[4.0, 9.0]]]])]  # K = 2
        >>> sq_distances, matches = sf.search_patches(query, neighbours)
        >>> sq_distances[0, :, 0], matches[0, 1, 0]  # 5 is nearest to 4, 7 to 9: neighbour 1, row 0, column 1
        (array([1., 4.], dtype=float32), array([1, 0, 1], dtype=int32))
    """
    settings = SearchSettings(kappa, engine, device, block_bytes, metric, window)
    return _together(query_levels, neighbour_levels, settings, scan=True)


def search_levels(
    query_levels: Sequence[Any],
    neighbour_levels: Sequence[Any],
    kappa: int = 1,
    engine: str = "auto",
    device: str | None = None,
    block_bytes: int = SearchOptions.block_bytes,
    metric: str = "l2",
    window: float | str | None = None,
    distinct: bool = False,
) -> list[tuple[Any, Any]]:
    """Find the kappa nearest gallery patches of every query patch, each level apart on its own grid.

    Args:
        query_levels: pyramid of the query, in any order: [(c, h, w), ...], NumPy or torch, any float dtype.
        neighbour_levels: pyramids of the K neighbours: [(K, c, h, w), ...] of the same grids and channels.
        kappa: number of nearest patches, at most K * h * w of the smallest grid, or of a window in its corner.
        engine: as for search_patches.
        device: as for search_patches.
        block_bytes: as for search_patches.
        metric: as for search_patches, for levels of any grids.
        window: as for search_patches, in cells of each level, or a share of the sides of each level. Where a coarse
            level has no more cells, it is searched everywhere.
        distinct: whether a patch's kappa matches lie in as many neighbours, each the nearest of its neighbour: by L2,
            everywhere, by an engine of its own.

    Returns:
        for each level sq_distances (h, w, kappa) float32, ascending, and matches (h, w, kappa, 3) int32: (neighbour,
        row, column) of that level. Ties are ordered by neighbour, row, column. NumPy for NumPy, torch (on the same
        device) for torch.

    Raises:
        FeatureError: shapes that do not fit each other, NaN or infinity.
        OptionError: as for search_patches.
        DeviceError: an unknown device, or a GPU that is not there.

    Example:
        >>> query = [np.array([[[5.0, 7.0]]]), np.array([[[2.0]]])]  # grids of 1 x 2 and 1 x 1
        >>> neighbours = [np.array([[[[0.0, 1.0]]], [[[4.0, 9.0]]]]), np.array([[[[2.0]]], [[[3.0]]]])]  # K = 2
        >>> (fine, _), (coarse, at) = sf.search_levels(query, neighbours)
        >>> fine[0, :, 0], coarse[0, :, 0], at[0, 0, 0]  # the nearest to 2 is the first neighbour's
        (array([1., 4.], dtype=float32), array([0.], dtype=float32), array([0, 0, 0], dtype=int32))
        >>> sf.search_levels(query, neighbours, window=0)[0][0][0, :, 0]  # 5 is compared with 0 and 4, 7 with 1 and 9
        array([1., 4.], dtype=float32)
    """
    settings = SearchSettings(kappa, engine, device, block_bytes, metric, window, distinct)
    return _apart(query_levels, neighbour_levels, settings, scan=True)


def search_finite(
    query_levels: Sequence[Any], neighbour_levels: Sequence[Any], options: SearchOptions, scan: bool = False
) -> tuple[Any, Any]:
    """Search like search_patches, without scanning the neighbours' levels for NaN and infinity unless `scan`.

    For levels that are known to be finite: cast by an ExtractorSpec, or read with their checksums compared. The scan of
    140 MB (wide_resnet50_2, K = 50) would take 0.17 s of a query. Everything else is checked. A query of arrays may
    have neighbours that are tensors, and gets arrays.

    Args:
        query_levels: as for search_patches.
        neighbour_levels: as for search_patches.
        options: kappa, engine, device, block_bytes, metric and window count.
        scan: whether to scan them after all.
    """
    return _together(query_levels, neighbour_levels, SearchSettings.of(options), scan, mixed=True)


def search_levels_finite(
    query_levels: Sequence[Any], neighbour_levels: Sequence[Any], options: SearchOptions, scan: bool = False
) -> list[tuple[Any, Any]]:
    """Search like search_levels, as search_finite does like search_patches; `distinct` counts, too."""
    return _apart(query_levels, neighbour_levels, SearchSettings.of(options), scan, mixed=True)


def search_spaced_finite(
    query_levels: Sequence[Any], neighbour_levels: Sequence[Any], options: SearchOptions, scan: bool = False,
    kept: Sequence[KeptLevel | None] | None = None,
) -> list[tuple[Any, Any, Any]]:  # fmt: skip
    """Search as search_levels_finite does with `distinct`, among K >= 2; add the spacing (h, w), see spacing.spacing.

    The neighbours are prepared once for both, on the CPU; and if what other queries have prepared is kept, by level,
    once for all of them.
    """
    return search_in_steps(query_levels, neighbour_levels, options, scan, kept)[0]


def search_in_steps(
    query_levels: Sequence[Any], neighbour_levels: Sequence[Any], options: SearchOptions, scan: bool = False,
    kept: Sequence[KeptLevel | None] | None = None,
) -> tuple[list[tuple[Any, Any, Any]], Callable[[Sequence[Any], Sequence[NDArray[np.bool_]]], list[Any]]]:  # fmt: skip
    """Search as search_spaced_finite does; the spacing can be measured again, of other matches.

    Returns:
        what search_spaced_finite does, and a function of matches (h, w, m, 3) of each level, and of which patches
        (h, w) have another first match than was found. It returns the spacing (h, w) where the first of these lie; the
        others, in other neighbours, only save it time.
    """
    settings = SearchSettings.of(options)
    query, gallery, like = _checked(query_levels, neighbour_levels, settings, scan, mixed=True)
    sides = list(zip(query, gallery, kept or [None] * len(query), strict=True))
    places = [_place([own], [others], settings) for own, others, _ in sides]
    if len(set(places)) == 1 and places[0] != "cpu":
        return _spaced_on(places[0], query, gallery, like, settings.kappa), _spacings_on(places[0], gallery)
    if set(places) != {"cpu"} or like is not None or not all(isinstance(level, np.ndarray) for level in gallery):
        from .spacing import spacing

        def measured(matches: Sequence[Any], _: Any) -> list[Any]:
            each = zip(gallery, matches, places, strict=True)
            return [spacing(level, as_arrays([one])[0][:, :, 0], device=place) for level, one, place in each]

        return [_found([own], [others], like, settings, True) for own, others, _ in sides], measured
    from ..system.threads import side_by_side
    from .spacing import Searched

    def of_side(side: tuple[Array, Any, KeptLevel | None]) -> tuple[Searched, tuple[Any, Any, Any]]:
        searched, (sq_distances, matches) = Searched.by(side[0], side[1], settings.kappa, side[2])
        return searched, (sq_distances, matches, searched.spacing().reshape(matches.shape[:2]))

    searched, found = zip(*side_by_side(of_side, sides), strict=True)

    def again(matches: Sequence[Any], others: Sequence[NDArray[np.bool_]]) -> list[Any]:
        each = list(zip(searched, found, matches, others, strict=True))
        return side_by_side(lambda one: one[0].spacing_of_others(one[1][2], *one[2:]), each)

    return list(found), again


def _spacings_on(device: str, gallery: list[Any]) -> Callable[[Sequence[Any], Any], list[Any]]:
    """Return what measures all spacings on a GPU at once: as many each time, so that it is recorded once."""
    from .gpu.spaced import spacings_torch

    def measured(matches: Sequence[Any], _: Any) -> list[Any]:
        places = [positions(each[:, :, 0], each.shape[:2]) for each in as_arrays(list(matches))]
        with np.errstate(over="ignore", invalid="ignore"):
            return spacings_torch(gallery, places, NEAREST, device)

    return measured


def _spaced_on(device: str, query: list[Array], gallery: list[Any], like: Any, kappa: int) -> list[tuple[Any, ...]]:
    """Search all levels on a GPU at once; see search_spaced_finite."""
    from .gpu.spaced import search_spaced_torch

    with as_typed(device), np.errstate(over="ignore", invalid="ignore"):
        found = search_spaced_torch([own.reshape(len(own), -1) for own in query], gallery, kappa, device)
    return [_shaped(each, own.shape[1:], len(gallery[0]), like) for each, own in zip(found, query, strict=True)]


def _together(
    query_levels: Sequence[Any],
    neighbour_levels: Sequence[Any],
    settings: SearchSettings,
    scan: bool,
    mixed: bool = False,
) -> tuple[Any, ...]:
    """Check the levels and search them concatenated."""
    query, gallery, like = as_levels(query_levels, neighbour_levels, mixed)
    check_levels(query, gallery, False, finest_first=True)
    if settings.distinct:
        raise OptionError("distinct: goes with matching 'by_level', found levels concatenated")
    finest: tuple[int, int] = query[0].shape[1:]
    settings.check([finest], len(gallery[0]))
    other = next((level.shape[1:] for level in query if level.shape[1:] != finest), None)
    if settings.metric == "cosine" and other is not None:
        raise OptionError(
            f"metric: expected l2 for concatenated levels of different grids, found cosine for {finest} and {other}; "
            "search by level"
        )
    return _found(query, gallery, like, replace(settings, scan=scan))


def _apart(
    query_levels: Sequence[Any],
    neighbour_levels: Sequence[Any],
    settings: SearchSettings,
    scan: bool,
    mixed: bool = False,
) -> list[Any]:
    """Check the levels and search each by itself."""
    query, gallery, like = _checked(query_levels, neighbour_levels, settings, scan, mixed)
    return [_found([own], [others], like, settings) for own, others in zip(query, gallery, strict=True)]


def _checked(
    query_levels: Sequence[Any], neighbour_levels: Sequence[Any], settings: SearchSettings, scan: bool, mixed: bool
) -> tuple[list[Array], list[Any], Any]:
    """Return levels that are searched each by itself, checked, and see as_levels."""
    query, gallery, like = as_levels(query_levels, neighbour_levels, mixed)
    check_levels(query, gallery, scan, finest_first=False)
    settings.check([level.shape[1:] for level in query], len(gallery[0]))
    return query, gallery, like


def _found(
    query: list[Array], gallery: list[Any], like: Any, settings: SearchSettings, spaced: bool = False
) -> tuple[Any, ...]:
    """Search checked levels; returns what search_patches does, on torch device `like`, or as NumPy if it is None."""
    grid: tuple[int, int] = query[0].shape[1:]
    on = "cpu" if settings.engine == "flat" else torch_device(settings.device)
    with as_typed(on), np.errstate(over="ignore", invalid="ignore"):  # overflow shows in the distances: refused there
        sq_distances, places, *rest = _search(query, gallery, settings, spaced)
        if settings.metric == "cosine":
            from .cosine import settled

            sq_distances, places = settled(sq_distances, places, query, gallery, settings)
    return _shaped((sq_distances, places, *rest), grid, len(gallery[0]), like)


def _shaped(found: tuple[Array, ...], grid: tuple[int, ...], k: int, like: Any) -> tuple[Any, ...]:
    """Return what an engine found among k neighbours on a grid, as _found does."""
    sq_distances, places, *rest = found
    matches = np.stack(np.unravel_index(places, (k, *grid)), axis=-1).astype(np.int32)
    found = sq_distances.reshape(*grid, -1), matches.reshape(*grid, -1, 3), *(each.reshape(grid) for each in rest)
    if like is None:
        return found
    import torch

    return tuple(torch.from_numpy(array).to(like) for array in found)


def _search(query: list[Array], gallery: list[Any], settings: SearchSettings, spaced: bool) -> tuple[Array, ...]:
    """Run an engine: squared distances and positions, (h * w, kappa), and if `spaced` the spacing (h * w,)."""
    kappa, where = settings.kappa, "cpu" if settings.engine == "flat" else _place(query, gallery, settings)
    if settings.distinct:
        from .distinct import search_distinct
        from .spacing import search_spaced

        own, [others] = query[0].reshape(len(query[0]), -1), gallery
        return search_spaced(own, others, kappa, where) if spaced else search_distinct(own, others, kappa, where)
    radius = settings.radius(query[0].shape[1:])
    engine, budget = settings.engine, 0.0
    if engine == "auto" and radius is None:
        of = [level.shape for level in query], len(gallery[0]), kappa
        engine, budget = (faster(*of), _budget(*of)) if where == "cpu" else ("pyramid", 0.0)
    bounds_see = (budget > 0 or engine == "bounds") and settings.metric == "l2"
    if settings.scan and not bounds_see:
        check_neighbours(gallery)
    is_cosine = settings.metric == "cosine"
    if engine == "bounds" and where != "cpu":
        raise OptionError(f"engine: expected pyramid or flat on {where}, found bounds, which searches on the CPU")
    if where != "cpu":
        from .gpu.search import Wanted, search_torch

        wanted = Wanted(kappa, radius=radius, is_cosine=is_cosine)
        return search_torch([query], [level[None] for level in gallery], where, wanted)[0]
    gallery = as_arrays(gallery)
    if radius is not None:
        from .window.search import search_window

        return search_window(query, gallery, kappa, radius, is_cosine)
    if is_cosine:
        from .cosine import directions

        query, gallery = directions(query, gallery)
    if budget:
        from .bounds.search import TooMuchLeftError, search_levels_by_bounds

        with suppress(TooMuchLeftError):
            return search_levels_by_bounds(query, gallery, kappa, budget, settings.scan)
        if settings.scan and bounds_see:  # they have not looked at all
            check_neighbours(gallery)
    if engine == "flat":
        from .flat import search_flat

        by = faiss_device(settings.device) if settings.engine == "flat" else "cpu"
        return search_flat(query, gallery, kappa, by, settings.block_bytes)
    if engine == "bounds":
        from .bounds.search import search_levels_by_bounds

        return search_levels_by_bounds(query, gallery, kappa, scan=settings.scan)
    from .pyramid.search import search_pyramid

    return search_pyramid(query, gallery, kappa)


def _budget(shapes: list[Any], k: int, kappa: int) -> float:
    """Return how long the search by bounds may take on this CPU; see bounds_budget."""
    from .bounds.products_tiles import has_tiles
    from .pyramid.search import is_narrow

    return bounds_budget(shapes, k, kappa, is_narrow(kappa), has_tiles())


def _place(query: list[Array], gallery: list[Any], settings: SearchSettings) -> str:
    """Return the torch device of a search: where it was asked for, and for "auto" where it is expected to be faster."""
    where = torch_device(settings.device)
    if where == "cpu" or settings.device not in (None, "auto"):
        return where
    if not isinstance(gallery[0], np.ndarray) and gallery[0].device.type != "cpu":
        return where  # what is there already stays
    from ..system.threads import torch_threads

    shapes = [level.shape for level in query]
    if not gpu_pays(shapes, len(gallery[0]), settings.kappa, torch_threads()):
        return "cpu"
    from .gpu.memory import fits

    return where if fits(where, shapes, len(gallery[0]), settings.kappa, gallery[0].dtype.itemsize) else "cpu"
