"""Ray clusters of processes on this machine whose parts are killed, for benchmarks/cluster.py."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster as RayNodes

import spade_faiss as sf
from spade_faiss.images.sources import ImageFile

STORE = 80 * 2**20  # bytes of a node's object store
SHARD = 16  # images in a shard: several for each node
STEPS = (
    "completed {}",
    "written N.h5",
    "renamed N.h5",
    "2 adopted",
    "2 committed",
    "renamed gallery.json",
    "3 committed",
)


@contextlib.contextmanager
def nodes(number: int) -> Iterator[RayNodes]:
    """Start a Ray cluster of so many nodes with a CPU each."""
    options = {"num_cpus": 1, "object_store_memory": STORE}
    found = RayNodes(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    for _ in range(number - 1):
        found.add_node(**options)
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def content(path: Path) -> list[tuple[str, str]]:
    """Return the keys of a gallery in their order, with digests; it must verify."""
    with sf.Gallery.open(path) as gallery:
        if problems := gallery.verify():
            raise AssertionError(problems)
        ids = gallery.snapshot().ids()
        return list(zip(gallery.keys(ids), gallery.snapshot().digests(ids), strict=True))


def create(path: Path) -> None:
    """Make an empty gallery of the toy extractor with small shards."""
    spec = sf.load_extractor("toy").spec
    sf.Gallery.create(path, spec, "flat", shard_bytes=SHARD * spec.bytes_with("stored")).close()


def processes(title: str) -> list[int]:
    """Return the processes of Ray's workers with a title, as `ray::_make`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(title.encode()):
                found.append(int(path.parent.name))
    return found


def run(gallery: Path, files: Sequence[ImageFile], address: str, step: str = "") -> subprocess.Popen[bytes]:
    """Start the build as a driver of its own; step: where it is killed."""
    listing = gallery.with_suffix(".txt")
    listing.write_text("\n".join(f"{file.path}\t{file.key}" for file in files))
    environment = {**os.environ, **({"SPADE_FAISS_FAILPOINT": step} if step else {})}
    return subprocess.Popen(
        [sys.executable, __file__, str(gallery), str(listing), address], env=environment, stderr=subprocess.DEVNULL
    )


def builds(files: Sequence[ImageFile], folder: Path, numbers: Sequence[int], kills: int) -> Any:
    """Kill a process, a node, and the driver at named steps; run the same command again; compare with one process."""
    rng, found = random.Random(0), {}
    create(folder / "one")
    with sf.Gallery.open(folder / "one") as one:
        one.add_images(list(files), sf.load_extractor("toy"))
    expected = content(folder / "one")
    for number in numbers:
        tally = {kind: {"trials": 0, "killed": 0, "equal": 0, "lost": 0} for kind in ("process", "node", "driver")}
        with nodes(number) as cluster:
            start = time.perf_counter()
            create(folder / f"warm-{number}")
            run(folder / f"warm-{number}", files, cluster.address).wait()
            seconds = time.perf_counter() - start
            for kind, counts in tally.items():
                for trial in range(kills):
                    path = folder / f"{number}-{kind}-{trial}"
                    create(path)
                    step = STEPS[trial % len(STEPS)] if kind == "driver" else ""
                    driver = run(path, files, cluster.address, step)
                    if kind != "driver":
                        time.sleep(rng.uniform(0.3, 0.9) * seconds)
                        counts["killed"] += kill(kind, cluster)
                    status = driver.wait()
                    counts["killed"] += status == -signal.SIGKILL
                    before = content(path)  # what was committed
                    counts["lost"] += before != expected[: len(before)]
                    again = run(path, files, cluster.address).wait()
                    counts["trials"] += 1
                    counts["equal"] += again == 0 and content(path) == expected
                print(f"builds on {number} nodes, {kind}: {counts}", flush=True)
        found[number] = tally
    return {"images": len(expected), "by nodes": found}


def kill(kind: str, cluster: RayNodes) -> bool:
    """Kill a worker at a shard, or a node other than the head, which another takes the place of."""
    if kind == "node":
        others = [node for node in cluster.list_all_nodes() if not node.head]
        cluster.remove_node(others[0], allow_graceful=False)
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
        return True
    working = processes("ray::_make")
    for process in working[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return bool(working)


def members(files: Sequence[ImageFile], queries: Sequence[Path], folder: Path, flight: int) -> Any:
    """Query three members while one after the other is killed, and compare every answer with one gallery's."""
    toy = sf.load_extractor("toy")
    made = {}
    for number, some in enumerate(np.array_split(np.arange(len(files)), 3)):
        made[f"m{number}"] = folder / f"f{number}.gallery"
        create(made[f"m{number}"])
        with sf.Gallery.open(made[f"m{number}"]) as gallery:
            gallery.add_images([files[at] for at in some], toy)
    sf.Cluster.create(folder / "flight.cluster", made).close()
    asked = [queries[number % len(queries)] for number in range(flight)]
    with sf.Cluster.open(folder / "flight.cluster") as here:
        expected = dict(zip(queries, sf.Federation(here, toy).query_batch(queries), strict=True))
    whole: list[float] = []
    with nodes(3), sf.Cluster.open(folder / "flight.cluster", options=sf.MemberOptions("any")) as cluster:
        reached = cluster.snapshot().members.members
        federation, done = sf.Federation(cluster, toy), threading.Event()

        def killer() -> None:
            number = 0
            while not done.wait(6):
                member, number = reached[number % 3], number + 1
                process = member.call("process")()
                start = time.perf_counter()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                member.call("process")()  # answers when it is back
                whole.append(time.perf_counter() - start)

        federation.query(queries[0])
        thread = threading.Thread(target=killer)
        thread.start()
        start, wrong, longest, last = time.perf_counter(), 0, 0.0, time.perf_counter()
        for path, found in zip(asked, federation.stream(asked), strict=True):
            wanted = expected[path]
            wrong += not (
                np.array_equal(found.anomaly_map, wanted.anomaly_map)
                and found.image_score == wanted.image_score
                and found.neighbours.keys == wanted.neighbours.keys
            )
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        seconds = time.perf_counter() - start
        done.set()
        thread.join()
    return {
        "queries": flight, "wrong": wrong, "kills": len(whole), "seconds": round(seconds, 1),
        "longest wait for an answer": round(longest, 2),
        "seconds until whole": [round(one, 2) for one in sorted(whole)],
    }  # fmt: skip


def drive(gallery: str, listing: str, address: str) -> None:
    """Build a gallery by the machines at an address: the driver that is killed."""
    from spade_faiss.cluster import RayMachines

    lines = (line.split("\t") for line in Path(listing).read_text().splitlines())
    files = [ImageFile(Path(path), key) for path, key in lines]
    with sf.Gallery.open(gallery) as opened:
        opened.add_images(files, sf.load_extractor("toy"), workers=RayMachines(address))


if __name__ == "__main__":
    drive(*sys.argv[1:])
