"""A tiny labelled data set in every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.datasets.category import Category, Sample
from spade_faiss.datasets.layouts import open_dataset
from spade_faiss.errors import ImageError
from spade_faiss.images.decode import decode
from tests.helpers.images import make_images

SIZE = (16, 16)


Build = Callable[[Path], None]


def paint(path: Path, marked: int = 0, size: tuple[int, int] = SIZE) -> Path:
    """Write a grey image of (height, width) with `marked` pixels of value 255, in the first row."""
    pixels = np.zeros(size, np.uint8)
    pixels[0, :marked] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def paint_all(root: Path, *keys: str) -> None:
    """Write images by their keys; a key with =N at its end is a mask with N pixels marked."""
    for key in keys:
        name, _, marked = key.partition("=")
        paint(root / name, int(marked or 0))


def save_rows(path: Path, rows: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, rows)
    return path


def mvtec(root: Path) -> None:
    paint_all(root, "train/good/000.png", "train/good/001.png", "test/good/000.png", "test/hole/000.png")
    paint_all(root, "test/cut/000.png", "ground_truth/hole/000_mask.png=3", "ground_truth/cut/000_mask.png=5")


def converted_visa(root: Path) -> None:
    paint_all(root, "train/good/0836.JPG", "test/good/0001.JPG", "test/bad/000.JPG", "ground_truth/bad/000.png=4")


def loco(root: Path) -> None:
    paint_all(root, "train/good/000.png", "validation/good/000.png", "test/good/000.png")
    paint_all(root, "test/logical_anomalies/000.png", "test/structural_anomalies/000.png")
    paint_all(root, "ground_truth/structural_anomalies/000/000.png=2", "ground_truth/logical_anomalies/000/001.png=4")
    mask = np.zeros(SIZE, np.uint8)
    mask[9, :3] = 251  # LOCO's values tell the kind of defect
    Image.fromarray(mask).save(root / "ground_truth/logical_anomalies/000/000.png")


def mvtec_ad_2(root: Path) -> None:
    paint_all(root, "train/good/000_regular.png", "validation/good/000_regular.png", "test_private/000_regular.png")
    paint_all(root, "test_public/good/000_regular.png", "test_public/bad/001_overexposed.png")
    paint_all(root, "test_public/ground_truth/bad/001_overexposed_mask.png=6")


def btad(root: Path) -> None:
    paint_all(root, "train/ok/0000.bmp", "test/ok/0001.bmp", "test/ko/0000.bmp", "test/ko/0001.png")
    paint_all(root, "ground_truth/ko/0000.png=2", "ground_truth/ko/0001.bmp=3")


VISA_ROWS = [
    ["candle", "train", "normal", "candle/Data/Images/Normal/0001.JPG", ""],
    ["candle", "test", "normal", "candle/Data/Images/Normal/0000.JPG", ""],
    ["candle", "test", "anomaly", "candle/Data/Images/Anomaly/000.JPG", "candle/Data/Masks/Anomaly/000.png"],
    ["pcb1", "train", "normal", "pcb1/Data/Images/Normal/0000.JPG", ""],
    ["pcb1", "test", "anomaly", "pcb1/Data/Images/Anomaly/000.JPG", "pcb1/Data/Masks/Anomaly/000.png"],
]


VISA_COLUMNS = ["object", "split", "label", "image", "mask"]


def write_table(root: Path, rows: list[list[str]], columns: list[str] = VISA_COLUMNS, encoding: str = "utf-8") -> None:
    path = root / "split_csv/1cls.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(",".join(row) for row in [columns, *rows]) + "\n", encoding=encoding)


def visa(root: Path) -> None:
    write_table(root, VISA_ROWS)
    for *_, image, mask in VISA_ROWS:
        paint(root / image)
        if mask:
            paint(root / mask)
            Image.fromarray(np.eye(16, dtype=np.uint8)).save(root / mask)  # values are 1, 2, ... in VisA


def magnetic_tile(root: Path) -> None:
    for number in range(10):
        paint_all(root, f"MT_Free/Imgs/exp1_num_{number}.jpg", f"MT_Free/Imgs/exp1_num_{number}.png")
    paint_all(root, "MT_Blowhole/Imgs/exp1_num_7.jpg", "MT_Blowhole/Imgs/exp1_num_7.png=7")
    paint_all(root, "MT_Uneven/Imgs/exp1_num_7.jpg", "MT_Uneven/Imgs/exp1_num_7.png=0")


def shanghaitech(root: Path) -> None:
    for video in ("01_001", "01_002", "02_001", "13_001"):
        for number in range(7):
            paint(root / f"training/frames/{video}/{number:06d}.jpg")
    for video in ("01_0014", "02_0001"):
        labels, marks = np.zeros(12, np.uint8), np.zeros((12, *SIZE), np.uint8)
        labels[4:7] = 1
        for row in range(4, 7):
            marks[row, 0, :row] = 1
        for number in range(12):
            paint(root / f"testing/frames/{video}/{number:03d}.jpg")
        save_rows(root / f"testing/test_frame_mask/{video}.npy", labels)
        save_rows(root / f"testing/test_pixel_mask/{video}.npy", marks)


def mvtec_3d(root: Path) -> None:
    paint_all(root, "train/good/rgb/000.png", "train/good/xyz/000.tiff", "validation/good/rgb/000.png")
    paint_all(root, "test/good/rgb/000.png", "test/good/xyz/000.tiff", "test/good/gt/000.png")
    paint_all(root, "test/hole/rgb/000.png", "test/hole/xyz/000.tiff", "test/hole/gt/000.png=3")


def real_iad(root: Path) -> None:
    rows: dict[str, list[dict[str, str | None]]] = {"train": [], "test": []}
    for part, kind, name, mask in (
        ("train", "OK", "OK/S0001/toy_0001_OK_C1.jpg", None),
        ("test", "OK", "OK/S0002/toy_0002_OK_C1.jpg", None),
        ("test", "AK", "NG/AK/S0003/toy_0003_NG_AK_C1.jpg", "NG/AK/S0003/toy_0003_NG_AK_C1.png"),
        ("test", "OK", "NG/AK/S0003/toy_0003_NG_AK_C2.jpg", None),  # the defect is not seen from there
    ):
        rows[part].append({"category": "toy", "anomaly_class": kind, "image_path": name, "mask_path": mask})
        paint_all(root, f"realiad_256/toy/{name}", *([f"realiad_256/toy/{mask}=4"] if mask else []))
    table = root / "realiad_jsons/realiad_jsons/toy.json"
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps({"meta": {"prefix": "toy/", "normal_class": "OK"}, **rows}))


def kolektor_sdd(root: Path) -> None:
    for number in range(10):
        paint_all(root, f"kos01/Part{number}.jpg", f"kos01/Part{number}_label.bmp")
    paint_all(root, "kos02/Part0.jpg", "kos02/Part0_label.bmp=5")


def kolektor_sdd2(root: Path) -> None:
    paint_all(root, "train/10000.png", "train/10000_GT.png", "train/10001.png", "train/10001_GT.png=2")
    paint_all(root, "test/20000.png", "test/20000_GT.png", "test/20001.png", "test/20001_GT.png=3")
    paint_all(root, "train/10000 (copy).png", "train/10000_GT (copy).png")  # the published archive has such a pair


BUILDS: dict[str, Build] = {
    "mvtec": mvtec,
    "loco": loco,
    "mvtec_ad_2": mvtec_ad_2,
    "mvtec_3d": mvtec_3d,
    "btad": btad,
    "visa": visa,
    "real_iad": real_iad,
    "kolektor_sdd": kolektor_sdd,
    "kolektor_sdd2": kolektor_sdd2,
    "magnetic_tile": magnetic_tile,
    "shanghaitech": shanghaitech,
}


def table_of(category: Category) -> list[tuple[str, str, int]]:
    """Each test sample's key, kind, and marked pixels."""
    return [(sample.key, sample.kind, marked(category, sample)) for sample in category.test]


