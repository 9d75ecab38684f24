"""Commands that compare only what a gallery stores need no network."""

from __future__ import annotations

from pathlib import Path

import pytest

import spade_faiss as sf
from spade_faiss.extractors import registry
from spade_faiss.gallery import reader
from tests.helpers.command_line import Spade

COMMANDS = [("calibrate", "--false-alarms", "0.1"), ("audit", "--json")]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    asked: list[object] = []

    def load(*arguments: object) -> sf.Extractor:
        asked.append(arguments)
        return registry.load_extractor(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "load_extractor", load)
    return asked


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_stored_images_are_compared_without_a_network(
    spade: Spade, toy_gallery: sf.Gallery, no_network: list[object], command: tuple[str, ...]
) -> None:
    name, *options = command
    assert spade(name, toy_gallery.path, *options).status == 0
    assert no_network == []


def test_images_that_are_not_stored_are_extracted(
    spade: Spade, tmp_path: Path, image_folder: Path, toy: sf.Extractor, no_network: list[object]
) -> None:
    with sf.Gallery.create(tmp_path / "again.gallery", toy.spec, patches="recompute") as gallery:
        gallery.add_images(image_folder, toy)
    assert spade("calibrate", tmp_path / "again.gallery", "--false-alarms", "0.1").status == 0
    assert len(no_network) == 1


def test_what_was_asked_of_the_network_is_checked_all_the_same(spade: Spade, toy_gallery: sf.Gallery) -> None:
    for options, text in ((("--batch-size", "0"), "batch_size"), (("--weights", "none.pth"), "weights")):
        assert text in spade("calibrate", toy_gallery.path, *options).error
