"""Masks as people save them: what each format can express is understood, and exact formats stay exact."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, features
from scipy import ndimage

from spade_faiss.datasets.masks import given_marks, read_marks
from spade_faiss.errors import ImageError
from spade_faiss.metrics.pixel import PixelMetrics

SIZE = (96, 128)


def blobs(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A few smooth regions, a thin line and a speck."""
    rng = np.random.default_rng(seed)
    mask = ndimage.gaussian_filter(rng.standard_normal(size), 6) > 0.08
    mask[:, size[1] // 2 - 3 : size[1] // 2 + 4] = False
    mask[5:-5, size[1] // 2] = True
    mask[2:5, 2:5] = True
    return mask


def read(path: Path, **options: Any) -> np.ndarray:
    return read_marks(path, **options).anomalous


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


LOSSY = [
    ("jpg", {"quality": 50}),
    ("jpg", {"quality": 75}),
    ("jpg", {"quality": 95}),
    ("webp", {"quality": 75}),
    ("jp2", {"quality_mode": "dB", "quality_layers": [38], "irreversible": True}),
    ("tif", {"compression": "jpeg", "quality": 75}),
    *([("avif", {"quality": 75})] if features.check("avif") else []),
]


@pytest.mark.parametrize(("suffix", "options"), LOSSY)
@pytest.mark.parametrize("value", [255, 128, 60])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_lossy_masks_do_not_grow(tmp_path: Path, suffix: str, options: dict[str, Any], value: int, mode: str) -> None:
    """JPEG leaves small values around every mark (romi/plant-3d-vision issue 140: masks "not binary anymore")."""
    mask = blobs()
    image = Image.fromarray((mask * value).astype(np.uint8)).convert(mode)
    found = read(saved(tmp_path / f"mask.{suffix}", image, **options))
    assert np.mean(found != mask) < 0.012
    assert found.sum() == pytest.approx(mask.sum(), rel=0.04)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_where_white_is_zero(tmp_path: Path, dtype: Any) -> None:
    mask, path = blobs(), tmp_path / "mask.tif"
    tifffile.imwrite(path, np.iinfo(dtype).max - (mask * 7).astype(dtype), photometric="miniswhite", byteorder="<")
    assert np.array_equal(read(path), mask)
    assert not read(path, ignore_label=7).any()


@pytest.mark.slow
def test_jpeg_masks_score_as_png_masks_do(tmp_path: Path) -> None:
    """AUPRO of fixed maps: within 0.002 of the exact masks; any value above 0 would cost 0.02 and more."""
    exact, jpeg, grown = ({quality: PixelMetrics() for quality in (75, 95)} for _ in range(3))
    for seed in range(6):
        mask = blobs(seed, (240, 320))
        noise = np.random.default_rng(seed).standard_normal(mask.shape)
        scores = ndimage.gaussian_filter(mask * 4.0 + noise, 2).astype(np.float32)
        for quality in (75, 95):
            path = saved(tmp_path / "m.jpg", Image.fromarray((mask * 255).astype(np.uint8)), quality=quality)
            exact[quality].add(scores, mask)
            jpeg[quality].add(scores, read(path))
            grown[quality].add(scores, np.asarray(Image.open(path)) > 0)
    for quality in (75, 95):
        values = [one[quality].result().values["pixel_AUPRO"] for one in (exact, jpeg, grown)]
        assert abs(values[1] - values[0]) < 0.002
        assert abs(values[2] - values[0]) > 0.02


@pytest.mark.parametrize("quality", [75, 95])
@pytest.mark.parametrize("value", [1, 2, 5])
def test_labels_in_jpeg_all_count(tmp_path: Path, quality: int, value: int) -> None:
    mask = np.zeros(SIZE, np.uint8)
    mask[16:48, 32:96] = value
    found = read(saved(tmp_path / "m.jpg", Image.fromarray(mask), quality=quality))
    assert np.array_equal(found, mask > 0)


def test_two_levels_in_jpeg_both_count(tmp_path: Path) -> None:
    mask = np.zeros(SIZE, np.uint8)
    mask[16:48, 16:48], mask[40:80, 64:112] = 100, 255
    found = read(saved(tmp_path / "m.jpg", Image.fromarray(mask), quality=90))
    assert np.mean(found != (mask > 0)) < 0.01


def test_empty_jpeg_mask(tmp_path: Path) -> None:
    assert not read(saved(tmp_path / "m.jpg", Image.new("L", SIZE))).any()


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("png", {}),
        ("bmp", {}),
        ("gif", {}),
        ("tif", {"compression": "tiff_lzw"}),
        ("webp", {"lossless": True}),
        ("jp2", {"irreversible": False}),
    ],
)
@pytest.mark.parametrize("values", [(0, 1), (0, 255), (0, 1, 2, 3), (0, 20, 60, 255)])
def test_exact_formats_mark_all_above_0(
    tmp_path: Path, suffix: str, options: dict[str, Any], values: tuple[int, ...]
) -> None:
    labels = np.random.default_rng(0).choice(np.array(values, np.uint8), SIZE)
    found = read(saved(tmp_path / f"m.{suffix}", Image.fromarray(labels), **options))
    assert np.array_equal(found, labels > 0)


