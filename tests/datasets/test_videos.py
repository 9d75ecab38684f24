"""ShanghaiTech's videos: frames, labels of frames and masks of pixels."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from spade_faiss.datasets.layouts import open_dataset
from spade_faiss.errors import ImageError
from tests.helpers.datasets import (
    SIZE,
    refusal,
    save_rows,
    shanghaitech,
)


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
