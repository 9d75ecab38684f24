"""Folders as people have them: what others have put there, what cannot be read, names and sources as they are given."""

from __future__ import annotations

import os
import socket
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spade_faiss.errors import ImageError
from spade_faiss.images.decode import decode, read_file
from spade_faiss.images.passed_over import (
    GALLERIES,
    OTHER_FILES,
    OWN_RESULTS,
    SPECIAL,
    SYSTEM_FILES,
    SYSTEM_FOLDERS,
    UNREAD_FORMATS,
)
from spade_faiss.images.sources import ImageFile, find_images, list_sources, without_twin_names
from spade_faiss.images.suffixes import image_suffixes


def image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return path


def keys(*sources: Path) -> list[str]:
    return [file.key for file in list_sources(sources)]


@pytest.mark.parametrize(
    "folder",
    [
        "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", ".Trash-1000", "lost+found", "__MACOSX",
        "@Recycle", ".@__thumb", ".ipynb_checkpoints", ".thumbnails", "~snapshot", "@eaDir_tmp",
    ],
)  # fmt: skip
def test_folders_of_a_nas_or_a_system_are_passed_over_and_counted(tmp_path: Path, folder: str) -> None:
    """A user of immich imported Synology's thumbnails as images (immich-app/immich issue 30690).

    @eaDir_tmp is of mbrrg/synology-thumbgen pull request 10; ~snapshot of NetApp's documentation.
    """
    image(tmp_path / "a.png")
    image(tmp_path / "part" / folder / "a.png" / "SYNOPHOTO_THUMB_XL.jpg")
    listing = list_sources([tmp_path])
    assert [file.key for file in listing] == ["a.png"]
    assert listing.passed_over.counts == {SYSTEM_FOLDERS: 1}
    assert str(listing.passed_over) == f"passed over: 1 folder of a NAS or a system ({folder})"


def test_system_files_are_counted_in_one_line(tmp_path: Path) -> None:
    """macOS writes ._NAME.jpg onto exFAT and into archives (fire-eggs/DarkThumbs issue 36)."""
    image(tmp_path / "a.png")
    for name in ("._a.png", "._b.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"Mac OS X")
    listing = list_sources([tmp_path])
    assert listing.passed_over.counts == {SYSTEM_FILES: 4}
    assert str(listing.passed_over) == "passed over: 4 system files (.DS_Store, ._*, Thumbs.db)"


def test_our_results_and_galleries_are_left_out_and_a_folder_that_is_only_called_results_is_taken(
    tmp_path: Path,
) -> None:
    image(tmp_path / "results" / "overlays" / "a.png.png")
    image(tmp_path / "results" / "mine.png")
    (tmp_path / "results" / "results.jsonl").touch()
    image(tmp_path / "line" / "results" / "overlays" / "b.png")
    image(tmp_path / "n.gallery" / "shards" / "x.png")
    (tmp_path / "n.gallery" / "gallery.json").touch()
    image(tmp_path / "art.gallery" / "c.png")
    listing = list_sources([tmp_path])
    assert [file.key for file in listing] == ["art.gallery/c.png", "line/results/overlays/b.png", "results/mine.png"]
    assert listing.passed_over.counts == {OWN_RESULTS: 1, GALLERIES: 1}


def test_results_beside_the_images_are_left_out(tmp_path: Path) -> None:
    """As an earlier release wrote them with --output SOURCE."""
    image(tmp_path / "a.png")
    for place in ("overlays", "maps", "matches"):
        image(tmp_path / place / "a.png.png")
    assert keys(tmp_path) == ["a.png"]


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".avif", ".jp2", ".gif", ".tga", ".pnm", ".dib", ".mpo", ".webp"])
def test_suffixes_are_those_that_pillow_has(tmp_path: Path, suffix: str) -> None:
    if suffix not in image_suffixes():
        pytest.skip(f"this Pillow does not read {suffix}")
    path = tmp_path / f"A{suffix.upper()}"
    Image.new("RGB", (16, 16), "red").save(path)
    assert keys(tmp_path) == [path.name]
    assert decode(path).shape == (16, 16, 3)


