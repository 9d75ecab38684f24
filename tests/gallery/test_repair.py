"""Repair: what is damaged comes back from the image files as it was, what is good stays, and what is lost is named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.gallery import repair as repairing
from spade_faiss.options import Patches
from spade_faiss.store.manifest import Manifest
from tests.helpers.command_line import Spade
from tests.helpers.galleries import random_features_of
from tests.helpers.images import write_images

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


N = 12
KEYS = [f"{number:03d}.png" for number in range(N)]
BOTH: list[Patches] = ["stored", "recompute"]

Harm = Callable[[h5py.File, int], None]


def make(tmp_path: Path, toy: sf.Extractor, patches: Patches = "stored") -> sf.Gallery:
    """A gallery of three shards of four images."""
    options = sf.IndexOptions(device="cpu")
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec, options, patches=patches)
    normal = write_images(tmp_path / "normal", N)
    with gallery.writer() as writer:
        for start in range(0, N, 4):
            files = [normal / key for key in KEYS[start : start + 4]]
            views = [toy.spec.view.apply(sf.images.decode.decode(file)) for file in files]
            digests = [sf.store.source_images.content_digest(file.read_bytes()) for file in files]
            writer.append(KEYS[start : start + 4], toy.extract(views), digests, sources=list(map(str, files)))
            writer.commit()
    return gallery


def answers(gallery: sf.Gallery) -> dict[str, tuple[str, bytes]]:
    """Digest and image feature of every key, and its levels where they are stored."""
    snapshot, found = gallery.snapshot(), {}
    for row_id in snapshot.ids().tolist():
        [key], [digest] = snapshot.keys([row_id]), snapshot.digests([row_id])
        levels = [] if gallery.patches == "recompute" else gallery.read([row_id])
        parts = [snapshot.image_feature(row_id), *levels]
        found[key] = digest, snapshot.source(row_id), b"".join(part.tobytes() for part in parts)
    queries = np.stack([snapshot.image_feature(row_id) for row_id in gallery.ids(KEYS[:3])])
    ids, sq_distances = gallery.search(queries, 4)
    return found | {"search": (str(gallery.keys(ids.ravel())), None, sq_distances.tobytes())}


def harm(gallery: sf.Gallery, number: int, how: Harm, row: int = 1) -> None:
    path = gallery.path / Manifest.read(gallery.path).shards[number].file
    copy = path.with_name("copy")  # the file that somebody has open stays as it is
    shutil.copy(path, copy)
    with h5py.File(copy, "r+") as file:
        how(file, row)
    assert copy.stat().st_size == path.stat().st_size
    copy.replace(path)


def change_text(column: str) -> Harm:
    def change(file: h5py.File, row: int) -> None:
        texts = file[column][:]
        texts[row] = texts[row][:-2] + b"zz"
        file[column][:] = texts

    return change


def change_numbers(name: str) -> Harm:
    def change(file: h5py.File, row: int) -> None:
        values = file[name][row]
        values.ravel().view(np.uint8)[0] ^= 1
        file[name][row] = values

    return change


HARMS = {
    "key": change_text("keys"),
    "digest": change_text("digests"),
    "image": change_numbers("image"),
    "checksums": change_numbers("checksums"),
}


@pytest.mark.parametrize("patches", BOTH)
@pytest.mark.parametrize("what", [*HARMS, "source", "level"])
def test_a_damaged_image_comes_back_as_it_was(tmp_path: Path, toy: sf.Extractor, patches: Patches, what: str) -> None:
    if what == {"stored": "source", "recompute": "level"}[patches]:
        return
    gallery = make(tmp_path, toy, patches)
    expected = answers(gallery)
    shards = [entry.file for entry in Manifest.read(gallery.path).shards]
    how = {**HARMS, "source": change_text("sources"), "level": change_numbers("levels/1")}[what]
    harm(gallery, 1, how)
    gallery.refresh()
    assert len(gallery.verify()) == 1
    done = gallery.repair(toy, [tmp_path / "normal"])
    assert (done.extracted, done.dropped) == ([KEYS[5]], [])
    assert gallery.verify() == []
    assert answers(gallery) == expected
    assert answers(sf.Gallery.open(gallery.path, "cpu")) == expected
    kept = [entry.file for entry in Manifest.read(gallery.path).shards]
    assert [shards[0], shards[2]] == kept[:2]  # the others are as they were
    assert not (gallery.path / shards[1]).exists()


def test_many_at_once_and_removed_ones_do_not_count(tmp_path: Path, toy: sf.Extractor) -> None:
    gallery = make(tmp_path, toy)
    gallery.remove([KEYS[1], KEYS[8]])
    for number, row in ((0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0), (2, 3)):
        harm(gallery, number, HARMS["image"], row)
    gallery.refresh()
    done = gallery.repair(toy, [tmp_path / "normal"])
    assert sorted(done.extracted) == [KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[11]]
    assert gallery.verify() == []
    assert sorted(gallery.keys()) == sorted(set(KEYS) - {KEYS[1], KEYS[8]})


@pytest.mark.parametrize("patches", BOTH)
@pytest.mark.parametrize("what", ["empty", "not to be read"])
def test_a_file_that_cannot_be_read_hides_no_other(
    tmp_path: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch, patches: Patches, what: str
) -> None:
    """Among the files that may belong to images whose names are damaged."""
    gallery = make(tmp_path, toy, patches)
    expected = answers(gallery)
    harm(gallery, 1, HARMS["key"])
    harm(gallery, 2, HARMS["digest"], 2)
    gallery.refresh()
    for name in ("0000.png", "zzz.png"):  # before and after the others
        (tmp_path / "normal" / name).write_bytes(b"" if what == "empty" else b"some")
    if what == "not to be read":
        really = repairing.read_file

        def read_file(path: Path) -> bytes:
            if path.name in ("0000.png", "zzz.png"):
                raise sf.ImageError(f"{path}: cannot be read: Permission denied")
            return really(path)

        monkeypatch.setattr(repairing, "read_file", read_file)
    assert gallery.repair(toy, [tmp_path / "normal"]).extracted == [KEYS[5], KEYS[10]]
    assert gallery.verify() == []
    assert answers(gallery) == expected


@pytest.mark.parametrize("change", ["gone", "another"])
def test_what_has_no_file_is_left_and_reported_until_it_is_dropped(
    tmp_path: Path, toy: sf.Extractor, change: str
) -> None:
    gallery = make(tmp_path, toy)
    harm(gallery, 1, HARMS["image"], 1)
    harm(gallery, 1, HARMS["image"], 2)
    gallery.refresh()
    file = tmp_path / "normal" / KEYS[5]
    kept = file.read_bytes()
    file.unlink() if change == "gone" else shutil.copy(tmp_path / "normal" / KEYS[0], file)
    done = gallery.repair(toy, [tmp_path / "normal"])
    assert (done.extracted, done.dropped, done.derived) == ([KEYS[6]], [], False)
    assert KEYS[5] in [problem.key for problem in gallery.verify()]
    assert gallery.search(random_features_of(1, toy.spec).image, 3)[0].shape == (1, 3)  # by the index of before
    done = gallery.repair(toy, [tmp_path / "normal"], drop_unreadable=True)
    assert (done.extracted, done.dropped, done.dropped_images, done.derived) == ([], [KEYS[5]], 1, True)
    assert (gallery.verify(), len(gallery), KEYS[5] in gallery) == ([], N - 1, False)
    file.write_bytes(kept)
    assert gallery.add_images(tmp_path / "normal", toy).added == 1
    assert sorted(gallery.keys()) == KEYS


@pytest.mark.parametrize("patches", BOTH)
def test_a_shard_that_cannot_be_opened_is_dropped_only_when_asked(
    tmp_path: Path, toy: sf.Extractor, patches: Patches
) -> None:
    gallery = make(tmp_path, toy, patches)
    expected = answers(gallery)
    os.truncate(gallery.path / Manifest.read(gallery.path).shards[1].file, 100)
    harm(gallery, 2, HARMS["key"])
    gallery.refresh()
    done = gallery.repair(toy, [tmp_path / "normal"])
    assert (done.extracted, done.dropped) == ([KEYS[9]], [])
    assert "shards/000001.h5" in [problem.file for problem in gallery.verify()]
    done = gallery.repair(toy, [tmp_path / "normal"], drop_unreadable=True)
    assert (done.dropped, done.dropped_images) == (["shards/000001.h5"], 4)
    assert (gallery.verify(), sorted(gallery.keys())) == ([], KEYS[:4] + KEYS[8:])
    assert gallery.add_images(tmp_path / "normal", toy).added == 4
    assert answers(gallery) == expected


def test_features_that_no_file_gives_again_are_left(tmp_path: Path, toy: sf.Extractor) -> None:
    """Their digests are not those of files, so that a file of that name need not be theirs."""
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec, sf.IndexOptions(device="cpu"))
    gallery.append(KEYS[:4], random_features_of(4, toy.spec))
    harm(gallery, 0, HARMS["image"])
    gallery.refresh()
    assert gallery.repair(toy, [write_images(tmp_path / "normal", 4)]).extracted == []
    assert [problem.key for problem in gallery.verify()] == [KEYS[1]]


def test_killed_after_the_commit_it_goes_on(tmp_path: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = make(tmp_path, toy)
    expected = answers(gallery)
    harm(gallery, 1, HARMS["key"])
    gallery.refresh()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sf.store.writer.GalleryWriter, "rewrite", killed)
        with pytest.raises(KeyboardInterrupt):
            gallery.repair(toy, [tmp_path / "normal"])
    gallery = sf.Gallery.open(gallery.path, "cpu")
    assert answers(gallery) == expected  # the row is there, and the damaged one does not count
    assert len(gallery.verify()) == 1
    assert gallery.repair(toy, [tmp_path / "normal"]).extracted == []
    assert gallery.verify() == []
    assert answers(gallery) == expected


def test_on_the_command_line(tmp_path: Path, toy: sf.Extractor, spade: Spade) -> None:
    gallery = make(tmp_path, toy)
    harm(gallery, 1, HARMS["image"])
    os.truncate(gallery.path / Manifest.read(gallery.path).shards[2].file, 100)
    gallery.close()
    assert spade("verify", gallery.path, "--drop-unreadable").status == 2
    run = spade("verify", gallery.path, "--repair")
    assert (run.status, "2 problems" in run.out) == (1, True)
    assert "--normal DIR" in run.err
    run = spade("verify", gallery.path, "--repair", "--normal", tmp_path / "normal")
    assert run.status == 1
    assert f"1 images re-extracted: {KEYS[5]}" in run.err
    run = spade("verify", gallery.path, "--repair", "--normal", tmp_path / "normal", "--drop-unreadable")
    assert (run.status, "8 images checked, 0 problems" in run.out) == (0, True)
    assert "4 images removed, `add` them again: shards/000002.h5" in run.err
    assert "image index and key table rebuilt" in run.err
