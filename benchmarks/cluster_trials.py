"""Ray clusters of processes on this machine whose parts are killed, for benchmarks/cluster.py."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster as RayNodes

import spade_faiss as sf
from spade_faiss.extractors.toy import ToyExtractor
from spade_faiss.images.sources import ImageFile
from spade_faiss.system import failpoints

STORE = 80 * 2**20  # bytes of a node's object store
SHARD = 16  # images in a shard: several for each node
MAKING = ("opened", "appended to", "image features in", "completed")  # what a worker does to a shard
MORTAL = "CLUSTER_TRIALS_MORTAL"  # set on the nodes whose processes may die: all but the head
STEPS = "CLUSTER_TRIALS_STEPS"  # where the driver writes the steps that it has passed


@contextlib.contextmanager
def nodes(number: int) -> Iterator[RayNodes]:
    """Start a Ray cluster of so many nodes with a CPU each, whose workers can import this file."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    )
    options = {"num_cpus": 1, "object_store_memory": STORE}
    head = {**options, "include_dashboard": False}
    found = patiently(lambda: RayNodes(initialize_head=True, head_node_args=head))
    for _ in range(number - 1):
        add_node(found)
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def patiently(start: Callable[[], Any]) -> Any:
    """Start a node, again and again: Ray waits 30 s for it, which is little on a busy machine."""
    for _ in range(4):
        with contextlib.suppress(Exception):
            return start()
    return start()


def add_node(cluster: RayNodes) -> None:
    """Add a node whose processes may be killed."""
    patiently(lambda: cluster.add_node(num_cpus=1, object_store_memory=STORE, env_vars={MORTAL: "1"}))


def content(path: Path) -> list[tuple[str, str, bytes]]:
    """Return the keys of a gallery in their order, with digests and checksums of features; it must verify."""
    with sf.Gallery.open(path) as gallery:
        if problems := gallery.verify():
            raise AssertionError(problems)
        snapshot = gallery.snapshot()
        ids = snapshot.ids()
        checksums = [one.tobytes() for one in snapshot.rows.checksums(ids)] if len(ids) else []
        return list(zip(gallery.keys(ids), snapshot.digests(ids), checksums, strict=True))


def create(path: Path) -> None:
    """Make an empty gallery of the toy extractor with small shards."""
    spec = sf.load_extractor("toy").spec
    sf.Gallery.create(path, spec, "flat", shard_bytes=SHARD * spec.bytes_with("stored")).close()


class Mortal(ToyExtractor):
    """The toy. The first process of a mortal node that passes a step for the nth time says so and stands still."""

    def __init__(self, announced: Path, step: str, times: int) -> None:
        super().__init__(sf.FeatureOptions())
        self.announced, self.step, self.left = announced, step, times

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if MORTAL in os.environ:
            failpoints.action = self.passed

    def passed(self, step: str) -> None:
        """Stand still at the step, unless another process did."""
        self.left -= step.startswith(f"{self.step} ")
        if self.left or not step.startswith(f"{self.step} "):
            return
        said = self.announced.with_suffix(f".{os.getpid()}")
        said.write_text(f"{os.getpid()} {os.getppid()}")
        with contextlib.suppress(FileExistsError):
            os.link(said, self.announced)  # whole, and of one process only
            time.sleep(600)


