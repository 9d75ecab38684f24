"""A folder of images, and a gallery that the command line built of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.command_line import Spade
from tests.helpers.images import make_images


@pytest.fixture
def normal(tmp_path: Path) -> Path:
    return make_images(tmp_path / "normal", 12)


@pytest.fixture
def gallery(tmp_path: Path, normal: Path, spade: Spade) -> Path:
    path = tmp_path / "toy.gallery"
    assert spade("build", path, normal, "--extractor", "toy").status == 0
    return path
