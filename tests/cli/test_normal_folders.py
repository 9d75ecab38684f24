"""--normal: a folder that cannot help is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import spade_faiss as sf
from spade_faiss.store import source_images
from spade_faiss.store.source_images import SourceImages
from tests.helpers.command_line import TOY, Spade
from tests.helpers.images import make_images

NO_EFFECT = "note: --normal has no effect: "
NONE = "expected files of the images in "


@pytest.fixture
def recomputed(tmp_path: Path, normal: Path, spade: Spade) -> Path:
    assert spade("build", tmp_path / "re.gallery", normal, *TOY, "--patches", "recompute").status == 0
    return tmp_path / "re.gallery"


def test_where_nothing_reads_the_files(tmp_path: Path, gallery: Path, normal: Path, spade: Spade) -> None:
    out = ("--output", tmp_path / "out")
    query = ("query", gallery, normal / "000.png", "-k", 2, "--normal", normal)
    for words in (query, (*query, *out, "--no-report"), ("audit", gallery, "-k", 2, "--top", 1, "--normal", normal)):
        run = spade(*words)
        assert run.status == 0
        assert run.err.count(NO_EFFECT) == 1
        assert NO_EFFECT not in spade(*words, "--quiet").err
    assert NO_EFFECT in spade("verify", gallery, "--normal", normal).err
    for words in ((*query, *out), ("verify", gallery, "--normal", normal, "--repair")):
        run = spade(*words)
        assert run.status == 0
        assert "--normal" not in run.err


def other_folders(tmp_path: Path, normal: Path) -> list[Path]:
    """Return folders that hold none of the images: an empty one, the folder above, other images of the same names."""
    empty, above = tmp_path / "empty", tmp_path / "above"
    empty.mkdir()
    shutil.copytree(normal, above / "normal")
    return [empty, above, make_images(tmp_path / "same names", 12, seed=9)]


def test_a_wrong_folder_is_named(tmp_path: Path, recomputed: Path, normal: Path, spade: Spade) -> None:
    commands = (("query", recomputed, normal / "000.png", "-k", 2), ("verify", recomputed))
    for folder in other_folders(tmp_path, normal):
        for words in commands:
            run = spade(*words, "--normal", folder)
            assert run.status == 0  # the files are where the gallery keeps that they are
            assert f"note: --normal {folder}: {NONE}{recomputed}, found none" in run.err
    for words in commands:
        assert "--normal" not in spade(*words, "--normal", normal).err


def test_a_report_without_pictures_says_so(tmp_path: Path, gallery: Path, normal: Path, spade: Spade) -> None:
    query = ("query", gallery, normal / "000.png", "-k", 2, "--quiet")
    for number, folder in enumerate(other_folders(tmp_path, normal)):
        run = spade(*query, "--output", tmp_path / f"out{number}", "--normal", normal, "--normal", folder)
        assert run.err.count(NONE) == 1
        assert str(folder) in run.err


@pytest.mark.parametrize("drawn", [1, 2, 200])
def test_few_of_many_are_found(tmp_path: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch, drawn: int) -> None:
    """Those that are drawn need not be those that the folder has."""
    many = make_images(tmp_path / "many", 30)
    with sf.Gallery.create(tmp_path / "g", toy.spec) as gallery:
        gallery.add_images(many, toy)
        originals = SourceImages(gallery.snapshot())
        monkeypatch.setattr(source_images, "DRAWN", drawn)
        few = tmp_path / "few"
        few.mkdir()
        assert originals.is_any_in(few) is False
        shutil.copy(many / "017.png", few / "018.png")
        assert originals.is_any_in(few) is False  # of this name there is another
        shutil.copy(many / "017.png", few / "017.png")
        assert originals.is_any_in(few) is True
        monkeypatch.setattr(source_images, "LISTED", 0)
        assert originals.is_any_in(few) is (True if drawn == 200 else None)