def rgba(colour: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([np.broadcast_to(colour, (*SIZE, 3)), alpha]).astype(np.uint8))


MASK = blobs()
WHITE, RED, BLACK = np.full(3, 255), np.array([255, 0, 0]), np.zeros(3)


@pytest.mark.parametrize(
    "image",
    [
        rgba(WHITE, MASK * 255),
        rgba(RED, MASK * 128),
        rgba(BLACK, MASK * 255),  # painted in black on nothing
        rgba(np.where(MASK[..., None], RED, BLACK), MASK * 255),
        rgba(np.where(MASK[..., None], RED, BLACK), np.full(SIZE, 255)),
        rgba(np.where(MASK[..., None], RED, BLACK), np.full(SIZE, 0)),
        rgba(np.where(MASK[..., None], BLACK, WHITE), MASK * 255),  # black on transparent white
        rgba(np.where(MASK[..., None], RED, BLACK), np.where(MASK, 128, 255)),  # a translucent brush on black
        rgba(WHITE, np.where(MASK, 255, 40)),
        Image.fromarray(np.dstack([np.full(SIZE, 255), MASK * 255]).astype(np.uint8)),
    ],
    ids=["white", "red", "black", "premultiplied", "opaque", "no alpha", "on white", "brush", "never 0", "LA"],
)
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_alpha_that_varies_is_the_mask(tmp_path: Path, image: Image.Image, suffix: str) -> None:
    """MagicBrush issue 10: "RGBA image to 0-1 mask", as image editors export a painted layer."""
    if suffix == "webp":
        image.save(tmp_path / "m.webp", lossless=True, exact=True)
    else:
        image.save(tmp_path / f"m.{suffix}")
    assert np.array_equal(read(tmp_path / f"m.{suffix}"), MASK)


def test_transparent_outside_of_a_black_and_white_mask(tmp_path: Path) -> None:
    inside = np.zeros(SIZE, bool)
    inside[8:-8, 8:-8] = True
    image = rgba(np.where((MASK & inside)[..., None], 255, 0), inside * 255)
    assert np.array_equal(read(saved(tmp_path / "m.png", image)), MASK & inside)


