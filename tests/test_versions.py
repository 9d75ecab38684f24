"""Galleries that an earlier version wrote open, with the answers of then. make_fixtures.py wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import make_fixtures

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


def assert_same(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, float) or where in ("map", "levels", "image", "sq_distances"):
        pairs = zip(found, expected, strict=True) if where == "levels" else [(found, expected)]
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-9, err_msg=where)
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", sorted(make_fixtures.NAMES))
def test_a_gallery_of_before_answers_as_it_did(tmp_path: Path, name: str) -> None:
    expected = json.loads((make_fixtures.FIXTURES / f"{name}.json").read_bytes())
    path = shutil.copytree(make_fixtures.FIXTURES / name, tmp_path / name)
    found = make_fixtures.answers(path)
    assert found.keys() == expected.keys()
    assert expected["problems"] == []
    for where, value in expected.items():
        assert_same(found[where], value, where)
