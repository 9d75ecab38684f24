"""How fast the network is by torch and by OpenVINO, in float32 and bfloat16, and how far their features are apart.

    python benchmarks/network.py                 one image and batches: lite0, wide_resnet50_2, ViT-small
    python benchmarks/network.py --build DIR     a gallery of the normal images in DIR as well

The networks but lite0 have random weights, which serve for time. All ways take turns round by round, so that whatever
else the machine does falls on each, and the least of the rounds counts. A way that this CPU does not have is null.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from common import save

import spade_faiss as sf
from spade_faiss.extractors.networks import NetworkExtractor
from spade_faiss.extractors.openvino_network import ConversionError, platform
from spade_faiss.images.sources import find_images

WAYS = [(runtime, precision) for precision in ("float32", "bfloat16") for runtime in ("torch", "openvino")]
NETWORKS = {"efficientnet_lite0": 320, "wide_resnet50_2": 224, "timm:vit_small_patch16_224": 224}  # px


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--build", type=Path, help="a folder of normal images")
    parser.add_argument("--images", type=int, default=200, help="images of that folder to build galleries of")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # measured as by a first user
        asked = {"threads": args.threads, "batch": args.batch, "openvino": _platform()}
        found: dict[str, Any] = {}
        for name in args.networks:
            found[name] = measured(name, Path(folder), args.batch, args.rounds)
            save("network", {**asked, "networks": found}, part=True)
        built = build(args.build, args.images, args.rounds) if args.build else None
    save("network", {**asked, "networks": found, "build": built})


def measured(name: str, folder: Path, batch: int, rounds: int) -> dict[str, Any]:
    """Return milliseconds an image and differences of features, by way."""
    weights = random_weights(name, folder)
    options = sf.FeatureOptions(image_size=NETWORKS[name], dtype="float32", device="cpu", batch_size=batch)
    extractors = {
        f"{runtime} {precision}": load(name, weights, options, runtime, precision) for runtime, precision in WAYS
    }
    views = smooth_views(batch, NETWORKS[name])
    ways = {way: extractor for way, extractor in extractors.items() if extractor is not None}
    features = {way: extractor.extract(views) for way, extractor in ways.items()}  # compiles, and warms up
    for extractor in ways.values():
        extractor.extract(views[:1])
    seconds: dict[str, list[list[float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, extractor in ways.items():
            seconds[way].append([_timed(extractor, views[:n]) / n for n in (batch, 1)])
    expected = features["torch float32"]
    result: dict[str, Any] = dict.fromkeys(extractors)
    for way in ways:
        in_batch, alone = np.min(seconds[way], axis=0) * 1e3
        result[way] = {
            "ms_an_image_in_batch": round(in_batch, 2),
            "ms_alone": round(alone, 2),
            "difference_from_torch_float32": difference(features[way], expected),
        }
    base = result["torch float32"]["ms_an_image_in_batch"]
    times = {way: round(base / one["ms_an_image_in_batch"], 2) for way, one in result.items() if one}
    return {"px": NETWORKS[name], **result, "times_as_fast_in_batch": times}


def load(name: str, weights: Path | None, options: sf.FeatureOptions, runtime: Any, precision: Any) -> Any:
    """Load a network in one of the ways; None: it cannot be had here."""
    try:
        return sf.load_extractor(name, weights, replace(options, runtime=runtime, precision=precision))
    except sf.OptionError as error:
        print(error)
        return None


def random_weights(name: str, folder: Path) -> Path | None:
    """Write weights that a network starts with; None: it has its own."""
    torch.manual_seed(0)
    if name == "efficientnet_lite0":
        return None
    timms = name.startswith("timm:")
    model = timm.create_model(name[5:]) if timms else torchvision.models.get_model(name, weights=None)
    path = folder / f"{name.replace(':', '-')}.pth"
    torch.save(model.state_dict(), path)
    return path


def smooth_views(n: int, side: int) -> list[np.ndarray]:
    """Return images of coloured squares."""
    small = np.random.default_rng(0).integers(0, 256, (n, -(-side // 8), -(-side // 8), 3), dtype=np.uint8)
    return list(np.kron(small, np.ones((1, 8, 8, 1), np.uint8))[:, :side, :side])


def difference(found: sf.Features, expected: sf.Features) -> dict[str, float]:
    """Return the largest difference over the largest value, of the image feature and the worst level."""
    shares = [
        float(np.abs(one - other).max() / np.abs(other).max())
        for one, other in zip([found.image, *found.levels], [expected.image, *expected.levels], strict=True)
    ]
    return {"image": shares[0], "levels": max(shares[1:])}


def build(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Build galleries of the same images by torch and by OpenVINO, in turns; returns images per second."""
    sources = find_images([folder])[:count]
    rates: dict[str, list[float]] = {"torch": [], "openvino": []}
    with tempfile.TemporaryDirectory() as temporary:
        loaded = {
            way: sf.load_extractor(options=replace(sf.RECIPES["relative"].features, device="cpu", runtime=way))
            for way in rates
        }
        for number in range(min(rounds, 3)):
            for way, extractor in loaded.items():
                assert isinstance(extractor, NetworkExtractor)
                with sf.Gallery.create(Path(temporary, f"{way}{number}"), extractor.spec) as gallery:
                    start = time.perf_counter()
                    report = gallery.add_images(sources, extractor)
                    rates[way].append(round(report.added / (time.perf_counter() - start), 2))
    best = {way: max(each) for way, each in rates.items()}
    return {
        "images": len(sources),
        "px": extractor.spec.crop,
        "images_per_s": rates,
        "times_as_fast": round(best["openvino"] / best["torch"], 2),
    }


def _timed(extractor: sf.Extractor, views: list[np.ndarray]) -> float:
    start = time.perf_counter()
    extractor.extract(views)
    return time.perf_counter() - start


def _platform() -> dict[str, str] | None:
    try:
        return platform()
    except ConversionError:
        return None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
