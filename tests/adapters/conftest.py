"""A folder of images with masks, and anomalib without its log, for the tests that run in it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.helpers.parts import write_parts


@pytest.fixture
def quiet_anomalib() -> None:
    for name in ("anomalib", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one size: 8 normal ones, 4 + 4 to test with, and masks."""
    return write_parts(tmp_path_factory.mktemp("parts"), lambda number: (40, 48))
