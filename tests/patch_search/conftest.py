"""What the tests of the patch search share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from spade_faiss.patch_search.bounds.choices import CHOICES
from spade_faiss.patch_search.pyramid import search as pyramid


@pytest.fixture(scope="module")
def float32_products() -> Iterator[None]:
    """Spare the time of measuring products in bfloat16, which test_patch_search.py has both ways."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyramid, "bfloat16_pays", lambda: False)
        yield


@pytest.fixture(autouse=True)
def nothing_chosen() -> None:
    """Let no search know what that of another test has found out."""
    CHOICES.clear()
