"""Files that a gallery recomputes its patches from: gone, changed or moved, no other image is taken for one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import spade_faiss as sf
from tests.helpers.galleries import random_features_of
from tests.helpers.images import make_images, write_images
from tests.helpers.recomputed import assert_same_detection, create


def refusal(detector: sf.Detector, query: Path) -> str:
    with pytest.raises(sf.SourceError) as caught:
        detector.query(query)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def swap_for_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swap_for_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)  # reading it would wait for ever


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, "not found"),
    "folder": (swap_for_folder, "not found"),
    "pipe": (swap_for_pipe, "not found"),
    "empty": (lambda path: path.write_bytes(b""), "found an empty file"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not the file that is in the gallery"),
    "another": (lambda path: shutil.copy(path.with_name("005.png"), path), "not the file that is in the gallery"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_what_it_was_is_one_clear_line(
    gallery: sf.Gallery, normal: Path, toy: sf.Extractor, damage: str, tmp_path: Path
) -> None:
    query = shutil.copy(normal / "004.png", tmp_path / "query.png")
    detector = sf.Detector(gallery, toy, sf.SearchOptions(k=1))
    change, reason = DAMAGES[damage]
    change(normal / "004.png")
    said = refusal(detector, query)
    assert said.startswith(f"{normal / '004.png'}: expected the image '004.png', from which {gallery.path} recomputes")
    assert reason in said
    assert "(normal=FOLDER)" in said
    assert "(replace=True)" in said
    assert "remove" in said
    detector.query(normal / "001.png")  # whose neighbour is there
    [problem] = gallery.verify()
    assert (problem.key, problem.file) == ("004.png", str(normal / "004.png"))
    assert problem.message == said
    assert gallery.verify(files=False) == []
    gallery.remove(["004.png"])
    detector.query(query)
    assert gallery.verify() == []


def test_a_folder_that_has_moved_is_found_where_it_is_said_to_be(
    gallery: sf.Gallery, normal: Path, toy: sf.Extractor, queries: list[Path], tmp_path: Path
) -> None:
    search = sf.SearchOptions(k=3)
    expected = sf.Detector(gallery, toy, search).query(queries[0])
    elsewhere = make_images(tmp_path / "elsewhere", 12, seed=123)  # the same names, other images
    moved = normal.rename(tmp_path / "moved")
    assert "not found" in refusal(sf.Detector(gallery, toy, search), queries[0])
    assert "not the file that is" in refusal(sf.Detector(gallery, toy, search, normal=[elsewhere]), queries[0])
    assert len(gallery.verify(normal=[elsewhere])) == 12
    for normals in ([elsewhere, moved], [str(moved)], sf.images.find_images([moved])):
        assert_same_detection(sf.Detector(gallery, toy, search, normal=normals).query(queries[0]), expected)
        assert gallery.verify(normal=normals) == []
        assert gallery.read([2], toy, normal=normals)[0].shape[0] == 1


def test_add_with_replace_remembers_the_new_place(
    gallery: sf.Gallery, normal: Path, toy: sf.Extractor, queries: list[Path], tmp_path: Path
) -> None:
    before, expected = gallery.generation, sf.Detector(gallery, toy).query(queries[0])
    moved = normal.rename(tmp_path / "moved")
    report = gallery.add_images(moved, toy)
    assert (report.added, report.unchanged, report.skipped) == (0, 12, [])  # the content is the same
    assert gallery.generation == before
    report = gallery.add_images(moved, toy, replace=True)
    assert (report.added, report.replaced, report.unchanged) == (12, 12, 0)
    assert gallery.verify() == []
    found = sf.Detector(gallery, toy).query(queries[0])
    assert found.anomaly_map.tobytes() == expected.anomaly_map.tobytes()
    report = gallery.add_images(moved, toy, replace=True)
    assert (report.added, report.unchanged) == (0, 12)


def test_where_patches_are_stored_a_moved_folder_does_not_matter(
    tmp_path: Path, normal: Path, toy: sf.Extractor
) -> None:
    stored = create(tmp_path / "stored", toy, "stored")
    stored.add_images(normal, toy)
    report = stored.add_images(normal.rename(tmp_path / "moved"), toy, replace=True)
    assert (report.added, report.unchanged) == (0, 12)
    assert stored.verify() == []


def test_changed_images_are_taken_with_replace(gallery: sf.Gallery, normal: Path, toy: sf.Extractor) -> None:
    shutil.copy(make_images(normal.parent / "new", 1, seed=99) / "000.png", normal / "004.png")
    assert [skipped.path.name for skipped in gallery.add_images(normal, toy).skipped] == ["004.png"]
    assert len(gallery.verify()) == 1
    report = gallery.add_images(normal, toy, replace=True)
    assert (report.added, report.replaced, report.unchanged) == (1, 1, 11)
    assert gallery.verify() == []
    [key] = sf.Detector(gallery, toy, sf.SearchOptions(k=1)).query(normal / "004.png").neighbours.keys
    assert key == "004.png"


def test_a_relative_source_is_found_from_any_folder(
    tmp_path: Path, normal: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = create(tmp_path / "g", toy)
    monkeypatch.chdir(tmp_path)
    gallery.add_images("normal", toy)
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert gallery.verify() == []
    assert sf.Detector(gallery, toy).query(normal / "001.png").neighbours.keys[0] == "001.png"


def test_what_a_damaged_or_hostile_gallery_names_is_read_as_a_path_only(tmp_path: Path, toy: sf.Extractor) -> None:
    """Whatever it names, a file counts only with the content that the gallery says."""
    secret = write_images(tmp_path / "secret", 1) / "000.png"
    gallery = create(tmp_path / "g", toy)
    digest = "sha256:" + "0" * 64
    with gallery.writer() as writer:
        writer.append(["a"], random_features_of(1, toy.spec), [digest], sources=[str(secret)])
    with pytest.raises(sf.SourceError, match="not the file that is in the gallery"):
        gallery.read([0], toy)
