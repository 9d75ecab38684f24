"""The recipe rad from disk, beside anomalib's Rad with its bank in memory, as the normal images grow.

    spade-faiss bench rad NORMAL_DIR TEST_DIR [--images 200 1000 5000] [--extracted 100] [--weights FILE]

Each figure is measured in a process of its own. Both get the same network, and the same features of the normal images:
the first --extracted go through the network, and the others are those again with every value scaled by 1 + 2 % noise.
So `fit_seconds` has what comes after the network, whose own time stands beside it and is the same for both. Queries
are whole, from pixels to map and score. `peak_mib` is the process's largest resident memory, network included: what
of a gallery's files the system keeps in its page cache counts as resident only where it is mapped.

Needs the extra `peers` for anomalib's side; without it, only ours is measured, and a line says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import available_bytes, save
from peers_rad import batches, files_in

import spade_faiss as sf
from spade_faiss.extractors.features import Features

NOISE = 0.02
TOGETHER = 20  # images in a commit, or in a batch that anomalib's Rad stores
SEED = 0


@dataclass(frozen=True)
class Task:
    """What one process measures."""

    normal: Path
    test: Path
    name: str  # timm's, of the network
    weights: Path
    images: int
    extracted: int
    k: int
    queries: int

    @property
    def options(self) -> sf.FeatureOptions:
        """Return the recipe's options; float16 on disk is the gallery's default."""
        return sf.RECIPES["rad"].features

    def files(self) -> list[Path]:
        """Return the normal images that go through the network."""
        return files_in(self.normal)[: min(self.images, self.extracted)]

    def queried(self) -> list[Path]:
        """Return the test images, after one that does not count."""
        return files_in(self.test)[: self.queries + 1]

    def repeated(self, rows: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """Yield arrays of all images by TOGETHER, from those of the extracted ones.

        Args:
            rows: image features (n, d), and of each level the patches (n, cells, c).
        """
        for start in range(0, self.images, TOGETHER):
            numbers = np.arange(start, min(start + TOGETHER, self.images))
            chosen = [array[numbers % len(array)] for array in rows]
            again = numbers >= len(rows[0])
            if again.any():
                rng = np.random.default_rng([SEED, start])
                for array in chosen:
                    noise = rng.standard_normal(array[again].shape, np.float32)
                    array[again] *= 1 + NOISE * noise
            yield chosen


def ours(task: Task, folder: Path) -> dict[str, Any]:
    """Build a gallery of the recipe rad on disk, and query it."""
    extractor = sf.load_extractor(f"timm:{task.name}", task.weights, task.options)
    start = time.perf_counter()
    found = []
    for pixels in _views(task.files(), extractor.spec.view):
        one = extractor.extract(pixels)
        grid = one.levels[0].shape[2:]
        found.append([one.image, *(level.reshape(*level.shape[:2], -1).swapaxes(1, 2) for level in one.levels)])
    rows = [np.concatenate(arrays).astype(np.float32) for arrays in zip(*found, strict=True)]
    network = time.perf_counter() - start
    start = time.perf_counter()
    gallery = sf.Gallery.create(folder / "rad.gallery", extractor.spec, recipe="rad")
    count = 0
    for image, *levels in task.repeated(rows):
        image /= np.linalg.norm(image, axis=1, keepdims=True)
        keys = [f"{count + number:06d}" for number in range(len(image))]
        levels = [level.swapaxes(1, 2).reshape(len(image), -1, *grid).astype(np.float16) for level in levels]
        gallery.append(keys, Features(image, levels))
        count += len(image)
    fit = time.perf_counter() - start
    del rows, found
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=task.k))
    seconds, scores, match = [], [], []
    for path in task.queried():
        start = time.perf_counter()
        detection = detector.query(path)
        seconds.append(time.perf_counter() - start)
        match.append(sum(detection.seconds.values()) - detection.seconds.get("extract", 0))
        scores.append(float(detection.image_score))
    stored = sum(path.stat().st_size for path in (folder / "rad.gallery").rglob("*") if path.is_file())
    return {
        "network_seconds": network, "fit_seconds": fit, "query_seconds": float(np.median(seconds[1:])),
        "without_network_seconds": float(np.median(match[1:])), "scores": scores, "disk_mib": stored // 2**20,
    }  # fmt: skip


def anomalibs(task: Task, _: Path) -> dict[str, Any]:
    """Fill anomalib's Rad's bank with the same features, and query it."""
    from anomalib.models.image.rad.torch_model import RadModel

    model: Any = RadModel(task.name, pre_trained=False, k_image=task.k)
    model.feature_extractor.feature_extractor.load_state_dict(torch.load(task.weights, weights_only=True))
    view = sf.load_extractor(f"timm:{task.name}", task.weights, task.options).spec.view
    grid = tuple(side // model.patch_size for side in view.crop)
    start = time.perf_counter()
    with torch.no_grad():
        found = [model._extract_features(pixels) for pixels in batches(task.files(), view)]
    rows = [torch.cat([one[-1][1] for one in found]).numpy()]
    rows += [torch.cat([one[number][0] for one in found]).numpy() for number in range(len(model.layers))]
    network = time.perf_counter() - start
    del found
    start = time.perf_counter()
    for tokens, *levels in task.repeated(rows):
        image = torch.from_numpy(tokens)
        model._store_features([(torch.from_numpy(level), image) for level in levels], grid)
    model.build_memory_bank()
    fit = time.perf_counter() - start
    model.eval()
    seconds, scores, match = [], [], []
    with torch.no_grad():
        for path in task.queried():
            start = time.perf_counter()
            [pixels] = batches([path], view)
            features = model._extract_features(pixels)
            extracted = time.perf_counter()
            scores.append(float(model._score(features, grid, pixels.shape[-2:]).pred_score))
            match.append(time.perf_counter() - extracted)
            seconds.append(time.perf_counter() - start)
    return {
        "network_seconds": network, "fit_seconds": fit, "query_seconds": float(np.median(seconds[1:])),
        "without_network_seconds": float(np.median(match[1:])), "scores": scores,
    }  # fmt: skip


def _views(files: list[Path], view: Any) -> Iterator[list[np.ndarray]]:
    from PIL import Image

    for start in range(0, len(files), 8):
        yield [view.apply(np.asarray(Image.open(path).convert("RGB"))) for path in files[start : start + 8]]


SIDES = {"spade-faiss": ours, "anomalib": anomalibs}


def measure(side: str, args: argparse.Namespace, weights: Path, images: int) -> dict[str, Any]:
    """Run one side in a process of its own, which may not take more memory than the machine has."""
    command = [
        sys.executable, __file__, str(args.normal), str(args.test), "--one", side, "--images", str(images),
        "--extracted", str(args.extracted), "-k", str(args.k), "--queries", str(args.queries),
        "--network", args.network, "--weights", str(weights),
    ]  # fmt: skip
    limit = available_bytes()

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=bounded)
    row: dict[str, Any] = {"side": side, "images": images, "k": args.k}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return row | {"failed": lines[-1][:200] if lines else f"signal {-done.returncode}", "limit_gib": limit // 2**30}
    return row | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("normal", type=Path, help="folder of normal images")
    parser.add_argument("test", type=Path, help="folder of images to query")
    parser.add_argument("--images", type=int, nargs="+", default=[200, 1000, 5000], help="normal images")
    parser.add_argument("--extracted", type=int, default=100, help="normal images that go through the network")
    parser.add_argument("-k", type=int, default=150)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--network", default="vit_small_patch14_dinov2", help="vision transformer of timm's")
    parser.add_argument("--weights", type=Path, help="its weights (.pth); default: random")
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        task = Task(
            args.normal, args.test, args.network, args.weights, args.images[0], args.extracted, args.k, args.queries
        )
        with tempfile.TemporaryDirectory() as folder:
            row = SIDES[args.one](task, Path(folder))
        print(json.dumps(row | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
        return
    sides = [side for side in SIDES if side != "anomalib" or importlib.util.find_spec("anomalib")]
    if len(sides) == 1:
        print("anomalib is not installed (pip install 'spade-faiss[peers]'): only ours is measured", file=sys.stderr)
    rows, asked = [], {"network": args.network, "extracted": args.extracted, "noise": NOISE}
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights or _random_weights(args.network, Path(folder))
        for images in args.images:
            for side in sides:
                rows.append(measure(side, args, weights, images))
                print({name: value for name, value in rows[-1].items() if name != "scores"}, flush=True)
            found = [row.pop("scores") for row in rows[-len(sides) :] if "scores" in row]
            if len(found) == 2:
                rows[-2]["largest_difference"] = float(np.abs(np.subtract(*found)).max())
            save("rad", {**asked, "rows": rows}, part=True)
    save("rad", {**asked, "rows": rows})


def _random_weights(name: str, folder: Path) -> Path:
    import timm

    torch.manual_seed(SEED)
    weights = timm.create_model(name).state_dict()
    for part in weights:
        if part.endswith(".gamma"):  # of 1e-5 to begin with: all images would have one class token
            weights[part] = torch.ones_like(weights[part])
    torch.save(weights, path := folder / "random.pth")
    return path


if __name__ == "__main__":
    main()
