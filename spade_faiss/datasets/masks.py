"""Reading masks of defects as (H, W) bool: image files, or rows of a .npy that holds a whole video's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import ImageError
from ..images.decode import read_file


def load_rows(path: Path, rows: int | None, dimensions: int) -> NDArray[Any]:
    """Map a video's .npy with one row per frame into memory, without reading or unpickling it.

    Raises:
        ImageError: the file cannot be read, or has other `dimensions` or another number of `rows` (None: any).
    """
    try:
        values = np.lib.format.open_memmap(path, mode="r")
        if values.dtype.kind not in "biuf" or values.ndim != dimensions or rows not in (None, len(values)):
            wanted = f"numbers in {dimensions} dimensions" + (f", {rows} rows for as many frames" if rows else "")
            raise ValueError(f"expected {wanted}, found {values.shape} {values.dtype}")
    except Exception as error:  # damaged files raise nearly anything
        raise ImageError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from error
    return np.asarray(values)


def read_mask(path: Path, frame: int | None, image_size: tuple[int, int]) -> NDArray[np.bool_]:
    """Read a mask image, or a frame's row of a .npy, as (H, W) bool: True where any channel is above 0.

    Raises:
        ImageError: the mask cannot be read, or has not the image's (height, width); the message starts with its path.
    """
    if frame is not None:
        values = load_rows(path, None, 3)[frame]
        size = values.shape
    else:
        content = read_file(path)
        try:
            mask = Image.open(io.BytesIO(content))
            ImageOps.exif_transpose(mask, in_place=True)
            size = mask.size[::-1]
            if size == image_size:  # nothing larger than the image is decoded
                # Grey values of any width are compared as they are, palettes and colours as RGB.
                grey = mask.mode in ("1", "L") or mask.mode[0] in "IF"
                values = np.asarray(mask) if grey else np.asarray(mask.convert("RGBA"))[..., :3].max(axis=2)
        except Exception as error:  # decoders raise nearly anything
            raise ImageError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from error
    if size != image_size:
        expected, found = (f"{width} x {height}" for height, width in (image_size, size))
        raise ImageError(f"{path}: expected {expected} pixels, as the image has, found {found}")
    return np.asarray(values > 0)
