"""Does anything grow? Thousands of queries through one detector; rounds of add, remove, query, compact on one gallery.

The toy extractor and small images: what leaks by the query or by the commit shows all the same, and sooner. Memory,
open files and threads are sampled along the way; the same content of a gallery has to give the same answers to the bit.

    python benchmarks/long_run.py [--queries 20000] [--rounds 200] [--images 200]
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from common import resident_mib, save
from PIL import Image

import spade_faiss as sf

COMPACT_EVERY = 10  # rounds
CHANGED = 10  # images that come and go in each round
SAMPLES = 200
WARM = 0.25  # of the samples are left out of the slope: pools and caches fill, and the allocator finds its size


@dataclass(frozen=True)
class Sample:
    """What a process holds after some steps."""

    step: int
    mib: float  # resident
    files: int  # open
    threads: int

    @classmethod
    def take(cls, step: int) -> Sample:
        gc.collect()
        return cls(step, round(resident_mib(), 2), len([*Path("/proc/self/fd").iterdir()]), threading.active_count())


def summary(samples: list[Sample]) -> dict[str, Any]:
    """Start, middle, end, and what a thousand steps add once it is warm."""
    warm = samples[int(WARM * len(samples)) :]
    steps, mib = np.array([sample.step for sample in warm]), np.array([sample.mib for sample in warm])
    slope = np.polyfit(steps, mib, 1)[0] if len(warm) > 1 else 0.0
    return {
        "start": asdict(samples[0]),
        "quarter": asdict(warm[0]),
        "middle": asdict(samples[len(samples) // 2]),
        "end": asdict(samples[-1]),
        "mib_for_1000_steps": round(1000 * float(slope), 3),
        "most_files": max(sample.files for sample in samples),
        "most_threads": max(sample.threads for sample in samples),
    }


def noise(folder: Path, n: int, seed: int) -> list[Path]:
    folder.mkdir()
    rng, paths = np.random.default_rng(seed), [folder / f"{folder.name}-{number:04d}.png" for number in range(n)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(path, compress_level=1)
    return paths


def answer(found: sf.Detection) -> str:
    """A digest of all that a query found."""
    digest = xxhash.xxh3_128("\0".join(found.neighbours.keys).encode())
    for array in (found.neighbours.sq_distances, found.anomaly_map, found.sq_distances, found.matches):
        digest.update(np.ascontiguousarray(array).data)
    return str(digest.hexdigest())


def queries(folder: Path, n: int, images: int) -> tuple[list[Sample], bool]:
    """Query a few images over and over: one by one, in batches and as streams; were they always the same answers?"""
    extractor = sf.load_extractor("toy")
    with sf.Gallery.create(folder / "queried", extractor.spec, shard_bytes=2**18) as gallery:
        gallery.add_images(noise(folder / "normal", images, 1), extractor)
    image_bytes = extractor.spec.bytes_per_image
    # A cache that is too small for all of them, so that it evicts and reads for as long as this runs.
    options = sf.SearchOptions(k=5, cache_bytes=images // 2 * image_bytes)
    paths, samples, same = noise(folder / "asked", 20, 2), [Sample.take(0)], True
    with sf.Gallery.open(folder / "queried") as gallery:
        detector = sf.Detector(gallery, extractor, options)
        expected = [answer(detector.query(path)) for path in paths]

        def rounds() -> Iterator[list[sf.Detection]]:
            while True:
                yield [detector.query(path) for path in paths]
                yield detector.query_batch(paths)
                yield list(detector.stream(paths))

        done = 0
        for found in rounds():
            same &= [answer(one) for one in found] == expected
            done += len(found)
            if done >= n or done * SAMPLES // n > (done - len(found)) * SAMPLES // n:
                samples.append(Sample.take(done))
            if done >= n:
                return samples, same
    raise AssertionError


def rounds(folder: Path, n: int, images: int) -> tuple[list[Sample], bool]:
    """Add and remove the same images again and again, and query; does the same content always give the same answers?"""
    extractor, samples, same = sf.load_extractor("toy"), list[Sample](), True
    with sf.Gallery.create(folder / "changed", extractor.spec, shard_bytes=2**18) as gallery:
        gallery.add_images(noise(folder / "stays", images, 3), extractor)
        comes, asked = noise(folder / "comes", CHANGED, 4), noise(folder / "asks", 3, 5)
        detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=5))
        samples.append(Sample.take(0))
        expected: dict[int, list[str]] = {}
        for number in range(1, n + 1):
            gallery.add_images(comes, extractor)
            for removed in ([], [path.name for path in comes]):
                if removed:
                    gallery.remove(removed)
                answers = [answer(found) for found in detector.query_batch(asked)]
                same &= answers == expected.setdefault(len(gallery), answers)
            if number % COMPACT_EVERY == 0:
                gallery.compact()
                same &= [answer(found) for found in detector.query_batch(asked)] == expected[images]
            samples.append(Sample.take(number))
        assert gallery.verify() == []
    return samples, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--images", type=int, default=200, help="in each gallery")
    args = parser.parse_args()
    result: dict[str, Any] = {"images": args.images}
    with tempfile.TemporaryDirectory() as name:
        for what, steps in ((queries, args.queries), (rounds, args.rounds)):
            start = time.perf_counter()
            samples, same = what(Path(name), steps, args.images)
            result[what.__name__] = {
                "steps": steps,
                **summary(samples),
                "same_answers": same,
                "seconds": round(time.perf_counter() - start, 1),
                "samples": [list(asdict(sample).values()) for sample in samples[:: max(1, len(samples) // 40)]],
            }
    save("long_run", result)


if __name__ == "__main__":
    main()
