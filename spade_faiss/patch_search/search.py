"""The kappa nearest patches, among all patches of the K neighbours, for every patch of a query.

A patch is one position of the finest grid: every level upsampled to it bilinearly (align_corners=False), concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import Array, all_finite
from ..errors import FeatureError, OptionError
from ..options import SearchOptions
from ..system.devices import as_arrays, as_typed, faiss_device, search_device
from .cost_model import faster

ENGINES = ("flat", "pyramid")


def search_patches(
    query_levels: Sequence[Any],
    neighbour_levels: Sequence[Any],
    kappa: int = 1,
    engine: str = "auto",
    device: str | None = None,
    block_bytes: int = SearchOptions.block_bytes,
) -> tuple[Any, Any]:
    """Find the kappa nearest gallery patches of every query patch, by squared L2.

    Args:
        query_levels: pyramid of the query, finest level first: [(c, h, w), ...], NumPy or torch, any float dtype.
        neighbour_levels: pyramids of the K neighbours: [(K, c, h, w), ...] of the same grids and channels.
        kappa: number of nearest patches, at most K * h * w of the finest grid.
        engine: "flat", a temporary FAISS index; "pyramid", products at native resolution; "auto", the one that is
            expected to be faster on the CPU, and "flat" on a GPU, where nothing has been measured yet.
        device: auto or None (the CPU, until a GPU has been measured), cpu, cuda, cuda:N.
        block_bytes: memory limit of the flat engine's temporary gallery; one neighbour always fits.

    Returns:
        sq_distances (h, w, kappa) float32, ascending, and matches (h, w, kappa, 3) int32: (neighbour, row, column).
        Ties are ordered by neighbour, row, column. NumPy for NumPy, torch (on the same device) for torch.

    The engine "pyramid" on a GPU searches tensors on that device in place. Every other way copies them to the host.

    Raises:
        FeatureError: shapes that do not fit each other, NaN or infinity.
        OptionError: an unknown engine, or kappa larger than the number of gallery patches.
        DeviceError: an unknown device, or a GPU that is not there.

    Example:
        >>> query = [np.array([[[5.0, 7.0]]])]  # one channel on a grid of 1 x 2
        >>> neighbours = [np.array([[[[0.0, 1.0]]], [[[4.0, 9.0]]]])]  # K = 2
        >>> sq_distances, matches = sf.search_patches(query, neighbours)
        >>> sq_distances[0, :, 0], matches[0, 1, 0]  # 5 is nearest to 4, 7 to 9: neighbour 1, row 0, column 1
        (array([1., 4.], dtype=float32), array([1, 0, 1], dtype=int32))
    """
    query, gallery, like = _as_levels(query_levels, neighbour_levels)
    _check(query, gallery, kappa, scan=True)
    return _found(query, gallery, like, SearchSettings(kappa, engine, device, block_bytes))


def search_checked(
    query_levels: Sequence[Any], neighbour_levels: Sequence[Any], options: SearchOptions
) -> tuple[Any, Any]:
    """Search like search_patches, without scanning the neighbours' levels for NaN and infinity.

    For levels that are known to be finite: cast by an ExtractorSpec, or read with their checksums compared. The scan
    of 140 MB (wide_resnet50_2, K = 50) would take 0.17 s of a query. Everything else is checked.

    Args:
        query_levels: as for search_patches.
        neighbour_levels: as for search_patches.
        options: kappa, engine, device and block_bytes count.
    """
    query, gallery, like = _as_levels(query_levels, neighbour_levels)
    _check(query, gallery, options.kappa, scan=False)
    settings = SearchSettings(options.kappa, options.engine, options.device, options.block_bytes)
    return _found(query, gallery, like, settings)


@dataclass(frozen=True)
class SearchSettings:
    """How to search; see search_patches. Unlike SearchOptions, nothing is checked here."""

    kappa: int
    engine: str
    device: str | None
    block_bytes: int


def _found(query: list[Array], gallery: list[Any], like: Any, settings: SearchSettings) -> tuple[Any, Any]:
    """Search checked levels; returns what search_patches does, on torch device `like`, or as NumPy if it is None."""
    if settings.engine not in ("auto", *ENGINES):
        raise OptionError(f"engine: expected auto or {' or '.join(ENGINES)}, found {settings.engine!r}")
    on = search_device(settings.device) if settings.engine == "pyramid" else "cpu"
    with as_typed(on), np.errstate(over="ignore", invalid="ignore"):  # overflow shows in the distances: refused there
        sq_distances, flat_matches = _search(query, gallery, settings)
    grid: tuple[int, int] = query[0].shape[1:]
    matches = np.stack(np.unravel_index(flat_matches, (len(gallery[0]), *grid)), axis=-1).astype(np.int32)
    found = sq_distances.reshape(*grid, -1), matches.reshape(*grid, -1, 3)
    if like is None:
        return found
    import torch

    return tuple(torch.from_numpy(array).to(like) for array in found)  # type: ignore[return-value]


def _search(query: list[Array], gallery: list[Any], settings: SearchSettings) -> tuple[Array, Array]:
    """Run an engine; each returns squared distances and positions, (h * w, kappa)."""
    engine, device, kappa = settings.engine, settings.device, settings.kappa
    if engine == "auto":  # FAISS is known to be fast on a GPU
        on_cpu = faiss_device(device) == "cpu"
        engine = faster([level.shape for level in query], len(gallery[0]), kappa) if on_cpu else "flat"
        device = "cpu" if on_cpu else device
    if engine == "flat":
        from .flat import search_flat

        return search_flat(query, as_arrays(gallery), kappa, faiss_device(device), settings.block_bytes)
    where = search_device(device)
    if where == "cpu":
        from .pyramid import search_pyramid

        return search_pyramid(query, as_arrays(gallery), kappa)
    from .pyramid_torch import search_pyramid_torch

    return search_pyramid_torch(query, gallery, kappa, where)


def _as_levels(query: Sequence[Any], gallery: Sequence[Any]) -> tuple[list[Array], list[Any], Any]:
    """Return the query as arrays, the gallery as arrays or tensors, and the torch device of tensors, else None."""
    arrays = [*query, *gallery]
    if all(isinstance(array, np.ndarray) for array in arrays):
        native = [array.astype(array.dtype.newbyteorder("="), copy=False) for array in arrays]
        # No engine computes in more than float64.
        native = [array.astype(np.float64) if array.dtype == np.longdouble else array for array in native]
        return native[: len(query)], native[len(query) :], None
    import torch

    if not all(isinstance(array, torch.Tensor) for array in arrays):
        kinds = sorted({type(array).__name__ for array in arrays})
        raise FeatureError(f"levels: expected all NumPy arrays or all torch tensors, found {' and '.join(kinds)}")
    devices = {array.device for array in arrays}
    if len(devices) > 1:
        raise FeatureError(f"levels: expected one device, found {' and '.join(sorted(map(str, devices)))}")
    # The query is small, and the means of its channels are taken on the host.
    return as_arrays(query), [tensor.detach() for tensor in gallery], devices.pop()


def _is_finite(level: Any) -> bool:
    """Return whether no value of an array or tensor is NaN or infinite."""
    if isinstance(level, np.ndarray):
        return all_finite(level)
    import torch

    # all_finite, on the level's own device.
    return bool(level.sum(dtype=torch.float32).isfinite() or level.isfinite().all())


def _check(query: list[Array], gallery: list[Any], kappa: int, scan: bool) -> None:
    """Check shapes, dtypes, kappa, the query's values and, if `scan`, the neighbours' values."""
    if not query or len(query) != len(gallery):
        raise FeatureError(
            f"levels: expected as many for the neighbours as for the query, found {len(gallery)} and {len(query)}"
        )
    k = len(gallery[0]) if gallery[0].ndim else 0
    for number, (level, others) in enumerate(zip(query, gallery, strict=True)):
        if level.ndim != 3 or others.ndim != 4 or others.shape[1:] != level.shape or len(others) != k:
            raise FeatureError(
                f"level {number}: expected (c, h, w) for the query and ({k}, c, h, w) for the neighbours, "
                f"found {level.shape} and {tuple(others.shape)}"
            )
        if 0 in level.shape or k == 0:
            raise FeatureError(f"level {number}: expected sizes >= 1, found {level.shape} and {tuple(others.shape)}")
        if level.shape[1] > query[0].shape[1] or level.shape[2] > query[0].shape[2]:
            raise FeatureError(
                f"level {number}: expected the finest level first, found {level.shape} after {query[0].shape}"
            )
        _check_values(f"level {number} of the query", level, scan=True)
        _check_values(f"level {number} of the neighbours", others, scan)
    patches = k * query[0].shape[1] * query[0].shape[2]
    if not isinstance(kappa, (int, np.integer)) or not 1 <= kappa <= patches:
        raise OptionError(f"kappa: expected 1 to {patches}, the number of gallery patches, found {kappa!r}")


def _check_values(name: str, array: Any, scan: bool) -> None:
    """Check that an array or tensor is of floats and, if `scan`, that all are finite."""
    is_float = array.dtype.kind == "f" if isinstance(array, np.ndarray) else array.is_floating_point()
    if not is_float:
        raise FeatureError(f"{name}: expected floats, found {str(array.dtype).removeprefix('torch.')}")
    if scan and not _is_finite(array):
        raise FeatureError(f"{name}: expected finite values, found NaN or infinity")
