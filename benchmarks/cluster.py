"""One gallery over many members: the same answer, what it costs, who may be killed, and a model of 10^8 images.

python benchmarks/cluster.py NORMAL_DIR TEST_DIR [--limit 761] [--queries 60] [--members 1 2 5] [--show NAME...]

| show | what |
| --- | --- |
| equality | neighbours, distances, matches, maps and scores of a federation against those of one gallery |
| overhead | seconds, messages and bytes of a query by number of members in one process, beside the model's |
| synthetic | --images image features over 8 members: recall, milliseconds a query, memory |
| builds | needs Ray: builds on 2, 3, 4 nodes; a process, a node, the driver killed; digests against one process |
| members | needs Ray: members killed while --flight queries are under way: wrong answers, seconds until whole |

Nodes are processes on this machine (ray.cluster_utils.Cluster). The network runs once, for the gallery of all images;
members get its features. Each show adds its part to cluster.json of the results.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, SERVER, resident_mib, save

import spade_faiss as sf
from spade_faiss.cluster.member import Answer, LocalMember
from spade_faiss.images.decode import decode
from spade_faiss.images.sources import find_images

SHOWS = ("equality", "overhead", "synthetic", "builds", "members")
MEMBERS_OVERHEAD = (1, 2, 4, 8)
MODEL_MEMBERS = (10, 100)
LINK = 1.25e9  # bytes a second of the machine that queries
BLOCK = 5_000  # synthetic image features drawn at a time
DIMENSIONS = 128
HEADER = 400  # bytes of a pickled message beside its arrays, about


class Counting(LocalMember):
    """A member that counts calls, and the bytes that they would take on a wire."""

    calls, sent, received = 0, 0, 0

    def __init__(self, member: LocalMember) -> None:
        super().__init__(member.gallery.entry, member.gallery)

    def call(self, method: str, *args: Any) -> Answer:
        """See Member."""
        Counting.calls += 1
        Counting.sent += len(pickle.dumps((method, args), protocol=5))
        found = super().call(method, *args)()
        Counting.received += len(pickle.dumps(found, protocol=5))
        return lambda: found


def same(found: Any, expected: Any) -> bool:
    """Return whether two detections are equal bit for bit, but for their seconds."""
    if is_dataclass(expected):
        names = [one.name for one in fields(expected) if one.name != "seconds"]
        return all(same(getattr(found, name), getattr(expected, name)) for name in names)
    if isinstance(expected, np.ndarray):
        return bool(found.dtype == expected.dtype and np.array_equal(found, expected))
    if isinstance(expected, (tuple, list)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def shared_out(one: sf.Gallery, folder: Path, members: int) -> sf.Cluster:
    """Write the images of a gallery, in their order, to so many members, and make a cluster of these."""
    snapshot, made = one.snapshot(), {}
    for number, ids in enumerate(np.array_split(snapshot.ids(), members)):
        path = folder / f"{members}-{number}.gallery"
        recipe = one.recipe.name if one.recipe else None
        with sf.Gallery.create(path, one.spec, "flat", recipe=recipe) as gallery:
            for some in np.array_split(ids, max(1, len(ids) // 32)):
                features = sf.Features(snapshot.rows.read(some), one.read(some))
                gallery.append(one.keys(some), features, snapshot.digests(some))
        made[f"m{number}"] = path
    return sf.Cluster.create(folder / f"{members}.cluster", made)


def equality(one: sf.Gallery, extractor: sf.Extractor, queries: Sequence[Path], folder: Path, args: Any) -> Any:
    """Compare every array of every detection."""
    expected, found = sf.Detector(one, extractor).query_batch(queries), {}
    for members in args.members:
        with shared_out(one, folder, members) as cluster:
            federation = sf.Federation(cluster, extractor)
            equal = [same(*pair) for pair in zip(federation.query_batch(queries), expected, strict=True)]
            found[members] = {"queries": len(equal), "equal": sum(equal)}
            print(f"equality, {members} members: {sum(equal)} of {len(equal)}", flush=True)
    return found


def predicted(one: sf.Gallery, k: int, members: int, kappa: int) -> dict[str, float]:
    """Model of a query's messages and bytes by number of members, for a recipe with levels apart and spacing."""
    spec, owners = one.spec, min(members, k)
    itemsize = np.dtype(spec.dtype).itemsize
    query = 4 * sum(c * h * w for c, h, w in spec.level_shapes)
    cells = sum(h * w for _, h, w in spec.level_shapes)
    patches = itemsize * sum(c * h * w for c, h, w in spec.level_shapes)  # each cell matched another patch
    sent = members * 4 * spec.image_dim + owners * (query + patches + 8 * cells) + 16 * cells
    matches = owners * min(kappa, -(-k // owners)) * cells * (4 + 12)
    received = members * 12 * k + matches + patches + owners * min(4, -(-k // owners)) * cells * 12
    messages = members + 4 * owners
    return {"messages": messages, "sent": sent + HEADER * messages, "received": received + HEADER * messages}


def overhead(one: sf.Gallery, extractor: sf.Extractor, queries: Sequence[Path], folder: Path, _: Any) -> Any:
    """Time queries by one gallery and by federations, in turns; levels are in memory."""
    images = [decode(path) for path in queries[:8]]
    runs: dict[str, Any] = {"one gallery": sf.Detector(one, extractor)}
    clusters = [shared_out(one, folder, members) for members in MEMBERS_OVERHEAD]
    runs |= {f"{len(cluster.names())} members": sf.Federation(cluster, extractor) for cluster in clusters}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(6):
        for name, detector in runs.items():
            start = time.perf_counter()
            detector.query_batch(images)
            if turn:  # the first reads from the disk, and measures a baseline
                seconds[name].append((time.perf_counter() - start) / len(images))
    found: dict[str, Any] = {}
    for name, detector in runs.items():
        found[name] = {
            "seconds": min(seconds[name]),
            "of one gallery": round(min(seconds[name]) / min(seconds["one gallery"]), 3),
        }
        if isinstance(detector, sf.Federation):
            members = detector.gallery.snapshot().members
            members.members = tuple(Counting(one) for one in members.members)  # type: ignore[arg-type]
            Counting.calls = Counting.sent = Counting.received = 0
            detector.query_batch(images)
            measured = {"messages": Counting.calls, "sent": Counting.sent, "received": Counting.received}
            found[name]["measured"] = {what: round(value / len(images)) for what, value in measured.items()}
            kappa = detector.search.kappa or 1
            found[name]["predicted"] = predicted(one, detector.k, len(members), kappa)
        print(f"overhead, {name}: {found[name]}", flush=True)
    for members in MODEL_MEMBERS:  # 10^6 images each: the worst case, in which each neighbour lies on another member
        detector = runs["one gallery"]
        model = predicted(one, 50, members, detector.search.kappa or 1)
        found[f"model, {members} members"] = model | {
            "seconds on 10 Gbit/s": round((model["sent"] + model["received"]) / LINK, 4)
        }
    for cluster in clusters:
        cluster.close()
    return found


def synthetic(images: int, folder: Path, members: int = 8, queries: int = 100, k: int = 50) -> Any:
    """Search synthetic image features on members and in one gallery, against the exact answer."""
    spec = sf.ExtractorSpec("synthetic", ((1, 1, 1),), DIMENSIONS)
    centres = np.random.default_rng(0).standard_normal((64, DIMENSIONS), np.float32)

    def drawn(number: int, n: int) -> np.ndarray:
        block = np.random.default_rng([1, number])
        return centres[block.integers(0, 64, n)] + 0.5 * block.standard_normal((n, DIMENSIONS), np.float32)

    wanted = drawn(10**9, queries)
    best, best_at = np.full((queries, k), np.inf, np.float32), np.zeros((queries, k), np.int64)
    galleries, per_member = {}, -(-images // members)
    start = time.perf_counter()
    for member in range(members):
        path = galleries[f"m{member}"] = folder / f"s{member}.gallery"
        with sf.Gallery.create(path, spec, "auto", shard_bytes=2**26) as gallery, gallery.writer() as writer:
            for first in range(member * per_member, min(images, (member + 1) * per_member), BLOCK):
                block = drawn(first, min(BLOCK, min(images, (member + 1) * per_member) - first))
                keys = [f"{first + row:09d}" for row in range(len(block))]
                writer.append(keys, sf.Features(block, [np.zeros((len(block), 1, 1, 1), np.float16)]), keys)
                far = np.square(wanted).sum(axis=1)[:, None] + np.square(block).sum(axis=1) - 2 * wanted @ block.T
                both, at = (
                    np.hstack([best, far]),
                    np.hstack([best_at, np.tile(first + np.arange(len(block)), (queries, 1))]),
                )
                order = np.argpartition(both, k, axis=1)[:, :k]
                best, best_at = np.take_along_axis(both, order, 1), np.take_along_axis(at, order, 1)
    built = time.perf_counter() - start
    sf.Cluster.create(folder / "s.cluster", galleries).close()
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_searched, args=(folder / "s.cluster", wanted, best_at, sender))
    process.start()
    found = receiver.recv()
    process.join()
    return {
        "images": images, "members": members, "dimensions": DIMENSIONS, "seconds to build": round(built),
        "index": _kind(galleries["m0"]), **found, "MiB a member": round(found["MiB of all members"] / members, 1),
    }  # fmt: skip


def _searched(cluster: Path, wanted: np.ndarray, exact: np.ndarray, sender: Any) -> None:
    """Search in a process that has built nothing, and send recall, milliseconds and memory."""
    k, before = exact.shape[1], resident_mib()
    with sf.Cluster.open(cluster) as opened:
        opened.search(wanted[:1], k)
        milliseconds, recalls = [], []
        for query, nearest in zip(wanted, exact, strict=True):
            start = time.perf_counter()
            ids, _ = opened.search(query[None], k)
            milliseconds.append(1000 * (time.perf_counter() - start))
            recalls.append(len(set(map(int, opened.keys(ids[0]))) & set(nearest.tolist())) / k)
        sender.send(
            {
                "recall": round(float(np.mean(recalls)), 4),
                "milliseconds": {f"p{p}": round(float(np.percentile(milliseconds, p)), 2) for p in (50, 95)},
                "MiB of all members": round(resident_mib() - before, 1),
            }
        )


def _kind(path: Path) -> str:
    with sf.Gallery.open(path) as gallery:
        return str(gallery.index_state())


def add_to_results(name: str, part: Any) -> None:
    """Add a part to cluster.json of the results."""
    path = RESULTS / "cluster.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    before.pop("machine", None)
    save("cluster", {**before, name: part})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("normal", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--recipe", default="relative")
    parser.add_argument("--limit", type=int, default=1000, help="normal images at most")
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--members", type=int, nargs="*", default=[1, 2, 5])
    parser.add_argument("--images", type=int, default=1_000_000, help="synthetic ones")
    parser.add_argument("--nodes", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument(
        "--kills", type=int, default=2, help="of a worker and of a node, at each step, on each number of nodes"
    )
    parser.add_argument("--every", type=int, default=1, help="take every Nth of these steps")
    parser.add_argument("--flight", type=int, default=500, help="queries while members are killed")
    parser.add_argument("--show", nargs="*", choices=SHOWS, default=list(SHOWS))
    args = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="cluster-"))
    try:
        files = find_images([args.normal])[: args.limit]
        tests = find_images([args.test])
        queries = [tests[at].path for at in np.linspace(0, len(tests) - 1, args.queries).astype(int)]
        if {"equality", "overhead"} & set(args.show):
            extractor = sf.load_extractor(args.extractor, options=sf.RECIPES[args.recipe].features)
            with sf.Gallery.create(folder / "one.gallery", extractor.spec, "flat", recipe=args.recipe) as one:
                one.add_images(files, extractor)
                for show in (equality, overhead):
                    if show.__name__ in args.show:
                        (folder / show.__name__).mkdir()
                        part = show(one, extractor, queries, folder / show.__name__, args)
                        add_to_results(show.__name__, {"normal": len(one), "recipe": args.recipe, "found": part})
        if "synthetic" in args.show:
            add_to_results("synthetic", synthetic(args.images, folder))
        if {"builds", "members"} & set(args.show):
            import cluster_trials

            if "builds" in args.show:
                for at, number in enumerate(args.nodes):  # each step of the driver on one number of nodes
                    driver = slice(at, None, args.every * len(args.nodes))
                    trials = args.kills, slice(at % args.every, None, args.every), driver
                    part = cluster_trials.builds(files, folder, number, trials)
                    add_to_results(f"builds on {number} nodes", part)
            if "members" in args.show:
                add_to_results("members", cluster_trials.members(files, queries, folder, args.flight))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
