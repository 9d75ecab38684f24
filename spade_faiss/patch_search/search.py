"""The kappa nearest patches, among all patches of the K neighbours, for every patch of a query.

A patch is one position of the finest grid: every level upsampled to it bilinearly (align_corners=False), concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import Array, all_finite
from ..errors import FeatureError, OptionError
from ..options import SearchOptions
from ..system.devices import as_arrays, faiss_device, search_device
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
        kappa: how many nearest patches.
        engine: "flat", a temporary FAISS index; "pyramid", products at native resolution; "auto" takes the one
            that is expected to be faster, on a GPU always "flat": nothing has been measured there.
        device: auto, cpu, cuda, cuda:N; None: auto.
        block_bytes: the most that the flat engine's temporary gallery may take at a time; at least one neighbour.

    Returns:
        sq_distances (h, w, kappa) float32, ascending, and matches (h, w, kappa, 3) int32: (neighbour, row, column).
        Ties are in the order of neighbour, row, column. NumPy for NumPy, torch (on the same device) for torch.

    Neighbours' tensors stay where they are for "pyramid" on a GPU; all other ways go over arrays on the host.

    Raises:
        FeatureError: shapes that do not fit each other, NaN or infinity.
        OptionError: an unknown engine, or kappa larger than the number of gallery patches.
    """
    query, gallery, like = _as_levels(query_levels, neighbour_levels)
    _check(query, gallery, kappa)
    if engine not in ("auto", *ENGINES):
        raise OptionError(f"engine: expected auto or {' or '.join(ENGINES)}, found {engine!r}")
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found, and refused, where it ends up
        sq_distances, flat_matches = _search(engine, query, gallery, kappa, device, block_bytes)
    grid: tuple[int, int] = query[0].shape[1:]
    matches = np.stack(np.unravel_index(flat_matches, (len(gallery[0]), *grid)), axis=-1).astype(np.int32)
    found = sq_distances.reshape(*grid, kappa), matches.reshape(*grid, kappa, 3)
    if like is None:
        return found
    import torch

    return tuple(torch.from_numpy(array).to(like) for array in found)  # type: ignore[return-value]


def _search(
    engine: str, query: list[Array], gallery: list[Any], kappa: int, device: str | None, block_bytes: int
) -> tuple[Array, Array]:
    """Run an engine; each returns squared distances and positions, (h * w, kappa)."""
    if engine == "auto":  # on a GPU FAISS is the one that is known to be fast
        on_cpu = faiss_device(device) == "cpu"
        engine = faster([level.shape for level in query], len(gallery[0]), kappa) if on_cpu else "flat"
        device = "cpu" if on_cpu else device
    if engine == "flat":
        from .flat import search_flat

        return search_flat(query, as_arrays(gallery), kappa, faiss_device(device), block_bytes)
    where = search_device(device)
    if where == "cpu":
        from .pyramid import search_pyramid

        return search_pyramid(query, as_arrays(gallery), kappa)
    from .pyramid_torch import search_pyramid_torch

    return search_pyramid_torch(query, gallery, kappa, where)


def _as_levels(query: Sequence[Any], gallery: Sequence[Any]) -> tuple[list[Array], list[Any], Any]:
    """Return the query as arrays, the gallery as arrays or tensors, and the torch device they came from, or None."""
    arrays = [*query, *gallery]
    if all(isinstance(array, np.ndarray) for array in arrays):
        native = [array.astype(array.dtype.newbyteorder("="), copy=False) for array in arrays]
        # What is wider than float64 is in no engine.
        native = [array.astype(np.float64) if array.dtype == np.longdouble else array for array in native]
        return native[: len(query)], native[len(query) :], None
    import torch

    if not all(isinstance(array, torch.Tensor) for array in arrays):
        kinds = sorted({type(array).__name__ for array in arrays})
        raise FeatureError(f"levels: expected all NumPy arrays or all torch tensors, found {' and '.join(kinds)}")
    devices = {array.device for array in arrays}
    if len(devices) > 1:
        raise FeatureError(f"levels: expected one device, found {' and '.join(sorted(map(str, devices)))}")
    # The query is small, and its channels' means are taken on the host.
    return as_arrays(query), [tensor.detach() for tensor in gallery], devices.pop()


def _is_finite(level: Any) -> bool:
    if isinstance(level, np.ndarray):
        return all_finite(level)
    import torch

    # As all_finite, where the level is.
    return bool(level.sum(dtype=torch.float32).isfinite() or level.isfinite().all())


def _check(query: list[Array], gallery: list[Any], kappa: int) -> None:
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
        for what, array in (("query", level), ("neighbours", others)):
            is_float = array.dtype.kind == "f" if isinstance(array, np.ndarray) else array.is_floating_point()
            if not is_float:
                found = str(array.dtype).removeprefix("torch.")
                raise FeatureError(f"level {number} of the {what}: expected floats, found {found}")
            if not _is_finite(array):
                raise FeatureError(f"level {number} of the {what}: expected finite values, found NaN or infinity")
    patches = k * query[0].shape[1] * query[0].shape[2]
    if not isinstance(kappa, (int, np.integer)) or not 1 <= kappa <= patches:
        raise OptionError(f"kappa: expected 1 to {patches}, the number of gallery patches, found {kappa!r}")
