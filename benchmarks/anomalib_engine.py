"""SpadeFaiss in anomalib's Engine, beside anomalib's own PatchCore and Rad on the same network and images.

    spade-faiss bench anomalib_engine DATASET... [--sides spade own patchcore] [--limit 50] [--images 3000]

DATASET is a folder in the layout of MVTec AD, read by anomalib's Folder. Each side runs in a process of its own:
`Engine.fit`, then `validate`, `test` and `predict`. `spade` resizes images as the extractor sees them; `own` keeps them
at their own size, one a batch; `evaluate` is this package without anomalib, whose figures theirs are compared with.
PatchCore gets the extractor's network, its two levels of stride 8 and 16, and 8-bit images at the same size. `rad` and
`spade_rad` share a vision transformer with random weights, or with --weights: their metrics say nothing then.

`fit_seconds` has all up to the first query, the baseline of normal images too, where a recipe needs one.
`fit_mib` and `predict_mib` are the peak of the resident memory above what the process took after its imports and with
its network loaded. A query is a call of the model with one image, network included: the median of `predict`, which
takes --predicted of the test images.

PatchCore keeps --ratio of the patches, or --bank N of them: it chooses one after the other by its distance to all, so
that 1 % of a set of hundreds of images takes hours. `bank` of a row is how many it kept. `fit_mib` does not depend on
it: all patches are in memory as the choice begins, 8 MiB an image. Rad keeps all patches of four layers, 8 MiB an image
by the default --network. --limit bounds both. A side that the kernel ends for its memory says "signal 9", and the next
one runs.

--images N also makes N normal images, as crops and mirrored crops of those of the first DATASET, and measures the
memory of fit and predict. PatchCore keeps 1000 patches there, or --bank.

Needs the extra `anomalib`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import importlib.util
import json
import logging
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import PeakMemory, resident_mib, save
from PIL import Image, ImageOps
from quality_patchcore import levels_of, patchcore_features

import spade_faiss as sf
from spade_faiss.images.sources import find_images
from spade_faiss.recipes import DEFAULT_RECIPE

SIDES = ("spade", "own", "patchcore", "spade_rad", "rad")
METRICS = ("image_AUROC", "pixel_AUROC")
SIDE = 512  # px of a made image


class _Levels(torch.nn.Module):
    """An extractor in the place of PatchCore's network: images in [0, 1] to levels by name."""

    def __init__(self, extractor: sf.Extractor) -> None:
        super().__init__()
        self._extractor = extractor

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        from spade_faiss.adapters.anomalib_pixels import pixels_of

        levels = levels_of(self._extractor, pixels_of(images), "cpu")
        return dict(zip(self._extractor.spec.level_names, levels, strict=True))


def model_of(side: str, args: argparse.Namespace, folder: Path) -> Any:
    """Return anomalib's model of a side."""
    from anomalib.models import Patchcore, Rad

    from spade_faiss.adapters.anomalib import SpadeFaiss
    from spade_faiss.adapters.anomalib_processing import ViewPreProcessor

    shown = {"visualizer": False}
    if side in ("spade", "own"):
        sizes = {"pre_processor": False} if side == "own" else {}
        return SpadeFaiss(folder / "g", args.backbone, args.recipe, options={"k": args.k}, **sizes, **shown)
    if side == "spade_rad":
        return SpadeFaiss(folder / "g", f"timm:{args.network}", "rad", args.weights, options={"k": args.k}, **shown)
    if side == "rad":
        model = Rad(args.network, pre_trained=False, k_image=args.k, **shown)
        model.model.feature_extractor.feature_extractor.load_state_dict(torch.load(args.weights, weights_only=True))
        return model
    size = sf.RECIPES[args.recipe].features.image_size
    options = dataclasses.replace(patchcore_features(), image_size=size, crop=None)
    extractor = sf.load_extractor(args.backbone, options=options)
    model = Patchcore(
        "resnet18", pre_trained=False, coreset_sampling_ratio=args.ratio,
        pre_processor=ViewPreProcessor(extractor.spec.view.resized), **shown,
    )  # fmt: skip
    model.model.feature_extractor = _Levels(extractor)  # its own was made, not loaded
    model.model.layers = list(extractor.spec.level_names)
    if args.bank:
        _keep(model.model, args.bank)
    return model


def _keep(model: Any, bank: int) -> None:
    """Have PatchCore keep a number of patches, whatever share of them that is; all, if there are no more."""
    subsample: Callable[[float], None] = model.subsample_embedding

    def kept(_: float) -> None:
        patches = sum(len(one) for one in model.embedding_store)
        subsample(min(1, (bank + 0.5) / patches))  # it takes the integer below

    model.subsample_embedding = kept


