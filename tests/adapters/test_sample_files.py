"""Samples and images are matched by the places of files, or by name and content: files of one name are told apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import spade_faiss as sf
from spade_faiss.adapters.sample_files import by_content, by_place
from tests.helpers.images import make_images


def test_a_key_is_the_place_in_the_folder(tmp_path: Path) -> None:
    files = {"1": str(tmp_path / "new" / "a" / "000.png"), "2": str(tmp_path / "old" / "a" / "000.png")}
    assert by_place(files, tmp_path / "new") == {"1": "a/000.png"}
    (tmp_path / "link").symlink_to(tmp_path / "old")
    assert by_place(files, tmp_path / "link") == {"2": "a/000.png"}


def test_content_tells_files_of_one_name_apart(tmp_path: Path, toy: sf.Extractor) -> None:
    normal, other = make_images(tmp_path / "normal", 3), make_images(tmp_path / "test" / "normal", 3, seed=1)
    shutil.copy(normal / "000.png", tmp_path / "copy.png")
    copy = shutil.copytree(normal, tmp_path / "moved")
    files = {str(path.relative_to(tmp_path)): str(path) for path in sorted(tmp_path.rglob("*.png"))}
    with sf.Gallery.create(tmp_path / "toy.gallery", toy.spec) as gallery:
        gallery.add_images(normal, toy)
        gallery.remove(["002.png"])
        found = by_content(files, gallery.snapshot(), "root")
        names = dict(zip(found, gallery.keys(list(found.values())), strict=True))
    assert names == {f"{folder.name}/{name}": name for folder in (copy, normal) for name in ("000.png", "001.png")}
    assert other.exists()
