"""A Gallery that another one of the same folder has overtaken: what it writes, and where it stands afterwards."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import spade_faiss as sf
from tests.helpers.galleries import random_features_of
from tests.helpers.images import write_images
from tests.helpers.own_galleries import KEYS, assert_holds, create, named, reopen

IMAGE = np.zeros((32, 32, 3), np.uint8)


@pytest.fixture
def made_again(tmp_path: Path) -> tuple[sf.Gallery, sf.Extractor, sf.Extractor]:
    """A gallery that was made again with another spec, open as it was before; and the extractors of both."""
    old, new = (sf.load_extractor("toy", options=sf.FeatureOptions(neighbourhood=size)) for size in (1, 3))
    images, path = write_images(tmp_path / "images", 4), tmp_path / "g"
    for extractor in (old, new):
        if path.exists():
            stale = reopen(path)
            shutil.rmtree(path)
        sf.Gallery.create(path, extractor.spec, sf.IndexOptions(device="cpu")).add_images(images, extractor)
    return stale, old, new


WRITES: dict[str, Callable[[sf.Gallery, sf.Extractor, Path], object]] = {
    "add": lambda gallery, extractor, _: gallery.add([("x", IMAGE)], extractor),
    "add_images": lambda gallery, extractor, images: gallery.add_images(images, extractor, replace=True),
    "append": lambda gallery, extractor, _: gallery.append(["x"], extractor.extract([IMAGE])),
    "workers": lambda gallery, extractor, images: gallery.add_images(images, extractor, workers=2),
    "remove": lambda gallery, *_: gallery.remove(["001.png"]),
    "repair": lambda gallery, extractor, images: gallery.repair(extractor, [images]),
    "writer": lambda gallery, extractor, _: gallery.writer().__enter__().append(["x"], extractor.extract([IMAGE])),
}


@pytest.mark.parametrize("how", WRITES)
def test_features_of_the_spec_of_before_are_not_taken(
    made_again: tuple[sf.Gallery, sf.Extractor, sf.Extractor], tmp_path: Path, how: str
) -> None:
    """They were compared with the spec that the gallery had once, and written beside those of the new one."""
    stale, old, new = made_again
    before = named(stale.path)
    with pytest.raises(
        sf.SpecMismatchError, match=r"g: made again .*, refresh\(\) it: .* neighbourhood: expected 3, fo"
    ):
        WRITES[how](stale, old, write_images(tmp_path / "others", 2, 9))
    assert named(stale.path) == before
    stale.refresh()
    assert stale.add([("x", IMAGE)], new).added == 1
    assert stale.verify() == []


@pytest.mark.parametrize("how", ["add", "add_images", "repair"])
def test_a_thread_that_refreshes_meanwhile_lets_no_other_spec_in(
    made_again: tuple[sf.Gallery, sf.Extractor, sf.Extractor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """Between the comparison and the lock."""
    stale, old, _ = made_again
    writer = sf.Gallery.writer

    def refreshed(self: sf.Gallery, timeout: float = 0) -> object:
        self.refresh()
        return writer(self, timeout)

    monkeypatch.setattr(sf.Gallery, "writer", refreshed)
    before = named(stale.path)
    with pytest.raises(sf.SpecMismatchError, match=r"neighbourhood: expected 3, found 1"):
        WRITES[how](stale, old, write_images(tmp_path / "others", 2, 9))
    assert named(stale.path) == before


# Where a reader stands


@pytest.fixture
def overtaken(gallery: sf.Gallery) -> sf.Gallery:
    """A reader whose gallery has moved on, and has other ids."""
    reader = reopen(gallery.path)
    gallery.remove(KEYS[:3])
    gallery.compact()
    return reader


def fail_on_the_disk(gallery: sf.Gallery) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sf.store.shard_writer.ShardWriter, "append", full)
        gallery.append(["x"], random_features_of(1))


FAILS: dict[str, Callable[[sf.Gallery], object]] = {
    "remove": lambda gallery: gallery.remove([KEYS[5], "nobody"]),
    "append": lambda gallery: gallery.append([KEYS[7]], random_features_of(1, seed=99)),
    "features": lambda gallery: gallery.append(["x"], sf.Features(np.full((1, 6), np.nan, np.float32), [])),
    "reindex": lambda gallery: gallery.reindex("no such kind"),
    "timeout": lambda gallery: gallery.compact(timeout=-1),
    "disk": fail_on_the_disk,
}


@pytest.mark.parametrize("how", FAILS)
def test_a_write_that_fails_moves_no_reader(overtaken: sf.Gallery, features: sf.Features, how: str) -> None:
    """Its ids were those of another commit from then on."""
    generation, ids = overtaken.generation, overtaken.ids(KEYS)
    with pytest.raises((sf.SpadeError, OSError)):
        FAILS[how](overtaken)
    assert overtaken.generation == generation
    assert overtaken.keys(ids) == KEYS
    assert_holds(overtaken, KEYS, features)


def test_one_that_does_not_get_the_lock_moves_no_reader(gallery: sf.Gallery, overtaken: sf.Gallery) -> None:
    ids = overtaken.ids(KEYS[2:])
    with gallery.writer():
        for write in (overtaken.compact, overtaken.rebuild_index, lambda: overtaken.remove([KEYS[9]])):
            with pytest.raises(sf.GalleryLockedError):
                write()
    assert overtaken.keys(ids) == KEYS[2:]


def test_one_that_fails_after_a_commit_moves_on_to_it(overtaken: sf.Gallery) -> None:
    def write() -> None:
        with overtaken.writer() as writer:
            writer.append(["kept"], random_features_of(1, seed=3))
            writer.commit()
            writer.append(["lost"], random_features_of(1, seed=4))
            raise EOFError

    with pytest.raises(EOFError):
        write()
    assert overtaken.keys() == [*KEYS[3:], "kept"]
    assert overtaken.generation == reopen(overtaken.path).generation


def test_a_write_that_changes_nothing_moves_on(overtaken: sf.Gallery) -> None:
    with overtaken.writer():
        pass
    assert overtaken.keys() == KEYS[3:]


# What another one has chosen


def test_the_index_keeps_what_another_one_has_chosen(tmp_path: Path) -> None:
    """`reindex` took the options that it was opened with for the gallery's."""
    create(tmp_path / "g").append(list(map(str, range(300))), random_features_of(300))
    first, second, third = (reopen(tmp_path / "g") for _ in range(3))
    first.reindex("ivf", nlist=3, recall=0.5)
    second.rebuild_index()
    third.reindex(nprobe=2)
    options = reopen(tmp_path / "g").snapshot().manifest.index_options
    assert (options.kind, options.nlist, options.nprobe, options.recall) == ("ivf", 3, 2, 0.5)


# Another folder


def test_a_relative_path_is_that_of_when_it_was_opened(
    tmp_path: Path, features: sf.Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was called damaged when the process had moved to another folder."""
    (tmp_path / "at").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    create(tmp_path / "at" / "g").append(KEYS, features)
    gallery = sf.Gallery.open("at/g", "cpu")
    pickled = pickle.dumps(gallery)
    monkeypatch.chdir("elsewhere")
    again = pickle.loads(pickled)
    for one in (gallery, again):
        assert_holds(one, KEYS, features)
        assert (one.path, one.verify()) == (Path("at/g"), [])
    gallery.trust([KEYS[4]])
    again.refresh()
    assert again.trusted() == [KEYS[4]]
    again.remove([KEYS[4]])
    gallery.append(["more"], random_features_of(1, seed=8))
    assert gallery.keys() == [*KEYS[:4], *KEYS[5:], "more"]
    assert gallery.compact() > 0
    assert not os.listdir(tmp_path / "elsewhere")  # noqa: PTH208
    with pytest.raises(sf.GalleryNotFoundError, match=r"^at/g: "):
        sf.Gallery.open("at/g")
