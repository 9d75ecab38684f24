"""Images with more than 8 bits a value: how many of them are significant, and the 8 bits that are kept.

A file may declare its bits: TIFF by BitsPerSample and, where that is 16, by a MaxSampleValue or SMaxSampleValue of
2^n - 1; PNM by its maximum; JPEG 2000 by its precision; PNG by sBIT. Where a file declares nothing, the gallery's
choice holds. Nothing depends on the values of one image, but where sBIT's bits lie (see png_bits).
"""

from __future__ import annotations

import io
import logging
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..arrays import Pixels
from ..errors import ImageError

FULL = 16  # bits that are significant where neither the file nor the gallery says otherwise
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE, SMAX_SAMPLE_VALUE = 258, 262, 281, 341  # TIFF tags
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2  # TIFF's photometric interpretations

Samples = NDArray[np.uint16]  # (H, W) or (H, W, 3)

for _decoder in ("PIL", "tifffile"):  # they log what they also raise, and Python would print it beside our line
    logging.getLogger(_decoder).addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Depth:
    """How many bits of an image's values are significant."""

    declared: int | None = None  # lowest bits of a value; 16: the values fill 16 bits, whatever their precision
    by: str = ""  # what declares it


def depth_of(image: Image.Image, content: bytes | None) -> Depth | None:
    """Return the depth of an image with more than 8 bits a value; None: it has 8 or fewer.

    Args:
        image: as Pillow opened it.
        content: of its file, if there is one.
    """
    if hasattr(image, "tag_v2"):
        return _tiff_depth(image)
    if image.format == "PNG":
        if content is None or content[24] != 16:
            return Depth() if image.mode.startswith("I") or ";16" in rawmode(image) else None
        return Depth()
    if image.format == "PPM" and content is not None:
        largest = _pnm_header(content)[1]
        return None if largest < 256 else Depth() if largest == 0xFFFF else Depth(FULL, "maxval")
    if image.format == "JPEG2000" and content is not None:
        bits = _jpeg2000_bits(content)
        return None if bits <= 8 else Depth() if bits == FULL else Depth(bits, "precision")
    if image.format == "SGI":
        return Depth() if _sgi_is_deep(image) else None
    return Depth() if image.mode.startswith("I") else None


def _sgi_is_deep(image: Image.Image) -> bool:
    """Return whether a file has 16 bits a value, by how Pillow will read it: it keeps the upper 8 in mode L or RGB."""
    return any(tile[0] == "SGI16" or (tile[0] == "sgi_rle" and tile[3][-1] == 2) for tile in getattr(image, "tile", ()))


def rawmode(image: Image.Image) -> str:
    """Return how Pillow says that the values of a file lie, before it has read them."""
    for tile in getattr(image, "tile", ()):
        args = tile[3]
        return str(args[0] if isinstance(args, tuple) and args else args)
    return ""


def to_8_bits(samples: Samples, bits: int, name: str, by: str) -> Pixels:
    """Return the upper 8 of the significant bits, as (H, W, 3) uint8.

    Args:
        samples: (H, W) or (H, W, 3).
        bits: that are significant, 8 to 16, the lowest ones.
        name: of the image.
        by: what declares the bits; empty: the gallery.

    Raises:
        ImageError: a value does not fit the bits.
    """
    largest = int(samples.max(initial=0))
    if largest >= 2**bits:
        says = f"as its {by} says" if by else "as the gallery was built for"
        advice = "correct the tag" if by else "build a gallery with more bits, for all of its images"
        raise ImageError(
            f"{name}: expected values of {bits} bits, at most {2**bits - 1}, {says}, found {largest}; {advice}"
        )
    kept = (samples >> (bits - 8)).astype(np.uint8)
    return np.repeat(kept[:, :, None], 3, axis=2) if kept.ndim == 2 else kept


def grey_samples(image: Image.Image, name: str) -> Samples:
    """Return the values of a grey image of 16 bits, which Pillow may hold in 32.

    Raises:
        ImageError: a value does not fit 16 bits.
    """
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ImageError(f"{name}: expected 8 or 16 bits a channel, found values from {values.min()} to {values.max()}")
    return values.astype(np.uint16)


