"""Index a large set of normal images.

The script builds a gallery from folders of images, or resumes a build that was stopped: images that the gallery already
has, by their content, are skipped. It then prints what the gallery holds, and what each way to keep patches costs.

    python examples/index_a_large_set.py /data/normal --gallery large.gallery --workers 8 --patches recompute

Without arguments it indexes the sample set into a temporary folder.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Literal

import spade_faiss as sf

Patches = Literal["stored", "recompute"]

SAMPLES = Path(__file__).resolve().parents[1] / "data" / "samples" / "train" / "good"


def index(
    sources: list[Path], path: Path, extractor: sf.Extractor, recipe: sf.Recipe, patches: Patches, workers: int
) -> None:
    """Add all images in files and folders to a gallery, and print what became of them."""
    start = time.perf_counter()
    with sf.Gallery.open_or_create(path, extractor.spec, recipe=recipe.name, patches=patches) as gallery:
        report = gallery.add_images(sources, extractor, workers=workers, progress=True)
        seconds = time.perf_counter() - start
        print(f"{report.added} added, {report.unchanged} unchanged, {len(report.skipped)} skipped in {seconds:.1f} s")
        for item in report.skipped:
            print(f"  skipped: {item.reason}")


def describe(path: Path) -> None:
    """Print what a gallery holds."""
    with sf.Gallery.open(path) as gallery:
        facts = gallery.info()
    size = f"{facts['bytes'] / 1e6:.1f} MB"
    print(f"{facts['images']} images in {facts['shards']} shards, {size}, {facts['patches']} patches")
    for patches, each in facts["bytes_per_image_if"].items():  # 1 kB an image is 1 GB a million images
        print(f"  patches {patches:9} {each / 1000:8.1f} kB an image, {each / 1000:8.1f} GB a million images")


def main() -> None:
    """Parse the arguments, build, resume, describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, default=[SAMPLES], help="files and folders of normal images")
    parser.add_argument("--gallery", type=Path, help="folder of the gallery; default: a temporary one")
    parser.add_argument("--extractor", default="efficientnet_lite0", help="name of the extractor")
    parser.add_argument("--recipe", choices=sorted(sf.RECIPES), default="wary", help="settings of features and search")
    parser.add_argument("--patches", choices=["stored", "recompute"], default="stored")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode, extract and write")
    args = parser.parse_args()

    recipe = sf.RECIPES[args.recipe]
    extractor = sf.load_extractor(args.extractor, options=recipe.features)
    with tempfile.TemporaryDirectory() as temporary:
        path = args.gallery or Path(temporary) / "normal.gallery"
        index(args.sources, path, extractor, recipe, args.patches, args.workers)
        print("the same again, as after an interruption:")
        index(args.sources, path, extractor, recipe, args.patches, args.workers)
        describe(path)


if __name__ == "__main__":  # workers are spawned, and import this file again
    main()
