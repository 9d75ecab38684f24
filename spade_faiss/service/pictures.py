"""Pictures and arrays of an inspection as files' bytes: maps, overlays, masks, thumbnails."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..arrays import Pixels
from ..report.colour_scale import Scale, colours
from ..report.drawing import OPACITY, encode, fit
from ..report.result_folder import npy

THUMBNAIL = 200  # px, longer side
MEDIA_TYPES = {"png": "image/png", "npy": "application/x-npy", "tiff": "image/tiff"}
Map = NDArray[np.float32]


@dataclass(frozen=True)
class Kind:
    """What a picture file is, as far as a browser has to know."""

    media_type: str
    suffix: str


KINDS = {
    "PNG": Kind("image/png", ".png"),
    "JPEG": Kind("image/jpeg", ".jpg"),
    "WEBP": Kind("image/webp", ".webp"),
    "BMP": Kind("image/bmp", ".bmp"),
    "TIFF": Kind("image/tiff", ".tif"),
    "GIF": Kind("image/gif", ".gif"),
}
SHOWN = ("image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif")  # by every browser


def map_as(kind: str, scores: Map, scale: Scale) -> bytes:
    """Return an (H, W) map as a file: npy and tiff with its values, png coloured on the gallery's scale."""
    if kind == "npy":
        return npy(scores)
    if kind == "tiff":
        buffer = io.BytesIO()
        Image.fromarray(scores).save(buffer, "TIFF", compression="tiff_deflate")
        return buffer.getvalue()
    return encode(colours(scale.apply(scores)))


def overlay_layer(scores: Map, scale: Scale) -> bytes:
    """Return a map as an RGBA PNG to lay over its image: the higher the score, the less shows through."""
    values = scale.apply(scores)
    opacity = np.rint(255 * OPACITY * np.sqrt(values)).astype(np.uint8)
    return _png(np.dstack([colours(values), opacity]))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def thumbnail(pixels: Pixels) -> bytes:
    """Return a small JPEG of an (H, W, 3) image."""
    return encode(fit(pixels, THUMBNAIL), "JPEG")


def pack(scores: Map) -> bytes:
    """Pack an (H, W) float32 map without loss: byte planes, which compress, by zstd."""
    import imagecodecs

    height, width = scores.shape
    planes = np.ascontiguousarray(scores, "<f4").view(np.uint8).reshape(-1, 4).T.tobytes()
    return np.array([height, width], "<u4").tobytes() + bytes(imagecodecs.zstd_encode(planes, level=1))


def unpack(content: bytes) -> Map:
    """Return the map that was packed."""
    import imagecodecs

    height, width = np.frombuffer(content[:8], "<u4").tolist()
    planes = np.frombuffer(imagecodecs.zstd_decode(content[8:]), np.uint8).reshape(4, height * width)
    found: Map = np.ascontiguousarray(planes.T).view("<f4").reshape(height, width)
    return found
