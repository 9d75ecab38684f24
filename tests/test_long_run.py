"""Queries and rounds of writing, again and again: neither files, nor threads, nor memory grow, and answers stay.

A short run of benchmarks/long_run.py, in a process of its own, as what other tests hold comes and goes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.benchmarks import BENCHMARKS


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted as Linux has them")
def test_nothing_grows(tmp_path: Path) -> None:
    options = ["--queries", "300", "--rounds", "15", "--images", "60"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "long_run.py"), *options],
        env=os.environ | {"SPADE_FAISS_BENCH_OUTPUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "long_run.json").read_text())
    for what in ("queries", "rounds"):
        found = result[what]
        assert found["same_answers"], what
        early, end = found["quarter"], found["end"]
        assert end["files"] <= early["files"] + 2, found
        assert end["threads"] <= early["threads"] + 2, found  # readers start as they are needed, up to a number
        assert end["mib"] <= early["mib"] + 60, found
