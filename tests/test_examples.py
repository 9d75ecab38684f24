"""The examples: each runs on the sample set, or on synthetic features, and prints what it promises."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))

Run = Callable[..., list[str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run an example with arguments, and return the lines that it prints."""

    def run(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_there_is_one_for_each_use() -> None:
    assert SCRIPTS == ["embed_as_a_back_end.py", "index_a_large_set.py", "scaling_benchmark.py"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_uses_the_public_api_only(name: str) -> None:
    code = (EXAMPLES / name).read_text(encoding="utf-8")
    assert re.findall(r"^ *(?:from|import) spade_faiss.*$", code, re.MULTILINE) == ["import spade_faiss as sf"]
    assert not re.search(r"\bsf\._|\._\w", code)


@pytest.mark.parametrize("patches", ["stored", "recompute"])
def test_indexing_a_large_set_resumes(run: Run, tmp_path: Path, patches: str) -> None:
    arguments = ["--extractor", "toy", "--patches", patches, "--gallery", str(tmp_path / "large.gallery")]
    lines = run("index_a_large_set.py", *arguments)
    assert lines[0].startswith("40 added, 0 unchanged, 0 skipped in ")
    assert lines[2].startswith("0 added, 40 unchanged, 0 skipped in ")
    assert re.fullmatch(rf"40 images in 1 shards, \d+\.\d MB, {patches} patches", lines[3])
    # The robust recipe's toy: 3 x (40 x 40 + 20 x 20 + 10 x 10) float16 and 12 float32.
    assert lines[4].split()[:3] == ["patches", "stored", "12.6"]
    assert (tmp_path / "large.gallery" / "gallery.json").is_file()


def test_the_scaling_benchmark_prints_a_row_for_each_size(run: Run) -> None:
    lines = run("scaling_benchmark.py", "--images", "600", "200", "-k", "5", "--queries", "3")
    rows = [line.split() for line in lines[1:]]
    assert [row[:2] for row in rows] == [["200", "Flat"], ["600", "Flat"]]
    assert all(float(figure) > 0 for row in rows for figure in row[2:])


def test_the_back_end_finds_defects_and_no_false_alarm(run: Run) -> None:
    lines = run("embed_as_a_back_end.py")
    assert re.fullmatch(r"40 normal images, threshold 0\.\d+", lines[0])
    verdicts = {line.split()[0]: line.split()[2] for line in lines[2:]}
    assert len(verdicts) == 12
    assert [key for key, verdict in verdicts.items() if key.startswith("good/") and verdict != "normal"] == []
    assert list(verdicts.values()).count("anomalous") >= 7  # of 9
    for line in lines[2:]:
        assert re.search(r" \d{3}\.jpg$", line)  # the nearest normal image
