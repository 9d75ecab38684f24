"""A result folder with regions that are hard to write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers.results import masks, write_results

Masks = dict[str, NDArray[np.bool_]]


@pytest.fixture(scope="session")
def drawn() -> Masks:
    return masks()


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory, drawn: Masks) -> Path:
    return write_results(tmp_path_factory.mktemp("results"), drawn)
