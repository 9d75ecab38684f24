from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest
from click.testing import CliRunner

from spade_faiss.cli import bench
from spade_faiss.cli.main import cli
from spade_faiss.errors import OptionError


@pytest.fixture
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give back what a benchmark, which has the process to itself, changes."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(bench.OUTPUT, os.environ.get(bench.OUTPUT, ""))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Benchmarks to run in place of the real ones."""
    (tmp_path / "beside.py").write_text("import os\nOUTPUT = os.environ['SPADE_FAISS_BENCH_OUTPUT']\n")
    (tmp_path / "speed.py").write_text(
        '"""How fast.\n\nMore."""\nimport sys, beside\ndef main():\n    print(sys.argv[1:], beside.OUTPUT)\n'
        "if __name__ == '__main__':\n    main()\n"
    )
    (tmp_path / "needy.py").write_text("import a_package_that_nobody_has\ndef main(): pass\n")
    monkeypatch.setattr(bench, "benchmark_folder", lambda: tmp_path)
    return tmp_path


def test_lists_the_benchmarks_with_what_they_tell() -> None:
    lines = CliRunner().invoke(cli, ["bench"], catch_exceptions=False).output.splitlines()

    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert {"scaling", "query", "patch_search"} <= set(listed)
    assert not {"common", "synthetic", "scaling_cells"} & set(listed)
    assert listed["query"].startswith("Seconds of each stage")


@pytest.mark.usefixtures("_restored", "folder")
def test_passes_args_and_says_where_results_go() -> None:
    result = CliRunner().invoke(
        cli, ["bench", "--output", "there", "speed", "DIR", "-k", "5", "--help"], catch_exceptions=False
    )

    assert result.output == "['DIR', '-k', '5', '--help'] there\n"


@pytest.mark.usefixtures("_restored", "folder")
def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(OptionError, match=r"a_package_that_nobody_has.*spade-faiss\[bench\]"):
        CliRunner().invoke(cli, ["bench", "needy"], catch_exceptions=False)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(OptionError, match=r"scaling.*'fastest'"):
        CliRunner().invoke(cli, ["bench", "fastest"], catch_exceptions=False)


@pytest.mark.usefixtures("_restored")
def test_synthetic_features_are_the_same_whatever_was_drawn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(bench.benchmark_folder()))
    import synthetic

    rng = np.random.default_rng(0)
    real = np.maximum(rng.standard_normal((90, 3)) @ rng.standard_normal((3, 20)) + 1, 0).astype(np.float32)
    mixture = synthetic.Mixture.fit(real, clusters=3, rank=4)

    short, long = (np.concatenate(list(synthetic.stream(real, mixture, n))) for n in (120, 6000))
    assert short.shape == (120, 20)
    assert long.shape == (6000, 20)  # of two blocks
    assert long.dtype == np.float32
    assert long.min() >= 0
    np.testing.assert_array_equal(long[:90], real)
    np.testing.assert_array_equal(long[:120], short)
    np.testing.assert_array_equal(mixture.block(3), mixture.block(3))
    assert not np.array_equal(mixture.block(3), mixture.block(4))
    np.testing.assert_allclose(mixture.block(1, 4000).mean(axis=0), real.mean(axis=0), atol=0.35)


@pytest.mark.slow
@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("dimension", [2, 6])
def test_intrinsic_dimension_is_that_of_the_subspace(dimension: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(bench.benchmark_folder()))
    import synthetic

    rng = np.random.default_rng(0)
    points = rng.random((1500, dimension)) @ np.linalg.qr(rng.standard_normal((12, dimension)))[0].T
    sq = np.sort(np.square(points[:, None] - points[None]).sum(axis=2), axis=1)[:, 1:21]

    assert synthetic.intrinsic_dimension(sq) == pytest.approx(dimension, rel=0.15)


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """What benchmarks share, with a folder of its own for results."""
    monkeypatch.syspath_prepend(str(bench.benchmark_folder()))
    module = importlib.import_module("common")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_what_was_measured_before_a_benchmark_is_stopped_is_kept(common: ModuleType, tmp_path: Path) -> None:
    """Beside the last whole result, and until there is another."""
    common.save("speed", {"rows": [0, 0]}, show=False)
    common.save("speed", {"rows": [1]}, part=True)
    assert json.loads((tmp_path / "speed.json").read_text())["rows"] == [0, 0]
    assert json.loads((tmp_path / "speed.part.json").read_text())["rows"] == [1]
    common.save("speed", {"rows": [1, 2]}, show=False)
    assert json.loads((tmp_path / "speed.json").read_text())["rows"] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]


KILLED = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from common import end_with_the_parent

def work():
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context(sys.argv[1]), end_with_the_parent) as pool:
        pool.submit(work).result()
"""


@pytest.mark.parametrize("way", ["spawn", "forkserver"])
def test_a_benchmark_that_is_killed_leaves_no_process(way: str, tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(bench.benchmark_folder())}
    command = [sys.executable, tmp_path / "killed.py", way]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stdout is not None
        child = int(running.stdout.readline())
        os.kill(child, 0)  # it is there
        running.kill()
        assert running.stdout.read() == ""  # until the last process that could write has ended


@pytest.fixture
def anomalib_engine(common: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "argv", ["anomalib_engine", "set"])
    module = importlib.import_module("anomalib_engine")
    monkeypatch.setattr(module, "save", common.save)
    return module


def test_without_anomalib_nothing_is_measured(
    anomalib_engine: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="1"):
        anomalib_engine.main()
    assert capsys.readouterr().err == "expected the package anomalib, found none; pip install 'spade-faiss[anomalib]'\n"
    assert not list(tmp_path.iterdir())


def test_where_every_side_failed_nothing_is_written(
    anomalib_engine: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    row = {"side": "spade", "dataset": "set", "failed": "no room"}
    monkeypatch.setattr(anomalib_engine, "measure", lambda *_: row)
    with pytest.raises(SystemExit, match="1"):
        anomalib_engine.main()
    assert capsys.readouterr().err == "every side failed, nothing is written; the last: no room\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("common")
def test_the_page_of_the_service_starts_nothing_without_a_browser(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page, playwright = importlib.import_module("service_page"), MagicMock()
    playwright.sync_playwright().__enter__().chromium.launch.side_effect = FileNotFoundError("no browser")
    monkeypatch.setitem(sys.modules, "playwright", MagicMock())
    monkeypatch.setitem(sys.modules, "playwright.sync_api", playwright)
    monkeypatch.setattr(page.subprocess, "Popen", None)
    with pytest.raises(FileNotFoundError, match="no browser"):
        page.walk(tmp_path)


@pytest.mark.usefixtures("common")
def test_a_demonstration_that_ended_by_itself_is_no_more_to_be_killed(tmp_path: Path) -> None:
    demo = importlib.import_module("service_page").Demo(tmp_path)
    demo.process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    demo.process.wait()
    demo.kill()
