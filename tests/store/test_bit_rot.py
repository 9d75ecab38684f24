"""Whatever happens to a byte of a gallery, it is reported, refused or changes no answer: `bit_rot.py`, small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import spade_faiss as sf
from spade_faiss.options import Patches
from tests.helpers.benchmarks import bit_rot

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("patches", ["stored", "recompute"])
def test_damage_is_reported_refused_or_harmless(tmp_path: Path, patches: Patches) -> None:
    gallery = bit_rot.make_gallery(tmp_path, patches)
    chosen = bit_rot.damages(gallery, 30, seed={"stored": 3, "recompute": 4}[patches])
    outcomes = list(bit_rot.outcomes(gallery, chosen))
    assert {found for _, found in outcomes} <= set(bit_rot.OUTCOMES), outcomes
    assert [damage for damage, _ in outcomes] == chosen
    # Only what nobody reads, and zeros where there were zeros, may be harmless.
    harmless = {file for (file, _, _), found in outcomes if found == "harmless"}
    assert harmless <= {"writer.pid", "index/keys-000003.npy"}


def test_a_wrong_answer_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = bit_rot.make_gallery(tmp_path, "stored")
    expected = bit_rot.answers(gallery)

    def outcome(**others: Any) -> str:
        return bit_rot.outcome(gallery, {**expected, **others}, ("writer.pid", "flipped", 0))

    assert outcome() == "harmless"
    assert {outcome(**{name: None}) for name in expected} == {"WRONG"}

    def broken(self: sf.Gallery) -> None:
        raise IndexError("an error of another kind")

    monkeypatch.setattr(sf.Gallery, "verify", broken)
    assert outcome().startswith("not caught")
