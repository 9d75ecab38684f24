"""Queries and rounds of writing, again and again: neither files, nor threads, nor memory grow, and answers stay.

A short run of benchmarks/long_run.py, in a process of its own, as what other tests hold comes and goes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.benchmarks import BENCHMARKS
from tests.helpers.processes import run

RUN = """
import os, runpy, sys
_, benchmarks, os.environ["SPADE_FAISS_BENCH_OUTPUT"], *options = sys.argv
sys.path.insert(0, benchmarks)
sys.argv = ["long_run.py", *options]
runpy.run_module("long_run", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted as Linux has them")
def test_nothing_grows(tmp_path: Path) -> None:
    options = ["--queries", "200", "--rounds", "10", "--images", "40"]
    done = run(RUN, BENCHMARKS, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "long_run.json").read_text())
    for what in ("queries", "rounds"):
        found = result[what]
        assert found["same_answers"], what
        early, end = found["quarter"], found["end"]
        assert end["files"] <= early["files"] + 2, found
        assert end["threads"] <= early["threads"] + 2, found  # readers start as they are needed, up to a number
        assert end["mib"] <= early["mib"] + 40, found
