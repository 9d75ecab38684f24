"""Reading masks of defects as (H, W) bool: image files, or rows of a .npy that holds a whole video's."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import ImageError
from ..images.decode import content_of, read_file
from ..images.depth import BITS_PER_SAMPLE, colour_samples, depth_of, white_is_zero
from ..images.metadata import has_more_frames

Bools = NDArray[np.bool_]
MaskLike = Union[str, "os.PathLike[str]", Image.Image, NDArray[Any]]

BACKGROUND = 16  # a lossy format: smaller values may be the rounding of 0, or labels 1, 2, ...
PEAK = 0.2  # a lossy format: a value is a level if it and its neighbours hold this share of the brighter pixels


@dataclass(frozen=True)
class Marks:
    """What a mask says of each pixel of an image."""

    anomalous: Bools  # (H, W)
    ignored: Bools | None = None  # (H, W), True where a pixel counts as neither normal nor anomalous; None: nowhere


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


def read_marks(
    path: Path, frame: int | None = None, image_size: tuple[int, int] | None = None, ignore_label: int | None = None
) -> Marks:
    """Read a mask image, or a frame's row of a .npy.

    A pixel is anomalous where any channel is above 0. Three kinds of files need more than that:

    - Lossy formats (JPEG, most WebP, AVIF, JPEG 2000): above the middle between black and the mark's value, as
      compression leaves small values around every mark. Values below 16 throughout are labels, all of which count.
    - An alpha channel that varies: only what is not transparent is marked.
    - A palette that has no black: index 0 is normal.

    Args:
        path: the file.
        frame: the row of a .npy.
        image_size: expected (height, width); None: any.
        ignore_label: pixels of this value are ignored: a grey value, or an index of a palette.

    Raises:
        ImageError: the mask cannot be read, has another size, several pages, NaN, or marks in the lower half of 16-bit
            colour; or it is lossy and has labels to ignore. The message starts with its path.
    """
    if frame is not None:
        labels = load_rows(path, None, 3)[frame]
        _check_size(str(path), labels.shape, image_size)
        _refuse_nan(str(path), labels)
        return _without(Marks(np.asarray(labels > 0)), labels, ignore_label)
    content = read_file(path)
    try:
        image = Image.open(io.BytesIO(content))
        lossy, pages = _is_lossy(image, content), has_more_frames(image)
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: cannot be read: expected an image, found something that no decoder knows") from error
    except Exception as error:  # decoders raise nearly anything
        raise ImageError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from error
    if pages:
        raise ImageError(f"{path}: expected a mask of one page, found several; unite them in one")
    if not lossy and _may_fit(image, image_size):
        _refuse_lower_bits(image, content, str(path), ignore_label)
    return _marks_of_image(image, lossy, str(path), image_size, ignore_label)


def _may_fit(image: Image.Image, image_size: tuple[int, int] | None) -> bool:
    """Return whether a mask is to be decoded: nothing larger than the image is, which may have been turned."""
    return image_size is None or sorted(image.size) == sorted(image_size)


def _refuse_lower_bits(image: Image.Image, content: bytes, name: str, ignore_label: int | None) -> None:
    """Refuse a mask of 16-bit colour that marks or labels in the lower 8 bits, which Pillow drops.

    Raises:
        ImageError: it is one, or cannot be read.
    """
    if image.mode[0] in "IF" or depth_of(image, content) is None:
        return
    advice = "save the mask as grey, or with 8 bits a channel"
    if ignore_label is not None:
        raise ImageError(
            f"{name}: expected exact labels, as ignore_label={ignore_label} needs, found colours of 16 bits; {advice}"
        )
    try:
        samples = colour_samples(content, image.format, name)
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything
        raise ImageError(f"{name}: cannot be read: {str(error) or type(error).__name__}") from error
    lost = samples[(samples > 0) & (samples < 256)]
    if lost.size:
        raise ImageError(f"{name}: expected colours of 16 bits to be 0 or at least 256, found {lost.min()}; {advice}")


def _refuse_nan(name: str, labels: NDArray[Any]) -> None:
    if np.isnan(labels).any():
        raise ImageError(f"{name}: expected numbers, found NaN; replace it")


def _marks_of_image(
    image: Image.Image, lossy: bool, name: str, image_size: tuple[int, int] | None, ignore_label: int | None
) -> Marks:
    """Return what an image says as a mask, turned as its EXIF says.

    Raises:
        ImageError: see read_marks.
    """
    size = image.size[::-1]
    try:
        if _may_fit(image, image_size):
            turned = _positive(image, ImageOps.exif_transpose(image))
            size = turned.size[::-1]
            labels, marks = _labels(turned), Marks(_marked(turned, lossy))
    except Exception as error:  # decoders raise nearly anything
        raise ImageError(f"{name}: cannot be read: {str(error) or type(error).__name__}") from error
    _check_size(name, size, image_size)
    _refuse_nan(name, labels)
    if lossy and ignore_label is not None:
        raise ImageError(
            f"{name}: expected a lossless format, as ignore_label={ignore_label} needs exact labels, "
            f"found {image.format}"
        )
    return _without(marks, labels, ignore_label)


def _positive(image: Image.Image, turned: Image.Image) -> Image.Image:
    """Return a turned mask with black as 0, also where white is 0 in a TIFF of 16 bits."""
    if turned.mode == "La":  # grey times alpha, which Pillow converts to LA alone
        return turned.convert("LA")
    if not white_is_zero(image):
        return turned
    tags: Any = image
    return Image.fromarray(2 ** max(tags.tag_v2[BITS_PER_SAMPLE]) - 1 - np.asarray(turned))


def given_marks(mask: MaskLike, name: str, image_size: tuple[int, int], ignore_label: int | None = None) -> Marks:
    """Return what a mask says that a caller gave: a path, see read_marks; a PIL image; an (H, W) array.

    Args:
        mask: an array marks what is above 0, or True.
        name: what errors call it.
        image_size: expected (height, width).
        ignore_label: see read_marks.

    Raises:
        ImageError: it is something else, cannot be read, has another size or NaN, or is lossy and has labels to ignore.
    """
    if isinstance(mask, (str, os.PathLike)):
        return read_marks(Path(mask), None, image_size, ignore_label)
    name = f"{name}: its mask"
    if isinstance(mask, Image.Image):
        lossy, content = mask.format in ("JPEG", "MPO", "AVIF"), content_of(mask)
        if content is not None and not _is_lossy(mask, content) and _may_fit(mask, image_size):
            _refuse_lower_bits(mask, content, name, ignore_label)
        return _marks_of_image(mask, lossy, name, image_size, ignore_label)
    if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype.kind not in "biuf":
        found = f"{mask.shape} {mask.dtype}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise ImageError(f"{name}: expected a path, a PIL image or an (H, W) array, found {found}")
    _check_size(name, mask.shape, image_size)
    _refuse_nan(name, mask)
    return _without(Marks(np.asarray(mask > 0)), mask, ignore_label)


def _check_size(name: str, size: tuple[int, ...], image_size: tuple[int, int] | None) -> None:
    if image_size is not None and size != image_size:
        expected, found = (f"{width} x {height}" for height, width in (image_size, size))
        raise ImageError(f"{name}: expected {expected} pixels, as the image has, found {found}")


def _without(marks: Marks, labels: NDArray[Any], ignore_label: int | None) -> Marks:
    """Take the pixels of a label out of the marks."""
    if ignore_label is None:
        return marks
    ignored = np.asarray(labels == ignore_label)
    return Marks(marks.anomalous & ~ignored, ignored)


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L") or image.mode[0] in "IF"


def _labels(image: Image.Image) -> NDArray[Any]:
    """Return each pixel's label: its grey value, its index in the palette; -1 for a colour."""
    if _is_grey(image) or image.mode == "P":
        return np.asarray(image)
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(np.int16), 2, 0)
    labels: NDArray[Any] = np.where((red == green) & (green == blue), red, np.int16(-1))
    return labels


