"""A gallery in an object store: bytes and seconds of queries, cold and warm; pushes killed at every step.

python benchmarks/object_store.py NORMAL_DIR TEST_DIR [--images 190] [--queries 10] [-k 20]

The store is moto's server on the loopback address, in a process of its own: its seconds are not those of a network.
The bytes are. Every answer is compared with that from disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import SERVER, save

import spade_faiss as sf
from spade_faiss.images.sources import find_images
from spade_faiss.object_store.files import RemoteFiles
from spade_faiss.system import failpoints

BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
OWN = sf.ExtractorSpec(name="own", level_shapes=((3, 5, 7), (2, 3, 3)), image_dim=6)
SHARD = 4  # images of a shard of the small gallery whose pushes are killed


def serve(sender: Any) -> None:
    """Be the store until killed."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    sender.send("http://{}:{}".format(*server.get_host_and_port()))
    signal.pause()


@contextmanager
def store() -> Iterator[None]:
    """Run a store with a bucket, which this process and those that it starts use."""
    import boto3

    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=serve, args=(sender,))
    process.start()
    try:
        os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=receiver.recv())
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield
    finally:
        process.kill()
        process.join()


class Queries:
    """The same queries from disk and from the store."""

    def __init__(self, folder: Path, normal: list[Path], test: list[Path], k: int) -> None:
        self.folder = folder
        self.test = test
        self.k = k
        self.extractor = sf.load_extractor("efficientnet_lite0")
        with sf.Gallery.create(folder / "gallery", self.extractor.spec, recipe="paper") as gallery:
            gallery.add_images(normal, self.extractor)
            self.level_bytes = gallery.spec.bytes_per_image - 4 * gallery.spec.image_dim
            self.gallery_bytes = gallery.info()["bytes"]
        self.url = f"s3://{BUCKET}/gallery"

    def run(self, place: str | Path) -> tuple[list[sf.Detection], dict[str, Any]]:
        """Query from a place; returns the detections, and what they took."""
        started = time.perf_counter()
        with sf.Gallery.open(place, cache=self.folder / "cache") as gallery:
            detector = sf.Detector(gallery, self.extractor, sf.SearchOptions(k=self.k, cache_bytes=0))
            opened = time.perf_counter()
            detections = [detector.query(path) for path in self.test]
            seconds = time.perf_counter() - opened
            found: dict[str, Any] = {
                "seconds_to_open": round(opened - started, 3),
                "seconds_a_query": round(seconds / len(self.test), 4),
                "seconds_a_query_reading": round(float(np.mean([one.seconds["read"] for one in detections])), 4),
            }
            files = gallery.snapshot().files
            if isinstance(files, RemoteFiles):
                rows = sum(one.bytes for file, one in files.commit.objects.items() if file.endswith(".rows"))
                index = gallery.snapshot().manifest.index
                keys = {key for one in detections for key in one.neighbours.keys}
                found |= {
                    "bytes_fetched": files.bucket.fetched,
                    "requests": files.bucket.requests,
                    "bytes_needed": {
                        "levels of the distinct neighbours": len(keys) * self.level_bytes,
                        "image index": index.bytes if index else 0,
                        "rows of all shards": rows,
                        "gallery.json": len(files.commit.content),
                    },
                    "distinct_neighbours": len(keys),
                }
        return detections, found