def white_is_zero(image: Image.Image) -> bool:
    """Whether the values of a grey TIFF of 16 bits are those of a negative: Pillow takes them as they are."""
    return image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO


def from_white(samples: Samples, bits: int) -> Samples:
    """Make a positive of a negative; values that do not fit its bits stay as they are, to be refused."""
    largest = np.uint16(2**bits - 1)
    return samples if samples.max(initial=0) > largest else largest - samples


def colour_samples(content: bytes, format: str | None, name: str, bits: int = FULL) -> Samples:
    """Read all bits of a file with 9 to 16 of them, of which Pillow keeps 8: (H, W) or (H, W, 3), not turned.

    Args:
        content: of the file.
        format: as Pillow names it.
        name: of the image.
        bits: that are significant, the lowest ones: black is the largest value that they hold where white is 0.

    Raises:
        ImageError: a format or colours that are not supported.
    """
    if format == "TIFF":
        return _tiff_samples(content, name, bits)
    if format == "PPM":
        samples = _pnm_samples(content, name)
    elif format in ("PNG", "JPEG2000"):
        import imagecodecs

        read = imagecodecs.png_decode if format == "PNG" else imagecodecs.jpeg2k_decode
        samples = read(content)
        if samples.dtype == np.int16:  # JPEG 2000 may have signed values
            samples = (samples + np.int32(2 ** (_jpeg2000_bits(content) - 1))).astype(np.uint16)
    else:
        raise ImageError(
            f"{name}: expected PNG, TIFF, PPM or JPEG 2000, to read all 16 bits of a value, found {format}; convert it"
        )
    return _without_alpha(samples, name)


def png_bits(content: bytes, samples: Samples, chosen: int | None) -> int:
    """Return how many of the lowest bits are significant in a PNG of 16 bits, by its chunk sBIT.

    PNG scales values to the full 16 bits, and sBIT tells the precision they had before (PNG specification, 11.3.2.7):
    the values fill 16 bits. Some writers leave values of n bits as they are and say sBIT n. Such values are all below
    2^n: then the gallery's choice holds, and without one they are scaled if their lower bits are what scaling leaves.
    """
    bits = _sbit(content)
    if int(samples.max(initial=0)) >= 2**bits:
        return FULL
    if chosen is not None:
        return chosen
    spare = FULL - bits
    lower = samples & np.uint16(2**spare - 1)
    replicated = samples >> np.uint16(bits)  # 0 for all values below 2^n
    return FULL if bool((lower - replicated <= 1).all()) else bits


def has_sbit(content: bytes) -> bool:
    """Return whether a PNG of 16 bits declares fewer by its chunk sBIT."""
    return 8 < _sbit(content) < FULL


def _sbit(content: bytes) -> int:
    """Return the largest number of significant bits in a PNG's chunk sBIT; 0: it has none."""
    at = 8
    while at + 12 <= len(content):
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        if kind in (b"PLTE", b"IDAT", b"IEND"):
            return 0
        if kind == b"sBIT":
            colours = {0: 1, 4: 1}.get(content[25], 3)  # the alpha channel's comes after them
            return max(content[at + 8 : at + 8 + min(length, colours)], default=0)
        at += 12 + length
    return 0


def _tiff_depth(image: Any) -> Depth | None:
    try:
        bits = max(image.tag_v2.get(BITS_PER_SAMPLE, (1,)))
    except Exception:  # a tag that cannot be read
        return Depth() if image.mode.startswith("I") else None
    if bits <= 8:
        return None
    return Depth(bits, "BitsPerSample") if bits < FULL else _largest_sample(image.tag_v2)


def _largest_sample(tags: Any) -> Depth:
    """Return the depth that TIFF's largest sample values tell: a number of bits, if they are 2^n - 1."""
    for tag, name in ((SMAX_SAMPLE_VALUE, "SMaxSampleValue"), (MAX_SAMPLE_VALUE, "MaxSampleValue")):
        try:
            found = tags.get(tag)
            values = set(found) if isinstance(found, tuple) else {found}
            largest = int(max(values))
        except Exception:  # absent, or a tag that cannot be read
            continue
        bits = largest.bit_length()
        if values == {largest} and largest == 2**bits - 1 and 8 < bits < FULL:
            return Depth(bits, name)
    return Depth()


