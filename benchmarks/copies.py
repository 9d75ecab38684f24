"""Do copies among the normal images change the verdicts? The same normal images, with a share of them there twice.

    python benchmarks/copies.py NAME:FOLDER...

FOLDER has MVTec AD's layout: train/good, test/good, and defects in the other folders of test. For each share a gallery
is made of the normal images and of copies of that share of them, as BMP files in another folder; it is calibrated, and
judges images that it has not seen: good ones of test, and normal images that were not drawn.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import save
from PIL import Image

import spade_faiss as sf
from spade_faiss.recipes import DEFAULT_RECIPE

SHARES = (0.0, 0.1, 0.5, 1.0)


def some_of(paths: list[Path], limit: int) -> list[Path]:
    """Draw up to `limit` of some files, with a fixed seed."""
    chosen = np.random.default_rng(0).permutation(len(paths))[:limit]
    return [paths[at] for at in sorted(chosen.tolist())]


def measured(folder: Path, share: float, extractor: sf.Extractor, args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate with a share of the normal images copied, and judge new ones."""
    train = sorted((folder / "train" / "good").iterdir())
    normal = some_of(train, min(args.normal, round(0.7 * len(train))))
    test = sorted((folder / "test").glob("*/*"))
    unseen = sorted(set(train) - set(normal))
    good = some_of([*(path for path in test if path.parent.name == "good"), *unseen], args.test)
    defective = some_of([path for path in test if path.parent.name != "good"], args.test)
    with tempfile.TemporaryDirectory() as temporary:
        copies = Path(temporary, "copies")
        copies.mkdir()
        for path in normal[: round(share * len(normal))]:
            Image.open(path).convert("RGB").save(copies / f"{path.stem}.bmp")
        gallery = sf.Gallery.create(Path(temporary, "g"), extractor.spec, recipe=args.recipe)
        with gallery:
            report = gallery.add_images([*normal, copies] if share else normal, extractor)
            search = sf.SearchOptions(k=args.k)
            found = sf.calibrate(sf.Detector(gallery, extractor, search), args.false_alarms)
            found.write(gallery.path)
            detector = sf.Detector(gallery, extractor)
            flagged = [
                [one.verdict == "anomalous" for one in detector.stream(map(str, paths))] for paths in (good, defective)
            ]
    return {
        "images": report.added,
        "copies": report.copies,
        "scores": len(found.image_scores),
        "image_threshold": round(found.image_threshold, 5),
        "pixel_threshold": round(found.pixel_threshold, 5),
        "false_alarms": round(float(np.mean(flagged[0])), 4),
        "defects_found": round(float(np.mean(flagged[1])), 4),
        "test_images": [len(good), len(defective)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="NAME:FOLDER")
    parser.add_argument("--extractor", default="efficientnet_lite0")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, choices=list(sf.RECIPES))
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--false-alarms", type=float, default=0.1)
    parser.add_argument("--normal", type=int, default=120, help="normal images at most")
    parser.add_argument("--test", type=int, default=60, help="new good images, and defective ones, at most")
    args = parser.parse_args()
    extractor = sf.load_extractor(args.extractor, options=sf.RECIPES[args.recipe].features)
    settings = {"recipe": args.recipe, "k": args.k, "promised": args.false_alarms}
    result: dict[str, dict[str, Any]] = {}
    for one in args.sets:
        name, _, folder = one.partition(":")
        result[name] = {str(share): measured(Path(folder), share, extractor, args) for share in SHARES}
        save("copies", {**settings, "by_share_of_copies": result}, part=True)
    save("copies", {**settings, "by_share_of_copies": result})


if __name__ == "__main__":
    main()