def test_no_suffix_of_what_is_no_picture() -> None:
    assert not image_suffixes() & {".pdf", ".eps", ".h5", ".grib", ".mpg", ".ico", ".psd", ".fits", ".pfm"}
    assert image_suffixes() >= {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def test_a_format_without_a_decoder_is_left_out_by_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    image(tmp_path / "a.png")
    (tmp_path / "b.avif").write_bytes(b"x")
    listing = list_sources([tmp_path])
    assert listing.passed_over.counts == {UNREAD_FORMATS: 1}
    assert "1 file in a format that is not read (.avif)" in str(listing.passed_over)


def test_raw_pictures_videos_and_other_files_are_counted(tmp_path: Path) -> None:
    for name in ("a.CR2", "b.heic", "c.mp4", "notes.txt", "noname"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ImageError, match="found none in it; passed over: 3 files in formats that are not read"):
        find_images([tmp_path])
    image(tmp_path / "d.png")
    assert list_sources([tmp_path]).passed_over.counts == {UNREAD_FORMATS: 3, OTHER_FILES: 2}


def deny(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let a folder refuse to be listed, also for root."""
    real = os.scandir

    def scandir(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_a_folder_without_read_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "a.png")
    image(tmp_path / "part" / "b.png")
    deny(monkeypatch, tmp_path / "part")
    listing = list_sources([tmp_path])
    assert [file.key for file in listing] == ["a.png"]
    assert [one.reason for one in listing.unlisted] == [
        f"{tmp_path / 'part'}: folder cannot be listed: Permission denied"
    ]
    with pytest.raises(ImageError, match="folder cannot be listed"):
        find_images([tmp_path])
    with pytest.raises(ImageError, match="folder cannot be listed"):
        list_sources([tmp_path / "part"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_pipes_sockets_and_links_to_nothing_do_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "control")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "camera2").symlink_to("/not/mounted")
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.png")
        listing = list_sources([tmp_path])
    assert [file.key for file in listing] == ["a.png", "gone.png"]  # reading says why not
    found = {one.path.name: one.reason.partition("found ")[2] for one in listing.unlisted}
    assert found == {
        "pipe.png": "a named pipe",
        "s.png": "a socket",
        "camera2": "a link to nothing, perhaps to a folder",
    }
    assert listing.passed_over.counts == {SPECIAL: 1}
    with pytest.raises(ImageError, match="found a named pipe"):
        list_sources([tmp_path / "pipe.png"])
    with pytest.raises(ImageError, match="expected an image file, found a pipe"):
        read_file(tmp_path / "pipe.png")


def test_keys_of_sources_without_a_collision_stay_as_they_are(tmp_path: Path) -> None:
    image(tmp_path / "line1" / "a.png")
    image(tmp_path / "line2" / "b.png")
    assert keys(tmp_path / "line1", tmp_path / "line2") == ["a.png", "b.png"]


def test_keys_of_sources_with_files_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("line1/000.png", "line2/000.png", "line2/001.png", "other/line3/000.png")):
        image(tmp_path / name, number)
    assert keys(tmp_path / "line1", tmp_path / "line2") == ["line1/000.png", "line2/000.png", "line2/001.png"]
    monkeypatch.chdir(tmp_path / "line1")
    listing = list_sources(["000.png", "../other/line3/000.png"])
    assert [file.key for file in listing] == ["line1/000.png", "other/line3/000.png"]
    assert listing.notes == [f"several sources hold 000.png: keys are paths from {tmp_path}, as other/line3/000.png"]
    assert [read_file(file.path) for file in listing] == [
        (tmp_path / "line1/000.png").read_bytes(),
        (tmp_path / "other/line3/000.png").read_bytes(),
    ]


def test_a_file_given_twice_is_one_image(tmp_path: Path) -> None:
    path = image(tmp_path / "line" / "a.png")
    (tmp_path / "again").symlink_to(tmp_path / "line")
    assert keys(path, path) == ["a.png"]
    assert keys(tmp_path / "line", path, tmp_path / "again", tmp_path) == ["a.png", "again/a.png"]


def test_image_files_of_the_caller_keep_their_keys(tmp_path: Path) -> None:
    one, two = image(tmp_path / "1.png"), image(tmp_path / "2.png")
    with pytest.raises(ImageError, match="two images would have the key 'a'"):
        list_sources([ImageFile(one, "a"), ImageFile(two, "a")])
    assert len(list_sources([ImageFile(one, "a"), ImageFile(one, "a")])) == 1


@pytest.mark.parametrize("order", ["aba", "abba", "aabbab", "abcabc"])
def test_image_files_given_twice_are_one_image_wherever_they_are(tmp_path: Path, order: str) -> None:
    files = {name: ImageFile(image(tmp_path / f"{name}.png"), name) for name in "abc"}
    assert list_sources([files[name] for name in order]) == [files[name] for name in sorted(set(order))]
    with pytest.raises(ImageError, match="two images would have the key 'a'"):
        list_sources([files["a"], ImageFile(files["b"].path, "a"), files["a"]])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take both names for one")
def test_two_names_that_differ_in_normalisation_only(tmp_path: Path) -> None:
    """Linux holds both, a gallery would take them for one image: the second is named, not left out in silence."""
    for number, form in enumerate(("NFC", "NFD")):
        image(tmp_path / unicodedata.normalize(form, "größe.png"), number)
    listing = without_twin_names(list_sources([tmp_path]))
    assert len(listing) == 1
    [one] = listing.unlisted
    assert "differs from that of" in one.reason
