"""Reading K neighbours' levels, cold and warm, against plain reading; a query end to end against its two bare parts.

python benchmarks/reading.py NORMAL_DIR TEST_DIR

Cold: the system is told to drop the files' pages first. Plain: as many bytes, from the start of the files on, into one
buffer that is used again: what the disk, or the page cache, gives at the most.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from common import save

import spade_faiss as sf
from spade_faiss.detect.pipeline import Pipeline
from spade_faiss.images.decode import decode
from spade_faiss.images.sources import find_images
from spade_faiss.pyramids.cache import PyramidCache
from spade_faiss.pyramids.reader import StoredPyramids
from spade_faiss.store import level_reader
from spade_faiss.system.prefetch import batched

BLOCK = 4 * 2**20  # bytes of a plain read
WIDE = ((256, 56, 56), (512, 28, 28), (1024, 14, 14))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("normal", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=int, default=100, help="test images, evenly spread over the folder")
    parser.add_argument("--wide-images", type=int, default=300, help="random ones, the size of wide_resnet50_2's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-k", type=int, default=50)
    args = parser.parse_args()

    found = find_images([args.test])
    paths = [found[i].path for i in np.linspace(0, len(found) - 1, min(args.images, len(found))).astype(int)]
    extractor = sf.load_extractor(args.extractor, args.weights)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        with random_gallery(f"{folder}/wide", args.wide_images, rng) as gallery:
            some = [rng.choice(len(gallery), args.k, replace=False) for _ in range(args.rounds)]
            wide = reads(gallery, some)
        with sf.Gallery.create(f"{folder}/g", extractor.spec) as gallery:
            gallery.add_images(args.normal, extractor)
            detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=args.k))
            some = [np.array(gallery.ids(detector.query(path).neighbours.keys)) for path in paths[: args.rounds]]
            own = reads(gallery, some)
            whole = end_to_end(detector, paths, args.rounds)
    save(
        "reading",
        {
            "normal_images": len(find_images([args.normal])),
            "extractor": args.extractor,
            "k": args.k,
            "rounds": args.rounds,
            "reads": own,
            "reads_of_wide_resnet50_2_size": {"images": args.wide_images, **wide},
            "end_to_end": whole,
        },
    )


def random_gallery(path: str, n: int, rng: np.random.Generator) -> sf.Gallery:
    """Make a gallery of random features of wide_resnet50_2's size."""
    gallery = sf.Gallery.create(path, sf.ExtractorSpec("random", WIDE, 8))
    with gallery.writer() as writer:
        for keys in batched(map(str, range(n)), 16):
            levels = [rng.integers(0, 0x7C00, (len(keys), *shape), np.uint16).view(np.float16) for shape in WIDE]
            writer.append(keys, sf.Features(rng.standard_normal((len(keys), 8), np.float32), levels))
    return gallery


def reads(gallery: sf.Gallery, some: Sequence[Any]) -> dict[str, Any]:
    """Time the reading of some images' levels, a set of ids a round, in each way."""
    snapshot, spec = gallery.snapshot(), gallery.spec
    files = sorted(gallery.path.glob("shards/*"))
    size = len(some[0]) * (spec.bytes_per_image - 4 * spec.image_dim)
    verified, unverified = StoredPyramids(snapshot), StoredPyramids(snapshot, verify=False)
    full = PyramidCache(2**40)
    for ids in some:
        full.read(verified, ids)

    def plain(ids: Any) -> None:
        left, buffer = size, bytearray(BLOCK)
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while left > 0 and (done := opened.readinto(memoryview(buffer)[: min(left, BLOCK)])):
                    left -= done
        assert left <= 0, "expected a gallery of more bytes than are read at a time"

    def through_hdf5(ids: Any) -> None:
        level_reader.SUPPORTED = False
        try:
            PyramidCache(0).read(verified, ids)
        finally:
            level_reader.SUPPORTED = True

    ways: dict[str, Callable[[Any], Any]] = {
        "plain": plain,
        "hdf5": through_hdf5,
        "straight": lambda ids: PyramidCache(0).read(verified, ids),
        "straight_unverified": lambda ids: PyramidCache(0).read(unverified, ids),
        "straight_and_kept": lambda ids: PyramidCache(2**40).read(verified, ids),
    }
    result: dict[str, Any] = {"bytes": size}
    for state in ("cold", "warm"):
        seconds: dict[str, list[float]] = {}
        for ids in some:
            for name, way in ways.items():
                if state == "cold":
                    drop(files)
                else:
                    way(ids)
                seconds.setdefault(name, []).append(timed(lambda: way(ids)))  # noqa: B023 (called at once)
            if state == "warm":
                seconds.setdefault("from_cache", []).append(timed(lambda: full.read(verified, ids)))  # noqa: B023
        result[state] = {
            name: {
                "seconds": round(statistics.median(each), 5),
                "mb_per_s": round(size / statistics.median(each) / 1e6),
            }
            for name, each in seconds.items()
        }
    return result


def drop(files: Sequence[Path]) -> None:
    """Tell the system to drop the files from its page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def end_to_end(detector: sf.Detector, paths: Sequence[Path], rounds: int) -> dict[str, Any]:
    """Time streams over images, and their two bare parts: the network's passes, and the patch searches."""
    gallery, extractor, options = detector.gallery, detector.extractor, detector.search
    batches = list(batched([extractor.spec.view.apply(decode(path)) for path in paths], extractor.batch_size))
    keys = [found.neighbours.keys for found in detector.stream(paths)]  # and everything is warm

    def backbone() -> float:
        return timed(lambda: [extractor.extract(batch) for batch in batches])

    def queries() -> Iterator[tuple[list[Any], list[Any]]]:
        for start, batch in zip(range(0, len(paths), extractor.batch_size), batches, strict=True):
            features = extractor.extract(batch)
            for row in range(len(batch)):
                yield [level[row] for level in features.levels], gallery.read(gallery.ids(keys[start + row]))

    def search() -> float:
        return sum(
            timed(lambda: sf.search_patches(own, others, options.kappa, options.engine, options.device))  # noqa: B023
            for own, others in queries()
        )

    def stream(overlaps: bool | None) -> float:
        asked = nullcontext() if overlaps is None else mock.patch.object(Pipeline, "overlaps", overlaps)
        with asked:
            return timed(lambda: [found.image_score for found in detector.stream(paths)])

    measured: dict[str, list[float]] = {}
    for _ in range(rounds):  # in turn, so that all see the same machine
        measured.setdefault("backbone", []).append(backbone())
        measured.setdefault("search", []).append(search())
        measured.setdefault("stream", []).append(stream(None))
        measured.setdefault("stream_network_overlapped", []).append(stream(True))
        measured.setdefault("stream_network_in_turn", []).append(stream(False))
    seconds = {name: round(statistics.median(each), 3) for name, each in measured.items()}
    bare = seconds["backbone"] + seconds["search"]
    stages: dict[str, float] = {}
    for found in detector.stream(paths):
        for stage, value in found.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + value
    return {
        "images": len(paths),
        "seconds": seconds,
        "seconds_of_stages": {stage: round(value, 3) for stage, value in stages.items()},
        "stream_over_bare_parts": round(seconds["stream"] / bare, 3),
        "in_each_round": [
            round(total / (network + match), 3)
            for total, network, match in zip(measured["stream"], measured["backbone"], measured["search"], strict=True)
        ],
    }


if __name__ == "__main__":
    main()
