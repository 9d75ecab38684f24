"""Finding, decoding and viewing images: every kind of file that a folder of pictures may hold."""

from __future__ import annotations

import gc
import io
import itertools
import os
import struct
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Iterator
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
from spade_faiss.images.view import View
from spade_faiss.system.prefetch import batched, one_ahead, read_ahead
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


def keys(*sources: Path) -> list[str]:
    return [image.key for image in find_images(sources)]


# --- names -----------------------------------------------------------------------------------------------------------


def test_folder_is_searched_to_any_depth_in_the_order_of_its_keys(tmp_path: Path) -> None:
    expected = ["a.png", "b/c/d/e.png", "b/x.png", "b2.png", "c.png"]
    for key in reversed(expected):
        write(tmp_path / key)
    assert keys(tmp_path) == expected
    assert [image.path for image in find_images([tmp_path])] == [tmp_path / key for key in expected]


def test_hidden_files_and_other_suffixes_are_passed_over(tmp_path: Path) -> None:
    for name in ("a.png", ".hidden.png", ".cache/b.png", "notes.txt", "png", "c.png.bak", "d"):
        write(tmp_path / name)
    assert keys(tmp_path) == ["a.png"]


def test_hidden_source_is_searched(tmp_path: Path) -> None:
    write(tmp_path / ".data/a.png")
    assert keys(tmp_path / ".data") == ["a.png"]


def test_case_of_the_suffix_does_not_matter(tmp_path: Path) -> None:
    names = ["A.JPG", "b.Jpeg", "c.PNG", "d.TIF", "e.tiff", "f.BMP", "g.webp", "h.pgm", "i.PPM"]
    for name in names:
        write(tmp_path / name)
    assert keys(tmp_path) == names


@pytest.mark.parametrize("name", ["one.png", "no suffix", ".hidden.png"])
def test_a_file_named_by_itself_is_taken_whatever_its_name(tmp_path: Path, name: str) -> None:
    assert keys(write(tmp_path / "folder" / name)) == [name]


def test_spaces_and_letters_outside_ascii(tmp_path: Path) -> None:
    path = write(tmp_path / "größe 1" / "плитка 磁瓦 é.png")
    (image,) = find_images([tmp_path])
    assert (image.path, image.key) == (path, "größe 1/плитка 磁瓦 é.png")
    assert np.array_equal(decode(image.path), UPRIGHT)


def test_sources_keep_their_order(tmp_path: Path) -> None:
    write(tmp_path / "z/1.png")
    write(tmp_path / "a/2.png")
    assert keys(tmp_path / "z", tmp_path / "a") == ["1.png", "2.png"]


def test_same_key_from_two_sources_becomes_the_path_from_the_nearest_common_folder(tmp_path: Path) -> None:
    write(tmp_path / "a/part/1.png")
    write(tmp_path / "b/part/1.png")
    assert keys(tmp_path / "a", tmp_path / "b") == ["a/part/1.png", "b/part/1.png"]


def test_missing_source(tmp_path: Path) -> None:
    missing = tmp_path / "not there"
    with pytest.raises(ImageError, match="found nothing there") as caught:
        find_images([write(tmp_path / "a.png"), missing])
    assert str(caught.value).startswith(f"{missing}: ")


def test_folder_without_images(tmp_path: Path) -> None:
    write(tmp_path / "empty/readme.txt")
    write(tmp_path / "full/a.png")
    with pytest.raises(ImageError, match=r"expected a folder with images \(\.bmp .*, found none") as caught:
        find_images([tmp_path / "full", tmp_path / "empty"])
    assert str(caught.value).startswith(f"{tmp_path / 'empty'}: ")


def test_loops_of_links_end(tmp_path: Path) -> None:
    write(tmp_path / "source/a/1.png")
    (tmp_path / "source/a/self").symlink_to(tmp_path / "source/a", target_is_directory=True)
    (tmp_path / "source/a/up").symlink_to(tmp_path / "source", target_is_directory=True)
    (tmp_path / "source/dead").symlink_to(tmp_path / "source/dead")
    assert keys(tmp_path / "source") == ["a/1.png"]


