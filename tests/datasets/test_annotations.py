"""Masks, labels and depth maps beside photos: read where the layout is known, else named, never taken as images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spade_faiss.datasets.category import GOOD
from spade_faiss.datasets.folders import from_folders
from spade_faiss.datasets.layouts import open_dataset
from spade_faiss.errors import ImageError
from tests.helpers.datasets import mvtec, paint, paint_all


def photo(path: Path, seed: int = 0) -> Path:
    """Write a 16 x 16 picture of many values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def photos(root: Path, *keys: str) -> None:
    for seed, key in enumerate(keys):
        photo(root / key, seed)


def marked(category_of: object, key: str) -> int:
    """How many pixels the mask of a test image marks."""
    category = category_of
    [sample] = [one for one in category.test if one.key == key]  # type: ignore[attr-defined]
    return int(category.mask_of(sample, (16, 16)).sum())  # type: ignore[attr-defined]


def refusal(*folders: Path | None) -> str:
    with pytest.raises(ImageError) as caught:
        from_folders(*folders)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Photos without and with defects, and no annotation."""
    photos(tmp_path, *(f"good/{number}.png" for number in range(5)), "bad/0.jpg", "bad/1.jpg")
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "0_GT.png",
        "0_gt.bmp",
        "0_mask.png",
        "0-mask.jpg",
        "0_label.bmp",
        "0_mask_1.png",
        "mask_0.png",
        "0_depth.tiff",
        "0.png",  # KolektorSDD, Magnetic Tile: N.jpg and mask N.png
        "gt/9.png",
        "masks/0.png",
        "ground_truth/0.png",
        "kind/GT/0.png",
        "depth/0.png",
        "xyz/0.tiff",
        "9_GT.png",  # the photo is elsewhere, but so few values has no photo
    ],
)
@pytest.mark.parametrize("role", ["good", "bad"])
def test_annotations_among_photos_are_named(root: Path, role: str, name: str) -> None:
    photo(root / role / "0.jpg")
    (root / "good/0.png").unlink(missing_ok=True)
    path = paint(root / role / name, 7)
    total = len([file for file in (root / role).rglob("*") if file.is_file()])
    said = refusal(root / "good", root / "bad")
    assert said.startswith(f"{root / role}: expected photos, found 1 of {total} images to be annotations")
    assert str(path) in said
    assert "masks=FOLDER" in said


def test_many_are_counted_and_three_are_named(root: Path) -> None:
    photos(root, *(f"bad/{number}.jpg" for number in range(9)))
    paint_all(root, *(f"bad/{number}_GT.png=3" for number in range(9)))
    said = refusal(root / "good", root / "bad")
    assert "found 9 of 18 images" in said
    assert "0_GT.png" in said
    assert said.count("_GT.png") == 3
    assert "and 6 more" in said


def test_photos_with_such_words_in_their_names_are_photos(root: Path) -> None:
    """A bottle's label, a mask to wear: words alone are no evidence."""
    photos(root, "good/bottle_label.png", "good/n95_mask.png", "good/label_7.jpg", "bad/unmask/gtx.png")
    category = from_folders(root / "good", root / "bad")
    assert len(category.normal) + sum(not sample.anomalous for sample in category.test) == 8
    assert [sample.key for sample in category.test if sample.anomalous][-1] == "abnormal/unmask/gtx.png"


def test_two_photos_of_one_name_are_photos(root: Path) -> None:
    photos(root, "bad/0.bmp", "bad/0.png")
    assert len([one for one in from_folders(root / "good", root / "bad").test if one.anomalous]) == 4


def test_label_pictures_and_depth_maps_of_a_photos_name(root: Path) -> None:
    labels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) // 64)
    labels.save(root / "bad/0.png")
    Image.fromarray(np.linspace(0, 9, 256, dtype=np.float32).reshape(16, 16)).save(root / "bad/1.tiff")
    said = refusal(root / "good", root / "bad")
    assert "found 2 of 4 images" in said
    assert "0.png" in said
    assert "1.tiff" in said


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        ("bad/crack/x_GT.png", "bad"),
        ("bad/crack/x.png", "bad"),
        ("bad/crack/gt/x.png", "bad"),
        ("bad/gt/crack/x.png", "bad/gt"),
        ("bad/drawn/crack/x.png", "bad/drawn"),
        ("bad/crack/masks/x_mask.png", "bad"),
        ("bad/crack/x_label_2.bmp", "."),
        ("bad/crack/masks/x.png", "bad/crack/masks"),
    ],
)
def test_masks_beside_photos_are_masks_where_they_are_named(tmp_path: Path, mask: str, named: str) -> None:
    """anomalib issue 659: a folder of images/ beside masks/ in one folder of anomalous images."""
    photos(tmp_path, *(f"good/{number}.png" for number in range(5)))
    photo(tmp_path / "bad/crack" / ("rgb" if "/gt/x" in mask and named == "bad" else "") / "x.jpg")
    paint(tmp_path / mask, 7)
    category = from_folders(tmp_path / "good", tmp_path / "bad", tmp_path / named)
    [sample] = [one for one in category.test if one.anomalous]
    assert (sample.path.name, sample.kind, sample.mask) == ("x.jpg", "crack", tmp_path / mask)
    assert marked(category, sample.key) == 7


def test_depth_maps_are_no_masks(tmp_path: Path) -> None:
    photos(tmp_path, *(f"good/{number}.png" for number in range(5)), "bad/crack/rgb/x.png")
    paint_all(tmp_path, "bad/crack/gt/x.png=7", "bad/crack/xyz/x.tiff", "bad/crack/depth/x.png=3")
    category = from_folders(tmp_path / "good", tmp_path / "bad", tmp_path / "bad")
    assert marked(category, "abnormal/crack/rgb/x.png") == 7


