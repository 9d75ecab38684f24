"""Metadata of image files: used where it can be read, passed over where it cannot. Pixels never depend on it.

Pillow refuses whole files for an ICC profile that is too large, or for a wrong checksum of a comment. What it refuses
is offered to it again without metadata.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from PIL import Image

LARGEST_TEXT = 2**20  # bytes of a PNG's compressed text, inflated; Pillow's limit
ORIENTATION = 0x0112  # EXIF tag
NEW_SUBFILE_TYPE = 254  # TIFF tag
NO_PICTURE = 0b101  # its bits of a page that is a smaller version of another one, or the mask of one

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
TURNS = {  # EXIF orientation -> what makes an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF tags that pixels depend on: sizes, samples, compression, strips, tiles, palette, tables, orientation.
TIFF_TAGS = {
    254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 281, 284, 292, 293, 317, 320, 322, 323, 324, 325,
    332, 338, 339, 341, 347, 529, 530, 531, 532,
}  # fmt: skip
ORIENTING_TEXT = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1")  # keywords of PNG text


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return what makes an image upright; None: nothing, or its metadata cannot be read."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # broken EXIF and XMP raise nearly anything: SyntaxError, struct.error, TypeError
        return None


def has_more_frames(image: Image.Image) -> bool:
    """Return whether a file holds more pictures than its first: pages of a TIFF, frames of an animation.

    Previews and smaller versions of the first picture do not count: a camera's MPO, pages of a TIFF pyramid. The image
    is left at its first frame.
    """
    if image.format in ("MPO", None) or not getattr(image, "is_animated", False):
        return False
    if image.format != "TIFF":
        return True
    try:
        for page in range(1, getattr(image, "n_frames", 1)):
            image.seek(page)
            if not int(image.tag_v2.get(NEW_SUBFILE_TYPE, 0)) & NO_PICTURE:  # type: ignore[attr-defined]
                return True
    except Exception:  # the list of pages is damaged; the first page may be whole
        return False
    finally:
        image.seek(0)
    return False


def without_metadata(content: bytes) -> Iterator[bytes]:
    """Yield an image file with less and less metadata: first what rotates it is kept, then nothing."""
    bare = _BARE.get(_kind(content))
    if bare is None:
        return
    for keep_orientation in (True, False):
        try:
            yield bare(content, keep_orientation)
        except (struct.error, IndexError, ValueError):  # damaged in its structure
            return


def _kind(content: bytes) -> str:
    if content.startswith(PNG):
        return "PNG"
    if content.startswith(JPEG):
        return "JPEG"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    return "TIFF" if content[:4] in (b"II*\0", b"MM\0*") else ""


def _bare_png(content: bytes, keep_orientation: bool) -> bytes:
    """Keep critical chunks, sBIT, and those that may hold an orientation. Transparency is not used."""
    parts, at = [PNG], len(PNG)
    while at + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        chunk = content[at : at + 12 + length]
        if kind[0] & 32 == 0 or (keep_orientation and _is_of_use(kind, chunk)):  # a small letter: ancillary
            parts.append(chunk)
        at += 12 + length
        if kind == b"IEND":
            break
    return b"".join(parts)


def _is_of_use(kind: bytes, chunk: bytes) -> bool:
    """Return whether an ancillary chunk of a PNG may decide over pixels, and is whole and safe to read."""
    if len(chunk) < 12:
        return False
    data = chunk[8:-4]
    if struct.unpack(">I", chunk[-4:])[0] != zlib.crc32(chunk[4:-4]):
        return False
    keyword, _, text = data.partition(b"\0")
    if kind in (b"eXIf", b"sBIT"):
        return True
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or keyword not in ORIENTING_TEXT or len(data) > LARGEST_TEXT:
        return False
    if kind == b"tEXt":
        return True
    if kind == b"iTXt":
        if text[:1] == b"\0":
            return True
        text = text[2:].split(b"\0", 2)[-1]
    else:
        text = text[1:]
    try:
        reader = zlib.decompressobj()
        reader.decompress(text, LARGEST_TEXT - 1)
    except zlib.error:
        return False
    return reader.eof


def _bare_jpeg(content: bytes, keep_orientation: bool) -> bytes:
    """Keep what decoding needs: JFIF (APP0) and Adobe (APP14), which tell the colours, and all that is no APPn."""
    parts, at = [content[:2]], 2
    while True:
        at = content.index(b"\xff", at)  # bytes between segments are passed over, as libjpeg does
        marker = content[at + 1]
        if marker in (0x00, 0xFF):
            at += 1
            continue
        if marker in (0xDA, 0xD9):  # the scan, where pixels begin
            return b"".join([*parts, content[at:]])
        if 0xD0 <= marker <= 0xD8 or marker == 0x01:  # no length
            at += 2
            continue
        end = at + 2 + struct.unpack_from(">H", content, at + 2)[0]
        oriented = keep_orientation and marker == 0xE1 and content[at + 4 : at + 8] == b"Exif"
        if not (0xE1 <= marker <= 0xEF or marker == 0xFE) or marker == 0xEE or oriented:
            parts.append(content[at:end])
        at = end


def _bare_webp(content: bytes, keep_orientation: bool) -> bytes:
    """Keep pictures; the flags of the others are cleared."""
    parts, at = [], 12
    while at + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, at)
        chunk = content[at : at + 8 + length + length % 2]
        if kind == b"VP8X":
            flags = chunk[8] & (0b00011010 if keep_orientation else 0b00010010)  # alpha, EXIF, animation
            parts.append(chunk[:8] + bytes([flags]) + chunk[9:])
        elif kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF") or (keep_orientation and kind == b"EXIF"):
            parts.append(chunk)
        at += 8 + length + length % 2
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _bare_tiff(content: bytes, keep_orientation: bool) -> bytes:
    """Keep the first page, and of its tags those that pixels depend on."""
    order = "<" if content[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    entries = [content[start + 2 + 12 * number : start + 14 + 12 * number] for number in range(count)]
    wanted = TIFF_TAGS if keep_orientation else TIFF_TAGS - {274, 281, 341}
    kept = [entry for entry in entries if len(entry) == 12 and struct.unpack(f"{order}H", entry[:2])[0] in wanted]
    table = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return content[:start] + table + content[start + len(table) :]


_BARE = {"PNG": _bare_png, "JPEG": _bare_jpeg, "WEBP": _bare_webp, "TIFF": _bare_tiff}
