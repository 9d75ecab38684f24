"""docs/guarantees.md names tests: each has to be there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(\w+)`", (TESTS.parent / "docs" / "guarantees.md").read_text())))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_test_is_there(file: str, name: str) -> None:
    texts = [path.read_text() for path in TESTS.rglob(file)]  # rooms may have files of one name
    assert sum(bool(re.search(rf"^def {name}\(", text, re.MULTILINE)) for text in texts) == 1


def test_there_are_some() -> None:
    assert len(NAMED) > 40
