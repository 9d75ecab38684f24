"""Image files to (H, W, 3) uint8 RGB pixels."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..arrays import Pixels
from ..errors import ImageError
from .depth import (
    FULL,
    Samples,
    colour_samples,
    depth_of,
    from_white,
    grey_samples,
    has_sbit,
    png_bits,
    tiff_page,
    to_8_bits,
    white_is_zero,
)
from .facts import NO_FACTS, Facts
from .inputs import ImageLike, opened
from .inputs import read_file as read_file
from .metadata import TURNS, has_more_frames, turn_of, without_metadata

PIXELS_DAMAGED = ("image file is truncated", "decoder error", "broken data stream")  # as Pillow's errors begin
PLANAR_CONFIGURATION = 284  # TIFF tag; 2: channel by channel
MIN_SIDE = 8  # px; smaller images are placeholders rather than pictures


@dataclass(frozen=True)
class DecodedImage:
    """Pixels, and what else decoding found out."""

    pixels: Pixels
    facts: Facts


def decode(image: ImageLike, name: str = "image", bits: int | None = None) -> Pixels:
    """Decode an image to (H, W, 3) uint8 RGB, upright.

    EXIF rotation is applied. Palette, grey and CMYK images become RGB. An alpha channel is dropped. Only the first of
    several frames is read. Metadata that cannot be read counts as none. Of more than 8 bits a value the upper 8 that
    are significant are kept, and values are never stretched per image.

    Args:
        image: a path, a file's bytes, an open binary file, a PIL image, an (H, W, 3) or (H, W) uint8 array, or a
            (3, H, W), (H, W, 3) or (H, W) uint8 tensor.
        name: what errors call an image without a path.
        bits: 8 to 16, how many bits are significant in files of 16 that do not say so; None: 16.

    Raises:
        ImageError: the image cannot be read, has a side under MIN_SIDE, more than PIL.Image.MAX_IMAGE_PIXELS pixels,
            or a value of more bits.
    """
    return decode_with_facts(image, name, bits).pixels


def decode_with_facts(image: ImageLike, name: str = "image", bits: int | None = None) -> DecodedImage:
    """Decode an image like `decode`, and tell what else was found out."""
    if isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
    given, facts = opened(image, name), NO_FACTS
    if isinstance(given, np.ndarray):
        pixels = given
    else:
        pixels, facts = _decode_pil(given, name, bits)
    if min(pixels.shape[:2]) < MIN_SIDE:
        height, width = pixels.shape[:2]
        raise ImageError(f"{name}: expected at least {MIN_SIDE} x {MIN_SIDE} pixels, found {width} x {height}")
    return DecodedImage(np.ascontiguousarray(pixels), facts)


def image_bytes(content: bytes) -> int:
    """Return about the memory that decoding a file takes, by its header: Pillow's pixels and a copy as RGB."""
    height, width = size_in_header(content)
    return 7 * height * width or len(content)


def size_in_header(content: bytes) -> tuple[int, int]:
    """Return the (H, W) that a file's header says, before it is turned as its EXIF says; (0, 0): none that is known."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            return int(height), int(width)
    except Exception:  # decoding will say what is wrong with it
        return 0, 0


def _decode_pil(image: bytes | Image.Image, name: str, bits: int | None) -> tuple[Pixels, Facts]:
    """Decode a file's bytes or a PIL image, with an ImageError for whatever the decoder raises."""
    try:
        if isinstance(image, bytes):
            return _decode_file(image, name, bits)
        content = content_of(image)
        if content is not None:
            return _decode_file(content, name, bits)
        return _decode_opened(image, None, name, bits)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: expected at most {Image.MAX_IMAGE_PIXELS} pixels, found more; "
            "if it is not an attack, set PIL.Image.MAX_IMAGE_PIXELS=N"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: expected an image, found something that no decoder knows") from error
    except MemoryError as error:
        raise ImageError(f"{name}: too large to decode in the memory that is free") from error
    except Exception as error:  # decoders raise nearly anything on damaged files: OSError, SyntaxError, struct.error
        raise ImageError(f"{name}: damaged or cut short: {str(error) or type(error).__name__}") from error


