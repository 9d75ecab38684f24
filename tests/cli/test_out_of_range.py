"""A number out of its range is refused before anything is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.command_line import TOY, Spade
from tests.helpers.images import make_images


@pytest.mark.parametrize("workers", [0, -1, -3])
@pytest.mark.parametrize("ray", [(), ("--ray", "local")])
def test_workers(tmp_path: Path, gallery: Path, normal: Path, spade: Spade, workers: int, ray: tuple[str, ...]) -> None:
    cluster = tmp_path / "c"
    assert spade("cluster", "create", cluster, gallery).status == 0
    for words in (
        ("build", tmp_path / "new.gallery", normal, *TOY),
        ("add", gallery, normal),
        ("cluster", "add", cluster, normal),
    ):
        run = spade(*words, "--workers", workers, *ray)
        assert (run.status, run.out) == (1, "")
        assert run.err == f"spade-faiss: error: workers: expected a number >= 1, found {workers}\n"
    assert not (tmp_path / "new.gallery").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--kappa", 0), ("-k", -1), ("--k-score", 0), ("--nprobe", 0), ("--leave-out", 0.7), ("--sigma", -1),
        ("--sigma", "nan"), ("--truncate", 0), ("--min-region", 0), ("--batch-size", 0), ("--window", 2.5),
    ],
)  # fmt: skip
def test_options_of_a_query(tmp_path: Path, gallery: Path, spade: Spade, option: str, value: object) -> None:
    """Where a folder holds something else, a query says so first."""
    parts = make_images(tmp_path / "parts", 1)
    (parts / "notes.txt").write_text("red")
    assert "note: passed over: 1 other file" in spade("query", gallery, parts, "-k", 2).err
    run = spade("query", gallery, parts, option, value)
    assert (run.status, run.out) == (1, "")
    assert run.err.count("\n") == 1
    assert run.error
