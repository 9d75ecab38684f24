"""Images: their names under a folder, decoding, and the view of them that a network gets."""

from __future__ import annotations

import io
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import ImageError

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MIN_SIDE = 8  # px; anything smaller has nothing to look at, and is more likely a placeholder than a picture

Pixels = NDArray[np.uint8]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Source:
    """An image file, and the key it goes by: its path relative to its source, with forward slashes."""

    path: Path
    key: str


@dataclass(frozen=True)
class View:
    """What a network sees of an image: the image squashed to `resized`, and the centre of that, `crop`, in pixels."""

    resized: tuple[int, int]  # (height, width)
    crop: tuple[int, int]  # (height, width)

    @property
    def offset(self) -> tuple[int, int]:
        """The crop's (top, left) in pixels of the resized image."""
        return (self.resized[0] - self.crop[0]) // 2, (self.resized[1] - self.crop[1]) // 2

    def apply(self, pixels: Pixels) -> Pixels:
        """Resize (antialiased bilinear) and crop an (H, W, 3) image; returns (crop height, crop width, 3) uint8."""
        (height, width), (top, left) = self.crop, self.offset
        resized = self.resize(pixels)
        return np.ascontiguousarray(resized[top : top + height, left : left + width])

    def resize(self, pixels: Pixels) -> Pixels:
        """Resize (antialiased bilinear) an (H, W, 3) image to `resized`, without the crop."""
        size = self.resized[::-1]
        return pixels if pixels.shape[1::-1] == size else _resize(pixels, size)

    def region(self, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the (left, top, right, bottom), half-open, of the original pixels whose centres the network saw."""
        spans = [
            _span(side, resized, offset, crop)
            for side, resized, offset, crop in zip(image_size, self.resized, self.offset, self.crop, strict=True)
        ]
        return spans[1][0], spans[0][0], spans[1][1], spans[0][1]

    def cell_box(
        self, image_size: tuple[int, int], grid: tuple[int, int], row: int, column: int, rows: int = 1, columns: int = 1
    ) -> tuple[float, float, float, float]:
        """Return where a cell of a level's grid, or a block of cells, lies in the original image.

        Args:
            image_size: (H, W) of the original image.
            grid: (h, w) of the level.
            row: of the first cell, from 0.
            column: of the first cell, from 0.
            rows: cells of the block from there down.
            columns: cells of the block from there to the right.

        Returns:
            (left, top, right, bottom) in pixels of the original, whose corner is (0, 0), not rounded.
        """
        top, bottom = (self._to_original(0, edge / grid[0], image_size) for edge in (row, row + rows))
        left, right = (self._to_original(1, edge / grid[1], image_size) for edge in (column, column + columns))
        return left, top, right, bottom

    def _to_original(self, axis: int, share: float, image_size: tuple[int, int]) -> float:
        """Return the pixel of the original at a share of the crop's side."""
        return (share * self.crop[axis] + self.offset[axis]) * image_size[axis] / self.resized[axis]

    def cell_at(self, image_size: tuple[int, int], grid: tuple[int, int], y: int, x: int) -> tuple[int, int]:
        """Return the (row, column) of the cell that holds the centre of a pixel; the nearest where it was cropped."""
        row, column = (
            min(cells - 1, max(0, math.floor(((at + 0.5) * resized / side - offset) * cells / crop)))
            for at, cells, crop, offset, side, resized in zip(
                (y, x), grid, self.crop, self.offset, image_size, self.resized, strict=True
            )
        )
        return row, column


def _span(side: int, resized: int, offset: int, crop: int) -> tuple[int, int]:
    centres = (np.arange(side) + 0.5) * resized / side - offset
    inside = np.flatnonzero((centres >= 0) & (centres < crop))
    return (int(inside[0]), int(inside[-1]) + 1) if inside.size else (side // 2, side // 2)


def _resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


def find_images(sources: Sequence[str | Path | Source]) -> list[Source]:
    """List the images of files and folders (searched to any depth), each folder in the order of its keys.

    Hidden files and files without an image's suffix are passed over. A Source is taken as it is.

    Raises:
        ImageError: a source does not exist or holds no image, or two sources give the same key.
    """
    found: dict[str, Source] = {}
    for source in sources:
        listed = [source] if isinstance(source, Source) else _list_source(Path(source))
        if not listed:
            suffixes = " ".join(sorted(SUFFIXES))
            raise ImageError(f"{source}: expected a folder with images ({suffixes}), found none in it")
        for image in listed:
            other = found.setdefault(image.key, image)
            if other is not image:
                raise ImageError(
                    f"two images would have the key {image.key!r}: {other.path} and {image.path}; "
                    "give a folder that holds both sources, so that their keys differ"
                )
    return list(found.values())


def _list_source(source: Path) -> list[Source]:
    if source.is_file():
        return [Source(source, source.name)]
    if not source.is_dir():
        raise ImageError(f"{source}: expected an image or a folder of images, found nothing there")
    images = []
    for folder, folders, files in os.walk(source, followlinks=True):
        above = Path(folder).relative_to(source).parents
        if os.path.realpath(folder) in {os.path.realpath(source / parent) for parent in above}:
            folders.clear()  # a link that leads back to a folder above it
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                images.append(Source(path, path.relative_to(source).as_posix()))
    return sorted(images, key=lambda image: image.key)


def decode(image: str | os.PathLike[str] | bytes | Image.Image | NDArray[Any], name: str = "image") -> Pixels:
    """Decode an image to (H, W, 3) uint8 RGB, upright.

    EXIF rotation is applied; palette, grey and CMYK images become RGB; an alpha channel is dropped; 16-bit values keep
    their upper 8 bits (never stretched per image); of a file with several frames the first counts.

    Args:
        image: a path, a file's bytes, a PIL image, or an (H, W, 3) or (H, W) uint8 array.
        name: what an error calls it where it has no path.

    Raises:
        ImageError: it cannot be read, is smaller than MIN_SIDE, or has more than PIL.Image.MAX_IMAGE_PIXELS pixels.
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
    """Read an image file's bytes, with an ImageError for what stands in the way."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ImageError(f"{os.fsencode(path)!r}: expected a name in UTF-8, as keys are; rename the file") from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not content:
        raise ImageError(f"{path}: expected an image, found an empty file (0 bytes)")
    return content


def _decode_pil(image: bytes | Image.Image, name: str) -> Pixels:
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
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow may also hold in 32 bits
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ImageError(
                f"{name}: expected 8 or 16 bits a channel, found values from {values.min()} to {values.max()}"
            )
        grey = (values >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ImageError(f"{name}: expected 8 or 16 bits a channel, found floating point; convert it to 8 or 16 bits")
    if "transparency" in image.info:  # which Pillow wants to be told about before it is dropped
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def read_ahead(items: Iterable[T], function: Callable[[T], R], workers: int = 4, ahead: int = 32) -> Iterator[R]:
    """Yield function(item) in the order of the items, computed by threads up to `ahead` items before they are needed.

    Memory is bounded by `ahead` results. An exception of the function is raised at its item's turn.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="read-ahead") as pool:
        waiting: deque[Future[R]] = deque(pool.submit(function, item) for item in islice(iterator, ahead))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(iterator, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def one_ahead(items: Iterable[T], function: Callable[[T], R], background: bool = True) -> Iterator[R]:
    """Yield function(item) in the order of the items; while the caller works on one, a thread computes the next.

    The caller's thread takes the items, one ahead of what is yielded, and computes the first result, as there is
    nothing yet to overlap it with. Memory is bounded by two results. An exception, of the items or of the function, is
    raised at its item's turn. Closed early, it waits for the one result that is being computed.

    Args:
        items: taken when they are needed.
        function: of one item.
        background: False: the caller's thread computes everything, each at its turn.
    """
    if not background:
        yield from map(function, items)
        return
    iterator, pool = iter(items), ThreadPoolExecutor(1, thread_name_prefix="one-ahead")
    waiting: deque[Callable[[], R]] = deque(partial(function, item) for item in islice(iterator, 1))
    try:
        while waiting:
            results = [waiting.popleft()()]
            try:
                waiting.extend(pool.submit(function, item).result for item in islice(iterator, 1))
            except Exception as error:
                waiting.append(partial(_raise, error))
            yield results.pop()  # and this frame does not keep it while the next is computed
    finally:
        pool.shutdown(cancel_futures=True)


def _raise(error: Exception) -> NoReturn:
    raise error


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items, the last one possibly shorter.

    An exception of the items is raised after the list of those before it.
    """
    iterator, error = iter(items), None
    while error is None:
        batch: list[T] = []
        try:
            for item in islice(iterator, size):
                batch.append(item)  # one by one: what comes before an exception is kept
        except Exception as raised:
            error = raised
        if not batch:
            break
        yield batch
    if error is not None:
        raise error
