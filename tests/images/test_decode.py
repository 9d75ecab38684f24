"""Decoding images: every kind of file that a folder of pictures may hold, what is refused, and any bytes at all."""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spade_faiss.errors import ImageError
from spade_faiss.images.decode import decode, read_file
from spade_faiss.images.sources import find_images
from tests.helpers.permissions import permissions_count
from tests.helpers.processes import run

RNG = np.random.default_rng(0)
UPRIGHT = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
GREY_16 = RNG.integers(0, 65536, (12, 20)).astype(np.uint16)


def encode(image: Any, format: str = "PNG", **options: Any) -> bytes:
    """A file's bytes, of pixels or of a PIL image."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(UPRIGHT) if content is None else content)
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, and holds one byte of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def bmp_header(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 58, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def refusal(path: Path) -> str:
    """What decode says against a file: one line that starts with its path; returned without the path."""
    with pytest.raises(ImageError) as caught:
        decode(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


# --- decoding: what is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_rgb_comes_back_as_it_was(tmp_path: Path, format: str) -> None:
    pixels = decode(write(tmp_path / "image", encode(UPRIGHT, format)))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert np.array_equal(pixels, UPRIGHT)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_formats(format: str) -> None:
    colour = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    pixels = decode(encode(colour, format, quality=95))
    assert pixels.shape == colour.shape
    assert np.abs(pixels.astype(int) - colour).max() <= 3


def test_all_ways_to_give_an_image_agree(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png")
    for given_as in (path, str(path), path.read_bytes(), Image.fromarray(UPRIGHT), UPRIGHT, UPRIGHT[::-1][::-1]):
        assert np.array_equal(decode(given_as), UPRIGHT)
    with Image.open(path) as opened:  # not loaded yet
        assert np.array_equal(decode(opened), UPRIGHT)


def test_grey_array_becomes_rgb() -> None:
    grey = UPRIGHT[..., 0]
    assert np.array_equal(decode(grey), np.stack([grey] * 3, axis=-1))


def test_one_bit() -> None:
    bits = UPRIGHT[..., 0] > 127
    assert np.array_equal(decode(encode(Image.fromarray(bits)))[..., 1], bits * np.uint8(255))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(encode(GREY_16, "PNG"), id="png"),
        pytest.param(encode(GREY_16, "TIFF"), id="tiff"),
        pytest.param(encode(Image.frombytes("I;16B", (20, 12), GREY_16.astype(">u2").tobytes()), "TIFF"), id="tiff-be"),
        pytest.param(encode(GREY_16, "PPM"), id="pgm"),  # which Pillow opens as 32-bit
    ],
)
def test_16_bit_keeps_the_upper_8_bits(content: bytes) -> None:
    expected = (GREY_16 // 256).astype(np.uint8)
    assert np.array_equal(decode(content), np.stack([expected] * 3, axis=-1))


def test_16_bit_is_not_stretched() -> None:
    assert (decode(encode(np.full((9, 9), 1000, np.uint16))) == 3).all()  # a dark image stays dark


@pytest.mark.parametrize(
    "transparency", [None, 5, bytes(range(0, 160, 10))], ids=["opaque", "one-transparent", "alpha-per-colour"]
)
def test_palette(transparency: int | bytes | None) -> None:
    palette = RNG.integers(0, 256, (16, 3), dtype=np.uint8)
    indices = RNG.integers(0, 16, (12, 20), dtype=np.uint8)
    image = Image.fromarray(indices).convert("L")
    image.putpalette(palette.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    assert np.array_equal(decode(encode(image, "PNG", **options)), palette[indices])


def test_cmyk() -> None:
    inks = np.zeros((8, 40, 4), np.uint8)  # paper, cyan, magenta, yellow, black: 8 pixels each
    for number in range(4):
        inks[:, 8 * (number + 1) : 8 * (number + 2), number] = 255
    image = Image.frombytes("CMYK", (40, 8), inks.tobytes())
    expected = np.array([(255, 255, 255), (0, 255, 255), (255, 0, 255), (255, 255, 0), (0, 0, 0)])
    assert np.array_equal(decode(encode(image, "TIFF"))[4, 4::8], expected)
    jpeg = decode(encode(image, "JPEG", quality=100, subsampling=0))[4, 4::8]
    assert np.abs(jpeg.astype(int) - expected).max() <= 8


def test_alpha_is_dropped_not_blended() -> None:
    alpha = RNG.integers(0, 256, (12, 20, 1), dtype=np.uint8)
    alpha[:6] = 0
    assert np.array_equal(decode(encode(np.concatenate([UPRIGHT, alpha], axis=2))), UPRIGHT)
    grey = UPRIGHT[..., :1]
    grey_alpha = Image.frombytes("LA", (20, 12), np.concatenate([grey, alpha], axis=2).tobytes())
    assert np.array_equal(decode(encode(grey_alpha)), np.repeat(grey, 3, axis=2))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize(("orientation", "quarter_turns"), [(1, 0), (3, 2), (6, 1), (8, -1)])
def test_exif_rotation(format: str, orientation: int, quarter_turns: int) -> None:
    smooth = np.zeros((24, 40, 3), np.uint8)  # which JPEG keeps well
    smooth[..., 0], smooth[..., 1] = np.arange(24)[:, None] * 10, np.arange(40) * 6
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(np.rot90(smooth, quarter_turns))
    content = encode(stored, format, exif=exif, **({"quality": 100, "subsampling": 0} if format == "JPEG" else {}))
    with Image.open(io.BytesIO(content)) as opened:
        for pixels in (decode(content), decode(opened)):
            assert pixels.shape == smooth.shape
            assert np.abs(pixels.astype(int) - smooth).max() <= (4 if format == "JPEG" else 0)


def test_exif_rotation_of_16_bit() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(np.ascontiguousarray(np.rot90(GREY_16, 1)), "TIFF", exif=exif)
    assert np.array_equal(decode(content)[..., 0], (GREY_16 // 256).astype(np.uint8))


def test_first_of_several_frames() -> None:
    other = Image.fromarray(255 - UPRIGHT)
    assert np.array_equal(decode(encode(UPRIGHT, "TIFF", save_all=True, append_images=[other])), UPRIGHT)


# --- decoding: what is refused ---------------------------------------------------------------------------------------


def test_folder_named_like_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    assert "cannot be read" in refusal(tmp_path / "a.png")


def test_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "nothing.png")
    (image,) = find_images([tmp_path])  # listed, so that a build can name it
    assert "cannot be read: No such file" in refusal(image.path)


@pytest.mark.skipif(os.name != "posix", reason="permissions are set as on POSIX")
def test_no_permission(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png")
    path.chmod(0)
    with permissions_count():
        assert "cannot be read: Permission denied" in refusal(path)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "BMP", "WEBP"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_truncated(tmp_path: Path, format: str, kept: float) -> None:
    content = encode(UPRIGHT, format)
    said = refusal(write(tmp_path / "a.png", content[: int(len(content) * kept)]))
    assert "damaged or cut short" in said or "no decoder knows" in said  # a header of too few bytes is no header


def test_zero_bytes(tmp_path: Path) -> None:
    assert "found an empty file (0 bytes)" in refusal(write(tmp_path / "a.png", b""))
    with pytest.raises(ImageError, match="expected an image"):
        decode(b"")


def test_text_named_png(tmp_path: Path) -> None:
    assert "something that no decoder knows" in refusal(write(tmp_path / "a.png", b"not an image\nat all\n"))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 100), (100, 7)])
def test_too_small(tmp_path: Path, width: int, height: int) -> None:
    content = encode(np.zeros((height, width, 3), np.uint8))
    said = refusal(write(tmp_path / "a.png", content))
    assert said == f"expected at least 8 x 8 pixels, found {width} x {height}"


def test_smallest_is_read() -> None:
    assert decode(np.zeros((8, 8, 3), np.uint8)).shape == (8, 8, 3)


@pytest.mark.parametrize("header", [png_header, bmp_header])
@pytest.mark.parametrize("side", [10_000, 50_000])  # Pillow only warns of the first, which is less than twice its limit
def test_decompression_bomb(tmp_path: Path, header: Any, side: int) -> None:
    # Decoding would say that the file is cut short: that the limit is named shows that it never began.
    said = refusal(write(tmp_path / "a.png", header(side, side)))
    assert f"expected at most {Image.MAX_IMAGE_PIXELS} pixels" in said
    assert "PIL.Image.MAX_IMAGE_PIXELS" in said


def test_limit_of_pixels_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = UPRIGHT.shape[0] * UPRIGHT.shape[1]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit - 1)
    for given_as in (encode(UPRIGHT), Image.fromarray(UPRIGHT)):
        with pytest.raises(ImageError, match=f"expected at most {limit - 1} pixels"):
            decode(given_as)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert np.array_equal(decode(encode(UPRIGHT)), UPRIGHT)


def test_floating_point(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", encode(np.full((9, 9), 0.5, np.float32), "TIFF"))
    assert "found floating point; convert it" in refusal(path)


@pytest.mark.parametrize("value", [-1, 65536])
def test_32_bit_beyond_16(tmp_path: Path, value: int) -> None:
    path = write(tmp_path / "a.tif", encode(np.full((9, 9), value, np.int32), "TIFF"))
    assert f"found values from {value} to {value}" in refusal(path)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((9, 9, 3), np.float32),
        np.zeros((9, 9, 3), np.uint16),
        np.zeros((9, 9, 4), np.uint8),
        np.zeros((9, 9, 1), np.uint8),
        np.zeros((3, 9, 9), np.uint8),
        np.zeros((2, 9, 9, 3), np.uint8),
        np.zeros(9, np.uint8),
        np.zeros((), np.uint8),
    ],
    ids=lambda array: f"{array.shape}-{array.dtype}",
)
def test_arrays_that_are_no_images(array: np.ndarray) -> None:
    with pytest.raises(ImageError) as caught:
        decode(array, name="frame 7")
    assert (
        str(caught.value) == f"frame 7: expected an (H, W, 3) or (H, W) uint8 array, found {array.shape} {array.dtype}"
    )


def test_empty_array() -> None:
    with pytest.raises(ImageError, match="found 9 x 0"):
        decode(np.zeros((0, 9, 3), np.uint8))


def test_name_of_what_has_no_path() -> None:
    for given_as in (b"text", Image.new("RGB", (1, 1)), np.zeros((1, 1, 3), np.uint8)):
        with pytest.raises(ImageError, match=r"^frame 7: "):
            decode(given_as, name="frame 7")


def test_read_file_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        read_file(tmp_path / "nothing.png")
    assert str(caught.value) == f"{tmp_path / 'nothing.png'}: cannot be read: No such file or directory"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such a name")
def test_name_that_is_not_utf_8(tmp_path: Path) -> None:
    path = write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")))
    with pytest.raises(ImageError, match="expected a name in UTF-8") as caught:
        decode(path)
    assert str(caught.value).isprintable()


@pytest.mark.slow
def test_nothing_is_printed_but_a_line_for_each_image(tmp_path: Path) -> None:
    """Pillow warns of several kinds of file; a build names them in lines of its own."""
    palette = Image.fromarray(UPRIGHT).quantize(16)
    write(tmp_path / "in" / "a.png", encode(palette, "PNG", transparency=bytes(range(16))))
    write(tmp_path / "in" / "b.png", png_header(10_000, 10_000))
    tiff = encode(UPRIGHT, "TIFF")
    for length in range(10, 200, 12):
        write(tmp_path / "in" / f"c{length}.tif", tiff[:length])
    program = "from spade_faiss.cli.main import main; main()"
    done = run(program, "build", tmp_path / "g", tmp_path / "in", "--extractor", "toy", "--quiet")
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    assert len(lines) == 17
    assert all(line.startswith(f"spade-faiss: skipped: {tmp_path / 'in'}") for line in lines)


# --- decoding: anything at all ---------------------------------------------------------------------------------------


EXIF = Image.Exif()
EXIF[0x0112] = 6
FILES = [
    encode(UPRIGHT, "PNG"),
    encode(UPRIGHT, "JPEG", exif=EXIF),
    encode(UPRIGHT, "TIFF"),
    encode(UPRIGHT, "TIFF", compression="tiff_lzw"),
    encode(UPRIGHT, "BMP"),
    encode(UPRIGHT, "WEBP"),
    encode(UPRIGHT, "PPM"),
    encode(GREY_16, "PNG"),
    encode(Image.fromarray(UPRIGHT).quantize(16), "PNG", transparency=3),
    encode(Image.fromarray(UPRIGHT).convert("CMYK"), "JPEG"),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A small image file with some bytes changed, and perhaps its end cut off."""
    content = bytearray(draw(st.sampled_from(FILES)))
    headers = st.integers(0, min(200, len(content)) - 1)  # where a change does most
    for _ in range(draw(st.integers(0, 6))):
        content[draw(headers | st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.just(len(content)) | st.integers(0, len(content)))])


@pytest.mark.slow
@given(damaged() | st.binary(max_size=64))
@settings(max_examples=400)
def test_any_bytes_decode_or_raise_image_error(content: bytes) -> None:
    said = "fuzz: "
    try:
        pixels = decode(content, name="fuzz")
    except ImageError as error:
        said = str(error)
    else:
        assert pixels.dtype == np.uint8
        assert (pixels.ndim, pixels.shape[2]) == (3, 3)
    assert said.startswith("fuzz: ")
    assert "\n" not in said
