"""Members as actors of a Ray cluster of three nodes on this machine; `make test-ray` runs these where Ray is apart."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.cluster import ray_members
from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

STORE = 80 * 2**20
NAMES = "north", "south", "west"


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False},
    )
    for _ in range(2):
        found.add_node(num_cpus=1, object_store_memory=STORE)
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def galleries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("members"), {}
    for seed, name in enumerate(NAMES):
        images = make_images(folder / "images" / name, 4, seed)
        for file in sorted(images.iterdir()):
            file.rename(file.with_name(f"{name}-{file.name}"))
        made[name] = folder / f"{name}.gallery"
        make_gallery(made[name], images)[0].close()
    toy = sf.load_extractor("toy")
    with sf.Gallery.create(folder / "one.gallery", toy.spec) as one:
        for name in NAMES:
            one.add_images(folder / "images" / name, toy)
    return made


@pytest.fixture
def queries(tmp_path: Path) -> list[Path]:
    return sorted(make_images(tmp_path / "queries", 6, seed=99).iterdir())


def nodes_of(machines: Any) -> dict[str, str]:
    return dict(zip(NAMES, [one["NodeID"] for one in ray.nodes() if one["Alive"]], strict=False))


def opened(path: Path, partial: str = "refuse") -> sf.Cluster:
    return sf.Cluster.open(path, options=sf.MemberOptions("any", partial))  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", ["relative", "robust"])
def test_the_answer_of_one_gallery(
    machines: Any, galleries: dict[str, Path], queries: list[Path], tmp_path: Path, recipe: str
) -> None:
    made = sf.Cluster.create(tmp_path / "c", galleries, nodes=nodes_of(machines), options=sf.MemberOptions("any"))
    options = sf.RECIPES[recipe].search, sf.RECIPES[recipe].score
    toy = sf.load_extractor("toy")
    with made, sf.Gallery.open(galleries["north"].with_name("one.gallery")) as one:
        federation, detector = sf.Federation(made, toy, *options), sf.Detector(one, toy, *options)
        assert made.snapshot().members.parallel == 3
        for found, expected in zip(federation.stream(queries), detector.stream(queries), strict=True):
            assert found.image_score == expected.image_score
            assert found.neighbours.keys == expected.neighbours.keys
            np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
            np.testing.assert_array_equal(found.matches, expected.matches)


def test_the_scale_of_normal_images_is_kept(
    machines: Any, galleries: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = sf.Cluster.create(tmp_path / "c", galleries, nodes=nodes_of(machines), options=sf.MemberOptions("any"))
    options = sf.RECIPES["relative"].search, sf.RECIPES["relative"].score
    with made:
        first, second = (sf.Federation(made, sf.load_extractor("toy"), *options) for _ in range(2))
        assert not first.keep_baseline()
        expected = first.baseline()
        assert second.keep_baseline()
        found = second.baseline()
        assert expected is not None
        assert found is not None
        assert found.to_json() == expected.to_json()


def test_a_member_killed_in_flight_comes_back(
    machines: Any, galleries: dict[str, Path], queries: list[Path], tmp_path: Path
) -> None:
    sf.Cluster.create(tmp_path / "c", galleries).close()
    toy = sf.load_extractor("toy")
    with opened(tmp_path / "c") as cluster:
        federation = sf.Federation(cluster, toy)
        expected = federation.query_batch(queries)
        process = cluster.snapshot().members.members[1].call("process")()
        threading.Timer(0.2, os.kill, (process, signal.SIGKILL)).start()
        found = [one for _ in range(4) for one in federation.stream(queries)]
        for number, one in enumerate(found):
            np.testing.assert_array_equal(one.anomaly_map, expected[number % len(queries)].anomaly_map)
            assert one.missing == ()
        assert cluster.snapshot().members.members[1].call("process")() != process


def test_a_machine_that_is_lost(
    machines: Any, galleries: dict[str, Path], queries: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another test's cluster goes on with the machines that are left."""
    monkeypatch.setattr(ray_members, "ANSWER_SECONDS", 30.0)
    others = nodes_of(machines)
    node = machines.add_node(num_cpus=1, object_store_memory=STORE)
    machines.wait_for_nodes()
    nodes = {**others, "south": node.node_id}  # the others lie elsewhere: Ray would place one there
    sf.Cluster.create(tmp_path / "c", galleries, nodes=nodes, options=sf.MemberOptions("any")).close()
    toy = sf.load_extractor("toy")
    with opened(tmp_path / "c") as refusing, opened(tmp_path / "c", "allow") as allowing:
        refused, allowed = sf.Federation(refusing, toy), sf.Federation(allowing, toy)
        assert allowed.query(queries[0]).missing == refused.query(queries[0]).missing == ()
        machines.remove_node(node, allow_graceful=False)
        started = time.monotonic()
        with pytest.raises(sf.MemberError, match="member 'south'"):
            refused.query(queries[0])
        found = allowed.query(queries[0])
        assert time.monotonic() - started < 90  # neither hangs
        assert found.missing == ("south",)
        assert not any(key.startswith("south") for key in found.neighbours.keys)
    with pytest.raises(sf.MemberError, match="member 'south'"):
        opened(tmp_path / "c")


def test_a_member_whose_files_are_damaged(
    machines: Any, galleries: dict[str, Path], queries: list[Path], tmp_path: Path
) -> None:
    members = {"north": galleries["north"], "south": shutil.copytree(galleries["south"], tmp_path / "south.gallery")}
    sf.Cluster.create(tmp_path / "c", members).close()
    for shard in (members["south"] / "shards").iterdir():
        shard.write_bytes(shard.read_bytes()[:-1])
    toy = sf.load_extractor("toy")
    with opened(tmp_path / "c") as refusing, opened(tmp_path / "c", "allow") as allowing:
        with pytest.raises(sf.MemberError, match=r"^member 'south': .*expected \d+ bytes, found"):
            sf.Federation(refusing, toy).query(queries[0])
        assert sf.Federation(allowing, toy).query(queries[0]).missing == ("south",)


def test_a_member_that_is_not_as_known_says_so(machines: Any, galleries: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(sf.MemberError, match=r"member 'gone': .*expected a gallery"):
        sf.Cluster.create(tmp_path / "c", {"gone": tmp_path / "gone"}, options=sf.MemberOptions("any"))


def test_a_machine_that_ray_does_not_have(machines: Any, galleries: dict[str, Path], tmp_path: Path) -> None:
    options = sf.MemberOptions("any")
    with pytest.raises(sf.MemberError, match=r"member 'north': expected a machine 10.9.9.9 in the Ray cluster, found"):
        sf.Cluster.create(tmp_path / "c", galleries, nodes={"north": "10.9.9.9"}, options=options)


def test_ray_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(ConnectionError("no such cluster")))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(sf.MemberError, match=rf"ray {address}: expected a Ray cluster of .*no such cluster"):
            ray_members.RayCluster.at(address)
    for nobody in (address, f"ray://{address}", "127.0.0.1:99999"):
        with pytest.raises(sf.MemberError, match=rf"ray {nobody}: expected a Ray cluster, found nobody who answers"):
            ray_members.RayCluster.at(nobody)
