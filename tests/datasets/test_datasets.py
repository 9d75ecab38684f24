"""Labelled data sets: a tiny one in every layout, how layouts are told apart, and every rule about masks."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spade_faiss.datasets.category import GOOD, Category, Sample
from spade_faiss.datasets.folders import from_folders
from spade_faiss.datasets.layouts import LAYOUTS, open_dataset
from spade_faiss.errors import ImageError, OptionError
from tests.helpers.datasets import (
    BUILDS,
    SIZE,
    VISA_COLUMNS,
    VISA_ROWS,
    Build,
    btad,
    converted_visa,
    loco,
    magnetic_tile,
    marked,
    mvtec,
    mvtec_ad_2,
    paint,
    paint_all,
    refusal,
    save_rows,
    shanghaitech,
    table_of,
    visa,
    write_table,
)


def open_one(root: Path, layout: str | None = None) -> Category:
    (category,) = open_dataset(root, layout)
    return category


# --- each layout -----------------------------------------------------------------------------------------------------


def test_mvtec(tmp_path: Path) -> None:
    mvtec(tmp_path / "hazelnut")
    category = open_one(tmp_path / "hazelnut")
    assert (category.name, category.layout, category.masks) == ("hazelnut", "mvtec", True)
    assert [image.key for image in category.normal] == ["train/good/000.png", "train/good/001.png"]
    assert [image.path for image in category.normal] == [tmp_path / "hazelnut" / image.key for image in category.normal]
    assert category.test == [
        Sample(
            tmp_path / "hazelnut/test/cut/000.png",
            "test/cut/000.png",
            "cut",
            True,
            tmp_path / "hazelnut/ground_truth/cut/000_mask.png",
        ),
        Sample(tmp_path / "hazelnut/test/good/000.png", "test/good/000.png", GOOD, False),
        Sample(
            tmp_path / "hazelnut/test/hole/000.png",
            "test/hole/000.png",
            "hole",
            True,
            tmp_path / "hazelnut/ground_truth/hole/000_mask.png",
        ),
    ]
    assert [count for _, _, count in table_of(category)] == [5, 0, 3]


def test_converted_visa_is_mvtec_with_masks_of_the_same_name(tmp_path: Path) -> None:
    converted_visa(tmp_path / "candle")
    category = open_one(tmp_path / "candle")
    assert category.layout == "mvtec"
    assert table_of(category) == [("test/bad/000.JPG", "bad", 4), ("test/good/0001.JPG", GOOD, 0)]


def test_loco_unites_an_images_masks(tmp_path: Path) -> None:
    loco(tmp_path)
    category = open_one(tmp_path)
    assert [image.key for image in category.normal] == ["train/good/000.png"]  # and none of validation/
    assert table_of(category) == [
        ("test/good/000.png", GOOD, 0),
        ("test/logical_anomalies/000.png", "logical_anomalies", 3 + 4),
        ("test/structural_anomalies/000.png", "structural_anomalies", 2),
    ]


def test_mvtec_ad_2_has_its_public_test_set(tmp_path: Path) -> None:
    mvtec_ad_2(tmp_path)
    category = open_one(tmp_path)
    assert [image.key for image in category.normal] == ["train/good/000_regular.png"]
    assert table_of(category) == [
        ("test_public/bad/001_overexposed.png", "bad", 6),
        ("test_public/good/000_regular.png", GOOD, 0),
    ]


def test_btad_pairs_masks_whatever_the_suffix(tmp_path: Path) -> None:
    btad(tmp_path)
    paint(tmp_path / "ground_truth/ok/0001.png")  # of a normal image: not looked at
    category = open_one(tmp_path)
    assert [image.key for image in category.normal] == ["train/ok/0000.bmp"]
    assert table_of(category) == [
        ("test/ko/0000.bmp", "ko", 2),
        ("test/ko/0001.png", "ko", 3),
        ("test/ok/0001.bmp", GOOD, 0),
    ]


def test_visa(tmp_path: Path) -> None:
    visa(tmp_path)
    candle, pcb = open_dataset(tmp_path)
    assert [(one.name, one.layout, one.masks) for one in (candle, pcb)] == [
        ("candle", "visa", True),
        ("pcb1", "visa", True),
    ]
    assert [image.key for image in candle.normal] == ["Data/Images/Normal/0001.JPG"]
    assert candle.normal[0].path == tmp_path / "candle/Data/Images/Normal/0001.JPG"
    assert table_of(candle) == [
        ("Data/Images/Anomaly/000.JPG", "anomaly", 16),
        ("Data/Images/Normal/0000.JPG", GOOD, 0),
    ]
    assert table_of(pcb) == [("Data/Images/Anomaly/000.JPG", "anomaly", 16)]


def test_magnetic_tile(tmp_path: Path) -> None:
    magnetic_tile(tmp_path / "MTD")
    (tmp_path / "MTD/README.md").touch()
    category = open_one(tmp_path / "MTD")
    assert (category.name, category.layout, category.masks) == ("MTD", "magnetic_tile", True)
    held_out = [sample.key for sample in category.test if not sample.anomalous]
    assert (len(category.normal), len(held_out)) == (8, 2)
    whole = {f"MT_Free/Imgs/exp1_num_{number}.jpg" for number in range(10)}
    assert {image.key for image in category.normal} | set(held_out) == whole
    assert table_of(category)[:2] == [
        ("MT_Blowhole/Imgs/exp1_num_7.jpg", "blowhole", 7),
        ("MT_Uneven/Imgs/exp1_num_7.jpg", "uneven", 0),  # a mask that marks nothing is no error
    ]


def test_magnetic_tile_draws_by_the_seed(tmp_path: Path) -> None:
    magnetic_tile(tmp_path)

    def held_out(**settings: int) -> list[str]:
        return [sample.key for sample in open_dataset(tmp_path, **settings)[0].test if not sample.anomalous]

    # Written down, since results are only comparable while the draw stays what it is.
    assert held_out() == held_out(seed=0) == ["MT_Free/Imgs/exp1_num_0.jpg", "MT_Free/Imgs/exp1_num_6.jpg"]
    assert len({tuple(held_out(seed=seed)) for seed in range(8)}) > 3


def test_magnetic_tiles_952_normal_images(tmp_path: Path) -> None:
    magnetic_tile(tmp_path)
    for number in range(10, 952):
        (tmp_path / f"MT_Free/Imgs/exp1_num_{number}.jpg").touch()
    category = open_one(tmp_path)
    assert (len(category.normal), sum(not sample.anomalous for sample in category.test)) == (761, 191)


def test_shanghaitech_has_a_category_for_each_tested_scene(tmp_path: Path) -> None:
    shanghaitech(tmp_path)
    first, second = open_dataset(tmp_path)
    assert [(one.name, one.layout, one.masks, len(one.normal), len(one.test)) for one in (first, second)] == [
        ("01", "shanghaitech", True, 14, 12),
        ("02", "shanghaitech", True, 7, 12),
    ]
    assert first.normal[0].key == "training/frames/01_001/000000.jpg"
    assert table_of(first)[3:8] == [
        ("testing/frames/01_0014/003.jpg", GOOD, 0),
        ("testing/frames/01_0014/004.jpg", "anomaly", 4),
        ("testing/frames/01_0014/005.jpg", "anomaly", 5),
        ("testing/frames/01_0014/006.jpg", "anomaly", 6),
        ("testing/frames/01_0014/007.jpg", GOOD, 0),
    ]


def test_subsampled_frames_keep_their_labels_and_masks(tmp_path: Path) -> None:
    shanghaitech(tmp_path)
    category = open_dataset(tmp_path, every=5)[0]
    assert [image.key.rpartition("frames/")[2] for image in category.normal] == [
        "01_001/000000.jpg",
        "01_001/000005.jpg",
        "01_002/000000.jpg",
        "01_002/000005.jpg",
    ]
    assert [(sample.frame, marked(category, sample)) for sample in category.test] == [(0, 0), (5, 5), (10, 0)]


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    shanghaitech(tmp_path)
    folder = tmp_path / "testing/frames/02_0001"
    for number in range(12):
        (folder / f"{number:03d}.jpg").rename(folder / f"{number}.jpg")
    category = open_dataset(tmp_path)[1]
    assert [sample.path.stem for sample in category.test] == [str(number) for number in range(12)]
    assert [sample.path.stem for sample in category.test if sample.anomalous] == ["4", "5", "6"]


def test_videos_whose_names_tell_no_scene_are_one_category(tmp_path: Path) -> None:
    paint_all(tmp_path / "ped", "training/frames/01/0.jpg", "testing/frames/02/0.jpg", "testing/frames/03/0.jpg")
    for video in ("02", "03"):
        save_rows(tmp_path / f"ped/testing/test_frame_mask/{video}.npy", np.ones(1, bool))
    category = open_one(tmp_path / "ped")
    assert (category.name, category.masks, len(category.test)) == ("ped", False, 2)


# --- any folders -----------------------------------------------------------------------------------------------------


def test_folders(tmp_path: Path) -> None:
    root = tmp_path / "tiles"
    paint_all(root, "fine/b.png", "fine/a.png", "check/a.png", "bad/x.png", "bad/crack/y.jpg", "bad/crack/x.png")
    paint_all(root, "drawn/crack/x.bmp=3", "drawn/crack/y_mask.png=2", "drawn/x.png=1", "drawn/unused.png")
    category = from_folders(root / "fine", root / "bad", root / "drawn", root / "check")
    assert (category.name, category.layout, category.masks) == ("tiles", "folders", True)
    assert [image.key for image in category.normal] == ["normal/a.png", "normal/b.png"]
    assert table_of(category) == [
        ("abnormal/crack/x.png", "crack", 3),
        ("abnormal/crack/y.jpg", "crack", 2),
        ("abnormal/x.png", "abnormal", 1),
        ("test_normal/a.png", GOOD, 0),
    ]


def test_a_fifth_of_the_normal_images_is_held_out(tmp_path: Path) -> None:
    paint_all(tmp_path, *(f"good/{number}.png" for number in range(10)), "bad/0.png")
    category = from_folders(tmp_path / "good", tmp_path / "bad")
    assert not category.masks
    held_out = [sample.key for sample in category.test if not sample.anomalous]
    keys = [image.key for image in category.normal]
    assert (len(keys), len(held_out)) == (8, 2)
    assert {*keys, *held_out} == {f"normal/{number}.png" for number in range(10)}
    assert keys == sorted(keys)
    assert from_folders(tmp_path / "good", tmp_path / "bad") == category
    assert any(from_folders(tmp_path / "good", tmp_path / "bad", seed=seed) != category for seed in range(1, 5))


def test_one_normal_image_cannot_be_split(tmp_path: Path) -> None:
    paint_all(tmp_path, "good/0.png", "bad/0.png")
    with pytest.raises(ImageError, match="expected images to train and to test"):
        from_folders(tmp_path / "good", tmp_path / "bad")


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (("good", "good"), "folders normal and abnormal, found in both"),
        (("all", "all/bad"), "folders normal and abnormal, found in both"),
        (("good", "bad", "bad"), "folders abnormal and masks, found in both"),
        (("good", "bad", None, "good"), "folders normal and test_normal, found in both"),
        (("good", "link"), "folders normal and abnormal, found in both"),
        (("good", "all"), "expected only defects, found a folder good; name that as test_normal"),
        (("good", "missing"), "found nothing there"),
        (("good", "bad", "empty"), "expected a folder with images"),
        (
            ("good", "bad", "other"),
            "expected a mask for each anomalous image, or no masks, found none of abnormal/0.png",
        ),
    ],
)
def test_folders_that_cannot_be(tmp_path: Path, folders: tuple[str | None, ...], said: str) -> None:
    paint_all(tmp_path, "good/0.png", "good/1.png", "bad/0.png", "bad/1.png", "all/bad/2.png", "all/good/2.png")
    paint_all(tmp_path, "other/7.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "good")
    given = [None if folder is None else tmp_path / folder for folder in folders]
    with pytest.raises(ImageError, match=said):
        from_folders(*given)  # type: ignore[arg-type]


# --- telling layouts apart -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_told_or_named(tmp_path: Path, layout: str) -> None:
    BUILDS[layout](tmp_path / "set")
    told = open_dataset(tmp_path / "set")
    assert {category.layout for category in told} == {layout}
    assert open_dataset(str(tmp_path / "set"), layout) == told == open_dataset(tmp_path)


@pytest.mark.parametrize("layout", ["mvtec", "loco", "mvtec_ad_2", "btad"])
def test_several_categories_in_one_folder(tmp_path: Path, layout: str) -> None:
    for name in ("wood", "03", "плитка"):
        BUILDS[layout](tmp_path / name)
    (tmp_path / "license.txt").touch()
    paint_all(tmp_path, ".cache/train/good/1.png", ".cache/test/good/1.png", "pictures/1.png")
    categories = open_dataset(tmp_path)
    assert [category.name for category in categories] == ["03", "wood", "плитка"]
    assert len({str(table_of(category)) for category in categories}) == 1


def test_two_layouts_in_one_category(tmp_path: Path) -> None:
    mvtec(tmp_path)
    paint(tmp_path / "train/ok/0.png")
    said = refusal(tmp_path)
    assert said == f"{tmp_path}: fits several layouts (mvtec: {tmp_path.name}; btad: {tmp_path.name}); " + (
        "name one with layout=NAME"
    )
    assert open_one(tmp_path, "mvtec").layout == "mvtec"


def test_two_layouts_in_one_folder(tmp_path: Path) -> None:
    mvtec(tmp_path / "bottle")
    loco(tmp_path / "box")
    btad(tmp_path / "03")
    assert "fits several layouts (mvtec: bottle; loco: box; btad: 03)" in refusal(tmp_path)
    assert open_one(tmp_path, "btad").name == "03"


def test_no_layout(tmp_path: Path) -> None:
    paint_all(tmp_path, "a/1.png", "b/2.png", "c/3.png", "d/4.png")
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path}: expected a data set")
    for layout, patterns in LAYOUTS.items():
        assert f"{layout}: {patterns[0]}" in said
    assert "found a, b, c and 1 more; for others, name the folders of normal and of abnormal images" in said


def test_named_layout_that_is_not_there(tmp_path: Path) -> None:
    mvtec(tmp_path)
    said = refusal(tmp_path, "btad")
    assert "(btad: train/ok and test), found ground_truth, test, train" in said


def test_no_folder(tmp_path: Path) -> None:
    assert "found nothing" in refusal(tmp_path / "missing")
    assert "found a file" in refusal(paint(tmp_path / "a.png"))


def test_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"layout: expected one of mvtec, .*, found 'MVTec'"):
        open_dataset(tmp_path, "MVTec")


def test_category_that_is_not_complete_is_not_left_out_in_silence(tmp_path: Path) -> None:
    for name in ("bottle", "cable"):
        mvtec(tmp_path / name)
    shutil.rmtree(tmp_path / "cable/test")
    for layout in (None, "mvtec"):
        assert refusal(tmp_path, layout).startswith(f"{tmp_path / 'cable'}: expected train/good and test")


@pytest.mark.parametrize("folder", ["train/good", "test/good"])
def test_category_without_images(tmp_path: Path, folder: str) -> None:
    mvtec(tmp_path)
    for path in ("test/cut", "test/hole", folder):
        for file in (tmp_path / path).iterdir():
            file.unlink()
    assert "expected images to train and to test" in refusal(tmp_path)


def test_test_image_without_a_kind(tmp_path: Path) -> None:
    mvtec(tmp_path)
    stray = paint(tmp_path / "test/003.png")
    assert refusal(tmp_path) == (
        f"{stray}: expected in a folder named after its kind, found beside those; "
        "layout mvtec, guessed from the folders; layout=NAME names another"
    )


@pytest.mark.parametrize(
    ("build", "settings", "said"),
    [
        (mvtec, {"every": 5}, "every: not a setting of the layout mvtec"),
        (shanghaitech, {"seed": 5}, "seed: not a setting of the layout shanghaitech"),
        (shanghaitech, {"every": 0}, "every: expected a whole number >= 1, found 0"),
        (magnetic_tile, {"seed": -1}, "seed: expected a whole number >= 0, found -1"),
        (magnetic_tile, {"sede": 1}, "sede: not a setting"),
    ],
)
def test_settings(tmp_path: Path, build: Build, settings: dict[str, int], said: str) -> None:
    build(tmp_path)
    with pytest.raises(OptionError, match=said):
        open_dataset(tmp_path, **settings)


def test_names_outside_ascii_and_with_dots(tmp_path: Path) -> None:
    root = tmp_path / "größe 1.5"
    paint_all(root, "train/good/磁.瓦.png", "test/трещина/é v1.2.png", "ground_truth/трещина/é v1.2_mask.png=2")
    category = open_one(root)
    assert (category.name, category.normal[0].key) == ("größe 1.5", "train/good/磁.瓦.png")
    assert table_of(category) == [("test/трещина/é v1.2.png", "трещина", 2)]


def test_name_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mvtec(tmp_path / "bottle")
    monkeypatch.chdir(tmp_path / "bottle")
    assert open_one(Path()).name == "bottle"


def test_order_is_that_of_the_keys(tmp_path: Path) -> None:
    for number in (10, 9, 1, 2):  # however the file system lists them
        paint_all(tmp_path, f"train/good/{number}.png", f"test/b/{number}.png", f"test/a/{number}.png")
    category = open_one(tmp_path)
    assert [image.path.stem for image in category.normal] == ["1", "10", "2", "9"]
    keys = [sample.key for sample in category.test]
    assert keys == sorted(keys)


# --- masks -----------------------------------------------------------------------------------------------------------


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


# --- the table of VisA -----------------------------------------------------------------------------------------------


def test_table_with_a_byte_order_mark_and_columns_in_another_order(tmp_path: Path) -> None:
    visa(tmp_path)
    expected = open_dataset(tmp_path)
    write_table(tmp_path, [[*row[::-1], "x"] for row in VISA_ROWS[::-1]], [*VISA_COLUMNS[::-1], "note"], "utf-8-sig")
    assert open_dataset(tmp_path) == expected


def test_table_without_masks(tmp_path: Path) -> None:
    visa(tmp_path)
    unneeded = "candle/Data/Masks/Anomaly/000.png"  # of normal images: not looked at
    write_table(tmp_path, [[*row[:4], unneeded if row[2] == "normal" else ""] for row in VISA_ROWS])
    assert not any(category.masks for category in open_dataset(tmp_path))
    write_table(tmp_path, [*VISA_ROWS[:4], [*VISA_ROWS[4][:4], ""]])
    assert "found none of Data/Images/Anomaly/000.JPG" in refusal(tmp_path)


def test_table_without_some_columns(tmp_path: Path) -> None:
    visa(tmp_path)
    write_table(tmp_path, [row[:3] for row in VISA_ROWS], ["object", "split", "label"])
    assert "expected columns object, split, label, image, mask, found no image, mask" in refusal(tmp_path)
    (tmp_path / "split_csv/1cls.csv").write_text("")
    assert "found no image, label, mask, object, split" in refusal(tmp_path)


@pytest.mark.parametrize("column", [3, 4])
@pytest.mark.parametrize("name", ["candle/missing.png", "candle/nul\0.png", "candle/" + "x" * 300, "candle/Data"])
def test_table_that_names_no_file(tmp_path: Path, column: int, name: str) -> None:
    visa(tmp_path)
    write_table(tmp_path, [*VISA_ROWS[:2], [*VISA_ROWS[2][:column], name, *VISA_ROWS[2][column + 1 :]]])
    said = refusal(tmp_path)
    assert said.startswith(str(tmp_path / "split_csv/1cls.csv"))
    assert "NUL" in said or ("line 4: expected a file" in said and repr(name) in said)


@pytest.mark.parametrize("column", [3, 4])
@pytest.mark.parametrize("name", ["candle/../../secret.png", "candle/link.png", "candle/folder/secret.png"])
def test_table_that_leads_out_of_the_folder(tmp_path: Path, column: int, name: str) -> None:
    visa(tmp_path / "set")
    paint(tmp_path / "secret.png")
    (tmp_path / "set/candle/link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "set/candle/folder").symlink_to(tmp_path)
    rows = [*VISA_ROWS[:2], [*VISA_ROWS[2][:column], name, *VISA_ROWS[2][column + 1 :]]]
    write_table(tmp_path / "set", rows)
    assert f"line 4: expected a file that is inside {tmp_path / 'set'}, found {name!r}" in refusal(tmp_path / "set")


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret.png", "candle/../secret.png", "./candle/x.png"])
def test_table_with_masks_from_elsewhere(tmp_path: Path, name: str) -> None:
    visa(tmp_path / "set")
    paint_all(tmp_path, "secret.png", "set/secret.png", "set/candle/x.png")
    write_table(tmp_path / "set", [[*VISA_ROWS[2][:4], name]])
    assert "line 2: expected a file" in refusal(tmp_path / "set")


@pytest.mark.parametrize("name", ["", ".", "..", "candle/Data", "pcb1"])
def test_table_with_an_object_that_is_not_the_images_folder(tmp_path: Path, name: str) -> None:
    visa(tmp_path)
    write_table(tmp_path, [[name, *VISA_ROWS[0][1:]], *VISA_ROWS[1:]])
    assert f"line 2: expected an image in {name}/ that no other line names" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("split", "label"), [("train", "anomaly"), ("val", "normal"), ("test", "bad"), ("", "normal"), ("Test", "normal")]
)
def test_table_with_other_labels(tmp_path: Path, split: str, label: str) -> None:
    visa(tmp_path)
    write_table(tmp_path, [["candle", split, label, VISA_ROWS[0][3], ""]])
    assert f"line 2: expected train,normal or test,normal or test,anomaly, found {split},{label}" in refusal(tmp_path)


def test_table_that_trains_with_a_test_image(tmp_path: Path) -> None:
    visa(tmp_path)
    write_table(tmp_path, [*VISA_ROWS, ["candle", "test", "normal", VISA_ROWS[0][3], ""]])
    assert f"that no other line names, found {VISA_ROWS[0][3]!r}" in refusal(tmp_path)


def test_table_with_nothing_to_train_with(tmp_path: Path) -> None:
    visa(tmp_path)
    write_table(tmp_path, VISA_ROWS[1:])
    assert "expected images to train and to test candle with, found 0, 2" in refusal(tmp_path)


def test_table_that_is_no_text(tmp_path: Path) -> None:
    visa(tmp_path)
    (tmp_path / "split_csv/1cls.csv").write_bytes(b"object,split,label,image,mask\n\xff\xfe,,,,\n")
    assert "1cls.csv: cannot be read: " in refusal(tmp_path)


def test_table_with_a_short_line(tmp_path: Path) -> None:
    visa(tmp_path)
    write_table(tmp_path, [["candle", "train"]])
    assert "found train," in refusal(tmp_path)


# --- videos ----------------------------------------------------------------------------------------------------------


def test_training_videos_must_be_extracted(tmp_path: Path) -> None:
    shanghaitech(tmp_path)
    shutil.rmtree(tmp_path / "training")
    (tmp_path / "training/videos").mkdir(parents=True)
    (tmp_path / "training/videos/01_001.avi").write_bytes(b"RIFF")
    said = refusal(tmp_path)
    assert "expected training frames in training/frames/VIDEO/, found none" in said
    assert "ffmpeg -i training/videos/VIDEO.avi" in said


def test_scene_without_training_frames(tmp_path: Path) -> None:
    shanghaitech(tmp_path)
    shutil.rmtree(tmp_path / "training/frames/02_001")
    assert "expected images to train and to test 02 with, found 0, 12" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["frame", "pixel"])
def test_as_many_rows_as_frames(tmp_path: Path, kind: str) -> None:
    shanghaitech(tmp_path)
    path = tmp_path / f"testing/test_{kind}_mask/01_0014.npy"
    save_rows(path, np.load(path)[:-1])
    said = refusal(tmp_path)
    assert said.startswith(f"{path}: ")
    assert "12 rows for as many frames, found (11" in said


@pytest.mark.parametrize(
    "rows",
    [np.zeros((12, 1)), np.zeros(()), np.array(["0"] * 12), np.array([None] * 12)],
    ids=["two dimensions", "none", "text", "pickled"],
)
def test_labels_that_are_no_row_of_numbers(tmp_path: Path, rows: np.ndarray) -> None:
    shanghaitech(tmp_path)
    path = save_rows(tmp_path / "testing/test_frame_mask/01_0014.npy", rows)
    assert refusal(tmp_path).startswith(f"{path}: cannot be read: ")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"text"])
def test_damaged_labels(tmp_path: Path, content: bytes) -> None:
    shanghaitech(tmp_path)
    path = tmp_path / "testing/test_frame_mask/01_0014.npy"
    path.write_bytes(content)
    assert refusal(tmp_path).startswith(f"{path}: cannot be read: ")


def test_archive_of_labels(tmp_path: Path) -> None:
    shanghaitech(tmp_path)
    path = tmp_path / "testing/test_frame_mask/01_0014.npy"
    with path.open("wb") as file:
        np.savez(file, labels=np.zeros(12))
    assert refusal(tmp_path).startswith(f"{path}: cannot be read: ")


def test_missing_labels(tmp_path: Path) -> None:
    shanghaitech(tmp_path)
    path = tmp_path / "testing/test_frame_mask/02_0001.npy"
    path.unlink()
    assert refusal(tmp_path).startswith(f"{path}: cannot be read: ")


def test_pixel_masks_of_some_videos_only(tmp_path: Path) -> None:
    shanghaitech(tmp_path)
    (tmp_path / "testing/test_pixel_mask/02_0001.npy").unlink()
    assert "found none of testing/frames/02_0001/004.jpg" in refusal(tmp_path)
    save_rows(tmp_path / "testing/test_frame_mask/02_0001.npy", np.zeros(12, bool))
    assert all(category.masks for category in open_dataset(tmp_path))  # a video without anomalies needs none


def test_pixel_masks_of_another_size(tmp_path: Path) -> None:
    shanghaitech(tmp_path)
    path = save_rows(tmp_path / "testing/test_pixel_mask/01_0014.npy", np.ones((12, 8, 16), np.uint8))
    category = open_dataset(tmp_path)[0]
    with pytest.raises(ImageError, match="expected 16 x 16 pixels, as the image has, found 16 x 8") as caught:
        category.mask_of(category.test[5], SIZE)
    assert str(caught.value).startswith(f"{category.test[5].path}: its mask {path}: ")
