"""The levels that a search is given: as arrays or tensors of known kinds, with their shapes and values checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import Array, all_finite
from ..errors import FeatureError
from ..system.devices import as_arrays

LARGE = 2**24  # bytes that several threads look at


def as_levels(query: Sequence[Any], gallery: Sequence[Any], mixed: bool = False) -> tuple[list[Array], list[Any], Any]:
    """Return the query as arrays, the gallery as arrays or tensors, and the torch device of tensors, else None.

    Args:
        query: levels, arrays or tensors.
        gallery: levels, likewise.
        mixed: whether a query of arrays may have a gallery of tensors; what is found is then wanted as arrays.
    """
    arrays = [*query, *gallery]
    if mixed and all(isinstance(array, np.ndarray) for array in query) and not isinstance(gallery[0], np.ndarray):
        return list(query), [tensor.detach() for tensor in gallery], None
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
    if isinstance(level, np.ndarray) and level.nbytes < LARGE:
        return all_finite(level)
    if isinstance(level, np.ndarray):
        from ..system.threads import single_threads, torch_threads  # here, as it takes torch

        parts = np.array_split(level, min(torch_threads(), len(level)))
        return all(single_threads(torch_threads()).map(all_finite, parts)) if len(parts) > 1 else all_finite(level)
    import torch

    # all_finite, on the level's own device.
    return bool(level.sum(dtype=torch.float32).isfinite() or level.isfinite().all())


def check_levels(query: list[Array], gallery: list[Any], scan: bool, finest_first: bool) -> None:
    """Check shapes, dtypes, the query's values and, if `scan`, the neighbours' values.

    Args:
        query: levels [(c, h, w), ...].
        gallery: levels [(K, c, h, w), ...].
        scan: whether the neighbours' values may not be finite.
        finest_first: whether no level may be larger than the first.
    """
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
        if finest_first and (level.shape[1] > query[0].shape[1] or level.shape[2] > query[0].shape[2]):
            raise FeatureError(
                f"level {number}: expected the finest level first, found {level.shape} after {query[0].shape}"
            )
        _check_values(f"level {number} of the query", level, scan=True)
        _check_values(_neighbours(number), others, scan)


def check_neighbours(gallery: Sequence[Any]) -> None:
    """Check that the values of levels [(K, c, h, w), ...] are finite."""
    for number, level in enumerate(gallery):
        _check_values(_neighbours(number), level, scan=True)


def _neighbours(number: int) -> str:
    return f"level {number} of the neighbours"


def _check_values(name: str, array: Any, scan: bool) -> None:
    """Check that an array or tensor is of floats and, if `scan`, that all are finite."""
    is_float = array.dtype.kind == "f" if isinstance(array, np.ndarray) else array.is_floating_point()
    if not is_float:
        raise FeatureError(f"{name}: expected floats, found {str(array.dtype).removeprefix('torch.')}")
    if scan and not _is_finite(array):
        raise FeatureError(f"{name}: expected finite values, found NaN or infinity")