def datamodule_of(root: Path, args: argparse.Namespace, batch: int) -> Any:
    """Return anomalib's datamodule over a folder, with --limit images of each role; its MVTecAD takes PNG alone."""
    from anomalib.data import Folder

    kinds = sorted(path.name for path in (root / "test").iterdir() if path.name != "good")
    module = Folder(
        name=root.name, root=root, normal_dir="train/good", normal_test_dir="test/good",
        abnormal_dir=[f"test/{kind}" for kind in kinds], mask_dir=[f"ground_truth/{kind}" for kind in kinds],
        train_batch_size=batch, eval_batch_size=1, num_workers=0, val_split_mode="same_as_test",
    )  # fmt: skip
    own = module._setup

    def limited(stage: str | None = None) -> None:
        own(stage)
        for data, number in ((module.train_data, args.limit), (module.test_data, args.queries or args.limit)):
            samples = data.samples
            if number:
                kept = np.unique(np.linspace(0, len(samples) - 1, number).astype(int))
                data._samples = samples.iloc[kept].reset_index(drop=True)

    module._setup = limited
    return module


def engine(folder: Path, **options: Any) -> Any:
    """Return an Engine that writes nothing but what it must."""
    from anomalib.engine import Engine

    return Engine(default_root_dir=folder, logger=False, barebones=True, **options)