def tiff_page(content: bytes) -> tuple[Any, Depth, int]:
    """Open a TIFF that Pillow may not know: (tifffile's first page, depth, EXIF orientation).

    Raises:
        ValueError: it is no TIFF of 9 to 16 bits that can be read, or part of its pixels lies outside the file.
    """
    import tifffile

    page: Any = tifffile.TiffFile(io.BytesIO(content)).pages[0]
    bits = page.bitspersample
    if not isinstance(bits, int) or not 8 < bits <= FULL or page.sampleformat != 1:
        raise ValueError(f"{bits} bits a value, of format {page.sampleformat}")
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if not parts or any(size <= 0 or at + size > len(content) for at, size in parts):
        raise ValueError("part of the pixels lies outside the file")
    tags = {tag.code: tag.value for tag in page.tags}
    depth = Depth(bits, "BitsPerSample") if bits < FULL else _largest_sample(tags)
    return page, depth, int(tags.get(274, 1))


def _tiff_samples(content: bytes, name: str, bits: int) -> Samples:
    """Read the first page of a TIFF."""
    page, _, _ = tiff_page(content)
    samples = page.asarray(maxworkers=1)
    if page.planarconfig == 2 and samples.ndim == 3:  # channel by channel
        samples = np.moveaxis(samples, 0, -1)
    bands = samples.shape[2] if samples.ndim == 3 else 1
    if page.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB) or (bands > 2 and page.photometric != RGB):
        found = getattr(page.photometric, "name", page.photometric)
        raise ImageError(
            f"{name}: expected grey of {page.bitspersample} bits, or colours with the photometric interpretation RGB, "
            f"found {bands} bands with {found}; save those that are red, green and blue as RGB"
        )
    samples = _without_alpha(samples, name)
    return from_white(samples, min(bits, page.bitspersample)) if page.photometric == WHITE_IS_ZERO else samples


def _without_alpha(samples: NDArray[Any], name: str) -> Samples:
    """Return (H, W) or (H, W, 3) of an image that may have more channels."""
    if samples.ndim == 3 and samples.shape[2] in (1, 2):
        samples = samples[:, :, 0]
    if samples.dtype != np.uint16 or samples.ndim not in (2, 3):
        raise ImageError(f"{name}: expected 16-bit grey or RGB, found {samples.shape} {samples.dtype}")
    return samples if samples.ndim == 2 else samples[:, :, :3]


def _pnm_header(content: bytes) -> tuple[tuple[int, int], int, int]:
    """Return a PNM's (width, height), its maximum and where its pixels begin; a bitmap has no maximum: 1."""
    numbers, at = [], 2
    for _ in range(2 if content[1:2] in b"14" else 3):
        found = re.compile(rb"(?:\s|#[^\n\r]*[\n\r])*(\d+)").match(content, at)
        if found is None:
            return (0, 0), 1, at
        numbers.append(int(found[1]))
        at = found.end()
    return (numbers[0], numbers[1]), numbers[2] if len(numbers) == 3 else 1, at + 1


def _pnm_samples(content: bytes, name: str) -> NDArray[Any]:
    """Read a binary PPM of 16 bits."""
    (width, height), _, at = _pnm_header(content)
    if content[:2] != b"P6" or len(content) < at + 6 * width * height:
        raise ImageError(f"{name}: expected a whole binary PPM of 16 bits")
    return np.frombuffer(content, ">u2", 3 * width * height, at).reshape(height, width, 3).astype(np.uint16)


def _jpeg2000_bits(content: bytes) -> int:
    """Return the precision of a JPEG 2000's first component, from its segment SIZ."""
    at = content.find(b"\xff\x4f\xff\x51")
    return (content[at + 42] & 0x7F) + 1 if at >= 0 and at + 42 < len(content) else 8
