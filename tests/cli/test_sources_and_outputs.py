"""What the command line says about sources, names and outputs as people have them."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.cli.messages import as_line, one_line
from tests.helpers.command_line import Spade

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


TOY = ("--extractor", "toy")
BLOB = np.zeros((40, 48), np.uint8)
BLOB[10:20, 10:20] = 255


def write(path: Path, seed: int = 0, pixels: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels is None:
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def gallery(tmp_path: Path, toy: sf.Extractor) -> Path:
    for number in range(4):
        write(tmp_path / "normal" / f"{number}.png", number)
    with sf.Gallery.create(tmp_path / "toy.gallery", toy.spec) as made:
        made.add_images(tmp_path / "normal", toy)
    return tmp_path / "toy.gallery"


@pytest.fixture
def denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source with a folder that may not be listed, also by root."""
    write(tmp_path / "source" / "a.png")
    folder = write(tmp_path / "source" / "private" / "b.png").parent
    real = os.scandir

    def scandir(path: str) -> object:
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    return folder


def test_a_folder_that_cannot_be_listed_is_a_skip(tmp_path: Path, spade: Spade, gallery: Path, denied: Path) -> None:
    for args in (("build", tmp_path / "g", denied.parent, *TOY), ("query", gallery, denied.parent, "-k", "2")):
        run = spade(*args, "--quiet")
        assert run.status == 3
        assert run.err == f"spade-faiss: skipped: {denied}: folder cannot be listed: Permission denied\n"
        assert spade(*args, "--strict").error.endswith(f"{denied}: folder cannot be listed: Permission denied")
    assert str(denied) in (tmp_path / "g" / "skipped.jsonl").read_text()