def run(side: str, root: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Fit, validate, test and predict in this process."""
    model, module = model_of(side, args, folder), datamodule_of(root, args, 1 if side == "own" else 8)
    start_mib = resident_mib()
    with PeakMemory() as fit:
        start = time.perf_counter()
        engine(folder, limit_val_batches=0).fit(model=model, datamodule=module)
        fit_seconds = time.perf_counter() - start
    row: dict[str, Any] = {
        "images": len(module.train_data), "fit_seconds": round(fit_seconds, 2),
        "fit_mib": round(fit.peak - start_mib), "start_mib": round(start_mib),
    }  # fmt: skip
    if side == "patchcore":
        row["bank"] = len(model.model.memory_bank)
    if not args.memory_only:
        runner = engine(folder)
        runner.validate(model=model, datamodule=module)
        [found] = runner.test(model=model, datamodule=module)
        row |= {name: round(float(found[name]), 5) for name in METRICS if name in found}
    seconds = _timed(model)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # what the fit has freed is not predict's
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with PeakMemory() as predict:
        runner = engine(folder, limit_predict_batches=args.predicted or 1.0)
        runner.predict(model=model, datamodule=module, return_predictions=False)
    return row | {
        "queries": len(seconds), "query_seconds": round(statistics.median(seconds[1:]), 4),
        "predict_mib": round(predict.peak - start_mib),
    }  # fmt: skip


def _timed(model: Any) -> list[float]:
    """Have the model's calls timed; returns the list that they go to."""
    seconds: list[float] = []
    forward: Callable[[Any], Any] = model.model.forward

    def timed(images: Any) -> Any:
        start = time.perf_counter()
        found = forward(images)
        seconds.append(time.perf_counter() - start)
        return found

    model.model.forward = timed
    return seconds


def run_evaluate(root: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Evaluate the same images without the Engine: at their own size, and at that of the view."""
    from spade_faiss.adapters.anomalib_data import category_of
    from spade_faiss.evaluate import EvaluationOptions, evaluate

    category = category_of(datamodule_of(root, args, 1))
    extractor = sf.load_extractor(args.backbone, options=sf.RECIPES[args.recipe].features)
    start = time.perf_counter()
    gallery = sf.Gallery.create(folder / "g", extractor.spec, recipe=args.recipe)
    gallery.add_images(category.normal, extractor)
    fit_seconds = time.perf_counter() - start
    detector = sf.Detector(gallery, extractor, sf.SearchOptions(k=args.k))
    view = extractor.spec.view
    assert view is not None
    row: dict[str, Any] = {"images": len(gallery), "fit_seconds": round(fit_seconds, 2)}
    for name, size in (("", None), ("_at_view", view.resized[0])):
        found = evaluate(detector, category, EvaluationOptions(metrics_size=size)).metrics
        row |= {f"{metric}{name}": round(found[metric] or 0, 5) for metric in METRICS}
    return row


def make_images(root: Path, made: Path, number: int) -> Path:
    """Write crops and mirrored crops of a set's normal images, and copy its test images, in the same layout."""
    rng = np.random.default_rng(0)
    sources = find_images([root / "train" / "good"])
    (made / "train" / "good").mkdir(parents=True)
    for one in range(number):
        image = Image.open(sources[one % len(sources)].path).convert("RGB")
        share = rng.uniform(0.7, 1)
        width, height = (int(side * share) for side in image.size)
        left, top = (int(side * (1 - share) * rng.random()) for side in image.size)
        part = image.crop((left, top, left + width, top + height))
        part = ImageOps.mirror(part) if rng.random() < 0.5 else part
        part.resize((SIDE, SIDE)).save(made / "train" / "good" / f"{one:05d}.jpg", quality=90)
    for name in ("test", "ground_truth"):
        shutil.copytree(root / name, made / name)  # anomalib follows no links
    return made


def measure(side: str, root: Path, args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Run one side in a process of its own."""
    command = [
        sys.executable, __file__, str(root), "--one", side, "--backbone", args.backbone, "--recipe", args.recipe,
        "-k", str(args.k), "--limit", str(args.limit), "--queries", "0", "--network", args.network,
        "--ratio", str(args.ratio), "--bank", str(args.bank), "--predicted", str(args.predicted),
        *(["--weights", str(args.weights)] if args.weights else []), *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row = {"side": side, "dataset": root.name}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return row | {"failed": lines[-1][:200] if lines else f"signal {-done.returncode}"}
    return row | json.loads(done.stdout.splitlines()[-1])


def compared(rows: list[dict[str, Any]]) -> None:
    """Write beside each figure of SpadeFaiss how far it is from that of evaluate, at the same size."""
    own = {row["dataset"]: row for row in rows if row["side"] == "evaluate"}
    for row in rows:
        reference = own.get(row["dataset"], {})
        suffix = {"spade": "_at_view", "own": ""}.get(row["side"])
        for metric in METRICS if suffix is not None else ():
            if metric in row and f"{metric}{suffix}" in reference:
                row[f"{metric}_difference"] = round(row[metric] - reference[f"{metric}{suffix}"], 5)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", type=Path, nargs="+", metavar="DATASET", help="folder in MVTec AD's layout")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["spade", "own", "patchcore"])
    parser.add_argument("--limit", type=int, default=0, help="images of each role at most, spread over the set; 0: all")
    parser.add_argument("--predicted", type=int, default=50, help="images that predict takes; 0: all")
    parser.add_argument("--images", type=int, default=0, help="also measure memory with so many made normal images")
    parser.add_argument("--queries", type=int, default=10, help="test images with made normal images")
    parser.add_argument(
        "--bank", type=int, default=0, help="patches that PatchCore keeps; 0: --ratio, of --images 1000"
    )
    parser.add_argument("--ratio", type=float, default=0.01, help="share of the patches that PatchCore keeps")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, choices=sf.RECIPES)
    parser.add_argument("-k", type=int, default=20)
    parser.add_argument("--network", default="vit_small_patch14_dinov2", help="vision transformer of timm's, for Rad")
    parser.add_argument("--weights", type=Path, help="its weights (.pth); default: random")
    parser.add_argument("--name", default="anomalib_engine", help="of the file of results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.one:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            take = run_evaluate if args.one == "evaluate" else lambda *rest: run(args.one, *rest)
            print(json.dumps(take(args.datasets[0], args, Path(folder))))
            return
        if importlib.util.find_spec("anomalib") is None:
            parser.exit(1, "expected the package anomalib, found none; pip install 'spade-faiss[anomalib]'\n")
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        settings |= {"datasets": [root.name for root in args.datasets], "weights": "given" if args.weights else None}
        if args.weights is None and {"rad", "spade_rad"} & set(args.sides):
            args.weights = _random_weights(args.network, Path(folder))
        rows, large = [], []
        for root in args.datasets:
            for side in ("evaluate", *args.sides):
                rows.append(measure(side, root, args))
                print(rows[-1], flush=True)
                if any("failed" not in row for row in rows):
                    save(args.name, {"settings": settings, "rows": rows}, part=True)
        if all("failed" in row for row in rows):
            parser.exit(1, f"every side failed, nothing is written; the last: {rows[-1]['failed']}\n")
        compared(rows)
        if args.images:
            made = make_images(args.datasets[0], Path(folder) / "made", args.images)
            for side in (side for side in args.sides if side != "own"):
                own = argparse.Namespace(**{**vars(args), "limit": 0, "bank": args.bank or 1000})
                large.append(measure(side, made, own, "--queries", str(args.queries), "--memory-only"))
                print(large[-1], flush=True)
        save(args.name, {"settings": settings, "rows": rows, "made": large})


def _random_weights(name: str, folder: Path) -> Path:
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model(name).state_dict(), path := folder / "random.pth")
    return path


if __name__ == "__main__":
    main()
