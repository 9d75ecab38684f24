"""How fast a gallery is built, against the bare loop "decode, resize, backbone" in the same run.

python benchmarks/build.py DIR      a folder of normal images
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from common import PeakMemory, save

import spade_faiss as sf
from spade_faiss.images.decode import decode
from spade_faiss.images.sources import ImageFile, find_images
from spade_faiss.system.prefetch import batched


def bare_loop(sources: list[ImageFile], extractor: sf.Extractor) -> float:
    """Decode, resize and run the backbone, one after the other, keeping nothing; returns images per second."""
    start = time.perf_counter()
    for batch in batched(sources, extractor.batch_size):
        extractor.extract([extractor.spec.view.apply(decode(source.path)) for source in batch])
    return len(sources) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="processes; peak memory is of the first alone")
    args = parser.parse_args()

    extractor = sf.load_extractor(args.extractor)
    sources = find_images([args.images])
    bare_loop(sources[: 4 * extractor.batch_size], extractor)  # warms up
    bare, built, peaks, sizes = [], [], [], []
    for _ in range(args.rounds):  # in turns, so that what else the machine does falls on both
        bare.append(bare_loop(sources, extractor))
        with tempfile.TemporaryDirectory() as folder, sf.Gallery.create(f"{folder}/g", extractor.spec) as gallery:
            with PeakMemory() as memory:
                start = time.perf_counter()
                # The last commit and the index included, and the start of other workers.
                report = gallery.add_images(args.images, extractor, workers=args.workers)
                built.append(report.added / (time.perf_counter() - start))
            peaks.append(memory.peak)
            sizes.append(sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()))
    save(
        "build" if args.workers == 1 else f"build_workers_{args.workers}",
        {
            "images": len(sources),
            "extractor": args.extractor,
            "workers": args.workers,
            "bare_images_per_s": [round(value, 2) for value in bare],
            "build_images_per_s": [round(value, 2) for value in built],
            "build_over_bare_median": round(statistics.median(b / a for a, b in zip(bare, built, strict=True)), 3),
            "peak_resident_mib": round(max(peaks)),
            "bytes_per_image": sizes[-1] // len(sources),
            "feature_bytes_per_image": extractor.spec.bytes_per_image,
        },
    )


if __name__ == "__main__":
    main()