def test_what_is_passed_over_is_one_line(tmp_path: Path, spade: Spade, gallery: Path) -> None:
    for name in ("a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "#recycle/old.png"):
        write(tmp_path / "source" / name)
    (tmp_path / "source" / "a.CR2").write_bytes(b"raw")
    said = (
        "spade-faiss: note: passed over: 2 folders of a NAS or a system (#recycle, @eaDir), "
        "1 file in a format that is not read (.cr2)\n"
    )
    for args in (("build", tmp_path / "g", tmp_path / "source", *TOY), ("query", gallery, tmp_path / "source")):
        run = spade(*args)
        assert run.status == 0
        assert said in run.err
        assert spade(*args, "--quiet").err == ""


def test_masks_among_photos(tmp_path: Path, spade: Spade, gallery: Path) -> None:
    """N_masks.tif beside N.tif is cellpose's convention (MouseLand/cellpose issue 667)."""
    source = tmp_path / "source"
    for number in range(3):
        write(source / f"{number}.png", number)
        write(source / f"{number}_GT.png", pixels=BLOB * (number > 0))  # that of a good part is black
        write(source / "cells" / f"{number}.tif", 10 + number)
        write(source / "cells" / f"{number}_masks.tif", pixels=BLOB // 255)
        write(source / "rgb" / f"r{number}.png", 20 + number)
        write(source / "gt" / f"r{number}.png", pixels=BLOB)
        write(source / "voc" / f"{number}.jpg", 30 + number)
        write(source / "voc" / f"{number}.png", pixels=BLOB)
    run = spade("build", tmp_path / "g", source, *TOY, "--quiet")
    assert run.status == 3
    assert run.err.count("looks like a mask of") == 12
    assert f"{source / 'gt' / 'r0.png'}: looks like a mask of rgb/r0.png, by its name and its two values" in run.err
    with sf.Gallery.open(tmp_path / "g") as made:
        assert len(made) == 12
    run = spade("query", gallery, source, "-k", "2")
    assert run.status == 0
    assert "12 images (0_GT.png, 1_GT.png, 2_GT.png, ...) look like masks of other images" in run.err


def test_names_of_masks_whose_pixels_are_no_mask_are_taken_and_named(tmp_path: Path, spade: Spade) -> None:
    source = tmp_path / "source"
    write(source / "0.png", 0)
    write(source / "0_label.png", 1)  # a photo of the label
    write(source / "1.png", 2)
    write(source / "1.jpg", 3)  # two photos
    run = spade("build", tmp_path / "g", source, *TOY)
    assert run.status == 0
    assert "1 image (0_label.png) are named as annotations of other images; they are taken" in run.err


def test_two_valued_pictures_among_photos_are_named(tmp_path: Path, spade: Spade) -> None:
    for number in range(4):
        write(tmp_path / "source" / f"{number}.png", number)
    write(tmp_path / "source" / "stray.png", pixels=BLOB)
    run = spade("build", tmp_path / "g", tmp_path / "source", *TOY)
    assert run.status == 0
    assert "1 image (stray.png) of 5 looked at have two values only, as masks do" in run.err


def test_scanned_drawings_are_no_masks(tmp_path: Path, spade: Spade) -> None:
    for number in range(3):
        write(tmp_path / "source" / f"{number}.png", pixels=BLOB)
        write(tmp_path / "source" / f"{number}_label.png", pixels=255 - BLOB)
    assert spade("build", tmp_path / "g", tmp_path / "source", *TOY).status == 0


@pytest.fixture
def stdout(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[], str]]:
    """Give stdout an encoding; the result is called for what was printed."""

    def encode(encoding: str) -> Callable[[], str]:
        buffer = io.BytesIO()
        stream = io.TextIOWrapper(buffer, encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)

        def printed() -> str:
            stream.flush()
            return buffer.getvalue().decode("utf-8" if encoding == "ascii" else encoding)  # click takes it for UTF-8

        return printed

    return encode


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_names_that_stdout_cannot_encode(
    tmp_path: Path, spade: Spade, gallery: Path, stdout: Callable[[str], Callable[[], str]], encoding: str
) -> None:
    names = ["z.png", "é 中文 🏭.png"]
    for name in names:
        write(tmp_path / "source" / name)
    printed = stdout(encoding)
    assert spade("query", gallery, tmp_path / "source", "-k", "2", "--quiet").status == 0
    assert names[1] in printed() or "\\u4e2d\\u6587 \\U0001f3ed.png" in printed()
    assert "z.png" in printed()  # not lost
    printed = stdout(encoding)
    assert spade("query", gallery, tmp_path / "source", "-k", "2", "--quiet", "--json").status == 0
    assert [json.loads(line)["key"] for line in printed().splitlines()] == names


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not take these names")
def test_names_with_control_characters_and_without_unicode(tmp_path: Path, spade: Spade, gallery: Path) -> None:
    write(tmp_path / "source" / "a\nfake line\x1b[31m.png")
    write(tmp_path / "source" / os.fsdecode(b"b\xff.png"))
    run = spade("query", gallery, tmp_path / "source", "-k", "2", "--quiet", "--output", tmp_path / "out")
    assert run.status == 3
    assert "a\\nfake line\\x1b[31m.png" in run.out
    assert len(run.out.splitlines()) == 2
    assert len(run.err.splitlines()) == 1
    assert "b\\\\xff" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_lines_for_a_terminal_and_for_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_line("größe\u202egnp.a\r\u2028") == "größe\\u202egnp.a\\r\\u2028"
    assert one_line("family 👨‍👩‍👧") == "family 👨‍👩‍👧"  # joiners stay
    assert as_line({"key": "\udcff"}) == '{"key": "\\udcff"}'
    assert as_line({"key": "中"}) == '{"key": "中"}'


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_output_used_twice_holds_one_run(tmp_path: Path, spade: Spade, gallery: Path) -> None:
    out = tmp_path / "out"
    for name in ("a.png", "part/b.png", "c.png"):
        write(tmp_path / "source" / name)
    query = ("query", gallery, "-k", "2", "--output", out, "--quiet")
    spade(*query, tmp_path / "source")
    (out / "maps" / "mine.txt").write_text("keep")
    (out / "maps" / "mine.npy").write_text("keep")
    assert spade(*query, tmp_path / "source" / "c.png", "--no-report").status == 0
    assert names_in(out) == [
        "maps/c.png.npy", "maps/mine.npy", "maps/mine.txt", "matches/c.png.npz", "overlays/c.png.png",
        "results.jsonl", "run.json", "scale.json",
    ]  # fmt: skip


def test_an_edited_results_file_deletes_nothing_outside(tmp_path: Path, spade: Spade, gallery: Path) -> None:
    write(tmp_path / "source" / "a.png")
    query = ("query", gallery, tmp_path / "source", "-k", "2", "--output", tmp_path / "out", "--quiet")
    spade(*query)
    precious = tmp_path / "precious.npy"
    precious.write_text("keep")
    lines = [{"key": "../../precious"}, {"key": "a", "map": "../precious.npy"}, {"key": "b", "map": str(precious)}, 7]
    text = "\n".join(map(json.dumps, lines)) + '\n{"key": "cut sho'
    (tmp_path / "out" / "results.jsonl").write_text(text)
    assert spade(*query).status == 0
    assert precious.read_text() == "keep"


def test_output_among_the_images(tmp_path: Path, spade: Spade, gallery: Path) -> None:
    source = write(tmp_path / "source" / "part" / "a.png").parents[1]
    query = ("query", gallery, source, "-k", "2", "--quiet", "--output")
    for place in (source, source / "part", source / ".." / "source"):
        assert "expected a folder for results" in spade(*query, place).error
    assert spade(*query, source / "results").status == 0  # a new folder
    run = spade(*query, source / "results")  # and again: its overlays are no images
    assert (run.status, len(run.out.splitlines())) == (0, 2)
    overlays = ("query", gallery, source / "results" / "overlays", "-k", "2", "--output", source / "results")
    assert "found" in spade(*overlays).error
    assert (source / "results" / "overlays" / "part" / "a.png.png").exists()


def test_names_too_long_for_the_outputs(tmp_path: Path, spade: Spade, gallery: Path) -> None:
    """A file near the limit of 255 bytes, to which a suffix is appended (oxdef/lib2opds pull request 25)."""
    names = ["a" * 249 + ".png", "a" * 248 + "b.png", "中" * 83 + ".png", "z.png"]
    for name in names:
        write(tmp_path / "source" / name)
    out = tmp_path / "out"
    run = spade("query", gallery, tmp_path / "source", "-k", "2", "--output", out, "--quiet")
    assert run.status == 0
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == sorted(names)
    files = {line[part] for line in lines for part in ("map", "matches", "overlay")}
    assert len(files) == 12
    assert all((out / file).is_file() for file in files)
    assert lines[2]["map"] == "maps/z.png.npy"
    spade("query", gallery, tmp_path / "source" / "z.png", "-k", "2", "--output", out, "--quiet")
    assert len(names_in(out)) == 7


def test_one_image_whose_output_has_no_place_costs_no_other(tmp_path: Path, spade: Spade, gallery: Path) -> None:
    write(tmp_path / "source" / "b.png")
    write(tmp_path / "source" / "b.png.npy" / "x.png")  # maps/b.png.npy is a file, and a folder
    out = tmp_path / "out"
    run = spade("query", gallery, tmp_path / "source", "-k", "2", "--output", out, "--quiet")
    assert run.status == 0
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert all((out / line[part]).is_file() for line in lines for part in ("map", "matches", "overlay"))
    write(tmp_path / "more" / "c" / "x.png")
    write(tmp_path / "more" / "d.png")
    out = tmp_path / "other"
    (out / "maps").mkdir(parents=True)
    (out / "overlays").write_text("a file in the way of every image")
    run = spade("query", gallery, tmp_path / "more", "-k", "2", "--output", out, "--quiet")
    assert run.status == 3
    assert run.err.count("skipped: cannot write the results of") == 2
    assert len(run.out.splitlines()) == 3  # both were scored


def test_two_folders_with_the_same_names(tmp_path: Path, spade: Spade, gallery: Path) -> None:
    for line in ("line1", "line2"):
        write(tmp_path / line / "000.png")
    run = spade("query", gallery, tmp_path / "line1", tmp_path / "line2", tmp_path / "line2" / "000.png", "-k", "2")
    assert run.status == 0
    assert [line.split()[-1] for line in run.out.splitlines()[1:]] == ["line1/000.png", "line2/000.png"]
