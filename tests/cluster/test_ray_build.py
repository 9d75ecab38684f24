"""Builds by Ray tasks: the gallery of one process, whoever is killed; `make test-ray` runs these."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.cluster import RayMachines, ray_build
from tests.helpers.images import write_images
from tests.helpers.workers import Moody, create, toy

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

STORE = 80 * 2**20
SHARDS = 4  # images in each
PROGRAM = """
import sys
import spade_faiss as sf
from spade_faiss.cluster import RayMachines
from tests.helpers.workers import toy
if __name__ == "__main__":
    gallery, images, address = sys.argv[1:]
    sf.Gallery.open(gallery).add_images(images, toy(), workers=RayMachines(address))
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False},
    )
    found.add_node(num_cpus=1, object_store_memory=STORE)
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 18, size=(16, 16))


def content(path: Path) -> list[tuple[str, str, bytes]]:
    """Keys in their order, with digests and features."""
    with sf.Gallery.open(path) as gallery:
        snapshot = gallery.snapshot()
        ids = snapshot.ids()
        features = snapshot.rows.read(ids)
        return [
            (key, digest, feature.tobytes())
            for key, digest, feature in zip(snapshot.keys(ids), snapshot.digests(ids), features, strict=True)
        ]


def by_one_process(tmp_path: Path, images: Path) -> list[tuple[str, str, bytes]]:
    create(tmp_path / "one", SHARDS).add_images(images, toy())
    return content(tmp_path / "one")


def test_the_gallery_of_one_process(machines: Any, images: Path, tmp_path: Path) -> None:
    (images / "005.png").write_bytes(b"no image")
    expected = by_one_process(tmp_path, images)
    gallery = create(tmp_path / "g", SHARDS)
    report = gallery.add_images(images, toy(), workers=RayMachines("any"))
    assert (report.added, len(report.skipped)) == (17, 1)
    assert content(tmp_path / "g") == expected
    assert not list((tmp_path / "g" / "shards").glob("*.tmp"))
    assert gallery.add_images(images, toy(), workers=RayMachines("any")).added == 0


def test_a_process_that_is_killed(machines: Any, images: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16, 3), 255, np.uint8)).save(images / "009.png")
    expected = by_one_process(tmp_path, images)
    (tmp_path / "mood").write_text("killed once")
    report = create(tmp_path / "g", SHARDS).add_images(images, Moody(tmp_path), workers=RayMachines("any"))
    assert (tmp_path / "was killed").exists()
    assert report.added == 18
    assert [one[:2] for one in content(tmp_path / "g")] == [one[:2] for one in expected]
    assert not list((tmp_path / "g" / "shards").glob("*.tmp"))


def test_a_process_that_is_killed_again_and_again(
    machines: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_build, "RETRIES", 1)
    Image.fromarray(np.full((16, 16, 3), 255, np.uint8)).save(images / "009.png")
    expected = by_one_process(tmp_path, images)
    (tmp_path / "mood").write_text("killed")
    gallery = create(tmp_path / "g", SHARDS)
    with pytest.raises(sf.WorkerError, match="lost 2 times"):
        gallery.add_images(images, Moody(tmp_path), workers=RayMachines("any"))
    (tmp_path / "mood").write_text("well")
    gallery.add_images(images, Moody(tmp_path), workers=RayMachines("any"))  # the same call goes on
    assert [one[:2] for one in content(tmp_path / "g")] == [one[:2] for one in expected]


@pytest.mark.parametrize("step", ["written N.h5", "2 adopted", "2 committed", "renamed gallery.json"])
def test_a_driver_that_is_killed(machines: Any, images: Path, tmp_path: Path, step: str) -> None:
    expected = by_one_process(tmp_path, images)
    create(tmp_path / "g", SHARDS)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "SPADE_FAISS_FAILPOINT": step}
    command = [sys.executable, program, tmp_path / "g", images, machines.address]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr[-2000:]
    with sf.Gallery.open(tmp_path / "g") as gallery:
        assert gallery.verify() == []
        assert content(tmp_path / "g") == expected[: len(gallery)]
        gallery.add_images(images, toy(), workers=RayMachines("any"))
    assert content(tmp_path / "g") == expected


def test_a_machine_that_does_not_see_the_gallery(
    machines: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(folder: str, image: str, digest: str, name: str) -> str | None:
        return f"another gallery, or none, at {folder}"

    monkeypatch.setattr(ray_build, "_sight", blind)
    gallery = create(tmp_path / "g", SHARDS)
    with pytest.raises(sf.WorkerError, match=r"machine .*: expected to see .*put both on storage that all machines"):
        gallery.add_images(images, toy(), workers=RayMachines("any"))
    assert len(gallery) == 0


def test_what_a_machine_sees(images: Path, tmp_path: Path) -> None:
    create(tmp_path / "g", SHARDS).close()
    digest, folder = ray_build.gallery_digest(tmp_path / "g"), str(tmp_path / "g")
    assert ray_build._sight(folder, str(images / "000.png"), digest, "x.seen.tmp") is None
    assert (tmp_path / "g" / "shards" / "x.seen.tmp").exists()
    assert "No such file" in str(ray_build._sight(folder, str(images / "x.png"), digest, "y.seen.tmp"))
    assert "another gallery" in str(ray_build._sight(folder, str(images / "000.png"), "", "y.seen.tmp"))
