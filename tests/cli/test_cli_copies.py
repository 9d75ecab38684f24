"""What the commands say about copies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.command_line import TOY, Spade
from tests.helpers.images import write_images


@pytest.fixture
def twice(tmp_path: Path) -> Path:
    folder = write_images(tmp_path / "normal", 12)
    for path in sorted(folder.iterdir())[:5]:
        (folder / f"again-{path.name}").write_bytes(path.read_bytes())
    return folder


def test_every_command_says_how_many(tmp_path: Path, twice: Path, spade: Spade) -> None:
    path = tmp_path / "g"
    built = spade("build", path, twice, *TOY, "--quiet")
    assert built.out.startswith("17 added (0 replaced, 5 copies of other images), 0 unchanged, 0 skipped; 17 images")
    assert "17 (0 removed and not yet compacted), 5 of them copies of others" in spade("info", path).out
    assert json.loads(spade("info", path, "--json").out)["copies"] == 5
    calibrated = spade("calibrate", path, "--false-alarms", 0.1, "--quiet")
    assert calibrated.out.startswith("12 images: image score above ")
    assert calibrated.err.strip() == (
        "spade-faiss: note: 5 images are copies of others; they are left out together, and count once"
    )
    audit = spade("audit", path, "--quiet")
    assert audit.err.strip() == "spade-faiss: note: 10 images have copies; they are left out together"
    line = json.loads(spade("audit", path, "--json", "--quiet", "--top", 1).out)
    assert set(line) == {"key", "image_score", "map_max", "oddity"}
    again = spade("add", path, twice, "--quiet")
    assert again.out.startswith("0 added (0 replaced), 17 unchanged")


def test_without_copies(tmp_path: Path, spade: Spade) -> None:
    path = tmp_path / "g"
    built = spade("build", path, write_images(tmp_path / "normal", 12), *TOY, "--quiet")
    assert built.out.startswith("12 added (0 replaced), 0 unchanged")
    assert "12 (0 removed and not yet compacted), no copies" in spade("info", path).out
    assert spade("calibrate", path, "--false-alarms", 0.1, "--quiet").err == ""


def test_mistakes_are_one_line(tmp_path: Path, twice: Path, spade: Spade) -> None:
    path = tmp_path / "g"
    spade("build", path, twice, *TOY, "--quiet")
    for command in (("calibrate", "--false-alarms", 0.1), ("audit",)):
        wrong = spade(*command, path, "--group", "part", "--quiet")
        assert wrong.status == 1
        assert "group: expected a pattern that matches keys" in wrong.error
    everything = spade("audit", path, "--group", "png", "--quiet")
    assert "all 17 images are left out with it, as its group (--group REGEX)" in everything.error