def _marked(image: Image.Image, lossy: bool) -> Bools:
    """Return the pixels that a mask of any mode marks."""
    if _is_grey(image):  # values of any width are compared as they are
        return _above(np.asarray(image), lossy)
    rgba = np.asarray(image.convert("RGBA"))
    colour, alpha = _above(rgba[..., :3].max(axis=2), lossy), rgba[..., 3]
    visible = _above(alpha, lossy)
    if visible.any() and not visible.all():
        shown = colour[visible]
        return visible & colour if shown.any() and not shown.all() else visible
    if alpha.min() < alpha.max() and not np.ptp(rgba[..., :3].reshape(-1, 3), axis=0).any():  # one colour, half visible
        return np.asarray(alpha > (int(alpha.min()) + int(alpha.max())) / 2)
    if image.mode == "P" and colour.all():
        index = np.asarray(image)
        return np.asarray(index > 0) if index.min() == 0 else colour
    return colour


def _above(values: NDArray[Any], lossy: bool) -> Bools:
    """Return where values are above 0; of a lossy format, where they are nearer to the lowest mark than to black."""
    if not lossy or values.dtype != np.uint8 or values.max() < BACKGROUND:
        return np.asarray(values > 0)
    counts = np.bincount(values.ravel(), minlength=256)
    around = np.convolve(counts, np.ones(9, np.int64), "same")
    top = int(values.max())
    start = max(2 * BACKGROUND, top // 3)  # waves beside a mark are lower
    levels = np.flatnonzero(around[start:] >= PEAK * counts[start:].sum()) + start
    found = [value for value in levels if counts[value] == counts[value - 4 : value + 5].max() > 0]
    lowest = int(found[0]) if found else top  # thin lines have no level: their pixels have all values
    return np.asarray(values > lowest / 2)


def _is_lossy(image: Image.Image, content: bytes) -> bool:
    """Return whether a file's format changes the values that were saved."""
    if image.format == "TIFF":
        return image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")
    if image.format == "JPEG2000":
        style = content.find(b"\xff\x52")  # the marker COD; its 14th byte is 1 for the reversible transform
        return content[style + 13 : style + 14] != b"\x01"
    if image.format == "WEBP":
        return not _has_chunk(content, b"VP8L")
    return image.format in ("JPEG", "MPO", "AVIF")


def _has_chunk(content: bytes, name: bytes) -> bool:
    """Return whether a RIFF file has a chunk of this name."""
    at = 12
    while at + 8 <= len(content):
        if content[at : at + 4] == name:
            return True
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return False
