"""Finding images: which files of a folder are images, and by what names they are known."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from spade_faiss.errors import ImageError
from spade_faiss.images.decode import decode
from spade_faiss.images.passed_over import LOOPS
from spade_faiss.images.sources import find_images


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12)).save(path, "PNG")
    return path


def keys(*sources: Path) -> list[str]:
    return [image.key for image in find_images(sources)]


def test_folder_is_searched_to_any_depth_in_the_order_of_its_keys(tmp_path: Path) -> None:
    expected = ["a.png", "b/c/d/e.png", "b/x.png", "b2.png", "c.png"]
    for key in reversed(expected):
        write(tmp_path / key)
    assert keys(tmp_path) == expected
    assert [image.path for image in find_images([tmp_path])] == [tmp_path / key for key in expected]


def test_hidden_files_and_other_suffixes_are_passed_over(tmp_path: Path) -> None:
    for name in ("a.png", ".hidden.png", ".cache/b.png", "notes.txt", "png", "c.png.bak", "d"):
        write(tmp_path / name)
    assert keys(tmp_path) == ["a.png"]


def test_hidden_source_is_searched(tmp_path: Path) -> None:
    write(tmp_path / ".data/a.png")
    assert keys(tmp_path / ".data") == ["a.png"]


def test_case_of_the_suffix_does_not_matter(tmp_path: Path) -> None:
    names = ["A.JPG", "b.Jpeg", "c.PNG", "d.TIF", "e.tiff", "f.BMP", "g.webp", "h.pgm", "i.PPM"]
    for name in names:
        write(tmp_path / name)
    assert keys(tmp_path) == names


@pytest.mark.parametrize("name", ["one.png", "no suffix", ".hidden.png"])
def test_a_file_named_by_itself_is_taken_whatever_its_name(tmp_path: Path, name: str) -> None:
    assert keys(write(tmp_path / "folder" / name)) == [name]


def test_spaces_and_letters_outside_ascii(tmp_path: Path) -> None:
    path = write(tmp_path / "größe 1" / "плитка 磁瓦 é.png")
    (image,) = find_images([tmp_path])
    assert (image.path, image.key) == (path, "größe 1/плитка 磁瓦 é.png")
    assert decode(image.path).shape == (12, 20, 3)


def test_sources_keep_their_order(tmp_path: Path) -> None:
    write(tmp_path / "z/1.png")
    write(tmp_path / "a/2.png")
    assert keys(tmp_path / "z", tmp_path / "a") == ["1.png", "2.png"]


def test_same_key_from_two_sources_becomes_the_path_from_the_nearest_common_folder(tmp_path: Path) -> None:
    write(tmp_path / "a/part/1.png")
    write(tmp_path / "b/part/1.png")
    assert keys(tmp_path / "a", tmp_path / "b") == ["a/part/1.png", "b/part/1.png"]


def test_missing_source(tmp_path: Path) -> None:
    missing = tmp_path / "not there"
    with pytest.raises(ImageError, match="found nothing there") as caught:
        find_images([write(tmp_path / "a.png"), missing])
    assert str(caught.value).startswith(f"{missing}: ")


def test_folder_without_images(tmp_path: Path) -> None:
    write(tmp_path / "empty/readme.txt")
    write(tmp_path / "full/a.png")
    with pytest.raises(ImageError, match=r"expected a folder with images \(\.bmp .*, found none") as caught:
        find_images([tmp_path / "full", tmp_path / "empty"])
    assert str(caught.value).startswith(f"{tmp_path / 'empty'}: ")


def test_loops_of_links_end(tmp_path: Path) -> None:
    write(tmp_path / "source/a/1.png")
    (tmp_path / "source/a/self").symlink_to(tmp_path / "source/a", target_is_directory=True)
    (tmp_path / "source/a/up").symlink_to(tmp_path / "source", target_is_directory=True)
    (tmp_path / "source/dead").symlink_to(tmp_path / "source/dead")
    assert keys(tmp_path / "source") == ["a/1.png"]


def link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target, target_is_directory=True)


@pytest.mark.parametrize("names", ["ab", "abc", "abcdefgh"])
def test_folders_that_link_to_each_other(tmp_path: Path, names: str) -> None:
    """Every folder links to every other one; the walk would find each image once a way that leads to it."""
    for one in names:
        write(tmp_path / one / f"{one}.png")
        for other in names.replace(one, ""):
            link(tmp_path / one / f"to {other}", tmp_path / other)
    listing = find_images([tmp_path])
    assert [image.key for image in listing] == [f"{one}/{one}.png" for one in names]
    assert listing.passed_over.counts == {LOOPS: len(names) * (len(names) - 1)}


@pytest.mark.parametrize("names", ["ab", "abc", "abcdefgh"])
def test_what_only_links_of_a_circle_lead_to_is_listed_once(tmp_path: Path, names: str) -> None:
    for number, one in enumerate(names):
        write(tmp_path / one / f"{one}.png")
        link(tmp_path / one / "next", tmp_path / names[(number + 1) % len(names)])
    found = [image.path.name for image in find_images([tmp_path / "a"])]
    assert sorted(found) == [f"{one}.png" for one in names]
    assert keys(tmp_path / "a")[:2] == ["a.png", "next/b.png"]


def test_link_to_a_folder_above_the_source(tmp_path: Path) -> None:
    write(tmp_path / "set/source/1.png")
    write(tmp_path / "set/other/2.png")
    link(tmp_path / "set/source/up", tmp_path / "set")
    assert keys(tmp_path / "set/source") == ["1.png", "up/other/2.png"]
    link(tmp_path / "set/source/deeper/up", tmp_path / "set/other")
    assert keys(tmp_path / "set/source") == ["1.png", "deeper/up/2.png"]  # what the circle leads to is there already


def test_two_links_to_a_folder_are_two_names_of_it(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/1.png")
    for name in ("a", "b", "c/d"):
        link(tmp_path / "source" / name, tmp_path / "elsewhere")
    write(tmp_path / "source/e/2.png")
    link(tmp_path / "source/f", tmp_path / "source/e")
    assert keys(tmp_path / "source") == ["a/1.png", "b/1.png", "c/d/1.png", "e/2.png", "f/2.png"]


def test_linked_folders_and_files_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/1.png")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "source/2.png").symlink_to(tmp_path / "elsewhere/1.png")
    assert keys(tmp_path / "source") == ["2.png", "link/1.png"]


def test_link_to_a_folder_beside_it_does_not_hide_that_folder(tmp_path: Path) -> None:
    # File systems list in any order: twelve pairs, so that some link comes before its folder.
    folders = [f"folder {number}" for number in range(12)]
    for number, folder in enumerate(folders):
        write(tmp_path / folder / "1.png")
        (tmp_path / f"link {number}").symlink_to(tmp_path / folder, target_is_directory=True)
    assert {f"{folder}/1.png" for folder in folders} <= set(keys(tmp_path))