def _decode_file(content: bytes, name: str, bits: int | None) -> tuple[Pixels, Facts]:
    """Decode a file; where that fails, decode it without its metadata, whose damage is not the pixels'."""
    try:
        return _decode_opened(Image.open(io.BytesIO(content)), content, name, bits)
    except (ImageError, MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise
    except Exception as error:
        bares = list(without_metadata(content))
        if str(error).startswith(PIXELS_DAMAGED):  # libtiff also says so of a broken tag
            bares = bares[-1:] if content[:2] in (b"II", b"MM") else []
        for bare in bares:
            try:
                return _decode_opened(Image.open(io.BytesIO(bare)), bare, name, bits)
            except (ImageError, MemoryError, Image.DecompressionBombError):
                raise
            except Exception:  # what is raised in the end is about the file as it is
                continue
        found = _decode_odd_tiff(content, name, bits)
        if found is None:
            raise
        return found


def content_of(image: Image.Image) -> bytes | None:
    """Return the file of a PIL image that is not loaded yet and may be deep; it has bits that Pillow would drop."""
    file, format = getattr(image, "fp", None), image.format
    deep = format in ("JPEG2000", "PPM") or (format in ("PNG", "TIFF", "SGI") and depth_of(image, None) is not None)
    if file is None or not deep or not getattr(image, "tile", None) or image.tell() != 0:
        return None
    try:
        at = file.tell()
        file.seek(0)
        content: bytes = file.read()
        file.seek(at)
    except (OSError, ValueError):  # closed
        return None
    return content


def _check_size(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise Image.DecompressionBombError


def _decode_opened(image: Image.Image, content: bytes | None, name: str, bits: int | None) -> tuple[Pixels, Facts]:
    """Decode an image that Pillow has opened."""
    _check_size(image.width, image.height)
    more, depth = content is not None and has_more_frames(image), depth_of(image, content)
    wrapped = content is not None and image.format == "JPEG2000"  # Pillow rounds up, and white becomes black
    deep_colour = depth is not None and (wrapped or not image.mode.startswith("I"))
    image.load()
    turn = turn_of(image)
    if depth is None or image.mode == "F":
        return _to_rgb(_turned(image, turn), name), Facts(more)
    declared, by = depth.declared, depth.by
    if image.format == "PNG" and content is not None and has_sbit(content):
        samples = colour_samples(content, "PNG", name) if deep_colour else grey_samples(image, name)
        declared, by = png_bits(content, samples, bits), "sBIT"
    significant, negative = declared or bits or FULL, white_is_zero(image)
    planes = deep_colour and getattr(image, "tag_v2", {}).get(PLANAR_CONFIGURATION) == 2  # which Pillow garbles
    if significant == FULL and not negative and not wrapped and (not planes or content is None):
        pixels = _to_rgb(_turned(image, turn), name)
        return pixels, Facts(more, None if depth.declared else int(pixels.max(initial=0)))
    if not deep_colour:
        samples = grey_samples(_turned(image, turn), name)
        samples = from_white(samples, significant) if negative else samples
    elif content is None:
        raise ImageError(f"{name}: expected a path or a file for 16-bit colour, of which PIL images keep 8 bits")
    elif image.mode == "CMYK":  # its inks would be taken for red, green and blue
        raise ImageError(f"{name}: expected grey or RGB of more than 8 bits a value, found CMYK; convert it to RGB")
    else:
        samples = _turned_samples(colour_samples(content, image.format, name), _turn_of_file(content, image, turn))
    high_byte = None if declared or bits else int(samples.max(initial=0)) >> 8
    return to_8_bits(samples, significant, name, by), Facts(more, high_byte)


def _decode_odd_tiff(content: bytes, name: str, bits: int | None) -> tuple[Pixels, Facts] | None:
    """Decode a TIFF of a depth that Pillow does not know, as 10 or 14 bits or 12 in colour; None: it is none."""
    try:
        page, depth, orientation = tiff_page(content)
        _check_size(page.imagewidth, page.imagelength)
        significant = depth.declared or bits or FULL
        samples = colour_samples(content, "TIFF", name, significant)
    except (ImageError, MemoryError, Image.DecompressionBombError):
        raise
    except Exception:  # tifffile raises nearly anything, and the caller knows what is wrong already
        return None
    samples = _turned_samples(samples, TURNS.get(orientation))
    high_byte = None if depth.declared or bits else int(samples.max(initial=0)) >> 8
    return to_8_bits(samples, significant, name, depth.by), Facts(False, high_byte)


def _turn_of_file(content: bytes, image: Image.Image, turn: Image.Transpose | None) -> Image.Transpose | None:
    """Return what makes the pixels of a file upright: Pillow turns a TIFF when it loads it, and forgets the tag."""
    if image.format != "TIFF":
        return turn
    return TURNS.get(tiff_page(content)[2])


def _turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _turned_samples(samples: Samples, turn: Image.Transpose | None) -> Samples:
    """Turn (H, W) or (H, W, 3) values as Pillow turns an image."""
    across = samples.swapaxes(0, 1)
    turned: dict[Image.Transpose | None, Samples] = {
        None: samples,
        Image.Transpose.FLIP_LEFT_RIGHT: samples[:, ::-1],
        Image.Transpose.FLIP_TOP_BOTTOM: samples[::-1],
        Image.Transpose.ROTATE_180: samples[::-1, ::-1],
        Image.Transpose.TRANSPOSE: across,
        Image.Transpose.TRANSVERSE: across[::-1, ::-1],
        Image.Transpose.ROTATE_270: across[:, ::-1],
        Image.Transpose.ROTATE_90: across[::-1],
    }
    return turned[turn]


def _to_rgb(image: Image.Image, name: str) -> Pixels:
    """Convert an image of any mode to RGB; 16-bit grey keeps its upper 8 bits."""
    if image.mode.startswith("I"):
        return to_8_bits(grey_samples(image, name), FULL, name, "")
    if image.mode == "F":
        raise ImageError(f"{name}: expected 8 or 16 bits a channel, found floating point; convert it to 8 or 16 bits")
    if image.mode == "La":  # grey times alpha, which Pillow converts to LA alone
        image = image.convert("LA")
    if "transparency" in image.info:  # without this step, Pillow warns
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))
