"""Images with fewer significant bits than stored bits: 10, 12 or 14 bits in 16, declared or not."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

import spade_faiss as sf
from spade_faiss.errors import ImageError, OptionError, SpecMismatchError
from spade_faiss.images.decode import decode

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
GREY = np.repeat(COLOUR[..., :1], 3, axis=2)
COLOUR_12 = COLOUR.astype(np.uint16) << 4 | 5  # as a camera of 12 bits gives it
GREY_12 = COLOUR_12[..., 0].copy()


def tiff(samples: np.ndarray, photometric: str = "minisblack", **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, samples, photometric=photometric, **options)
    return buffer.getvalue()


def png(samples: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    content: bytes = imagecodecs.png_encode(np.ascontiguousarray(samples))
    for kind, data in chunks:  # after IHDR
        chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        content = content[:33] + chunk + content[33:]
    return content


def largest(tag: int, value: int, channels: int) -> dict[str, Any]:
    return {"extratags": [(tag, "H", channels, value if channels == 1 else (value,) * channels, True)]}


DECLARED = {
    "TIFF BitsPerSample 12": (tiff(GREY_12, bitspersample=12), GREY),
    "TIFF BitsPerSample 10": (tiff(GREY_12 >> 2, bitspersample=10), GREY),
    "TIFF BitsPerSample 14": (tiff(GREY_12 << 2, bitspersample=14), GREY),
    "TIFF BitsPerSample 12 12 12": (tiff(COLOUR_12, "rgb", bitspersample=12), COLOUR),
    "TIFF MaxSampleValue": (tiff(GREY_12, **largest(281, 4095, 1)), GREY),
    "TIFF SMaxSampleValue": (tiff(COLOUR_12, "rgb", **largest(341, 4095, 3)), COLOUR),
    "TIFF big-endian": (tiff(COLOUR_12, "rgb", byteorder=">", **largest(281, 4095, 3)), COLOUR),
    "PNG sBIT, scaled": (png(COLOUR_12 << 4, (b"sBIT", b"\x0c\x0c\x0c")), COLOUR),
    "PNG sBIT, replicated": (png(COLOUR_12 << 4 | COLOUR_12 >> 8, (b"sBIT", b"\x0c\x0c\x0c")), COLOUR),
    "PNG sBIT, as they are": (png(COLOUR_12, (b"sBIT", b"\x0c\x0c\x0c")), COLOUR),
    "PNG sBIT, grey": (png(GREY_12, (b"sBIT", b"\x0c")), GREY),
    "JPEG 2000, grey": (imagecodecs.jpeg2k_encode(GREY_12, bitspersample=12, reversible=True, level=0), GREY),
    "JPEG 2000, colour": (imagecodecs.jpeg2k_encode(COLOUR_12, bitspersample=12, reversible=True, level=0), COLOUR),
    "PGM": (b"P5 32 24 4095\n" + GREY_12.astype(">u2").tobytes(), GREY),
    "PGM with a comment": (b"P5\n# a camera's\n32 24\n4095\n" + GREY_12.astype(">u2").tobytes(), GREY),
}


@pytest.mark.parametrize("bits", [None, 10, 12, 16])
@pytest.mark.parametrize("name", DECLARED)
def test_what_a_file_declares_is_used_whatever_the_gallery_says(name: str, bits: int | None) -> None:
    """PNG's sBIT: PNG specification (third edition), 11.3.2.7; MaxSampleValue: TIFF 6.0, pages 37 and 80."""
    if name.startswith("PNG sBIT, ") and name.endswith(("are", "grey")) and bits in (10, 16):
        pytest.skip("contradicts PNG: then the gallery's choice holds")
    content, expected = DECLARED[name]
    assert np.array_equal(decode(content, bits=bits), expected)


def test_ppm_declares_its_maximum() -> None:
    content = b"P6 32 24 4095\n" + COLOUR_12.astype(">u2").tobytes()
    assert np.abs(decode(content, bits=12).astype(int) - COLOUR).max() <= 1  # Pillow rounds