def test_folders_that_link_to_each_other(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        write(tmp_path / one / f"{one}.png")
        (tmp_path / one / "link").symlink_to(tmp_path / other, target_is_directory=True)
    assert {"a/a.png", "b/b.png"} <= set(keys(tmp_path))  # and it ends


def test_linked_folders_and_files_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/1.png")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "source/2.png").symlink_to(tmp_path / "elsewhere/1.png")
    assert keys(tmp_path / "source") == ["2.png", "link/1.png"]


def test_link_to_a_folder_beside_it_does_not_hide_that_folder(tmp_path: Path) -> None:
    # File systems list in any order: twelve pairs, so that some link comes before its folder.
    folders = [f"folder {number}" for number in range(12)]
    for number, folder in enumerate(folders):
        write(tmp_path / folder / "1.png")
        (tmp_path / f"link {number}").symlink_to(tmp_path / folder, target_is_directory=True)
    assert {f"{folder}/1.png" for folder in folders} <= set(keys(tmp_path))


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


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", lambda: 0)() == 0, reason="root may read every file")
def test_no_permission(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png")
    path.chmod(0)
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


# --- view ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [(300, 200), (33, 57), (256, 256), (8, 999)])
@pytest.mark.parametrize("view", [View((256, 256), (224, 224)), View((64, 96), (33, 95)), View((50, 40), (50, 40))])
def test_view_is_pillows_resize_and_crop(view: View, image_size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*image_size, 3), dtype=np.uint8)
    (top, left), (height, width) = view.offset, view.crop
    whole = Image.fromarray(pixels).resize((view.resized[1], view.resized[0]), Image.Resampling.BILINEAR)
    seen = view.apply(pixels)
    assert np.array_equal(seen, np.asarray(whole.crop((left, top, left + width, top + height))))
    assert seen.flags.c_contiguous


def test_view_centres_its_crop() -> None:
    assert View((256, 256), (224, 224)).offset == (16, 16)
    assert View((100, 61), (90, 40)).offset == (5, 10)  # an odd margin has the larger half below and to the right
    marked = np.zeros((100, 61, 3), np.uint8)
    marked[5, 10] = 255
    assert View((100, 61), (90, 40)).apply(marked)[0, 0, 0] == 255


def test_view_averages_what_it_shrinks() -> None:
    checkered = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(255)  # sampling would give all black or all white
    seen = View((8, 8), (8, 8)).apply(np.repeat(checkered[..., None], 3, axis=2).astype(np.uint8))
    assert np.abs(seen[1:-1, 1:-1].astype(int) - 127).max() <= 4


@pytest.mark.parametrize("image_size", [(1, 1), (8, 9), (224, 224), (1080, 1920), (333, 7)])
@pytest.mark.parametrize("side", [32, 224])
def test_region_of_a_whole_image(image_size: tuple[int, int], side: int) -> None:
    assert View((side, side), (side, side)).region(image_size) == (0, 0, image_size[1], image_size[0])


@pytest.mark.parametrize(
    ("image_size", "expected"),
    [
        ((256, 256), (16, 16, 240, 240)),
        ((512, 1024), (64, 32, 960, 480)),
        ((128, 64), (4, 8, 60, 120)),
        # Centres at (i + 0.5) 256 / 100 of the resized image: the first from 16 on is 16.64 (i = 6), the last below
        # 240 is 239.36 (i = 93).
        ((100, 100), (6, 6, 94, 94)),
    ],
)
def test_region_of_the_papers_crop(image_size: tuple[int, int], expected: tuple[int, int, int, int]) -> None:
    assert View((256, 256), (224, 224)).region(image_size) == expected


def test_region_of_odd_margins() -> None:
    # Height 101 of 101: rows 20 to 80. Width 51 of 102: a crop from column 10.5 to 30.5 of the image's own pixels,
    # whose first centre is that of column 10.
    assert View((101, 102), (60, 40)).region((101, 51)) == (15, 20, 35, 80)


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
)
def test_region_holds_the_pixels_whose_centres_were_seen(
    image_size: tuple[int, int], resized: tuple[int, int], crop: tuple[int, int]
) -> None:
    view = View(resized, (min(crop[0], resized[0]), min(crop[1], resized[1])))
    left, top, right, bottom = view.region(image_size)
    for side, start, stop, axis in ((image_size[0], top, bottom, 0), (image_size[1], left, right, 1)):
        assert 0 <= start <= stop <= side
        for pixel in range(side):
            # In integers: twice `side` times the centre's distance from the crop's edge.
            centre = (2 * pixel + 1) * view.resized[axis] - 2 * side * view.offset[axis]
            assert (start <= pixel < stop) == (0 <= centre < 2 * side * view.crop[axis])