def compare(one: list[sf.Detection], other: list[sf.Detection]) -> int:
    """Return how many detections differ, in any bit of score, map, neighbours or matches."""
    return sum(
        a.image_score != b.image_score
        or not np.array_equal(a.anomaly_map, b.anomaly_map)
        or not np.array_equal(a.matches, b.matches)
        or a.neighbours.keys != b.neighbours.keys
        for a, b in zip(one, other, strict=True)
    )


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Query from disk, with an empty cache, and with a full one."""
    normal, test = ([file.path for file in find_images([path])] for path in (args.normal, args.test))
    some = [test[at] for at in np.linspace(0, len(test) - 1, args.queries).astype(int)]
    queries = Queries(folder, normal[: args.images], some, args.k)
    started = time.perf_counter()
    pushed = sf.push(folder / "gallery", queries.url)
    seconds = time.perf_counter() - started
    queries.run(folder / "gallery")  # warms up
    disk, from_disk = queries.run(folder / "gallery")
    cold, from_store = queries.run(queries.url)
    warm, from_cache = queries.run(queries.url)
    return {
        "images": min(args.images, len(normal)),
        "k": args.k,
        "queries": len(some),
        "gallery_bytes": queries.gallery_bytes,
        "push": {"seconds": round(seconds, 2), "bytes": pushed.uploaded_bytes, "objects": pushed.uploaded},
        "disk": from_disk,
        "cold": from_store,
        "warm": from_cache,
        "detections_that_differ": compare(disk, cold) + compare(disk, warm),
    }


def append(gallery: sf.Gallery, first: int, n: int) -> None:
    """Append n images of random features."""
    rng = np.random.default_rng(first)
    levels = [rng.standard_normal((n, *shape)).astype(np.float16) for shape in OWN.level_shapes]
    features = sf.Features(rng.standard_normal((n, OWN.image_dim)).astype(np.float32), levels)
    gallery.append([f"{number:03d}" for number in range(first, first + n)], features)


def killed_push(folder: Path, url: str, where: str, environment: dict[str, str]) -> None:
    """Push in a process of its own, which is killed."""
    os.environ.update(environment)  # the process that it is forked from is older than the store
    failpoints.action = failpoints.killing(where)
    sf.push(folder, url, sweep=True)


def kill_at_every_step(folder: Path) -> dict[str, Any]:
    """Kill a push of a second generation at each of its steps, look, and push again."""
    gallery = sf.Gallery.create(folder / "old", OWN, index="flat")
    for first in range(0, 3 * SHARD, SHARD):
        append(gallery, first, SHARD)
    sf.push(folder / "old", f"s3://{BUCKET}/steps")
    shutil.copytree(folder / "old", folder / "new")
    with sf.Gallery.open(folder / "new") as new:
        append(new, 100, SHARD)
        new.remove(["000"])
        new.compact()
        expected = gallery.keys(), new.keys()
    passed: list[str] = []
    shutil.copytree(folder / "new", folder / "pushed")
    failpoints.action = passed.append
    sf.push(folder / "pushed", f"s3://{BUCKET}/steps", sweep=True)
    failpoints.action = None
    seen: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for number, step in enumerate(passed):
        seen[step] += 1
        url, copy = f"s3://{BUCKET}/{number}", folder / f"copy {number}"
        sf.push(folder / "old", url)
        shutil.copytree(folder / "new", copy)
        shutil.copy(folder / "old/remote.json", copy)
        process = SERVER.Process(target=killed_push, args=(copy, url, f"{seen[step]} {step}", dict(os.environ)))
        process.start()
        process.join()
        found["killed"] += process.exitcode == -signal.SIGKILL
        with sf.Gallery.open(url, cache=folder / "cache") as there:
            found["old generation"] += there.keys() == expected[0]
            found["new generation"] += there.keys() == expected[1]
            found["damaged or lost"] += bool(there.verify()) or there.keys() not in expected
        done = sf.push(copy, url, sweep=True)
        found["objects uploaded by the second push"] += done.uploaded
        found["objects that it found"] += done.kept
        with sf.Gallery.open(url, cache=folder / "cache") as there:
            found["not finished by the second push"] += bool(there.verify()) or there.keys() != expected[1]
        shutil.rmtree(copy)
    return {"steps": len(passed), "kinds": sorted(seen), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("normal", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--images", type=int, default=190, help="of the gallery")
    parser.add_argument("--queries", type=int, default=10, help="test images, evenly spread over the folder")
    parser.add_argument("-k", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, store():
        for part in ("queries", "kills"):
            (Path(name) / part).mkdir()
        result = measure(args, Path(name) / "queries")
        save("object_store", {**result, "push_killed_at_every_step": kill_at_every_step(Path(name) / "kills")})


if __name__ == "__main__":
    main()