UNDECLARED = {
    "PNG grey": (png(GREY_12), GREY),
    "PNG colour": (png(COLOUR_12), COLOUR),
    "PNG alpha": (png(np.dstack([COLOUR_12, COLOUR_12[..., 0]])), COLOUR),
    "TIFF grey": (tiff(GREY_12), GREY),
    "TIFF colour": (tiff(COLOUR_12, "rgb"), COLOUR),
    "TIFF big-endian": (tiff(COLOUR_12, "rgb", byteorder=">"), COLOUR),
    "TIFF planes": (tiff(np.moveaxis(COLOUR_12, -1, 0).copy(), "rgb", planarconfig="separate"), COLOUR),
    "TIFF zlib": (tiff(COLOUR_12, "rgb", compression="zlib"), COLOUR),
    "PGM": (b"P5 32 24 65535\n" + GREY_12.astype(">u2").tobytes(), GREY),
    "PPM": (b"P6 32 24 65535\n" + COLOUR_12.astype(">u2").tobytes(), COLOUR),
    "JPEG 2000": (imagecodecs.jpeg2k_encode(COLOUR_12, reversible=True, level=0), COLOUR),
}


@pytest.mark.parametrize("name", UNDECLARED)
def test_choice_of_the_gallery(name: str) -> None:
    content, expected = UNDECLARED[name]
    assert np.array_equal(decode(content, bits=12), expected)
    with Image.open(io.BytesIO(content)) as opened:
        assert np.array_equal(decode(opened, bits=12), expected)
    assert decode(content).max() <= 16  # without a choice: never stretched, however dark
    assert np.array_equal(decode(content, bits=16), decode(content))


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_where_white_is_zero(byteorder: str) -> None:
    """A negative, as of X-rays, is the same picture whatever its depth and byte order."""

    def negative(samples: np.ndarray, bits: int, **options: Any) -> bytes:
        turned = (2**bits - 1 - samples).astype(samples.dtype)
        return tiff(turned, "miniswhite", byteorder=byteorder, **options)

    full = GREY[..., 0].astype(np.uint16) << 8 | 77
    assert np.array_equal(decode(negative(GREY[..., 0], 8)), GREY)
    assert np.array_equal(decode(negative(full, 16)), GREY)
    assert np.array_equal(decode(negative(full, 16), bits=16), GREY)
    assert np.array_equal(decode(negative(GREY_12, 12), bits=12), GREY)
    assert np.array_equal(decode(negative(GREY_12, 12, **largest(341, 4095, 1))), GREY)
    # tifffile packs values as if they were in the file's byte order: it needs them so.
    turned = 4095 - GREY_12 if byteorder == "<" else (4095 - GREY_12).byteswap()
    assert np.array_equal(decode(tiff(turned, "miniswhite", byteorder=byteorder, bitspersample=12)), GREY)
    across = negative(full, 16, extratags=[(274, "H", 1, 6, True)])
    assert np.array_equal(decode(across), np.rot90(GREY, -1))
    with pytest.raises(ImageError, match="expected values of 12 bits"):
        decode(negative(full, 16), bits=12)
    if byteorder == "<":  # else Pillow does not open it
        with Image.open(io.BytesIO(negative(full, 16))) as opened:
            opened.load()
            assert np.array_equal(decode(opened), GREY)


def test_16_bits_in_planes() -> None:
    """Pillow takes the bytes of a TIFF's planes for pixels where it reads 16-bit colour; no error."""
    full = COLOUR.astype(np.uint16) << 8 | 77
    planes = np.moveaxis(full, -1, 0).copy()
    assert np.array_equal(decode(tiff(planes, "rgb", planarconfig="separate")), COLOUR)
    assert np.array_equal(decode(tiff(planes, "rgb", planarconfig="separate", compression="zlib")), COLOUR)


@pytest.mark.parametrize("name", UNDECLARED)
def test_value_of_more_bits_is_refused(name: str) -> None:
    with pytest.raises(ImageError, match=r"^part 7: expected values of 11 bits, at most 2047, .*, found 40\d\d; build"):
        decode(UNDECLARED[name][0], "part 7", bits=11)


