"""Pictures of anomaly maps."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..arrays import Pixels
from .colour_scale import Scale, colours

OPACITY = 0.85  # of the brightest colour over the image
OUTLINE = (64, 224, 255)  # cyan: in no stop of the colour scale
TRUTH = (70, 235, 110)  # green: the outline of a ground truth


def overlay(image: Pixels, scores: NDArray[np.float32], scale: Scale) -> Pixels:
    """Lay a map over its image: the higher the score, the less of the image shows through.

    Args:
        image: (H, W, 3) uint8.
        scores: (H, W) pixel scores.
        scale: which scores are coloured how.
    """
    values = scale.apply(scores)
    opacity = (OPACITY * np.sqrt(values))[..., None]
    blended: Pixels = np.rint(image * (1 - opacity) + colours(values) * opacity).astype(np.uint8)
    return blended


def outline(image: Pixels, mask: NDArray[np.bool_], width: int = 2, colour: tuple[int, int, int] = OUTLINE) -> Pixels:
    """Draw the border of a mask, just outside it, some pixels wide."""
    drawn: Pixels = image.copy()
    if mask.any():
        from scipy import ndimage  # here, as in detect/baseline.py

        drawn[ndimage.binary_dilation(mask, iterations=width) & ~mask] = colour
    return drawn


def stroke(image: Pixels) -> int:
    """Return a width of outlines that is seen when the whole image is: 2 px, more from 768 px on."""
    return max(2, int(max(image.shape[:2])) // 256)


def fit(image: Pixels, side: int) -> Pixels:
    """Resize an image, up or down, so that its longer side has so many pixels."""
    return np.asarray(Image.fromarray(image).resize(_fitted(image.shape, side), Image.Resampling.BICUBIC))


def fit_mask(mask: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    """Resize a mask as `fit` does an image; where any pixel is set, its place stays set."""
    shares = Image.fromarray(mask.astype(np.float32)).resize(_fitted(mask.shape, side), Image.Resampling.BOX)
    return np.asarray(shares) > 0


def _fitted(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    height, width = shape[:2]
    return max(1, round(width * side / max(height, width))), max(1, round(height * side / max(height, width)))


def patch(image: Pixels, box: tuple[float, float, float, float], size: tuple[int, int]) -> Pixels:
    """Cut a box out of an image and resize it.

    Args:
        image: (H, W, 3) uint8.
        box: (left, top, right, bottom) in pixels, not necessarily whole ones.
        size: (height, width) of the result.
    """
    height, width = image.shape[:2]
    # Rounding may have put an edge just outside.
    inside = (max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3]))
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC, inside))


def encode(image: Pixels, kind: str = "PNG", quality: int = 82) -> bytes:
    """Return an image file's bytes: PNG, or JPEG at a quality."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **({"quality": quality} if kind == "JPEG" else {}))
    return buffer.getvalue()
