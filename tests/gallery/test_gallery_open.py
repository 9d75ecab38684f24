"""Opening or creating a gallery, loading the extractor that made it, what a repair needs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.gallery import creation
from spade_faiss.gallery.info import info_of, recipe_of
from spade_faiss.store.manifest import Manifest
from tests.helpers.galleries import OWN, random_features_of
from tests.helpers.images import write_images


def test_it_is_created_once_and_then_opened(tmp_path: Path, toy: sf.Extractor) -> None:
    images = write_images(tmp_path / "images", 3)
    for created in (True, False):
        with sf.Gallery.open_or_create(
            tmp_path / "g", toy.spec, sf.IndexOptions("flat", device="cpu"), 12345, "paper", "recompute"
        ) as gallery:
            assert gallery.created is created
            gallery.add_images(images, toy)
    manifest = gallery.snapshot().manifest
    assert (manifest.rows, manifest.shard_bytes, manifest.recipe, manifest.patches) == (3, 12345, "paper", "recompute")
    assert manifest.index_options == sf.IndexOptions("flat", device="cpu")
    assert not sf.Gallery.open(tmp_path / "g").created


def test_what_is_not_said_is_as_it_is(tmp_path: Path, toy: sf.Extractor) -> None:
    assert sf.Gallery.open_or_create(tmp_path / "plain", toy.spec).patches == "stored"
    sf.Gallery.create(tmp_path / "g", toy.spec, recipe="robust", patches="recompute")
    gallery = sf.Gallery.open_or_create(tmp_path / "g", toy.spec)
    assert gallery.recipe == sf.RECIPES["robust"]
    assert gallery.patches == "recompute"


def test_one_line_names_both_values(tmp_path: Path, toy: sf.Extractor) -> None:
    path = tmp_path / "g"
    sf.Gallery.create(path, toy.spec, recipe="paper")
    sf.Gallery.create(tmp_path / "none", toy.spec)
    with pytest.raises(sf.SpecMismatchError, match=r"name: expected toy, found own"):
        sf.Gallery.open_or_create(path, OWN)
    with pytest.raises(sf.OptionError, match=f"^{path}: expected its own recipe, paper, found robust$"):
        sf.Gallery.open_or_create(path, toy.spec, recipe="robust")
    with pytest.raises(sf.OptionError, match=r"none: expected its own recipe, none, found robust$"):
        sf.Gallery.open_or_create(tmp_path / "none", toy.spec, recipe="robust")
    with pytest.raises(
        sf.OptionError, match="expected paper or robust or relative or sharp or wary or rad, found 'bogus'"
    ):
        sf.Gallery.open_or_create(path, toy.spec, recipe="bogus")
    with pytest.raises(sf.OptionError, match=f"^{path}: expected patches as it has them, stored, found recompute$"):
        sf.Gallery.open_or_create(path, toy.spec, patches="recompute")


def test_what_cannot_be_created_leaves_nothing(tmp_path: Path, toy: sf.Extractor) -> None:
    with pytest.raises(sf.OptionError, match="FAISS factory string"):
        sf.Gallery.open_or_create(tmp_path / "g", toy.spec, "Bogus")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(sf.GalleryError, match="found something"):
        sf.Gallery.open_or_create(tmp_path / "taken", toy.spec)
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "file"]


def test_another_that_creates_it_meanwhile(tmp_path: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look whether there is one and the making of it."""
    create, others = sf.Gallery.create, []

    def slow(path: Path, *rest: object) -> sf.Gallery:
        others.append(create(path, toy.spec))
        others[0].append(["000"], toy.extract([np.zeros((32, 32, 3), np.uint8)]))
        return create(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sf.Gallery, "create", slow)
    gallery = sf.Gallery.open_or_create(tmp_path / "g", toy.spec)
    assert (gallery.created, len(gallery)) == (False, 1)


def test_many_at_once(tmp_path: Path, toy: sf.Extractor) -> None:
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(sf.Gallery.open_or_create, tmp_path / "g", toy.spec, timeout=10) for _ in range(6)]
        galleries = [future.result() for future in futures]
    assert sorted(gallery.created for gallery in galleries) == [False] * 5 + [True]


def test_the_extractor_that_made_it(toy_gallery: sf.Gallery, tmp_path: Path) -> None:
    extractor = toy_gallery.load_extractor(batch_size=3)
    assert (extractor.spec, extractor.batch_size) == (toy_gallery.spec, 3)
    with sf.Gallery.create(
        tmp_path / "g", sf.load_extractor("toy", options=sf.FeatureOptions(image_size=64)).spec
    ) as g:
        assert g.load_extractor().spec.resized == (64, 64)
    with (
        sf.Gallery.create(tmp_path / "own", OWN) as own,
        pytest.raises(sf.OptionError, match=r"extractor: .*found 'own'"),
    ):
        own.load_extractor()


def test_an_extractor_that_is_another_now_is_refused(toy_gallery: sf.Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file of other weights."""
    other = sf.load_extractor("toy", options=sf.FeatureOptions(image_size=64))
    monkeypatch.setattr("spade_faiss.gallery.reader.load_extractor", lambda *_: other)
    with pytest.raises(sf.SpecMismatchError, match=r"resized: expected \(32, 32\), found \(64, 64\)"):
        toy_gallery.load_extractor()


def test_what_a_repair_needs(tmp_path: Path, toy: sf.Extractor, toy_gallery: sf.Gallery) -> None:
    image, index = sf.Problem("shards/000000.h5", "damaged", "000.png"), sf.Problem("index/image.faiss", "damaged")
    assert not toy_gallery.needs_extractor([])
    assert not toy_gallery.needs_extractor([image])  # nobody knows where the files are
    assert not toy_gallery.needs_extractor([index], ["folder"])
    assert toy_gallery.needs_extractor([index, image], ["folder"])
    recomputed = sf.Gallery.create(tmp_path / "r", toy.spec, patches="recompute")
    assert recomputed.needs_extractor([image])
    assert not recomputed.needs_extractor([index])
    own = sf.Gallery.create(tmp_path / "own", OWN)
    assert not own.needs_extractor([image], ["folder"])  # not made from images
    assert image.what == image.message


def test_it_shows_what_it_is(tmp_path: Path) -> None:
    gallery = sf.Gallery.create(tmp_path / "own.gallery", OWN, "flat")
    gallery.append(["a", "b", "c"], random_features_of(3))
    gallery.remove(["b"])
    assert repr(gallery) == f"Gallery('{tmp_path / 'own.gallery'}', 2 images, own, generation {gallery.generation})"


def test_a_recipe_of_a_later_release(tmp_path: Path, toy: sf.Extractor) -> None:
    manifest = Manifest(toy.spec, sf.IndexOptions(), creation.SHARD_BYTES["stored"], recipe="later")
    with pytest.raises(
        sf.GalleryError,
        match="paper or robust or relative or sharp or wary or rad, found 'later'; query it with that release",
    ):
        recipe_of(tmp_path, manifest)
    assert info_of(tmp_path, manifest)["recipe"] == {
        "name": "later", "what": "unknown to this release", "features": {}, "search": {}, "score": {}
    }  # fmt: skip