def test_tag_that_is_too_small_is_refused() -> None:
    with pytest.raises(ImageError, match="as its MaxSampleValue says, found 4085; correct the tag"):
        decode(tiff(GREY_12, **largest(281, 1023, 1)))


def test_largest_value_that_is_a_statistic_is_no_declaration() -> None:
    """TIFF 6.0 allows any value in MaxSampleValue, "for statistical purposes": an image's own must not scale it."""
    assert np.array_equal(decode(tiff(GREY_12, **largest(281, 3000, 1))), decode(tiff(GREY_12)))


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("bits", [9, 10, 12, 16])
def test_white_of_jpeg_2000_stays_white(bits: int, colour: bool) -> None:
    """Pillow rounds as it shifts, and 256 becomes 0."""
    samples = np.full((16, 16, 3) if colour else (16, 16), 2**bits - 1, np.uint16)
    samples[:8] = 0
    content = imagecodecs.jpeg2k_encode(samples, level=0, bitspersample=bits, reversible=True)
    expected = np.full((16, 16, 3), 255)
    expected[:8] = 0
    assert np.array_equal(decode(content), expected)


def test_signed_jpeg_2000() -> None:
    samples = (GREY_12.astype(np.int32) - 2048).astype(np.int16)
    content = imagecodecs.jpeg2k_encode(samples, level=0, bitspersample=12, reversible=True)
    assert np.array_equal(decode(content), GREY)


def sgi(samples: np.ndarray, packed: bool) -> bytes:
    """Return an SGI of 16 bits a value, plain or run-length encoded without runs.

    The SGI Image File Format, version 1.00: rows from the bottom up, channel by channel.
    """
    samples = np.atleast_3d(samples)
    (height, width, channels), kind = samples.shape, int(packed)
    fields = 474, kind, 2, 2 if channels == 1 else 3, width, height, channels, 0, 65535
    header = struct.pack(">hBBHHHHll", *fields).ljust(512, b"\0")
    rows = [row.astype(">u2").tobytes() for channel in np.moveaxis(samples, 2, 0) for row in channel[::-1]]
    if not packed:
        return header + b"".join(rows)
    coded = [struct.pack(">H", 0x80 | width) + row + b"\0\0" for row in rows]
    size = len(coded[0])
    starts = [512 + 8 * len(rows) + size * number for number in range(len(rows))]
    return header + struct.pack(f">{2 * len(rows)}I", *starts, *[size] * len(rows)) + b"".join(coded)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sgi_of_16_bits_is_read_as_16_or_refused(channels: int, packed: bool) -> None:
    """Pillow keeps the upper 8 bits: a gallery of 12 would compare black images."""
    full = RNG.integers(0, 65536, (24, 32, channels), dtype=np.uint16)
    expected = np.broadcast_to((full if channels == 1 else full[..., :3]) >> 8, (24, 32, 3))
    content = sgi(full, packed)
    for bits in (None, 16):
        assert np.array_equal(decode(content, bits=bits), expected)
    dark = sgi(full >> 4, packed)
    for bits in (10, 12):
        for given in (dark, Image.open(io.BytesIO(dark))):
            with pytest.raises(ImageError, match=r"^part 7: expected PNG, .* all 16 bits .*, found SGI; convert it$"):
                decode(given, "part 7", bits=bits)


@pytest.mark.parametrize("channels", [3, 4])
def test_sgi_of_8_bits_does_not_change(channels: int) -> None:
    buffer, pixels = io.BytesIO(), np.dstack([COLOUR, COLOUR[..., 0]])[..., :channels]
    Image.fromarray(pixels).save(buffer, "SGI")
    assert np.array_equal(decode(buffer.getvalue(), bits=12), COLOUR)


