"""Use spade-faiss as the back end of a system that has features of its own.

The features here are small statistics of pixel blocks, made with NumPy alone. They stand for whatever a system has
already: the maps of its own network, or a service that returns them. The gallery stores them, finds the nearest normal
images, and gives their levels back. The patch search compares patches. The score and the threshold are the system's
own: each normal image is compared with the others, and the largest of their scores is the threshold.

    python examples/embed_as_a_back_end.py --normal parts/good --test parts/test

Without arguments it runs on the sample set.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import spade_faiss as sf

SAMPLES = Path(__file__).resolve().parents[1] / "data" / "samples"
SIDE = 256  # px that images are resized to
LEVELS = {16: 16, 32: 8}  # px of a block -> cells a side, finest first
LAGS = ((0, 2), (2, 0), (2, 2), (2, -2), (0, 4), (4, 0), (4, 4), (4, -4))  # px down and right
CHANNELS = 3 + len(LAGS) + 3  # means of colours, texture by direction, spreads of colours
SPEC = sf.ExtractorSpec(
    "block-statistics", tuple((CHANNELS, cells, cells) for cells in LEVELS.values()), image_dim=CHANNELS * 64
)


def statistics(pixels: np.ndarray, block: int) -> np.ndarray:
    """Return statistics of square blocks: (SIDE, SIDE, 3) in [0, 1] -> (CHANNELS, cells, cells) float32."""
    grey = pixels.mean(axis=2)
    maps = [abs(grey - np.roll(grey, (down, right), axis=(0, 1))) for down, right in LAGS]  # texture by direction
    cells = SIDE // block
    blocks = np.stack([*pixels.transpose(2, 0, 1), *maps]).reshape(-1, cells, block, cells, block)
    spread = blocks[:3].std(axis=(2, 4))
    return np.concatenate([blocks.mean(axis=(2, 4)), spread]).astype(np.float32)


def features(path: Path) -> sf.Features:
    """Return the features of one image file."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE)), np.float32) / 255
    levels = [statistics(pixels, block)[None] for block in LEVELS]
    return sf.Features(levels[-1].reshape(1, -1), levels)


def images(folder: Path) -> list[Path]:
    """Return the image files under a folder."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})


class Inspector:
    """The system's own scoring on top of a gallery."""

    def __init__(self, gallery: sf.Gallery, k: int) -> None:
        self.gallery = gallery
        self.k = k

    def score(self, found: sf.Features, without: np.ndarray | None = None) -> tuple[float, list[str], tuple[int, int]]:
        """Return the largest patch distance, the keys of the neighbours, and the (row, column) of that patch."""
        ids, _ = self.gallery.search(found.image, self.k, without)
        sq_distances, _ = sf.search_patches([level[0] for level in found.levels], self.gallery.read(ids[0]))
        grid = sq_distances[..., 0]
        row, column = np.unravel_index(int(grid.argmax()), grid.shape)
        return float(grid.max()), self.gallery.keys(ids[0]), (int(row), int(column))

    def threshold(self, normal: dict[str, sf.Features]) -> float:
        """Return the largest score of a normal image that is compared with the others."""
        ids = self.gallery.ids(list(normal))
        return max(self.score(found, np.array([own]))[0] for own, found in zip(ids, normal.values(), strict=True))


def main() -> None:
    """Parse the arguments, append, find the threshold, judge the test images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--normal", type=Path, default=SAMPLES / "train" / "good", help="folder of normal images")
    parser.add_argument("--test", type=Path, default=SAMPLES / "test", help="folder of images to judge")
    parser.add_argument("-k", type=int, default=10, help="neighbours of a query")
    args = parser.parse_args()

    normal = {path.relative_to(args.normal).as_posix(): features(path) for path in images(args.normal)}
    with tempfile.TemporaryDirectory() as folder, sf.Gallery.create(Path(folder) / "own.gallery", SPEC) as gallery:
        together = sf.Features(
            np.concatenate([one.image for one in normal.values()]),
            [np.concatenate([one.levels[number] for one in normal.values()]) for number in range(len(LEVELS))],
        )
        gallery.append(list(normal), together)  # one commit
        inspector = Inspector(gallery, args.k)
        threshold = inspector.threshold(normal)
        print(f"{len(gallery)} normal images, threshold {threshold:.4g}")
        print(f"{'image':26} {'score':>8}  {'verdict':9}  {'worst patch':11}  nearest normal image")
        for path in images(args.test):
            score, keys, at = inspector.score(features(path))
            verdict = "anomalous" if score > threshold else "normal"
            print(f"{path.relative_to(args.test).as_posix():26} {score:8.4f}  {verdict:9}  {at!s:11}  {keys[0]}")


if __name__ == "__main__":
    main()
