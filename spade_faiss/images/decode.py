"""Image files to (H, W, 3) uint8 RGB pixels."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..arrays import Pixels
from ..errors import ImageError
from .regular_file import read_regular

MIN_SIDE = 8  # px; smaller images are placeholders rather than pictures


def decode(image: str | os.PathLike[str] | bytes | Image.Image | NDArray[Any], name: str = "image") -> Pixels:
    """Decode an image to (H, W, 3) uint8 RGB, upright.

    EXIF rotation is applied. Palette, grey and CMYK images become RGB. An alpha channel is dropped. 16-bit values keep
    their upper 8 bits and are never stretched per image. Only the first of several frames is read.

    Args:
        image: a path, a file's bytes, a PIL image, or an (H, W, 3) or (H, W) uint8 array.
        name: what errors call an image without a path.

    Raises:
        ImageError: the image cannot be read, has a side under MIN_SIDE, or more than PIL.Image.MAX_IMAGE_PIXELS pixels.
    """
    if isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
        image = read_file(Path(name))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise ImageError(f"{name}: expected an (H, W, 3) or (H, W) uint8 array, found {image.shape} {image.dtype}")
        pixels = image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
    else:
        pixels = _decode_pil(image, name)
    if min(pixels.shape[:2]) < MIN_SIDE:
        height, width = pixels.shape[:2]
        raise ImageError(f"{name}: expected at least {MIN_SIDE} x {MIN_SIDE} pixels, found {width} x {height}")
    return np.ascontiguousarray(pixels)


def read_file(path: Path) -> bytes:
    """Read an image file's bytes.

    Raises:
        ImageError: the file cannot be read, is empty, or has a name that is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ImageError(f"{os.fsencode(path)!r}: expected a name in UTF-8, as keys are; rename the file") from error
    try:
        content = read_regular(path)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not content:
        raise ImageError(f"{path}: expected an image, found an empty file (0 bytes)")
    return content


def _decode_pil(image: bytes | Image.Image, name: str) -> Pixels:
    """Decode a file's bytes or a PIL image, with an ImageError for whatever the decoder raises."""
    try:
        opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and opened.width * opened.height > limit:
            raise Image.DecompressionBombError
        return _to_rgb(ImageOps.exif_transpose(opened), name)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: expected at most {Image.MAX_IMAGE_PIXELS} pixels, found more; "
            "if it is not an attack, raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: expected an image, found something that no decoder knows") from error
    except MemoryError as error:
        raise ImageError(f"{name}: too large to decode in the memory that is free") from error
    except Exception as error:  # decoders raise nearly anything on damaged files: OSError, SyntaxError, struct.error
        raise ImageError(f"{name}: damaged or cut short: {str(error) or type(error).__name__}") from error


def _to_rgb(image: Image.Image, name: str) -> Pixels:
    """Convert an image of any mode to RGB."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow may hold it in 32 bits
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ImageError(
                f"{name}: expected 8 or 16 bits a channel, found values from {values.min()} to {values.max()}"
            )
        grey = (values >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ImageError(f"{name}: expected 8 or 16 bits a channel, found floating point; convert it to 8 or 16 bits")
    if "transparency" in image.info:  # without this step, Pillow warns
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))