class Builds:
    """Builds of the same images on one cluster, each killed once, gone on with by the same command, and compared."""

    def __init__(self, files: Sequence[ImageFile], folder: Path, cluster: RayNodes, expected: Any) -> None:
        self.folder, self.cluster, self.expected = folder, cluster, expected
        self.rng, self.number = random.Random(0), 0
        self.counts: dict[str, Counter[str]] = {}
        self.steps: dict[str, list[str]] = {}
        self.listing = folder / "images.txt"
        self.listing.write_text("\n".join(f"{file.path}\t{file.key}" for file in files))

    def run(self, kills: int, of_shards: slice, of_driver: slice) -> dict[str, Counter[str]]:
        """Kill a worker, then its node, `kills` times at some steps of a shard; the driver at some of its steps."""
        passed = self.folder / "steps.txt"
        first = self.folder / "undisturbed"
        create(first)
        if self.driver(first, {STEPS: str(passed)}).wait() or content(first) != self.expected:
            raise AssertionError("a build that nobody disturbed differs")
        steps = Counter(passed.read_text().splitlines())
        for kind in ("worker", "node"):
            for step in MAKING[of_shards] * kills:
                self.trial(kind, step, self.rng.randint(1, 4))
        for step, times in list(steps.items())[of_driver]:
            self.trial("driver", step, self.rng.randint(1, times))
        return self.counts

    def driver(self, gallery: Path, environment: dict[str, str], *mortal: str) -> subprocess.Popen[bytes]:
        """Start the build in a process of its own."""
        command = [sys.executable, __file__, str(gallery), str(self.listing), self.cluster.address, *mortal]
        return subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.DEVNULL)

    def trial(self, kind: str, step: str, times: int) -> None:
        """Build, kill, build again, compare."""
        self.number += 1
        path, counts = self.folder / f"{self.number}", self.counts.setdefault(kind, Counter())
        create(path)
        if kind == "driver":
            killed = self.driver(path, {failpoints.VARIABLE: f"{times} {step}"}).wait() == -signal.SIGKILL
        else:
            announced = path.with_suffix(".died")
            driver = self.driver(path, {}, str(announced), step, str(times))
            killed = self.kill(kind, driver, announced)
            counts["finished all the same"] += driver.wait() == 0
        before = content(path)  # what was committed
        again = self.driver(path, {}).wait()
        whole, swept = content(path) == self.expected, not list((path / "shards").glob("*.tmp"))
        outcome = {
            "trials": True, "killed": killed, "equal": again == 0 and whole and swept,
            "lost": before != self.expected[: len(before)],
        }  # fmt: skip
        counts.update({name: int(value) for name, value in outcome.items()})
        self.steps.setdefault(kind, []).append(step)
        print(f"{kind} at {times} {step}: {outcome}, {len(before)} images before", flush=True)
        shutil.rmtree(path)

    def kill(self, kind: str, driver: subprocess.Popen[bytes], announced: Path) -> bool:
        """Kill the worker that stands at its step, or its node with all processes, which another takes the place of."""
        while not announced.exists():
            if driver.poll() is not None:
                return False
            time.sleep(0.01)
        worker, raylet = map(int, announced.read_text().split())
        if kind == "worker":
            os.kill(worker, signal.SIGKILL)
            return True
        [node] = [one for one in self.cluster.list_all_nodes() if raylet in processes_of(one)]
        workers = children(raylet)
        self.cluster.remove_node(node, allow_graceful=False)
        for one in {worker, *workers}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        add_node(self.cluster)
        return True


def processes_of(node: Any) -> set[int]:
    """Return the processes that a node of Ray's has started."""
    return {one.process.pid for some in node.all_processes.values() for one in some}


def children(process: int) -> list[int]:
    """Return the processes that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(path.parent.name))
    return found


def builds(files: Sequence[ImageFile], folder: Path, number: int, trials: tuple[int, slice, slice]) -> Any:
    """Kill workers, nodes and drivers at named steps of builds on so many nodes; compare with one process."""
    folder = folder / f"{number} nodes"
    create(folder / "one")
    with sf.Gallery.open(folder / "one") as one:
        one.add_images(list(files), sf.load_extractor("toy"))
    expected, start = content(folder / "one"), time.perf_counter()
    with nodes(number) as cluster:
        killed = Builds(files, folder, cluster, expected)
        found = {
            kind: {**counts, "steps": sorted(set(killed.steps[kind]))} for kind, counts in killed.run(*trials).items()
        }
    return {"images": len(expected), "seconds": round(time.perf_counter() - start), **found}


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


def drive(gallery: str, listing: str, address: str, *mortal: str) -> None:
    """Build a gallery by the machines at an address: the driver that may be killed."""
    from cluster_trials import Mortal  # by the name that workers know it by

    from spade_faiss.cluster import RayMachines

    if STEPS in os.environ:
        steps = Path(os.environ[STEPS])
        failpoints.action = lambda step: steps.write_text(f"{steps.read_text() if steps.exists() else ''}{step}\n")
    lines = (line.split("\t") for line in Path(listing).read_text().splitlines())
    files = [ImageFile(Path(path), key) for path, key in lines]
    extractor: sf.Extractor = sf.load_extractor("toy")
    if mortal:
        announced, step, times = mortal
        extractor = Mortal(Path(announced), step, int(times))
    with sf.Gallery.open(gallery) as opened:
        opened.add_images(files, extractor, workers=RayMachines(address))


if __name__ == "__main__":
    drive(*sys.argv[1:])