def test_region_of_an_image_too_small_to_be_seen() -> None:
    left, top, right, bottom = View((100, 100), (10, 10)).region((2, 2))  # centres at 25 and 75, crop from 45 to 55
    assert left == right <= 2
    assert top == bottom <= 2


# --- cells of a grid -------------------------------------------------------------------------------------------------

PAPER = View((256, 256), (224, 224))


def test_cell_box_with_a_crop_worked_by_hand() -> None:
    # 224 px of crop begin at 16 px of 256. A cell of 56 is 4 px of them: 8 px of 512 rows, 16 px of 1024 columns.
    size, grid = (512, 1024), (56, 56)
    assert PAPER.cell_box(size, grid, 0, 0) == (64, 32, 80, 40)
    assert PAPER.cell_box(size, grid, 55, 1) == (80, 472, 96, 480)
    assert PAPER.cell_box(size, grid, 2, 3, rows=4, columns=2) == (112, 48, 144, 80)


def test_cells_of_a_grid_of_other_proportions() -> None:
    view = View((100, 60), (90, 40))  # offset (5, 10)
    assert view.cell_box((200, 30), (9, 20), 1, 2) == pytest.approx((7, 30, 8, 50))


@pytest.mark.parametrize("view", [PAPER, View((224, 224), (224, 224)), View((101, 102), (60, 40))])
@pytest.mark.parametrize("image_size", [(61, 300), (224, 224), (97, 53)])
def test_all_cells_together_are_the_region(view: View, image_size: tuple[int, int]) -> None:
    left, top, right, bottom = view.cell_box(image_size, (14, 28), 0, 0, rows=14, columns=28)
    x0, y0, x1, y1 = view.region(image_size)  # of whole pixels, whose centres are inside
    assert np.abs(np.subtract((left, top, right, bottom), (x0, y0, x1, y1))).max() <= 0.5


@pytest.mark.parametrize("view", [PAPER, View((101, 102), (60, 40))])
def test_cell_at_is_the_cell_whose_box_holds_the_pixel(view: View, rng: np.random.Generator) -> None:
    size, grid = (333, 214), (14, 9)
    x0, y0, x1, y1 = view.region(size)
    for _ in range(50):
        y, x = int(rng.integers(y0, y1)), int(rng.integers(x0, x1))
        left, top, right, bottom = view.cell_box(size, grid, *view.cell_at(size, grid, y, x))
        assert left <= x + 0.5 < right
        assert top <= y + 0.5 < bottom


def test_cell_at_of_a_pixel_that_was_cropped_is_the_nearest() -> None:
    assert PAPER.cell_at((256, 256), (56, 56), 0, 128) == (0, 28)
    assert PAPER.cell_at((256, 256), (56, 56), 255, 255) == (55, 55)


# --- reading ahead ---------------------------------------------------------------------------------------------------


def test_read_ahead_keeps_the_order() -> None:
    def slow_at_first(item: int) -> int:
        time.sleep(0.02 if item % 4 == 0 else 0)
        return item * item

    assert list(read_ahead(range(40), slow_at_first, workers=4, ahead=8)) == [item * item for item in range(40)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_read_ahead_of_fewer_items_than_it_reads_ahead(count: int) -> None:
    assert list(read_ahead(range(count), str, workers=4, ahead=32)) == [str(item) for item in range(count)]


def test_read_ahead_runs_at_the_same_time() -> None:
    barrier = threading.Barrier(3)  # nobody passes unless three are there
    assert len(list(read_ahead(range(6), lambda _: barrier.wait(timeout=10), workers=3, ahead=3))) == 6


def test_read_ahead_is_bounded() -> None:
    taken = 0

    def count() -> Iterator[int]:
        nonlocal taken
        for item in itertools.count():
            taken += 1
            yield item

    results = read_ahead(count(), lambda item: item, workers=2, ahead=5)
    for number, result in enumerate(itertools.islice(results, 30)):
        assert result == number
        assert taken <= number + 1 + 5  # those handed out, and `ahead` more
    results.close()  # type: ignore[attr-defined]


def test_read_ahead_raises_at_the_items_turn() -> None:
    def fail_at_3(item: int) -> int:
        if item == 3:
            raise ImageError("item 3: no image")
        time.sleep(0.01)  # so that the failure is there long before its turn
        return item

    results = read_ahead(range(100), fail_at_3, workers=4, ahead=8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ImageError, match="item 3"):
        next(results)


def test_read_ahead_closed_early_does_not_wait_for_the_rest() -> None:
    started = []

    def slow(item: int) -> int:
        started.append(item)
        time.sleep(0.05)
        return item

    results = read_ahead(itertools.count(), slow, workers=2, ahead=200)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert len(started) < 20  # all 200 would take five seconds


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (2, [[0, 1]]), (3, [[0, 1, 2]]), (7, [[0, 1, 2], [3, 4, 5], [6]])]
)
def test_batched(count: int, expected: list[list[int]]) -> None:
    assert list(batched(iter(range(count)), 3)) == expected


