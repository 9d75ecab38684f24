"""Result folders read back: whole ones, and those that are none, unfinished, damaged or of another release."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.images.sources import ImageFile
from spade_faiss.labels import export
from spade_faiss.report.colour_scale import colour_scale
from spade_faiss.report.result_folder import ResultFolder
from spade_faiss.report.results import Results
from spade_faiss.report.run_record import RunRecord
from tests.helpers.images import write_images
from tests.helpers.results import RUN, masks, write_results


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_results(tmp_path / "results", dict(list(masks().items())[:4]))


def test_results_are_read_back(folder: Path) -> None:
    results = Results.open(folder)
    assert (len(results), results.run, results.scale.high) == (4, RUN.finished(4), 2.0)
    for one in results:
        np.testing.assert_array_equal(one.labels() > 0, masks()[one.key])


def edited(name: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def other_map(folder: Path) -> None:
    np.save(folder / "maps" / "a" / "pixel.png.npy", np.zeros((23, 31), np.float32))


def text_as_map(folder: Path) -> None:
    (folder / "maps" / "a" / "pixel.png.npy").write_text("no map")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "results.jsonl").unlink(), "expected a folder that `query --output` wrote"),
        (lambda folder: (folder / "run.json").unlink(), "found none: an earlier release wrote these results"),
        (RUN.write, "expected the results of a run that has ended, found an unfinished one"),
        (edited("run.json", lambda text: text.replace('version": 1', 'version": 2')), "of version 1, found"),
        (edited("run.json", lambda text: text.replace('"generation"', '"no"')), "not as it is written: KeyError"),
        (edited("run.json", lambda text: text[:20]), "run.json: cannot be read"),
        (edited("run.json", lambda text: "[]"), "expected a JSON object, found list"),
        (edited("results.jsonl", lambda text: text[:-9]), "results.jsonl:4: expected a result as JSON"),
        (edited("results.jsonl", lambda text: text.split("\n")[0]), "expected 4 lines, found 1"),
        (edited("results.jsonl", lambda text: text + text), "expected a line for each image, found 'a/none.png' twice"),
        (edited("results.jsonl", lambda text: text.replace("maps/a", "../a")), "expected a map in maps/, found"),
        (edited("results.jsonl", lambda text: text.replace("maps/a", "maps//a")), "expected a map in maps/, found"),
        (edited("results.jsonl", lambda text: text.replace("maps/a", "./maps/a")), "expected a map in maps/, found"),
        (
            edited("run.json", lambda text: text.replace('"pixel": 1.0', '"pixel": "1"')),
            "run.json: not as it is written",
        ),
        (edited("run.json", lambda text: text.replace('"pixel": 1.0, ', "")), "run.json: not as it is written"),
        (
            edited("run.json", lambda text: text.replace('"images": 4', '"images": "4"')),
            "run.json: not as it is written",
        ),
        (edited("scale.json", lambda text: text.replace("2.0", "null")), "scale.json: not as it is written: TypeError"),
        (edited("scale.json", lambda text: text.replace("high", "top")), "scale.json: not as it is written: KeyError"),
        (edited("results.jsonl", lambda text: text.replace('"box": [', '"box": [0, ')), "expected a result as JSON"),
        (edited("results.jsonl", lambda text: text.replace('"area": 1', '"area": true')), "expected a result as JSON"),
        (edited("results.jsonl", lambda text: text.replace('"regions": []', '"regions": 7')), "expected a result as"),
        (edited("results.jsonl", lambda text: text.replace('"image_score": 6.0, ', "")), "expected a result as JSON"),
        (
            edited("results.jsonl", lambda text: text.replace('"key": "000', '"name": "000')),
            "expected a result as JSON",
        ),
        (lambda folder: (folder / "maps" / "a" / "pixel.png.npy").unlink(), "expected the map of a/pixel.png"),
        (text_as_map, "expected the map of a/pixel.png"),
        (other_map, "expected a map with the regions of a/pixel.png in results.jsonl, 1 of them, found 0 or others"),
        (
            replace(RUN, thresholds=None, images=4).write,
            "expected results of a calibrated gallery, found no thresholds",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(sf.ResultsError, match=re.escape(message)) as caught:
        export(folder, tmp_path / "regions.json")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "regions.json").exists()


def test_an_output_that_cannot_be_written(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(sf.OutputError, match=r"cannot write \S+regions\.json: "):
        export(folder, tmp_path / "file" / "regions.json")


@pytest.mark.parametrize("name", ["results.jsonl", "run.json", "maps/a/pixel.png.npy", "overlays", "report.html"])
@pytest.mark.parametrize("kind", ["cvat", "masks"])
def test_results_are_not_written_over(tmp_path: Path, folder: Path, name: str, kind: Any) -> None:
    (tmp_path / "link").symlink_to(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(sf.OutputError, match="expected a new file, found one of the results in"):
        export(folder, tmp_path / "link" / name, kind)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert export(folder, folder / "regions", kind) == 4


def test_the_record_says_who_wrote_it(folder: Path) -> None:
    values = json.loads((folder / "run.json").read_text())
    assert (values["format"], values["format_version"], values["created_by"]) == (
        "spade-faiss results", 1, sf.__version__,
    )  # fmt: skip


def test_a_path_is_that_of_when_it_was_queried(
    tmp_path: Path, toy_gallery: sf.Gallery, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the results may be in another folder, with a file of the same relative path."""
    image = write_images(tmp_path / "here" / "test", 1).parent / "test" / "000.png"
    write_images(tmp_path / "there" / "test", 1, seed=4)
    monkeypatch.chdir(tmp_path / "here")
    detector, relative = sf.Detector(toy_gallery, toy), image.relative_to(tmp_path / "here")
    with ResultFolder(tmp_path / "results", colour_scale(detector), run=RunRecord.of(detector)) as results:
        for file in (ImageFile(relative, "relative"), ImageFile(image, "absolute")):
            results.write(file, np.zeros((40, 48, 3), np.uint8), detector.query(file.path))
        results.close([])
    monkeypatch.chdir(tmp_path / "there")
    assert [one.path for one in Results.open(tmp_path / "results")] == [image, image]
    record = tmp_path / "results" / "run.json"
    values = json.loads(record.read_text())
    del values["directory"]  # as earlier releases wrote it
    record.write_text(json.dumps(values))
    assert [one.path for one in Results.open(tmp_path / "results")] == [relative, image]
