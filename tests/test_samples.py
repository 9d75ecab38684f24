"""The sample set: its layout, the script that draws it, and that a plain pixel difference cannot solve it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

DATA = Path(__file__).resolve().parents[1] / "data"
SAMPLES = DATA / "samples"
DEFECTS = ("loose_thread", "misweave", "smudge")


def read(path: Path, mode: str = "RGB") -> NDArray[np.int32]:
    with Image.open(path) as image:
        assert image.mode == mode
        return np.asarray(image, dtype=np.int32)


def auroc(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """Chance that a positive scores above a negative, ties counted half."""
    positive = scores[labels]
    negative = np.sort(scores[~labels])
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.mean() / 2 / negative.size)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """``data/make_samples.py``, which no package holds, as a module."""
    name = "make_samples"
    spec = importlib.util.spec_from_file_location(name, DATA / "make_samples.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def pixel_difference() -> tuple[NDArray[np.bool_], dict[str, NDArray[np.float64]]]:
    """Masks of the test images, and their squared difference from the normal images in two readings."""
    train = [read(path) for path in sorted((SAMPLES / "train/good").glob("*.jpg"))]
    masks, closest_pixel, closest_image = [], [], []
    for path in sorted((SAMPLES / "test").glob("*/*.jpg")):
        image = read(path)
        differences = [((image - normal) ** 2).sum(axis=-1) for normal in train]
        closest_pixel.append(np.minimum.reduce(differences))
        closest_image.append(min(differences, key=lambda difference: difference.mean()))
        mask = SAMPLES / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        masks.append(read(mask, "L") > 0 if mask.exists() else np.zeros(image.shape[:2], dtype=bool))
    maps = {"closest pixel": np.stack(closest_pixel), "closest image": np.stack(closest_image)}
    return np.stack(masks), {name: stack.astype(np.float64) for name, stack in maps.items()}


def test_layout_is_the_one_of_mvtec_ad() -> None:
    expected = {f"train/good/{number:03d}.jpg" for number in range(40)}
    expected |= {f"test/{kind}/{number:03d}.jpg" for kind in ("good", *DEFECTS) for number in range(3)}
    expected |= {f"ground_truth/{kind}/{number:03d}_mask.png" for kind in DEFECTS for number in range(3)}
    found = {path.relative_to(SAMPLES).as_posix() for path in SAMPLES.rglob("*") if path.is_file()}
    assert found == expected


def test_photographs_are_rgb_and_of_one_size() -> None:
    assert {read(path).shape for path in SAMPLES.rglob("*.jpg")} == {(256, 256, 3)}


def test_set_stays_small() -> None:
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < 3_000_000


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_has_a_mask_of_its_size(defect: str) -> None:
    for path in sorted((SAMPLES / "test" / defect).iterdir()):
        mask = read(SAMPLES / "ground_truth" / defect / f"{path.stem}_mask.png", "L")
        assert mask.shape == read(path).shape[:2]
        assert set(np.unique(mask)) == {0, 255}
        assert 0.005 < (mask > 0).mean() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "kind", "number"),
    [
        ("train/good", 0, 39),
        ("test/good", 1, 0),
        ("test/loose_thread", 2, 1),
        ("test/misweave", 3, 2),
        ("test/smudge", 4, 0),
    ],
)
def test_script_draws_the_committed_pieces(
    script: ModuleType, tmp_path: Path, folder: str, kind: int, number: int
) -> None:
    defect = folder.split("/")[1]
    pixels, mask = script.render((script.SEED, kind, number), defect)
    script.save(pixels, tmp_path / "drawn.jpg")
    # Another numpy rounds a sine otherwise, another JPEG encoder a coefficient: a few grey levels at most.
    off = np.abs(read(tmp_path / "drawn.jpg") - read(SAMPLES / folder / f"{number:03d}.jpg"))
    assert off.mean() < 0.5
    assert np.quantile(off, 0.999) <= 8
    if defect == "good":
        assert not mask.any()
    else:
        committed = read(SAMPLES / "ground_truth" / defect / f"{number:03d}_mask.png", "L")
        assert (mask != committed).mean() < 1e-3


def test_script_names_the_committed_files(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blank = np.zeros((8, 8), dtype=np.uint8)
    monkeypatch.setattr(script, "render", lambda seed, defect: (blank, blank))
    written = script.write_samples(tmp_path)
    assert {path.relative_to(tmp_path) for path in written} == {
        path.relative_to(SAMPLES) for path in SAMPLES.rglob("*") if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["closest pixel", "closest image"])
def test_pixel_difference_finds_neither_images_nor_pixels(
    pixel_difference: tuple[NDArray[np.bool_], dict[str, NDArray[np.float64]]], reading: str
) -> None:
    masks, maps = pixel_difference
    stack = maps[reading]
    defective = masks.any(axis=(1, 2))
    assert auroc(defective, np.quantile(stack, 0.999, axis=(1, 2))) <= 0.7
    assert auroc(defective, stack.max(axis=(1, 2))) <= 0.7
    assert auroc(defective, stack.mean(axis=(1, 2))) <= 0.7
    assert auroc(masks[defective].ravel(), stack[defective].ravel()) < 0.65
