"""Layouts that look alike, the message when the guess is wrong, and the tables of Real-IAD."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spade_faiss.cli.evaluate_command import evaluate
from spade_faiss.cli.messages import with_options
from spade_faiss.datasets.category import GOOD
from spade_faiss.datasets.layouts import open_dataset
from tests.helpers.datasets import BUILDS, loco, mvtec, paint_all, real_iad, refusal, table_of


def cameras(root: Path) -> None:
    """MVTec's layout with a folder for each camera in each kind."""
    for camera in ("cam1", "cam2"):
        paint_all(root, f"train/good/{camera}/000.png", f"test/good/{camera}/000.png", f"test/cut/{camera}/000.png")
        paint_all(root, f"ground_truth/cut/{camera}/000_mask.png=4")


def test_a_folder_for_each_camera_is_not_loco(tmp_path: Path) -> None:
    cameras(tmp_path)
    [category] = open_dataset(tmp_path)
    assert category.layout == "mvtec"
    assert table_of(category) == [
        ("test/cut/cam1/000.png", "cut", 4),
        ("test/cut/cam2/000.png", "cut", 4),
        ("test/good/cam1/000.png", GOOD, 0),
        ("test/good/cam2/000.png", GOOD, 0),
    ]


def test_cameras_beside_loco_are_two_layouts(tmp_path: Path) -> None:
    cameras(tmp_path / "a")
    loco(tmp_path / "b")
    assert "fits several layouts (mvtec: a; loco: b); name one with layout=NAME" in refusal(tmp_path)


@pytest.mark.parametrize("layout", BUILDS)
def test_every_error_of_opening_names_the_layout(tmp_path: Path, layout: str) -> None:
    BUILDS[layout](tmp_path)
    for path in list(tmp_path.rglob("*")):  # no image is left, and no row of labels
        if path.suffix.lower() in (".png", ".jpg", ".bmp", ".npy", ".tiff"):
            path.rename(path.with_name(path.name + ".gone"))
    if layout in ("loco", "kolektor_sdd", "kolektor_sdd2"):  # recognised by their files
        assert "layout" in refusal(tmp_path)
        return
    given = refusal(tmp_path, layout)
    assert given.endswith(f"; layout {layout}, as given") or (layout == "btad" and "train/ok" in given)
    assert refusal(tmp_path).endswith(f"; layout {layout}, guessed from the folders; layout=NAME names another")


def test_the_command_line_names_its_option() -> None:
    said = with_options("x; layout mvtec, guessed from the folders; layout=NAME names another", evaluate)
    assert said == "x; layout mvtec, guessed from the folders; --layout NAME names another"


@pytest.mark.parametrize("key", ["test/OK/0.png", "test/cam1/good/0.png", "test/Normal/0.png"])
def test_defect_free_images_under_another_name_are_not_taken_for_defects(tmp_path: Path, key: str) -> None:
    """Without masks nothing else would tell: they would count as anomalous. BTAD calls them ok."""
    paint_all(tmp_path, "train/good/0.png", "test/cut/0.png", "test/good/1.png", key)
    assert "expected the defect-free test images in test/good/" in refusal(tmp_path)


def test_defect_free_images_under_another_name_in_3d(tmp_path: Path) -> None:
    paint_all(tmp_path, "train/good/rgb/0.png", "test/cut/rgb/0.png", "test/good/rgb/1.png", "test/OK/rgb/0.png")
    assert "expected the defect-free test images in test/good/rgb/, found a folder OK" in refusal(tmp_path)


# --- the tables of Real-IAD ------------------------------------------------------------------------------------------


def test_real_iad(tmp_path: Path) -> None:
    real_iad(tmp_path)
    [category] = open_dataset(tmp_path)
    assert (category.name, category.layout, category.masks) == ("toy", "real_iad", True)
    assert [image.key for image in category.normal] == ["OK/S0001/toy_0001_OK_C1.jpg"]
    assert table_of(category) == [
        ("NG/AK/S0003/toy_0003_NG_AK_C1.jpg", "AK", 4),
        ("NG/AK/S0003/toy_0003_NG_AK_C2.jpg", GOOD, 0),  # by the table, not by its folder
        ("OK/S0002/toy_0002_OK_C1.jpg", GOOD, 0),
    ]
    assert open_dataset(tmp_path / "realiad_256")[0].test == category.test


def test_real_iad_at_two_resolutions(tmp_path: Path) -> None:
    real_iad(tmp_path)
    (tmp_path / "realiad_512").symlink_to(tmp_path / "realiad_256")
    (tmp_path / "realiad_512").unlink()
    paint_all(tmp_path, "realiad_512/toy/OK/S0001/toy_0001_OK_C1.jpg")
    assert "expected toy at one resolution" in refusal(tmp_path)
    assert len(open_dataset(tmp_path / "realiad_256")) == 1


def test_real_iad_with_tables_beside_its_categories(tmp_path: Path) -> None:
    real_iad(tmp_path)
    (tmp_path / "realiad_256/toy").rename(tmp_path / "toy")
    (tmp_path / "realiad_jsons/realiad_jsons/toy.json").rename(tmp_path / "realiad_jsons/toy.json")
    (tmp_path / "realiad_jsons/realiad_jsons").rmdir()
    assert len(open_dataset(tmp_path)[0].test) == 3


def test_categories_of_real_iad_without_images_are_named(tmp_path: Path) -> None:
    real_iad(tmp_path)
    table = tmp_path / "realiad_jsons/realiad_jsons/toy.json"
    (table.parent / "mint.json").write_text(table.read_text().replace("toy/", "mint/"))
    with pytest.warns(UserWarning, match="left out 1 categories without images: mint"):
        assert [category.name for category in open_dataset(tmp_path)] == ["toy"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.pop("test"), "expected lists train and test"),
        (lambda table: table["test"].append("x"), "expected lists train and test"),
        (lambda table: table["test"].append({"anomaly_class": "OK", "image_path": 3}), "expected lists train and test"),
        (lambda table: table["test"][0].update(image_path="OK/none.jpg"), "expected a file in"),
        (lambda table: table["test"][1].update(mask_path="../../../secret.png"), "inside"),
        (lambda table: table["train"][0].update(anomaly_class="AK"), "expected training images of the class OK"),
        (lambda table: table["train"].append(table["test"][0]), "expected each image once"),
    ],
)
def test_tables_that_cannot_be(tmp_path: Path, change: object, said: str) -> None:
    real_iad(tmp_path / "set")
    paint_all(tmp_path, "secret.png", "set/secret.png")
    path = tmp_path / "set/realiad_jsons/realiad_jsons/toy.json"
    table = json.loads(path.read_text())
    change(table)  # type: ignore[operator]
    path.write_text(json.dumps(table))
    found = refusal(tmp_path / "set")
    assert found.startswith(str(path))
    assert said in found


def test_mvtec_is_as_before(tmp_path: Path) -> None:
    mvtec(tmp_path)
    assert open_dataset(tmp_path)[0].layout == "mvtec"
