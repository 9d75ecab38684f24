"""`query --profile`: where the time of a query goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spade_faiss.detect.stage_times import STAGES
from tests.helpers.command_line import Spade


def findings(out: str) -> list[dict[str, Any]]:
    """What is found in each image, without the time that it took."""
    rows = [json.loads(line) for line in out.splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_profile_accounts_for_the_time_of_a_query(spade: Spade, gallery: Path, normal: Path, tmp_path: Path) -> None:
    """Images are queried one at a time; what is found, and skipped, is what it is without."""
    (tmp_path / "bad.png").write_bytes(b"no image")
    words = ("query", gallery, normal, tmp_path / "bad.png", "--json", "-k", 2, "--quiet")
    plain, profiled = spade(*words), spade(*words, "--profile")
    assert profiled.status == plain.status != 0
    assert findings(profiled.out) == findings(plain.out) != []
    lines = profiled.err.splitlines()
    start = next(at for at, line in enumerate(lines) if " one at a time after the first, which took " in line)
    assert lines[start].startswith("mean of 11 queries")
    table = [line.rsplit(None, 2) for line in lines[start + 2 : start + 10]]
    assert [name.strip() for name, *_ in table] == [*STAGES, "other", "a query"]
    times = [float(ms) for _, ms, _ in table]
    assert sum(times[:-1]) == pytest.approx(times[-1], abs=0.1)


def test_nothing_is_shown_of_no_query(spade: Spade, gallery: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    run = spade("query", gallery, tmp_path / "bad.png", "--profile", "-k", 2)
    assert run.status != 0
    assert run.err.count("no image was queried: there are no times") == 1
