"""Metadata that cannot be read counts as none: pixels decode, rotation is kept where it can be, memory is bounded."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spade_faiss.errors import ImageError
from spade_faiss.images.decode import decode, decode_with_facts

RNG = np.random.default_rng(0)
PIXELS = np.repeat(np.repeat(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8), 8, axis=0), 8, axis=1)
NOISE = RNG.bytes(1_200_000)
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6
EXIF = SIDEWAYS.tobytes().removeprefix(b"Exif\0\0")


def encode(format: str, pixels: np.ndarray = PIXELS, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes, damage: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ damage)


def png(*chunks: bytes, late: bool = False) -> bytes:
    """A PNG with more chunks, after its header or after its pixels."""
    content, more = encode("PNG"), b"".join(chunks)
    at = len(content) - 12 if late else 33
    return content[:at] + more + content[at:]


PNG_CHUNKS = {
    "ICC profile of 1.2 MB": (b"iCCP", b"name\0\0" + zlib.compress(NOISE)),
    "ICC profile that is none": (b"iCCP", b"name\0\0junk"),
    "zTXt of 60 MB": (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(60_000_000))),
    "iTXt of 5 MB": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(5_000_000))),
    "tEXt of 1.2 MB": (b"tEXt", b"Comment\0" + NOISE),
    "raw profile that is none": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 4\nxyz\n")),
    "eXIf of 1.2 MB": (b"eXIf", NOISE),
    "eXIf that is none": (b"eXIf", b"junk"),
    "empty eXIf": (b"eXIf", b""),
    "short pHYs": (b"pHYs", b"\0"),
    "short gAMA": (b"gAMA", b""),
    "short acTL": (b"acTL", b"\0"),
    "empty sBIT": (b"sBIT", b""),
    "unknown chunk": (b"zzZz", NOISE),
}


@pytest.mark.parametrize("late", [False, True], ids=["before the pixels", "after them"])
@pytest.mark.parametrize("damage", [0, 1], ids=["", "wrong checksum"])
@pytest.mark.parametrize("name", PNG_CHUNKS)
def test_png(name: str, damage: int, late: bool) -> None:
    """The first two are Pillow's "Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK" (Pillow's manual,
    image file formats, PNG); a wrong checksum in an ancillary chunk is "broken PNG file" there.
    """
    kind, data = PNG_CHUNKS[name]
    assert np.array_equal(decode(png(chunk(kind, data, damage), late=late)), PIXELS)


def test_rotation_is_kept_beside_metadata_that_cannot_be_read() -> None:
    turned = np.rot90(PIXELS, -1)
    bad = chunk(b"iCCP", b"name\0\0" + zlib.compress(NOISE))
    raw = b"Raw profile type exif\0\0" + zlib.compress(f"\nexif\n{len(EXIF):8}\n{EXIF.hex()}\n".encode())
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    assert np.array_equal(decode(png(chunk(b"eXIf", EXIF))), turned)
    for good in (chunk(b"eXIf", EXIF), chunk(b"zTXt", raw), chunk(b"iTXt", xmp)):
        assert np.array_equal(decode(png(bad, good)), turned)
    assert np.array_equal(decode(png(bad, chunk(b"eXIf", EXIF, damage=1))), PIXELS)


@pytest.mark.parametrize("name", ["ICC profile of 1.2 MB", "zTXt of 60 MB", "iTXt of 5 MB"])
def test_bombs_are_not_inflated(name: str) -> None:
    content = png(chunk(*PNG_CHUNKS[name]))
    tracemalloc.start()
    try:
        decode(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * 2**20


@pytest.mark.parametrize("name", PNG_CHUNKS)
def test_damaged_pixels_beside_bad_metadata_are_refused(name: str) -> None:
    content = png(chunk(*PNG_CHUNKS[name]))
    at = content.rindex(b"IDAT")
    for damaged in (content[:-40], content[: at + 4] + bytes(20) + content[at + 24 :], content[:at]):
        with pytest.raises(ImageError):
            decode(damaged)


def segment(marker: int, data: bytes, length: int | None = None) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2 if length is None else length) + data


JPEG_SEGMENTS = {
    "Exif that is none": segment(0xE1, b"Exif\0\0" + b"junk" * 50),
    "Exif cut short": segment(0xE1, b"Exif\0\0" + EXIF[: len(EXIF) // 2]),
    "Exif whose length is too small": segment(0xE1, b"Exif\0\0" + b"A" * 50, 20),
    "XMP that is none": segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<\xff\xfe tiff:Orientation="z'),
    "ICC profile, ninth part of one": segment(0xE2, b"ICC_PROFILE\0\x09\x01junk"),
    "MPF that is none": segment(0xE2, b"MPF\0junk"),
    "MPF of many": segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 30),
    "Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff"),
}


@pytest.mark.parametrize("name", JPEG_SEGMENTS)
def test_jpeg(name: str) -> None:
    content = encode("JPEG", quality=95)
    assert np.array_equal(decode(content[:2] + JPEG_SEGMENTS[name] + content[2:]), decode(content))


@pytest.mark.parametrize("lossless", [False, True])
def test_webp(lossless: bool) -> None:
    expected = decode(encode("WEBP", lossless=lossless))
    assert np.array_equal(decode(encode("WEBP", lossless=lossless, exif=b"junk" * 3)), expected)
    assert np.array_equal(decode(encode("WEBP", lossless=lossless, icc_profile=b"junk", xmp=b"\xff\xfe")), expected)
    turned = encode("WEBP", lossless=lossless, exif=SIDEWAYS)
    assert np.array_equal(decode(turned), np.rot90(expected, -1))
    at = turned.index(b"EXIF") + 4
    for length in (10, 2**31 - 1):
        wrong = turned[:at] + struct.pack("<I", length) + turned[at + 4 :]
        assert np.array_equal(decode(wrong), expected)


TIFF_ENTRIES = {  # tag, type, count, value
    "resolution of an unknown type": (282, 99, 1, 8),
    "resolution unit that is text": (296, 2, 4, 0x41414141),
    "ICC profile past the end": (34675, 7, 1000, 0xFFFFFFF0),
    "Exif past the end": (34665, 4, 1, 0xFFFFFFF0),
    "Exif that is none": (34665, 4, 1, 9),
    "Exif that is text": (34665, 2, 4, 0x41414141),
    "GPS that is text": (34853, 2, 4, 0x41414141),
    "orientation that is text": (274, 2, 4, 0x41414141),
    "description of 4 GiB": (270, 2, 0xFFFFFFFF, 8),
    "XMP of something else": (700, 1, 100000, 8),
    "sub-pages past the end": (330, 4, 4, 0xFF),
    "MaxSampleValue that is text": (281, 2, 4, 0x41414141),
}


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("name", TIFF_ENTRIES)
def test_tiff(name: str, compression: str | None) -> None:
    content = encode("TIFF", compression=compression)
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    entries = [content[start + 2 + 12 * number : start + 14 + 12 * number] for number in range(count)]
    entries = sorted([*entries, struct.pack("<HHII", *TIFF_ENTRIES[name])], key=lambda entry: entry[:2][::-1])
    end = len(content) + len(content) % 2
    table = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    moved = content[:4] + struct.pack("<I", end) + content[8:].ljust(end - 8, b"\0") + table
    assert np.array_equal(decode(moved), PIXELS)


# --- more than one picture -------------------------------------------------------------------------------------------

OTHER = Image.fromarray(255 - PIXELS)


@pytest.mark.parametrize("format", ["TIFF", "PNG", "GIF", "WEBP"])
def test_files_of_several_frames_are_known(format: str) -> None:
    content = encode(format, save_all=True, append_images=[OTHER])
    assert decode_with_facts(content).facts.more_frames
    assert not decode_with_facts(encode(format)).facts.more_frames


def test_previews_are_no_frames() -> None:
    """A camera's MPO embeds previews (CIPA DC-007), a TIFF pyramid smaller versions (TIFF 6.0, NewSubfileType)."""
    assert not decode_with_facts(encode("MPO", save_all=True, append_images=[OTHER.resize((20, 20))])).facts.more_frames
    tifffile = pytest.importorskip("tifffile")
    for smaller, more in ((1, False), (0, True)):
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer) as writer:
            writer.write(PIXELS, photometric="rgb")
            writer.write(np.ascontiguousarray(PIXELS[::2, ::2]), photometric="rgb", subfiletype=smaller)
        found = decode_with_facts(buffer.getvalue())
        assert found.facts.more_frames == more
        assert np.array_equal(found.pixels, PIXELS)
