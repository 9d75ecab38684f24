"""How much memory of a GPU a search takes at the most; docs/gpu.md has a table of it."""

from __future__ import annotations

from collections.abc import Sequence

from ...system.devices import free_gpu_bytes
from .candidates import BYTES, GROUPED, SPARE
from .patches import VALUES, WIDE
from .search import PART
from .tiles_torch import GROUPS, PAIRS, padded_cells

MEASURED = 28  # bytes per value of the candidates that are measured at a time: float32 twice, float64 twice


def search_bytes(shapes: Sequence[tuple[int, int, int]], k: int, kappa: int = 1, itemsize: int = 2) -> int:
    """Return the bytes that one search takes on a GPU, with the copy of its neighbours that a query gets.

    Args:
        shapes: levels (c, h, w) that are searched together, the finest first.
        k: number of neighbours.
        kappa: number of matches.
        itemsize: bytes of a stored value.
    """
    values, channels = sum(c * h * w for c, h, w in shapes), sum(c for c, _, _ in shapes)
    patches = shapes[0][1] * shapes[0][2]
    pairs = patches * padded_cells(patches)
    groups = patches * GROUPS
    some = min(k, max(1, min(BYTES // (patches * channels * WIDE), GROUPED // groups)))  # compared at a time
    compared = some * (patches * channels * WIDE + groups * 40) + 8 * max(pairs, min(PAIRS, some * pairs))
    measured = MEASURED * min(max(VALUES, channels * (kappa + SPARE)), patches * (kappa + SPARE) * channels)
    return k * values * itemsize + 4 * min(k * values, PART) + max(compared, measured)


def fits(device: str, shapes: Sequence[tuple[int, int, int]], k: int, kappa: int, itemsize: int = 2) -> bool:
    """Return whether a GPU has the memory for a search now; args are those of search_bytes."""
    import torch

    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, and free to be used
    return search_bytes(shapes, k, kappa, itemsize) <= free_gpu_bytes(device) + spare


def kept_bytes(shapes: Sequence[tuple[int, int, int]], images: int, itemsize: int = 2) -> int:
    """Return the bytes of levels of so many images that stay on a GPU between queries: `device_cache_bytes`."""
    return images * itemsize * sum(c * h * w for c, h, w in shapes)