def test_a_run_of_dark_sgi_is_noted(tmp_path: Path) -> None:
    (tmp_path / "dark.sgi").write_bytes(sgi(COLOUR_12, packed=False))
    extractor = sf.load_extractor("toy")
    with sf.Gallery.create(tmp_path / "g", extractor.spec) as gallery:
        [note] = gallery.add_images(tmp_path / "dark.sgi", extractor).notes
    assert "1 image with 16 bits a value, and no value above 4095" in note


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("bits", [None, 12, 16])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("bands", [3, 4, 5, 7])
def test_bands_of_grey_are_not_taken_for_colours(bands: int, photometric: str, bits: int | None, planes: bool) -> None:
    """A multispectral TIFF: which of its bands are red, green and blue, nothing says."""
    samples = RNG.integers(0, 4096, (24, 32, bands), dtype=np.uint16)
    laid_out = np.moveaxis(samples, -1, 0).copy() if planes else samples
    content = tiff(laid_out, photometric, planarconfig="separate" if planes else "contig")
    said = (
        rf"^part 7: expected grey of 16 bits, or colours .* RGB, found {bands} bands with {photometric.upper()}; save"
    )
    with pytest.raises(ImageError, match=said):
        decode(content, "part 7", bits=bits)


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("bands", [4, 5, 6])
def test_further_bands_of_rgb_are_dropped(bands: int, planes: bool) -> None:
    samples = np.dstack([COLOUR_12, *[GREY_12] * (bands - 3)])
    laid_out = np.moveaxis(samples, -1, 0).copy() if planes else samples
    content = tiff(laid_out, "rgb", planarconfig="separate" if planes else "contig")
    assert np.array_equal(decode(content, bits=12), COLOUR)


def test_alpha_of_grey_is_dropped() -> None:
    content = tiff(np.dstack([GREY_12, GREY_12[::-1]]), extrasamples=["unassalpha"], planarconfig="contig")
    assert np.array_equal(decode(content, bits=12), GREY)


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_inks_of_deep_jpeg_2000_are_not_taken_for_colours(bits: int) -> None:
    samples = RNG.integers(0, 2**bits, (24, 32, 4), dtype=np.uint16)
    options = {"level": 0, "reversible": True, "bitspersample": bits, "codecformat": "jp2"}
    with pytest.raises(ImageError, match=r"^part 7: expected grey or RGB .*, found CMYK; convert it to RGB$"):
        decode(imagecodecs.jpeg2k_encode(samples, colorspace="CMYK", **options), "part 7")
    colours = samples[..., :3].copy()
    expected = (colours >> (bits - 8)).astype(np.uint8)
    assert np.array_equal(decode(imagecodecs.jpeg2k_encode(colours, colorspace="SRGB", **options)), expected)


def test_grey_times_alpha_is_read() -> None:
    """Pillow converts its mode La to LA alone; the image was said to be damaged."""
    grey = COLOUR[..., 0]
    content = tiff(np.dstack([grey, np.full_like(grey, 255)]), extrasamples=["assocalpha"], planarconfig="contig")
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.mode == "La"
        assert np.array_equal(decode(opened), GREY)
    assert np.array_equal(decode(content), GREY)


def test_decoders_print_nothing_beside_the_line_of_a_command(tmp_path: Path) -> None:
    """Pillow logs bands that it cannot decode, which are read otherwise; Python prints what no handler takes."""
    (tmp_path / "bands.tif").write_bytes(tiff(np.dstack([COLOUR_12, *[GREY_12] * 4]), "rgb", planarconfig="contig"))
    program = f"from spade_faiss.images.decode import decode; decode({str(tmp_path / 'bands.tif')!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_8_bit_images_do_not_change() -> None:
    for content in (png(COLOUR), tiff(COLOUR, "rgb")):
        assert np.array_equal(decode(content, bits=12), COLOUR)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bits", [12, 16])
