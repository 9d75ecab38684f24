"""Masks as PNG files: 255 in regions, 0 elsewhere, as labelled sets have them."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def mask_png(mask: NDArray[np.bool_]) -> bytes:
    """Return an (H, W) mask as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
