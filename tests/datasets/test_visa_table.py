"""VisA's table of images: its columns, and every line that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from spade_faiss.datasets.layouts import open_dataset
from tests.helpers.datasets import (
    VISA_COLUMNS,
    VISA_ROWS,
    paint,
    paint_all,
    refusal,
    visa,
    write_table,
)


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