def test_orientation_of_deep_colour(orientation: int, bits: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(COLOUR).save(buffer, "TIFF", exif=exif)
    tag = {"extratags": [(0x0112, "H", 1, orientation, True)]}
    assert np.array_equal(decode(tiff(COLOUR_12, "rgb", bitspersample=bits, **tag), bits=12), decode(buffer.getvalue()))


@pytest.mark.parametrize("cut", [1, 100, 1000])
@pytest.mark.parametrize("options", [{}, {"bitspersample": 12}, {"compression": "zlib"}])
def test_damaged_pixels_are_refused(cut: int, options: dict[str, Any]) -> None:
    content = tiff(COLOUR_12, "rgb", metadata=None, **options)
    end = max(tag.valueoffset for tag in tifffile.TiffFile(io.BytesIO(content)).pages[0].tags)  # type: ignore[union-attr]
    assert end < len(content) - 1000
    with pytest.raises(ImageError):
        decode(content[:-cut], bits=12)


# --- the gallery's choice --------------------------------------------------------------------------------------------


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """Twelve images of 12 bits in 16, without a word on that."""
    for number in range(12):
        image = RNG.integers(0, 4096, (40, 40), dtype=np.uint16)
        (tmp_path / "deep").mkdir(exist_ok=True)
        (tmp_path / "deep" / f"{number:03}.png").write_bytes(png(image))
    return tmp_path / "deep"


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_choice_is_in_the_spec_and_applied_to_queries(deep: Path, tmp_path: Path, workers: int) -> None:
    extractor = sf.load_extractor("toy", options=sf.FeatureOptions(bits=12))
    with sf.Gallery.create(tmp_path / "g", extractor.spec) as gallery:
        report = gallery.add_images(deep, extractor, workers=workers)
        assert (report.added, report.notes) == (12, [])
    with sf.Gallery.open(tmp_path / "g") as gallery:
        assert gallery.spec.bits == 12
        detector = sf.Detector(gallery, gallery.load_extractor(), sf.SearchOptions(k=1))
        found = detector.query(deep / "003.png")
        assert found.neighbours.keys == ["003.png"]
        assert found.image_score == 0
        with pytest.raises(SpecMismatchError, match="bits: expected 12, found 16"):
            sf.Detector(gallery, sf.load_extractor("toy"))


def test_choice_is_written_only_where_it_was_made(tmp_path: Path) -> None:
    for bits in (None, 16, 10):
        spec = sf.load_extractor("toy", options=sf.FeatureOptions(bits=bits)).spec
        sf.Gallery.create(tmp_path / f"{bits}", spec).close()
        written = json.loads((tmp_path / f"{bits}" / "gallery.json").read_text())["spec"]
        assert written.get("bits") == bits
        assert ("bits" in written) == (bits is not None)
        assert sf.ExtractorSpec.from_json(written) == spec


def test_16_is_what_no_choice_means() -> None:
    with_16, without = (sf.load_extractor("toy", options=sf.FeatureOptions(bits=bits)).spec for bits in (16, None))
    without.require(with_16, "here")


@pytest.mark.parametrize("bits", [7, 17, 12.0, "12", True])
def test_bits_out_of_range(bits: Any) -> None:
    with pytest.raises(OptionError, match="bits: expected a number from 8 to 16"):
        sf.FeatureOptions(bits=bits)


@pytest.mark.parametrize(
    ("largest_value", "said", "workers"),
    [
        *[(1023, 10, 1), (4095, 12, 1), (4096, None, 1), (65535, None, 1)],
        *[pytest.param(*values, 2, marks=pytest.mark.slow) for values in ((4095, 12), (4096, None))],
    ],
)
def test_note_where_no_image_of_a_run_exceeds_10_or_12_bits(
    tmp_path: Path, largest_value: int, said: int | None, workers: int
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        image = np.full((16, 16), 100, np.uint16)
        image[0, 0] = largest_value if number == 1 else 200  # one of them is enough: never per image
        (tmp_path / "in" / f"{number}.png").write_bytes(png(image if number else np.dstack([image] * 3)))
    extractor = sf.load_extractor("toy")
    with sf.Gallery.create(tmp_path / "g", extractor.spec) as gallery:
        notes = gallery.add_images(tmp_path / "in", extractor, workers=workers).notes
    assert len(notes) == (said is not None)
    if said:
        assert f"3 images with 16 bits a value, and no value above {largest_value}" in notes[0]
        assert f"bits={said}" in notes[0]
