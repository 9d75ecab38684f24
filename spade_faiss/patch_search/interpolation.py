"""The weights of bilinear interpolation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def taps(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return which of `old` cells each of `new` cells is interpolated from, and with what weights.

    The definition is that of torch.nn.functional.interpolate(mode="bilinear", align_corners=False).

    Returns:
        indices and weights, (new, 2); a cell that is interpolated from one cell only has it twice.
    """
    centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    first = np.floor(centres).astype(np.int64)
    share = (centres - first).astype(np.float32)
    return np.stack([first, first + (share > 0)], axis=1), np.stack([1 - share, share], axis=1)
