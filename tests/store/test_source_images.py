"""Normal images are found by key where they were, and no other image is ever shown for one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.images.sources import ImageFile, find_images
from spade_faiss.store.source_images import SourceImages


def test_in_the_folder_that_the_gallery_was_built_from(toy_gallery: sf.Gallery, image_folder: Path) -> None:
    elsewhere = image_folder.parent / "elsewhere"
    for folders in ([image_folder], [elsewhere, image_folder]):
        found = SourceImages(toy_gallery.snapshot(), folders).decode("003.png")
        np.testing.assert_array_equal(found, np.asarray(Image.open(image_folder / "003.png")))


def test_among_files_whose_paths_end_in_the_key(toy_gallery: sf.Gallery, image_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"  # also ends in 003.png, but is another image
    shutil.copytree(image_folder, other)
    shutil.copy(image_folder / "004.png", other / "003.png")
    sources = [
        ImageFile(image.path, f"train/{image.key}") for image in find_images([other]) + find_images([image_folder])
    ]
    found = SourceImages(toy_gallery.snapshot(), files=sources).decode("003.png")
    np.testing.assert_array_equal(found, np.asarray(Image.open(image_folder / "003.png")))


def test_what_is_missing_is_said(toy_gallery: sf.Gallery, image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(sf.ImageError, match=r"^no folder of normal images given$"):
        SourceImages(toy_gallery.snapshot()).decode("003.png")
    with pytest.raises(sf.ImageError, match=r"^not found$"):
        SourceImages(toy_gallery.snapshot(), [tmp_path]).decode("003.png")
    shutil.copy(image_folder / "004.png", image_folder / "003.png")
    with pytest.raises(sf.ImageError, match=r"^not the file that is in the gallery$"):
        SourceImages(toy_gallery.snapshot(), [image_folder]).decode("003.png")


@pytest.mark.parametrize("key", ["../images/000.png", "{tmp}/images/000.png"])
def test_keys_never_lead_out_of_the_folder(tmp_path: Path, image_folder: Path, toy: sf.Extractor, key: str) -> None:
    key = key.format(tmp=tmp_path)
    (tmp_path / "empty").mkdir()
    pixels = np.asarray(Image.open(image_folder / "000.png"))
    gallery = sf.Gallery.create(tmp_path / "hostile.gallery", toy.spec)
    gallery.append([key], toy.extract([toy.spec.view.apply(pixels)]))
    with pytest.raises(sf.ImageError, match=r"^not found$"):
        SourceImages(gallery.snapshot(), [tmp_path / "empty"]).decode(key)


def test_one_that_cannot_be_read_does_not_hide_another(
    toy_gallery: sf.Gallery, image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "003.png").touch()
    found = SourceImages(toy_gallery.snapshot(), [tmp_path / "empty", image_folder]).decode("003.png")
    np.testing.assert_array_equal(found, np.asarray(Image.open(image_folder / "003.png")))
    with pytest.raises(sf.ImageError, match="found an empty file"):
        SourceImages(toy_gallery.snapshot(), [tmp_path / "empty"]).decode("003.png")


def test_features_appended_without_images_are_taken_by_name(
    tmp_path: Path, image_folder: Path, toy: sf.Extractor
) -> None:
    pixels = np.asarray(Image.open(image_folder / "000.png"))
    gallery = sf.Gallery.create(tmp_path / "own.gallery", toy.spec)
    gallery.append(["000.png"], toy.extract([toy.spec.view.apply(pixels)]))
    np.testing.assert_array_equal(SourceImages(gallery.snapshot(), [image_folder]).decode("000.png"), pixels)
