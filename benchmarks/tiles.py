"""Are small defects in large images found with tiles, and missed without? Seconds and peak memory of both.

    python benchmarks/tiles.py FOLDER

FOLDER holds photos of one texture. Large images are made of them: photos at their own scale, mirrored and turned at
random, side by side with soft seams. A defect is a dark spot of 12 px. For each size of image and each way, a process
builds a gallery, calibrates it, and judges new images, half of them with one defect.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import save
from numpy.typing import NDArray
from PIL import Image

import spade_faiss as sf

SEAM = 32  # px over which two photos blend
SPOT = 12  # px
# (height, width, side of a tile)
SHAPES = {"8000x200": (200, 8000, 200), "5000x4000": (4000, 5000, 256), "1000x800": (800, 1000, 256)}


def texture(photos: list[NDArray[np.float32]], height: int, width: int, rng: np.random.Generator) -> Any:
    """Lay photos side by side, in rows if the image is higher than they are."""
    side = min(min(photo.shape) for photo in photos)
    step, ramp = side - SEAM, np.minimum(1, (np.arange(side) + 0.5) / SEAM)
    weight = np.outer(*[np.minimum(ramp, ramp[::-1])] * 2)
    total, weights = np.zeros((2, height + 2 * side, width + 2 * side))
    for top in range(0, height + side, step):
        for left in range(0, width + side, step):
            photo = photos[rng.integers(len(photos))]
            y, x = (rng.integers(length - side + 1) for length in photo.shape)
            part = photo[y : y + side, x : x + side][:: rng.choice([1, -1]), :: rng.choice([1, -1])]
            total[top : top + side, left : left + side] += weight * part
            weights[top : top + side, left : left + side] += weight
    whole = (total / np.maximum(weights, 1e-9))[SEAM : SEAM + height, SEAM : SEAM + width]
    return whole.clip(0, 255).astype(np.uint8)


def spotted(pixels: Any, rng: np.random.Generator) -> tuple[Any, tuple[int, int]]:
    """Darken a round spot; returns the image and the spot's (y, x)."""
    height, width = pixels.shape
    y, x = int(rng.integers(SPOT, height - SPOT)), int(rng.integers(SPOT, width - SPOT))
    rows, columns = np.ogrid[:height, :width]
    inside = (rows - y) ** 2 + (columns - x) ** 2 <= (SPOT / 2) ** 2
    found = pixels.copy()
    found[inside] = found[inside] // 3
    return found, (y, x)


def write_set(folder: Path, photos: list[Any], shape: str, args: argparse.Namespace) -> list[tuple[int, int] | None]:
    """Write normal/ and test/; returns where the defect of each test image is."""
    height, width, _ = SHAPES[shape]
    rng = np.random.default_rng(0)
    spots: list[tuple[int, int] | None] = []
    for kind, count in (("normal", args.normal), ("test", args.test)):
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            pixels, spot = texture(photos, height, width, rng), None
            if kind == "test" and number % 2:
                pixels, spot = spotted(pixels, rng)
            if kind == "test":
                spots.append(spot)
            Image.fromarray(pixels).convert("RGB").save(folder / kind / f"{number:03d}.png", compress_level=1)
    return spots


def measure(folder: Path, shape: str, tiled: bool, spots: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    """Build, calibrate and judge in this process."""
    tile = SHAPES[shape][2] if tiled else None
    robust = sf.RECIPES["robust"]
    extractor = sf.load_extractor(options=dataclasses.replace(robust.features, tile=tile))
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        gallery = sf.Gallery.create(Path(temporary, "g"), extractor.spec, recipe="robust")
        gallery.add_images(folder / "normal", extractor)
        built = time.perf_counter()
        search = sf.SearchOptions(k=args.k, level_weights=robust.search.level_weights)
        sf.calibrate(sf.Detector(gallery, extractor, search), args.false_alarms).write(gallery.path)
        calibrated = time.perf_counter()
        alarms, hits = 0, 0
        found = sf.Detector(gallery, extractor).stream(sorted(map(str, (folder / "test").iterdir())))
        for spot, detection in zip(spots, found, strict=True):
            if spot is None:
                alarms += detection.verdict == "anomalous"
            else:
                y, x = spot
                boxes = [region.box for region in detection.regions if region.area < 200**2]
                hits += any(left <= x < right and top <= y < bottom for left, top, right, bottom in boxes)
        end = time.perf_counter()
    return {
        "tile": tile,
        "rows": len(gallery),
        "defects_found": hits,
        "of_defects": sum(spot is not None for spot in spots),
        "false_alarms": alarms,
        "of_normal": sum(spot is None for spot in spots),
        "build_s_per_image": round((built - start) / args.normal, 2),
        "calibrate_s_per_image": round((calibrated - built) / args.normal, 2),
        "query_s": round((end - calibrated) / len(spots), 2),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, metavar="FOLDER")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("-k", type=int, default=5)
    parser.add_argument("--normal", type=int, default=10)
    parser.add_argument("--test", type=int, default=10)
    parser.add_argument("--false-alarms", type=float, default=0.1)
    args = parser.parse_args()
    photos = [np.asarray(Image.open(path).convert("L"), np.float32) for path in sorted(args.photos.iterdir())]
    photos = [photo for photo in photos if min(photo.shape) >= 3 * SEAM]
    settings = {"recipe": "robust", "k": args.k, "promised": args.false_alarms, "normal": args.normal, "spot_px": SPOT}
    result: dict[str, Any] = {}
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            spots = write_set(folder, photos, shape, args)
            for way, tiled in (("whole", False), ("tiles", True)):
                with multiprocessing.get_context("spawn").Pool(1) as pool:  # its peak is that of this way alone
                    found = pool.apply(measure, (folder, shape, tiled, spots, args))
                result.setdefault(shape, {})[way] = found
                print(shape, way, found, flush=True)
                save("tiles", {**settings, "by_size": result}, part=True)
    save("tiles", {**settings, "by_size": result})


if __name__ == "__main__":
    main()