def marked(category: Category, sample: Sample) -> int:
    mask = category.mask_of(sample, decode(sample.path).shape[:2])
    assert mask.shape == SIZE
    assert mask.dtype == bool
    return int(mask.sum())


def open_one(root: Path, layout: str | None = None) -> Category:
    """The one category of a folder."""
    (category,) = open_dataset(root, layout)
    return category


def refusal(path: Path, layout: str | None = None) -> str:
    """What open_dataset says against a folder, in one line."""
    with pytest.raises(ImageError) as caught:
        open_dataset(path, layout)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_set(folder: Path) -> Path:
    """12 normal images, 3 good and 4 defective test images with masks: a white square is the defect."""
    make_images(folder / "train" / "good", 12)
    make_images(folder / "test" / "good", 3, seed=50)
    make_images(folder / "test" / "square", 4, seed=60)
    (folder / "ground_truth" / "square").mkdir(parents=True)
    for number, path in enumerate(sorted((folder / "test" / "square").iterdir())):
        pixels, mask = np.array(Image.open(path)), np.zeros((40, 48), np.uint8)
        mask[8 : 20 + number, 10:30] = 255
        pixels[mask > 0] = 255
        Image.fromarray(pixels).save(path)
        Image.fromarray(mask).save(folder / "ground_truth" / "square" / f"{path.stem}_mask.png")
    return folder


def detector_over(path: Path, dataset: Path) -> sf.Detector:
    """Make a toy gallery of a set's training images, and a detector over it."""
    extractor = sf.load_extractor("toy")
    gallery = sf.Gallery.create(path, extractor.spec)
    gallery.add_images(dataset / "train" / "good", extractor)
    return sf.Detector(gallery, extractor, sf.SearchOptions(k=3), sf.ScoreOptions(image_score="map_max"))
