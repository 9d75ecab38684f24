"""A folder of images, and a gallery that the command line built of it: once for all, and copied for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from spade_faiss.cli.main import cli
from tests.helpers.command_line import TOY
from tests.helpers.images import make_images


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    make_images(folder / "normal", 12)
    words = ("build", folder / "toy.gallery", folder / "normal", *TOY)
    assert CliRunner().invoke(cli, [str(word) for word in words]).exit_code == 0
    return folder


@pytest.fixture
def normal(tmp_path: Path, prepared: Path) -> Path:
    return Path(shutil.copytree(prepared / "normal", tmp_path / "normal"))


@pytest.fixture
def gallery(tmp_path: Path, normal: Path, prepared: Path) -> Path:
    """Of the images in `normal`; it does not say where they lie."""
    return Path(shutil.copytree(prepared / "toy.gallery", tmp_path / "toy.gallery"))
