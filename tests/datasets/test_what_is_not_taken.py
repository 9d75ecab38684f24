"""What a labelled set holds and its layout does not take is named: unread formats, parts, second files of a name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spade_faiss.datasets.folders import from_folders
from spade_faiss.datasets.layouts import LAYOUTS, open_dataset
from tests.helpers.command_line import Spade
from tests.helpers.datasets import Build, kolektor_sdd, loco, mvtec, paint, paint_all, real_iad, refusal


@pytest.mark.parametrize("build", [mvtec, loco, kolektor_sdd])
def test_files_in_formats_that_are_not_read_are_counted(tmp_path: Path, build: Build) -> None:
    build(tmp_path)
    for name in ("one.cr2", "two.cr2", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match="passed over") as caught:
        open_dataset(tmp_path)
    said = [str(warning.message) for warning in caught]
    assert said == [f"{tmp_path}: passed over: 2 files in formats that are not read (.cr2)"]


def test_they_are_counted_in_given_folders(tmp_path: Path) -> None:
    paint_all(tmp_path, *(f"good/{number}.png" for number in range(5)), "bad/0.png")
    (tmp_path / "bad/1.heic.dng").touch()
    with pytest.warns(UserWarning, match=r"bad: passed over: 1 file in a format that is not read \(\.dng\)$"):
        from_folders(tmp_path / "good", tmp_path / "bad")


@pytest.mark.parametrize("gone", ["train", "test"])
def test_part_of_a_category_is_not_left_out_in_silence(tmp_path: Path, gone: str) -> None:
    mvtec(tmp_path / "bottle")
    mvtec(tmp_path / "cable")
    shutil.rmtree(tmp_path / "cable" / gone)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'cable'}: expected train/good and test, as beside it")


def test_part_by_a_name_in_another_case(tmp_path: Path) -> None:
    mvtec(tmp_path / "bottle")
    mvtec(tmp_path / "cable")
    (tmp_path / "cable/train").rename(tmp_path / "cable/Train")
    (tmp_path / "cable/test").rename(tmp_path / "cable/Test")
    assert "cable: expected train/good and test, as beside it" in refusal(tmp_path)


@pytest.mark.parametrize(("name", "what"), [("Part0.png", "file of its name"), ("Part0_mask.bmp", "mask of its image")])
def test_second_file_of_one_name(tmp_path: Path, name: str, what: str) -> None:
    kolektor_sdd(tmp_path)
    paint(tmp_path / "kos01" / name)
    said = refusal(tmp_path)
    assert f"expected the only {what}, found" in said
    assert name in said


def test_mask_of_real_iad_that_is_no_text(tmp_path: Path) -> None:
    real_iad(tmp_path)
    path = tmp_path / "realiad_jsons/realiad_jsons/toy.json"
    table = json.loads(path.read_text())
    table["test"][1]["mask_path"] = 3
    path.write_text(json.dumps(table))
    assert refusal(tmp_path).startswith(f"{path}: expected lists train and test")


# --- folders of images without a layout -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("layout", [None, "mvtec", "visa"])
def test_images_without_a_layout_are_counted(tmp_path: Path, count: int, layout: str | None) -> None:
    names = [f"{number}.{suffix}" for number, suffix in enumerate(("png", "JPG", "bmp", "tif", "webp")[:count])]
    paint_all(tmp_path, *names)
    (tmp_path / "notes.txt").touch()
    paint_all(tmp_path, ".hidden.png")
    said = refusal(tmp_path, layout)
    found = {1: "1 image directly in it (0.png)", 3: "3 images directly in it (0.png, 1.JPG, 2.bmp)"}
    assert f", found {found.get(count, '5 images directly in it (0.png, 1.JPG, 2.bmp and 2 more)')}; " in said
    assert f"{layout or 'kolektor_sdd2'}: {' and '.join(LAYOUTS[layout or 'kolektor_sdd2'])}" in said
    assert "images without a layout (Gallery.add_images, build GALLERY FOLDER); for others, " in said


def test_images_beside_folders_without_a_layout_are_counted(tmp_path: Path) -> None:
    paint_all(tmp_path, "0.png", "1.png", "fine/0.png", "odd/0.png")
    assert ", found fine, odd and 2 images directly in it (0.png, 1.png); " in refusal(tmp_path)


@pytest.mark.parametrize("words", [["build", "g", "--dataset"], ["evaluate", "g"], ["evaluate", "g", "--shots", "2"]])
def test_the_command_line_says_what_to_run_instead(tmp_path: Path, words: list[str], spade: Spade) -> None:
    paint_all(tmp_path / "parts", "0.png", "1.png")
    run = spade(*words, tmp_path / "parts")
    assert (run.status, run.out, run.err.count("\n")) == (1, "", 1)
    assert ", found 2 images directly in it (0.png, 1.png); " in run.err
    assert "images without a layout (Gallery.add_images, build GALLERY FOLDER); for others, " in run.err
    assert run.err.endswith("of normal and of abnormal images (from_folders, --normal and --abnormal)\n")


def test_a_data_set_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", denied)
    assert refusal(tmp_path) == f"{tmp_path}: folder cannot be listed: Permission denied"
