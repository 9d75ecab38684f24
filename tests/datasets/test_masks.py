"""Masks of defects: which image each belongs to, what they mark, and what is refused."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spade_faiss.datasets.category import Category, Sample
from spade_faiss.datasets.folders import from_folders
from spade_faiss.errors import ImageError
from tests.helpers.datasets import (
    SIZE,
    loco,
    magnetic_tile,
    mvtec,
    open_one,
    paint,
    paint_all,
    refusal,
)


def test_no_masks_at_all(tmp_path: Path) -> None:
    mvtec(tmp_path)
    for file in (tmp_path / "ground_truth").glob("*/*"):
        file.unlink()
    category = open_one(tmp_path)
    assert not category.masks
    assert category.layout == "mvtec"
    shutil.rmtree(tmp_path / "ground_truth")
    assert open_one(tmp_path) == category
    with pytest.raises(ImageError, match=r"test/cut/000\.png: expected a mask, as the image is anomalous, found none"):
        category.mask_of(category.test[0], SIZE)


def test_some_masks_missing(tmp_path: Path) -> None:
    mvtec(tmp_path)
    paint_all(tmp_path, *(f"test/cut/{number:03d}.png" for number in range(1, 6)))
    assert refusal(tmp_path) == (
        f"{tmp_path}: expected a mask for each anomalous image, or no masks, found none of "
        "test/cut/001.png, test/cut/002.png, test/cut/003.png and 2 more; "
        "layout mvtec, guessed from the folders; layout=NAME names another"
    )


def test_masks_of_other_names_are_not_taken_by_position(tmp_path: Path) -> None:
    mvtec(tmp_path)
    for kind in ("cut", "hole"):
        folder = tmp_path / "ground_truth" / kind
        (folder / "000_mask.png").rename(folder / "001_mask.png")
    assert "found none of test/cut/000.png, test/hole/000.png" in refusal(tmp_path)


def test_loco_image_without_its_folder_of_masks(tmp_path: Path) -> None:
    loco(tmp_path)
    paint(tmp_path / "test/logical_anomalies/001.png")
    assert "found none of test/logical_anomalies/001.png" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["000.png", "000_mask.bmp"])
def test_two_masks_of_one_image(tmp_path: Path, name: str) -> None:
    mvtec(tmp_path)
    paint(tmp_path / "ground_truth/hole" / name)
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path / 'test/hole/000.png'}: expected one mask, found ")
    assert name in said
    assert "000_mask.png" in said


def test_one_mask_of_two_images(tmp_path: Path) -> None:
    mvtec(tmp_path)
    paint(tmp_path / "test/hole/000.jpg")
    assert "expected a mask of its own, found" in refusal(tmp_path)


def with_mask(root: Path, content: Image.Image | bytes, suffix: str = ".png") -> tuple[Category, Sample]:
    """A category with one anomalous image, and this as its mask."""
    paint_all(root, "train/good/0.png", "test/bad/0.png")
    path = root / f"ground_truth/bad/0_mask{suffix}"
    path.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)
    category = open_one(root)
    return category, category.test[0]


def eye(value: int, dtype: type = np.uint8) -> np.ndarray:
    return (np.eye(16) * value).astype(dtype)


def palette(colours: list[int]) -> Image.Image:
    image = Image.fromarray(eye(1), "L").convert("P")
    image.putdata(list(eye(1).ravel()))
    image.putpalette(colours)
    return image


BLUE = np.stack([eye(0), eye(0), eye(1)], axis=2)


@pytest.mark.parametrize(
    ("mask", "suffix"),
    [
        (Image.fromarray(eye(255)), ".png"),
        (Image.fromarray(eye(1)), ".png"),
        (Image.fromarray(eye(1)), ".bmp"),
        (Image.fromarray(eye(1, bool)), ".png"),
        (Image.fromarray(BLUE), ".png"),
        (Image.fromarray(np.dstack([BLUE, np.full(SIZE, 255, np.uint8)])), ".png"),
        (Image.fromarray(eye(1, np.uint16)), ".png"),
        (Image.fromarray(eye(1, np.int32)), ".tif"),
        (Image.fromarray((np.eye(16) * 0.5).astype(np.float32)), ".tif"),
        (palette([0, 0, 0, 0, 0, 9]), ".png"),
    ],
    ids=["L 255", "L 1", "bmp", "1 bit", "RGB", "RGBA", "16 bit", "32 bit", "float", "palette"],
)
def test_masks_are_binarised_above_0(tmp_path: Path, mask: Image.Image, suffix: str) -> None:
    category, sample = with_mask(tmp_path, mask, suffix)
    assert np.array_equal(category.mask_of(sample, SIZE), np.eye(16, dtype=bool))


def test_mask_that_marks_nothing(tmp_path: Path) -> None:
    category, sample = with_mask(tmp_path, Image.fromarray(eye(0)))
    assert sample.anomalous
    assert not category.mask_of(sample, SIZE).any()


@pytest.mark.parametrize(("height", "width"), [(8, 16), (16, 17), (32, 8)])
def test_mask_of_another_size_is_an_error_when_it_is_read(tmp_path: Path, height: int, width: int) -> None:
    category, sample = with_mask(tmp_path, Image.fromarray(np.ones((height, width), np.uint8)))
    with pytest.raises(ImageError) as caught:
        category.mask_of(sample, SIZE)
    assert str(caught.value) == (
        f"{sample.path}: its mask {sample.mask}: expected 16 x 16 pixels, as the image has, found {width} x {height}"
    )


def test_mask_on_its_side(tmp_path: Path) -> None:
    category, sample = with_mask(tmp_path, Image.fromarray(np.ones((12, 20), np.uint8)))
    assert category.mask_of(sample, (12, 20)).all()
    with pytest.raises(ImageError, match="expected 12 x 20 pixels, as the image has, found 20 x 12"):
        category.mask_of(sample, (20, 12))


def test_mask_is_turned_as_its_image_is(tmp_path: Path) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be shown turned by 90 degrees, clockwise
    pixels = np.zeros((12, 20), np.uint8)
    pixels[0, 0] = 255  # goes to the upper right corner
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    category, sample = with_mask(tmp_path, buffer.getvalue())
    assert np.argwhere(category.mask_of(sample, (20, 12))).tolist() == [[0, 11]]


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "cut short"])
def test_mask_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    category, sample = with_mask(tmp_path, content)
    with pytest.raises(ImageError) as caught:
        category.mask_of(sample, SIZE)
    assert str(caught.value).startswith(f"{sample.path}: its mask {sample.mask}: ")
    assert "\n" not in str(caught.value)


def test_mask_cut_short(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, SIZE, np.uint8)).save(buffer, "PNG")
    category, sample = with_mask(tmp_path, buffer.getvalue()[:150])
    with pytest.raises(ImageError, match="cannot be read"):
        category.mask_of(sample, SIZE)


def test_mask_that_is_gone_since(tmp_path: Path) -> None:
    category, sample = with_mask(tmp_path, Image.fromarray(eye(1)))
    assert sample.mask is not None
    sample.mask.unlink()
    with pytest.raises(ImageError, match=r"its mask .*found nothing there"):
        category.mask_of(sample, SIZE)


def test_normal_image_has_an_empty_mask_even_in_a_set_without_masks(tmp_path: Path) -> None:
    paint_all(tmp_path, "train/good/0.png", "test/good/0.png")
    category = open_one(tmp_path)
    assert not category.masks
    mask = category.mask_of(category.test[0], (3, 5))
    assert (mask.shape, mask.dtype, mask.any()) == ((3, 5), bool, False)


def test_magnetic_tile_mask_missing(tmp_path: Path) -> None:
    magnetic_tile(tmp_path)
    (tmp_path / "MT_Uneven/Imgs/exp1_num_7.png").unlink()
    assert "found none of MT_Uneven/Imgs/exp1_num_7.jpg" in refusal(tmp_path)


def test_masks_are_named_by_the_whole_name_of_their_image(tmp_path: Path) -> None:
    """As `export --format masks` names them."""
    paint_all(tmp_path, *(f"normal/{number}.png" for number in range(5)), "bad/a/0.jpg", "bad/a/0.png", "bad/1.b.png")
    paint_all(tmp_path, "masks/a/0.jpg.png=2", "masks/a/0.png.png=3", "masks/1.b.png.png=4")
    (tmp_path / "masks/index.json").touch()
    category = from_folders(tmp_path / "normal", tmp_path / "bad", tmp_path / "masks")
    marked = {one.key: int(category.mask_of(one, SIZE).sum()) for one in category.test if one.anomalous}
    assert marked == {"abnormal/a/0.jpg": 2, "abnormal/a/0.png": 3, "abnormal/1.b.png": 4}


def test_a_mask_of_another_image_by_its_stem_stays_that_ones(tmp_path: Path) -> None:
    paint_all(tmp_path, *(f"normal/{number}.png" for number in range(5)), "bad/0.jpg", "bad/0.jpg.bmp")
    paint_all(tmp_path, "masks/0.png=2", "masks/0.jpg.png=3")
    category = from_folders(tmp_path / "normal", tmp_path / "bad", tmp_path / "masks")
    marked = {one.key: int(category.mask_of(one, SIZE).sum()) for one in category.test if one.anomalous}
    assert marked == {"abnormal/0.jpg": 2, "abnormal/0.jpg.bmp": 3}