def paletted(index: np.ndarray, colours: list[tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray(index.astype(np.uint8), "L").convert("P")
    image.putdata(list(index.astype(np.uint8).ravel()))
    image.putpalette([value for colour in colours for value in colour])
    return image


@pytest.mark.parametrize(
    ("colours", "inverted"),
    [
        ([(0, 0, 0), (128, 0, 0)], False),  # Pascal VOC's
        ([(68, 1, 84), (253, 231, 37)], False),  # viridis: no black, so index 0 is normal
        ([(255, 255, 255), (0, 0, 0)], True),  # colours decide where there is a black
    ],
)
def test_palettes(tmp_path: Path, colours: list[tuple[int, int, int]], inverted: bool) -> None:
    found = read(saved(tmp_path / "m.png", paletted(MASK, colours)))
    assert np.array_equal(found, inverted != MASK)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_wide_values(tmp_path: Path, dtype: type) -> None:
    values = (MASK * (0.25 if dtype is np.float32 else 300)).astype(dtype)
    assert np.array_equal(read(saved(tmp_path / "m.tif", Image.fromarray(values))), MASK)


# --- a label to ignore -----------------------------------------------------------------------------------------------


LABELS = np.zeros(SIZE, np.uint8)
LABELS[:20], LABELS[60:], LABELS[30:50, 30:50] = 1, 255, 7


@pytest.mark.parametrize("kind", ["L", "RGB", "P", "I;16", "float", "npy"])
def test_pixels_of_a_label_are_ignored(tmp_path: Path, kind: str) -> None:
    """255 means "uncertain, to be ignored" in many sets (CAMMA-public/Endoscapes issue 5; Cityscapes; Pascal VOC)."""
    path, frame = tmp_path / "m.tif", None
    if kind == "npy":
        path, frame = tmp_path / "m.npy", 0
        np.save(path, LABELS[None])
    elif kind == "P":
        saved(path := tmp_path / "m.png", paletted(LABELS, [(0, 0, 0), *[(9, 9, 9)] * 255]))
    else:
        dtype = {"I;16": np.uint16, "float": np.float32}.get(kind, np.uint8)
        image = Image.fromarray(LABELS.astype(dtype))
        saved(path, image.convert("RGB") if kind == "RGB" else image)
    marks = read_marks(path, frame, ignore_label=255)
    assert np.array_equal(marks.anomalous, (LABELS == 1) | (LABELS == 7))
    assert marks.ignored is not None
    assert np.array_equal(marks.ignored, LABELS == 255)
    assert read_marks(path, frame).ignored is None
    assert np.array_equal(read(path, frame=frame), LABELS > 0)


def test_lossy_masks_have_no_exact_labels(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.jpg", Image.fromarray(LABELS))
    with pytest.raises(ImageError, match=r"m\.jpg: expected a lossless format, as ignore_label=255 .* found JPEG"):
        read_marks(path, ignore_label=255)


def test_a_mask_cut_short_is_an_error(tmp_path: Path) -> None:
    """LeiaLi/ReLoBlur issue 4: published masks that "cannot identify image file" in the middle of a run."""
    buffer = io.BytesIO()
    Image.fromarray(LABELS).save(buffer, "PNG")
    (tmp_path / "m.png").write_bytes(buffer.getvalue()[:60])
    with pytest.raises(ImageError, match="cannot be read"):
        read_marks(tmp_path / "m.png")


# --- what Pillow would drop of a mask --------------------------------------------------------------------------------

MARK = np.zeros((24, 32), np.uint16)
MARK[:4, :4] = 1


def deep_mask(path: Path, value: int, kind: str) -> Path:
    """Write a mask of 16-bit colour, or of grey and alpha, with 16 pixels of a value."""
    grey = MARK * np.uint16(value)
    if kind == "PNG grey and alpha":
        path.write_bytes(imagecodecs.png_encode(np.dstack([grey, np.full_like(grey, 65535)])))
    elif kind == "PNG":
        path.write_bytes(imagecodecs.png_encode(np.dstack([grey, np.zeros_like(grey), grey])))
    else:
        tifffile.imwrite(path, np.dstack([grey] * 3), photometric="rgb")
    return path


@pytest.mark.parametrize("value", [1, 3, 128, 255])
@pytest.mark.parametrize("kind", ["PNG", "PNG grey and alpha", "TIFF"])
def test_low_marks_in_16_bit_colour_are_not_lost(tmp_path: Path, value: int, kind: str) -> None:
    """Pillow keeps the upper 8 bits: such a mask marked nothing, in silence."""
    path = deep_mask(tmp_path / "mask", value, kind)
    said = rf"expected colours of 16 bits to be 0 or at least 256, found {value}; save the mask as grey"
    with pytest.raises(ImageError, match=said) as caught:
        read_marks(path)
    assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(ImageError, match=said), Image.open(path) as opened:
        given_marks(opened, "part 7", (24, 32))


@pytest.mark.parametrize("value", [256, 4095, 65535])
@pytest.mark.parametrize("kind", ["PNG", "PNG grey and alpha", "TIFF"])
def test_high_marks_in_16_bit_colour_count(tmp_path: Path, value: int, kind: str) -> None:
    path = deep_mask(tmp_path / "mask", value, kind)
    assert np.array_equal(read_marks(path).anomalous, MARK > 0)
    with Image.open(path) as opened:
        assert np.array_equal(given_marks(opened, "part 7", (24, 32)).anomalous, MARK > 0)
    with pytest.raises(ImageError, match="expected exact labels, as ignore_label=255 needs, found colours of 16 bits"):
        read_marks(path, ignore_label=255)
    with pytest.raises(ImageError, match="expected 8 x 8 pixels"):  # a mask that cannot fit is not decoded
        read_marks(path, image_size=(8, 8))


def test_damaged_16_bit_colour(tmp_path: Path) -> None:
    path = deep_mask(tmp_path / "mask", 65535, "PNG")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match=r"mask: cannot be read: "):
        read_marks(path)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_is_no_mark_and_no_background(tmp_path: Path, dtype: str) -> None:
    values = np.where(MARK > 0, np.nan, 0).astype(dtype)
    with pytest.raises(ImageError, match="expected numbers, found NaN"):
        given_marks(values, "part 7", (24, 32))
    np.save(tmp_path / "video.npy", np.stack([np.zeros((24, 32), dtype), values]))
    assert not read_marks(tmp_path / "video.npy", frame=0).anomalous.any()
    with pytest.raises(ImageError, match=r"video\.npy: expected numbers, found NaN"):
        read_marks(tmp_path / "video.npy", frame=1)
    if dtype == "float32":
        tifffile.imwrite(tmp_path / "mask.tif", values)
        with pytest.raises(ImageError, match=r"mask\.tif: expected numbers, found NaN"):
            read_marks(tmp_path / "mask.tif")


@pytest.mark.parametrize("suffix", ["tif", "gif", "png"])
def test_a_mask_of_several_pages_is_refused(tmp_path: Path, suffix: str) -> None:
    """A page for each defect: those after the first were not read, in silence."""
    pages = [Image.fromarray((turned * 255).astype(np.uint8)) for turned in (MARK, MARK[::-1], MARK[:, ::-1])]
    path = tmp_path / f"mask.{suffix}"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with pytest.raises(ImageError, match=r"expected a mask of one page, found several; unite them in one$"):
        read_marks(path)
    pages[0].save(path, save_all=True)
    assert np.array_equal(read_marks(path).anomalous, MARK > 0)


def test_grey_times_alpha_is_a_mask(tmp_path: Path) -> None:
    samples = np.dstack([MARK * 200, np.full_like(MARK, 255)]).astype(np.uint8)
    tifffile.imwrite(tmp_path / "mask.tif", samples, photometric="minisblack", extrasamples=["assocalpha"])
    assert np.array_equal(read_marks(tmp_path / "mask.tif").anomalous, MARK > 0)


@pytest.mark.parametrize("content", [b"GIF89 no image", b"II*\0" + bytes(9)])
def test_a_mask_that_no_decoder_knows_is_named_once(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mask.png").write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read_marks(tmp_path / "mask.png")
    assert str(caught.value).startswith(f"{tmp_path / 'mask.png'}: cannot be read: ")
    assert "BytesIO" not in str(caught.value)