@pytest.mark.parametrize("key", ["train/good/000_mask.png", "test/hole/000_GT.png", "test/hole/gt/000.png"])
@pytest.mark.parametrize("layout", [None, "mvtec"])
def test_annotations_in_a_known_layout_are_named(tmp_path: Path, key: str, layout: str | None) -> None:
    mvtec(tmp_path)
    path = paint(tmp_path / key, 3)
    with pytest.raises(ImageError) as caught:
        open_dataset(tmp_path, layout)
    said = str(caught.value)
    assert f"expected photos, found 1 of {2 + key.startswith('test') + 1} images to be annotations" in said
    assert str(path) in said


# --- layouts that have annotations beside photos ---------------------------------------------------------------------


@pytest.mark.parametrize("truth", ["gt", "ground_truth"])
def test_mvtec_3d_and_3d_adam(tmp_path: Path, truth: str) -> None:
    """MVTec 3D-AD has gt/; 3D-ADAM in the form that anomalib reads (data/datasets/depth/adam_3d.py) ground_truth/."""
    paint_all(tmp_path, "train/good/rgb/0.png", "train/good/xyz/0.tiff", f"train/good/{truth}/0.png")
    paint_all(tmp_path, "test/good/rgb/1.png", "test/good/xyz/1.tiff", f"test/good/{truth}/1.png")
    paint_all(tmp_path, "test/cut/rgb/2.png", "test/cut/xyz/2.tiff", f"test/cut/{truth}/2.png=5")
    [category] = open_dataset(tmp_path)
    assert category.layout == "mvtec_3d"
    assert [image.key for image in category.normal] == ["train/good/rgb/0.png"]
    assert [(one.key, one.kind) for one in category.test] == [
        ("test/cut/rgb/2.png", "cut"),
        ("test/good/rgb/1.png", GOOD),
    ]
    assert marked(category, "test/cut/rgb/2.png") == 5


@pytest.mark.parametrize("stray", ["test/3.png", "test/cut/3.png"])
def test_a_stray_image_in_mvtec_3d_is_named(tmp_path: Path, stray: str) -> None:
    paint_all(tmp_path, "train/good/rgb/0.png", "test/good/rgb/1.png", "test/cut/rgb/2.png", "test/cut/gt/2.png=5")
    paint_all(tmp_path, stray)
    with pytest.raises(ImageError, match=f"{stray}: expected in a folder as test/KIND/rgb/, found in"):
        open_dataset(tmp_path, "mvtec_3d")


def test_mpdd_is_mvtec(tmp_path: Path) -> None:
    """MPDD (github.com/stepanje/MPDD): bracket_black/train/good/000.png, ground_truth/hole/000_mask.png."""
    mvtec(tmp_path / "bracket_black")
    [category] = open_dataset(tmp_path)
    assert (category.name, category.layout, category.masks) == ("bracket_black", "mvtec", True)


def test_kolektor_sdd2_tells_normal_images_by_their_masks(tmp_path: Path) -> None:
    """Its archive also holds 10301 (copy).png and 10301_GT (copy).png, which loaders of it leave out by name."""
    paint_all(tmp_path, "train/10000.png", "train/10000_GT.png", "train/10301.png", "train/10301_GT.png=2")
    paint_all(tmp_path, "train/10301 (copy).png", "train/10301_GT (copy).png=2")
    paint_all(tmp_path, "test/20000.png", "test/20000_GT.png", "test/20001.png", "test/20001_GT.png=3")
    [category] = open_dataset(tmp_path)
    assert [image.key for image in category.normal] == ["train/10000.png"]
    assert [(one.key, one.kind) for one in category.test] == [("test/20000.png", GOOD), ("test/20001.png", "defect")]
    assert marked(category, "test/20001.png") == 3
    (tmp_path / "test/20000_GT.png").unlink()
    with pytest.raises(ImageError, match=r"20000\.png: expected a mask beside each image.*layout kolektor_sdd2"):
        open_dataset(tmp_path)


def test_kolektor_sdd_draws_its_training_images(tmp_path: Path) -> None:
    for number in range(10):
        paint_all(tmp_path, f"kos01/Part{number}.jpg", f"kos01/Part{number}_label.bmp")
    paint_all(tmp_path, "kos02/Part0.jpg", "kos02/Part0_label.bmp=5")
    [category] = open_dataset(tmp_path, seed=1)
    assert len(category.normal) == 8
    assert sorted(one.kind for one in category.test) == ["defect", GOOD, GOOD]
    assert not any("label" in one.key for one in [*category.normal, *category.test])


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (("audiojack/OK/S0001/a.jpg", "audiojack/NG/QS/S0002/b.jpg"), "Real-IAD without its tables"),
        (("1M3_D_Good/MechMind-Nano/rgb/0.png", "1M3_D_Cut/MechMind-LSRL/rgb/0.png"), "3D-ADAM as published"),
        (("Class1/Train/0576.PNG", "Class1/Train/Label/0576_label.PNG"), "DAGM 2007"),
        (("Candy/train/data/000_image_0.png", "Candy/train/data/000_mask.png"), "Eyecandies"),
    ],
)
def test_sets_that_are_not_read_are_refused_by_name(tmp_path: Path, keys: tuple[str, ...], name: str) -> None:
    """DAGM 2007 and Eyecandies, from their public descriptions, keep masks beside photos as well."""
    paint_all(tmp_path, *keys)
    with pytest.raises(ImageError, match=f"found .*{name}"):
        open_dataset(tmp_path)
