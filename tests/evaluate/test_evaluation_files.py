"""The files of an evaluation: whole ones, whatever happens, of this run alone, under any folder's name."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

import spade_faiss as sf
from spade_faiss.evaluate import METRICS, Evaluation, write_results
from spade_faiss.metrics.curves import image_roc
from spade_faiss.repeats import Draw, Repeats, write_repeats
from spade_faiss.report.output_files import clear_earlier_evaluation
from spade_faiss.system import atomic_files
from tests.helpers.command_line import TOY, Spade
from tests.helpers.datasets import make_set


def evaluation(name: str) -> Evaluation:
    curve = image_roc([0.0, 1.0], [False, True])
    assert curve is not None
    return Evaluation(name, 1, 1, dict.fromkeys(METRICS, 0.5), {}, curves=[curve])


def repeated(name: str) -> Repeats:
    draw = Draw(0, None, None, None, [], [])  # type: ignore[arg-type]
    return Repeats(name, [(draw, evaluation(name))])


WRITTEN = pytest.mark.parametrize(("write", "make"), [(write_results, evaluation), (write_repeats, repeated)])


@WRITTEN
def test_a_full_disk_leaves_what_earlier_categories_had(
    tmp_path: Path, write: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    write(tmp_path, [make("one")], [{}])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"metrics.json", "results.csv", "curves.json", "curves.csv"}
    monkeypatch.setattr(atomic_files, "publish", full)
    with pytest.raises(sf.OutputError, match="free some space"):
        write(tmp_path, [make("one"), make("two")], [{}, {}])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@WRITTEN
def test_settings_are_those_of_each_category(tmp_path: Path, write: Any, make: Any) -> None:
    one, two = {"k": 5, "calibrated": True, "size": None}, {"k": 5, "calibrated": False}
    write(tmp_path, [make("one"), make("two")], [one, two])
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["settings"] == {"k": 5}
    assert [category["settings"] for category in found["categories"]] == [one, two]


@WRITTEN
def test_names_whose_bytes_are_no_text(tmp_path: Path, write: Any, make: Any) -> None:
    write(tmp_path, [make(os.fsdecode(b"a\xff"))], [{}])
    for name in ("results.csv", "curves.csv"):
        assert "\na\\udcff," in (tmp_path / name).read_bytes().replace(b", seed 0", b"").replace(b'"', b"").decode()


@pytest.mark.slow
def test_a_set_whose_folder_has_such_a_name(tmp_path: Path, spade: Spade, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, out = make_set(tmp_path / "tiles"), tmp_path / "out"
    assert spade("build", tmp_path / "g", dataset / "train", *TOY, "--quiet").status == 0
    monkeypatch.chdir(dataset.rename(tmp_path / os.fsdecode(b"tiles\xff")))
    assert spade("evaluate", tmp_path / "g", ".", "--quiet", "-k", 2, "--output", out).status == 0
    assert "Evaluation of tiles\\udcff" in (out / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_nothing_of_an_earlier_run_is_left(tmp_path: Path, spade: Spade) -> None:
    dataset, out = make_set(tmp_path / "tiles"), tmp_path / "out"
    assert spade("build", tmp_path / "g", dataset / "train", *TOY, "--quiet").status == 0
    words = ("evaluate", tmp_path / "g", dataset, "--quiet", "-k", 2, "--maps", "tiff", "--output", out)
    assert spade(*words).status == 0
    maps = set(out.rglob("*.tiff"))
    assert len(maps) == 7
    (dataset / "test/square/002.png").write_bytes(b"no image")
    assert spade(*words).status == 1  # before the first query: all is as it was
    assert (out / "report.html").exists()
    assert spade(*words, "--skip-bad-images", "--no-report").status == 3
    assert set(out.rglob("*.tiff")) == maps - {out / "anomaly_maps/tiles/test/square/002.tiff"}
    assert not (out / "report.html").exists()


def test_only_what_an_evaluation_wrote_is_deleted(tmp_path: Path) -> None:
    out, drawn = tmp_path / "out", repeated("two")
    pages = [out / "report.html", out / "one/report.html", out / "two/seed-0/report.html"]
    others = [tmp_path / "report.html", out / "three/report.html", out / "own.txt"]
    for path in (*pages, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    clear_earlier_evaluation(out)
    assert all(path.exists() for path in (*pages, *others))  # nothing says that it was one
    write_repeats(out, [drawn], [{}])
    values = json.loads((out / "metrics.json").read_text())
    values["categories"] += [{"category": name} for name in ("one", "..", ".", "", "/", str(tmp_path))]
    (out / "metrics.json").write_text(json.dumps(values))
    clear_earlier_evaluation(out)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(others)
    assert not (out / "one").exists()


def test_edited_metrics_are_no_obstacle(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"categories": [1]}', '{"categories": [{"category": "a", "draws": [{"seed": "b"}]}]}'):
        for name in ("metrics.json", "results.csv", "report.html"):
            (tmp_path / name).write_text(text)
        clear_earlier_evaluation(tmp_path)
        assert not list(tmp_path.iterdir())
