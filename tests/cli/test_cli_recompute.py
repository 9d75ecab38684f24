"""Recomputed patches on the command line: chosen once, told by `info`, and one clear line where a file is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.command_line import TOY, Spade
from tests.helpers.images import make_images

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


RECOMPUTE = (*TOY, "--patches", "recompute")


@pytest.fixture
def recomputed(tmp_path: Path, normal: Path, spade: Spade) -> Path:
    path = tmp_path / "recompute.gallery"
    assert spade("build", path, normal, *RECOMPUTE).status == 0
    return path


def answers(run_out: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in run_out.splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_build_estimates_both_ways(tmp_path: Path, normal: Path, spade: Spade) -> None:
    whole = ("--extractor", "toy")  # at the recipe's own size
    stored = spade("build", tmp_path / "stored", normal, *whole).err
    recomputed = spade("build", tmp_path / "recompute", normal, *whole, *RECOMPUTE[-2:]).err
    for said in (stored, recomputed):
        assert "patches stored: 13 kB an image; recomputed (--patches recompute): 0.3 kB, and about " in said
        assert "ms for each neighbour of a query" in said


def test_info_tells_both_ways(gallery: Path, recomputed: Path, spade: Spade) -> None:
    facts = json.loads(spade("info", recomputed, "--json").out)
    assert (facts["patches"], facts["bytes_per_image"]) == ("recompute", facts["bytes_per_image_if"]["recompute"])
    assert (
        "recomputed from the image files, 0.3 kB an image; stored they would take 0.6 kB"
        in spade("info", recomputed).out
    )
    assert json.loads(spade("info", gallery, "--json").out)["patches"] == "stored"
    assert "stored, 0.6 kB an image; recomputed at each query they would take 0.3 kB" in spade("info", gallery).out


@pytest.mark.slow
def test_query_calibrate_and_audit_answer_as_a_stored_gallery(
    tmp_path: Path,
    gallery: Path,
    recomputed: Path,
    spade: Spade,
) -> None:
    images = make_images(tmp_path / "test", 3, seed=4)
    for command in (
        ("calibrate", "{}", "-k", 3, "--false-alarms", 0.1, "--quiet"),
        ("audit", "{}", "-k", 3, "--top", 4, "--json", "--quiet"),
        ("query", "{}", images, "-k", 3, "--json", "--quiet"),
    ):
        stored, found = (
            spade(*(str(path) if word == "{}" else word for word in command)) for path in (gallery, recomputed)
        )
        assert (stored.status, found.status) == (0, 0), found.err
        assert found.out
        if command[0] == "calibrate":
            assert found.out == stored.out
        else:
            assert answers(found.out) == answers(stored.out)


def test_goes_on_as_it_was_made(recomputed: Path, gallery: Path, normal: Path, spade: Spade) -> None:
    make_images(normal / "more", 2, seed=6)
    assert "2 added (0 replaced), 12 unchanged" in spade("build", recomputed, normal, *TOY).out
    other = spade("build", recomputed, normal, *TOY, "--patches", "stored")
    assert "expected patches as it has them, recompute, found stored" in other.error
    assert (
        "expected patches as it has them, stored, found recompute" in spade("build", gallery, normal, *RECOMPUTE).error
    )
    assert spade("verify", recomputed).status == 0


def test_a_deleted_source_is_one_clear_line(recomputed: Path, normal: Path, spade: Spade) -> None:
    query = shutil.copy(normal / "004.png", normal.parent / "query.png")
    (normal / "004.png").unlink()
    run = spade("query", recomputed, query, "-k", 1)
    assert run.status == 1
    assert f"{normal / '004.png'}: expected the image '004.png'" in run.error
    assert "found: not found; put it back" in run.error
    assert "004.png" in spade("calibrate", recomputed, "--false-alarms", 0.1).error
    checked = spade("verify", recomputed)
    assert checked.status == 1
    assert "12 images checked, 1 problems" in checked.out
    assert spade("verify", recomputed, "--no-files").status == 0
    [problem] = json.loads(spade("verify", recomputed, "--json").out)["problems"]
    assert (problem["key"], problem["file"]) == ("004.png", str(normal / "004.png"))
    spade("remove", recomputed, "004.png")
    assert spade("query", recomputed, query, "-k", 1).status == 0
    assert spade("verify", recomputed).status == 0


@pytest.mark.slow
def test_a_moved_folder_is_named_or_added_again(
    tmp_path: Path,
    recomputed: Path,
    normal: Path,
    spade: Spade,
) -> None:
    images, moved = make_images(tmp_path / "test", 1, seed=4), tmp_path / "moved"
    before = answers(spade("query", recomputed, images, "-k", 3, "--json").out)
    normal.rename(moved)
    assert "--normal DIR" in spade("query", recomputed, images, "-k", 3).error
    again = spade("query", recomputed, images, "-k", 3, "--json", "--normal", moved, "--output", tmp_path / "out")
    assert answers(again.out) == before
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/jpeg") == 2 + 3 + 2
    for command in (("calibrate", "--false-alarms", 0.1, "-k", 3), ("audit", "-k", 3), ("verify",)):
        name, *options = command
        assert spade(name, recomputed, *options).status == 1
        assert spade(name, recomputed, *options, "--normal", moved).status == 0
    (recomputed / "calibration.json").unlink()  # it will not be that of the next generation
    assert "12 added (12 replaced)" in spade("add", recomputed, moved, "--replace").out
    assert spade("query", recomputed, images, "-k", 3, "--quiet").status == 0
    assert spade("verify", recomputed).status == 0


def test_evaluate_finds_the_images_of_its_own_set(tmp_path: Path, normal: Path, spade: Spade) -> None:
    labelled = ("--abnormal", make_images(tmp_path / "bad", 3, seed=9), "--seed", 0)
    spade("build", tmp_path / "g", "--normal", normal, *labelled, *RECOMPUTE)
    (tmp_path / "moved").mkdir()
    moved = normal.rename(tmp_path / "moved" / normal.name)
    assert spade("query", tmp_path / "g", moved / "000.png", "-k", 2).status == 1
    run = spade("evaluate", tmp_path / "g", "--normal", moved, *labelled, "-k", 2, "--json", "--quiet")
    assert run.status == 0, run.err
    assert json.loads(run.out)[0]["metrics"]
