"""Names of an image's files in a result folder, on file systems that do not take its key."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.images.sources import ImageFile
from spade_faiss.report.colour_scale import colour_scale
from spade_faiss.report.output_files import EVALUATED, PAGE, OutputNames, clear_earlier_run, concerns_one_image
from spade_faiss.report.result_folder import ResultFolder

PIXELS = np.zeros((40, 48, 3), np.uint8)


@pytest.fixture
def detector(toy_gallery: sf.Gallery, toy: sf.Extractor) -> sf.Detector:
    return sf.Detector(toy_gallery, toy, sf.SearchOptions(k=2))


def write(detector: sf.Detector, folder: Path, *keys: str) -> list[str]:
    """Write the files of images; returns the reasons of those that were skipped."""
    detection = detector.query(PIXELS)
    with ResultFolder(folder, colour_scale(detector)) as results:
        skipped = [one for key in keys for one in results.write_or_skip(ImageFile(Path(key), key), PIXELS, detection)]
    return [one.reason for one in skipped]


def refuse(monkeypatch: pytest.MonkeyPatch, number: int, longest: int) -> None:
    """Let the disk refuse names that are longer, in bytes."""
    real = Path.write_bytes

    def write_bytes(path: Path, content: bytes) -> int:
        if len(os.fsencode(path.name)) > longest:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def files(folder: Path) -> list[Path]:
    return [path for place in ("maps", "matches", "overlays") for path in (folder / place).rglob("*") if path.is_file()]


def test_an_encrypted_folder_takes_143_bytes(
    tmp_path: Path, detector: sf.Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of eCryptfs (FThompson/BBCSoundDownloader issue 3)."""
    refuse(monkeypatch, errno.ENAMETOOLONG, 143)
    assert write(detector, tmp_path / "out", "a" * 200 + ".png", "a" * 199 + "b.png", "z.png") == []
    assert len(files(tmp_path / "out")) == 9


def test_names_that_no_choice_makes_good_are_skipped_and_leave_nothing(
    tmp_path: Path, detector: sf.Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, errno.EINVAL, 9)
    [reason] = write(detector, tmp_path / "out", "long.png", "z.png")
    assert reason.startswith(f"cannot write the results of long.png to {tmp_path / 'out'}: Invalid argument")
    assert len(files(tmp_path / "out")) == 3
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 1


def test_a_full_disk_stops_the_run(tmp_path: Path, detector: sf.Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOSPC, 0)
    with pytest.raises(sf.OutputError, match="free some space") as caught:
        write(detector, tmp_path / "out", "z.png")
    assert not concerns_one_image(caught.value)


def test_two_keys_that_a_file_system_takes_for_one(tmp_path: Path) -> None:
    names = OutputNames(tmp_path)
    first = next(names.choices("A.png"))
    assert first["map"] == "maps/A.png.npy"
    assert next(names.choices("a.png"))["map"] == "maps/a.png.npy"  # Linux: another file
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "ä.png.npy").touch()  # as if "Ä.png" had been written under either name
    next(names.choices("Ä.png"))
    assert next(names.choices("ä.png"))["map"].startswith("maps/ä.png~")


def test_a_run_of_another_kind_leaves_no_mix(tmp_path: Path, detector: sf.Detector) -> None:
    """Of a query and an evaluation into one folder, only the later one is there."""
    out = tmp_path / "out"
    out.mkdir()
    for name in EVALUATED:
        (out / name).write_text('{"categories": []}')
    (out / PAGE).write_text("of the evaluation")
    assert write(detector, out, "000.png") == []
    assert not {*EVALUATED, PAGE} & {path.name for path in out.iterdir()}
    (out / "mine.txt").write_text("of somebody else")
    clear_earlier_run(out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
