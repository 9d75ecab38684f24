"""Keys in another Unicode form, as macOS and archives write them, and keys that depend on the sources."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.store.source_images import SourceImages
from spade_faiss.store.trusted import change_trusted, read_trusted

NAME = "Übung größe 1/плитка й.png"


def normalised(form: str) -> str:
    return unicodedata.normalize(form, NAME)


MIXED = unicodedata.normalize("NFC", "Übung größe 1") + "/" + unicodedata.normalize("NFD", "плитка й.png")


def write(folder: Path, key: str, colour: str = "red") -> Path:
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 48), colour).save(path)
    return folder


@pytest.mark.parametrize("stored", [normalised("NFC"), normalised("NFD"), MIXED])
@pytest.mark.parametrize("asked", [normalised("NFC"), normalised("NFD"), MIXED])
def test_a_key_is_found_in_any_form(tmp_path: Path, toy: sf.Extractor, stored: str, asked: str) -> None:
    """Mixed: a folder in NFC with file names of another system (Garmelon/PFERD pull request 141)."""
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec)
    gallery.add_images(write(tmp_path / "one", stored), toy)
    assert gallery.ids([asked]) == [0]
    assert asked in gallery
    report = gallery.add_images(write(tmp_path / "two", asked), toy)  # the same content
    assert (report.added, report.unchanged, gallery.keys()) == (0, 1, [stored])
    report = gallery.add_images(write(tmp_path / "two", asked, "blue"), toy)
    assert (report.added, len(report.skipped)) == (0, 1)
    assert "with other content" in report.skipped[0].reason
    report = gallery.add_images(tmp_path / "two", toy, replace=True)
    assert (report.replaced, gallery.keys()) == (1, [asked])
    assert SourceImages(gallery.snapshot(), [write(tmp_path / "three", stored, "blue")]).decode(asked)[0, 0, 2] == 255
    gallery.remove([stored])
    assert len(gallery) == 0


@pytest.mark.parametrize("stored", [normalised("NFC"), normalised("NFD"), MIXED])
@pytest.mark.parametrize("asked", [normalised("NFC"), normalised("NFD"), MIXED])
def test_trust_ends_in_any_form(tmp_path: Path, toy: sf.Extractor, stored: str, asked: str) -> None:
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec)
    gallery.add_images(write(tmp_path / "one", stored), toy)
    [digest] = gallery.snapshot().digests([0])
    gallery.trust([asked])
    assert read_trusted(gallery.path) == {stored: digest}  # in the gallery's own form
    change_trusted(gallery.path, {asked: digest})  # as an earlier release did
    assert (gallery.trusted(), gallery.info()["trusted"]) == ([stored], 1)
    for key in (asked, *gallery.trusted()):
        gallery.trust([stored])
        gallery.distrust([key])
        assert read_trusted(gallery.path) == {}
        change_trusted(gallery.path, {asked: digest})
    gallery.remove([stored])
    assert read_trusted(gallery.path) == {}


def test_two_keys_of_one_normal_form_stay_two(tmp_path: Path, toy: sf.Extractor) -> None:
    """As a gallery of an earlier release may have them."""
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec)
    keys = [normalised("NFC"), normalised("NFD")]
    views = [
        toy.spec.view.apply(sf.images.decode.decode(write(tmp_path, f"{n}.png", c) / f"{n}.png"))
        for n, c in enumerate(("red", "blue"))
    ]
    gallery.append(keys, toy.extract(views))
    assert gallery.ids(keys) == [0, 1]
    gallery.remove(keys[1:])
    assert gallery.keys() == keys[:1]


def test_the_same_sources_give_the_same_keys(tmp_path: Path, toy: sf.Extractor) -> None:
    one, two = write(tmp_path / "line1", "000.png"), write(tmp_path / "line2", "000.png", "blue")
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec)
    assert gallery.add_images([one, two], toy).added == 2
    assert gallery.add_images([one, two], toy).unchanged == 2
    assert gallery.add_images(tmp_path, toy).unchanged == 2  # the nearest common folder
    assert gallery.keys() == ["line1/000.png", "line2/000.png"]
    [note] = gallery.add_images(one, toy).notes
    assert "is in" in note
    assert "as 'line1/000.png', and would be '000.png' now" in note


def test_a_later_collision_does_not_take_images_twice(tmp_path: Path, toy: sf.Extractor) -> None:
    one, two = write(tmp_path / "line1", "a.png"), write(tmp_path / "line2", "b.png", "blue")
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec)
    gallery.add_images([one, two], toy)
    write(two, "a.png", "green")
    with pytest.raises(sf.ImageError, match=r"it has the image 'a\.png', which would be 'line1/a\.png' now"):
        gallery.add_images([one, two], toy)
    assert gallery.keys() == ["a.png", "b.png"]