def test_batched_is_lazy() -> None:
    assert next(batched(itertools.count(), 2)) == [0, 1]


def failing_at(bad: int) -> Iterator[int]:
    for item in itertools.count():
        if item == bad:
            raise ImageError(f"item {bad}: no image")
        yield item


def test_batched_hands_on_what_comes_before_an_exception() -> None:
    batches = batched(failing_at(5), 3)
    assert [next(batches), next(batches)] == [[0, 1, 2], [3, 4]]
    with pytest.raises(ImageError, match="item 5"):
        next(batches)
    with pytest.raises(ImageError, match="item 6"):  # at the start of a batch
        list(batched(failing_at(6), 3))


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_one_ahead_keeps_the_order(count: int, background: bool) -> None:
    assert list(one_ahead(iter(range(count)), str, background)) == [str(item) for item in range(count)]


def test_one_ahead_computes_the_next_meanwhile_and_no_more() -> None:
    started: list[int] = []
    second = threading.Event()

    def note(item: int) -> int:
        started.append(item)
        if item == 1:
            second.set()
        return item

    results = one_ahead(itertools.count(), note)
    assert next(results) == 0
    assert second.wait(timeout=10)  # though nobody has asked for it yet
    time.sleep(0.02)
    assert started == [0, 1]
    assert next(results) == 1
    results.close()  # type: ignore[attr-defined]
    assert started[:2] == [0, 1]
    assert len(started) <= 3


@pytest.mark.parametrize("background", [True, False])
def test_one_ahead_raises_at_the_items_turn(background: bool) -> None:
    def fail_at_2(item: int) -> int:
        if item == 2:
            raise ImageError("item 2: no image")
        return item

    for results in (one_ahead(range(9), fail_at_2, background), one_ahead(failing_at(2), int, background)):
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ImageError, match="item 2"):
            next(results)
        assert list(results) == []


@pytest.mark.parametrize("background", [True, False])
def test_one_ahead_keeps_no_result(background: bool) -> None:
    class Result:
        pass

    alive: weakref.WeakSet[Result] = weakref.WeakSet()

    def make(item: int) -> Result:
        alive.add(result := Result())
        return result

    for result in one_ahead(range(50), make, background):
        assert len(alive) <= 3  # this one, the next, and for a moment the one after that
        assert result in alive
        del result
        assert len(alive) <= 2


def test_one_ahead_takes_items_in_the_callers_thread() -> None:
    def whose() -> Iterator[int]:
        for _ in range(5):
            yield threading.get_ident()

    assert set(one_ahead(whose(), lambda item: item)) == {threading.get_ident()}


def test_one_ahead_may_be_collected_in_its_own_thread() -> None:
    """Where it is part of a circle, the collector closes it wherever it happens to run; a warning would be an error."""
    dropped, collected = threading.Event(), threading.Event()

    def work(item: int) -> int:
        if item == 1:
            dropped.wait()
            gc.collect()
            collected.set()
        return item

    circle: list[Any] = [one_ahead(range(3), work)]
    next(circle[0])
    circle.append(circle)
    gc.disable()
    del circle
    dropped.set()
    assert collected.wait(10)
    gc.enable()


def test_one_ahead_closed_early_ends_its_thread() -> None:
    before = threading.active_count()
    results = one_ahead(range(9), lambda item: time.sleep(0.02) or item)
    next(results)
    assert threading.active_count() == before + 1
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
