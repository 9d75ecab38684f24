"""Keys and folders as callers give them: several or one, of images or of tiles; and what ends with a key: its trust."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.detect import calibration
from spade_faiss.images.sources import ImageFile
from spade_faiss.images.tiling import image_key
from spade_faiss.store import trusted
from spade_faiss.store.locks import READERS
from spade_faiss.store.trusted import change_trusted, read_trusted
from tests.helpers.galleries import make_gallery, random_features_of
from tests.helpers.images import write_images
from tests.helpers.own_galleries import KEYS, named, reopen

TILED = sf.FeatureOptions(tile=(30, 24), overlap=5)


def two() -> sf.Features:
    return random_features_of(2, seed=5)


USES: dict[str, Callable[[sf.Gallery, Any], object]] = {
    "append": lambda gallery, keys: gallery.append(keys, two()),
    "remove": lambda gallery, keys: gallery.remove(keys),
    "trust": lambda gallery, keys: gallery.trust(keys),
    "distrust": lambda gallery, keys: gallery.distrust(keys),
    "ids": lambda gallery, keys: gallery.ids(keys),
}


@pytest.mark.parametrize("how", USES)
@pytest.mark.parametrize("keys", ["xy", b"xy", 7, None])
def test_what_is_no_list_is_refused_in_one_line(gallery: sf.Gallery, how: str, keys: Any) -> None:
    """One text was taken letter by letter, or passed over in silence."""
    gallery.append(["x", "y"], two())
    gallery.trust(["x"])
    before = named(gallery.path), read_trusted(gallery.path)
    with pytest.raises(
        (sf.OptionError, sf.FeatureError), match=rf"^keys: expected several, found {keys!r}; .*\[KEY\]$"
    ):
        USES[how](gallery, keys)
    assert (named(gallery.path), read_trusted(gallery.path)) == before


@pytest.mark.parametrize("wrong", [3, None, Path("x"), b"x", np.zeros(3)])
def test_what_is_no_text_is_not_distrusted(gallery: sf.Gallery, wrong: Any) -> None:
    gallery.trust(KEYS[:2])
    with pytest.raises(sf.OptionError, match=r"^keys: expected texts, found .*$"):
        gallery.distrust([KEYS[0], wrong])
    assert gallery.trusted() == KEYS[:2]


@pytest.mark.parametrize("of", [tuple, lambda keys: (key for key in keys), dict.fromkeys, np.array, set])
def test_keys_may_come_in_any_collection(gallery: sf.Gallery, of: Callable[[list[str]], Any]) -> None:
    gallery.append(of(["x", "y"]), two())
    gallery.trust(of(["x", KEYS[1]]))
    assert sorted(gallery.ids(of(["x", "y"]))) == [12, 13]
    gallery.distrust(of([KEYS[1]]))
    assert gallery.trusted() == ["x"]
    gallery.remove(of(["x", KEYS[0]]))
    assert gallery.keys() == [*KEYS[1:], "y"]
    assert read_trusted(gallery.path) == {}


# Trust


def on_a_full_disk(write: Callable[[], object]) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trusted, "write_whole", full)
        with pytest.raises(sf.GalleryError, match=r"trusted\.json: No space left"):
            write()


def by_a_writer(gallery: sf.Gallery, keys: list[str]) -> None:
    with gallery.writer() as writer:
        writer.append(["other"], random_features_of(1, seed=2))
        for key in keys:
            writer.remove([key])


@pytest.mark.parametrize("remove", [sf.Gallery.remove, by_a_writer])
def test_removal_ends_trust_or_removes_nothing(
    gallery: sf.Gallery, remove: Callable[[sf.Gallery, list[str]], None]
) -> None:
    """The images went, their trust stayed, and the same call again was refused; a writer never ended it."""
    gallery.trust(KEYS[2:6])
    on_a_full_disk(lambda: remove(gallery, KEYS[3:5]))
    assert set(KEYS) <= set(gallery.keys())
    assert gallery.trusted() == KEYS[2:6]
    remove(gallery, KEYS[3:5])
    assert sorted(read_trusted(gallery.path)) == sorted([KEYS[2], KEYS[5]])
    assert not {*KEYS[3:5]} & set(gallery.keys())
    assert gallery.verify() == []


def test_what_is_not_removed_in_the_end_stays_trusted(gallery: sf.Gallery) -> None:
    gallery.trust(KEYS[:2])

    def write() -> None:
        with gallery.writer() as writer:
            writer.remove([KEYS[0]])
            writer.remove([KEYS[1], "nobody"])

    with pytest.raises(sf.OptionError, match="found 'nobody', which is not"):
        write()
    assert gallery.trusted() == KEYS[:2]


@pytest.fixture
def tiled(tmp_path: Path) -> tuple[sf.Gallery, sf.Extractor]:
    return make_gallery(tmp_path / "tiled", write_images(tmp_path / "images", 3, size=(50, 66)), TILED)


def test_a_tile_by_itself_is_not_trusted(tiled: tuple[sf.Gallery, sf.Extractor]) -> None:
    """`remove` of its image did not end that."""
    gallery, _ = tiled
    tile = gallery.keys()[-1]
    with pytest.raises(sf.OptionError, match=r"expected keys of whole images, found '002.png#xywh=.*; give '002.png'"):
        gallery.trust(["001.png", tile])
    assert gallery.trusted() == []
    [digest] = set(gallery.snapshot().digests(gallery.ids([tile])))
    for end in (gallery.distrust, gallery.remove):
        change_trusted(gallery.path, {tile: digest, "001.png": "sha256:0"})  # as an earlier release did
        assert gallery.trusted() == [tile]
        end(["002.png"])
        assert read_trusted(gallery.path) == {"001.png": "sha256:0"}


def test_without_tiles_such_a_key_is_its_own(gallery: sf.Gallery) -> None:
    gallery.append(["x", "x#xywh=1,2,3,4"], two())
    gallery.trust(["x", "x#xywh=1,2,3,4"])
    gallery.remove(["x"])
    assert gallery.trusted() == ["x#xywh=1,2,3,4"]


# Keys of tiles


@pytest.mark.parametrize("key", ["002.png#xywh=42,20,24,30", "002.png#xywh=1,1,2,2", "new.png#xywh=0,30,9,9"])
def test_the_key_of_a_tile_is_not_taken_for_an_image(
    tiled: tuple[sf.Gallery, sf.Extractor], tmp_path: Path, key: str
) -> None:
    """It was removed with the other image of that name, and never by its own key."""
    gallery, extractor = tiled
    before = gallery.keys()
    pixels = np.full((20, 20, 3), 9, np.uint8)
    report = gallery.add([(key, pixels), ("good", pixels)], extractor, replace=True)
    assert (report.added, [one.reason for one in report.skipped]) == (
        1,
        [f"{key}: keys: expected one of a whole image, found {key!r}, which a tile of {image_key(key)!r} has; "
         "give the image another key"],
    )  # fmt: skip
    for more in ({"strict": True}, {"strict": True, "workers": 2}):
        with pytest.raises(sf.FeatureError, match="expected one of a whole image"):
            gallery.add_images([ImageFile(tmp_path / "images" / "000.png", key)], extractor, replace=True, **more)
    with pytest.raises(sf.FeatureError, match=rf"expected all tiles of an image together, found '{key}' without"):
        gallery.append([key], extractor.extract([np.zeros((32, 32, 3), np.uint8)]), replace=True)
    assert gallery.keys() == [*before, "good"]


def test_all_tiles_of_an_image_may_be_appended_together(tiled: tuple[sf.Gallery, sf.Extractor]) -> None:
    gallery, extractor = tiled
    keys = extractor.spec.tiling.keys("x", (30, 40))
    views = extractor.spec.tiling.views(np.zeros((30, 40, 3), np.uint8))
    assert gallery.append(keys, extractor.extract(views)).added == 1
    assert len(keys) > 1
    gallery.remove(["x"])
    assert "x" not in {image_key(key) for key in gallery.keys()}  # noqa: SIM118


# One folder


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("of", [str, Path, lambda path: [path], lambda path: (str(path),), lambda path: iter([path])])
def test_one_folder_may_be_given_by_itself(
    tmp_path: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch, of: Callable[[Path], Any], absolute: bool
) -> None:
    """A text was taken letter by letter: nothing was found, and nothing was said."""
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec, sf.IndexOptions(device="cpu"), patches="recompute")
    images = write_images(tmp_path / "before", 4)
    gallery.add_images(images, toy)
    images.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "moved" if absolute else Path("moved")
    assert gallery.verify(normal=of(folder)) == []
    assert gallery.read([1, 2], toy, normal=of(folder))[0].shape[0] == 2
    [shard] = gallery.path.glob("shards/*.h5")
    content = bytearray(shard.read_bytes())
    content[content.index(gallery.snapshot().image_feature(1).tobytes())] ^= 1
    shard.with_suffix(".copy").write_bytes(content)
    shard.with_suffix(".copy").replace(shard)
    gallery.refresh()
    problems = gallery.verify(files=False)
    assert len(problems) == 1
    assert gallery.needs_extractor(problems, of(folder))
    assert gallery.repair(toy, of(folder)).extracted == ["001.png"]
    assert gallery.verify(files=False) == []


# What is swept


@pytest.mark.parametrize("name", [trusted.FILE, calibration.FILE])
def test_what_others_are_writing_is_not_swept(gallery: sf.Gallery, name: str) -> None:
    """It was deleted under the hands of another thread or process, whose work failed at its end."""
    lock, temporary = gallery.path / name.replace(".json", ".lock"), gallery.path / f"{name}.tmp"
    holding, done = threading.Event(), threading.Event()

    def write() -> None:
        with filelock.FileLock(lock):
            temporary.write_bytes(b"half")
            holding.set()
            done.wait(60)

    writing = threading.Thread(target=write)
    writing.start()
    assert holding.wait(60)
    try:
        gallery.append(["x", "y"], two())
        gallery.compact()
        assert temporary.read_bytes() == b"half"
    finally:
        done.set()
        writing.join()
    gallery.append(["z"], random_features_of(1, seed=9))  # whoever wrote it is dead
    assert not temporary.exists()


def test_a_gallery_without_its_empty_files_is_swept(gallery: sf.Gallery) -> None:
    """A copy that had left them out, as the fixtures of format 1 have, grew for ever."""
    (gallery.path / READERS).unlink()
    gallery = reopen(gallery.path)
    old = set(gallery.path.glob("shards/*"))
    gallery.remove(KEYS[:7])
    gallery.compact()
    assert not old & set(gallery.path.glob("shards/*"))
    assert (gallery.path / READERS).exists()


@pytest.mark.parametrize("late", [False, True])
def test_who_reads_such_a_gallery_keeps_the_files(gallery: sf.Gallery, features: sf.Features, late: bool) -> None:
    (gallery.path / READERS).unlink()
    if late:
        gallery.append(["x"], random_features_of(1, seed=4))  # which makes the lock's file
        gallery.remove(["x"])
    reader = reopen(gallery.path)
    old = set(gallery.path.glob("shards/*"))
    for key in KEYS[:2]:
        gallery.remove([key])
        gallery.compact()
    assert old <= set(gallery.path.glob("shards/*"))
    assert reader.read(reader.ids(KEYS))[0].tobytes() == features.levels[0].tobytes()
    reader.close()
    gallery.compact()
    gallery.append(["y"], random_features_of(1, seed=5))
    assert not old & set(gallery.path.glob("shards/*"))
