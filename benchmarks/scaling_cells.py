"""Cells of the scaling benchmark about galleries: building, indexes, retrieval, opening. Each has its own process."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from common import PeakMemory, available_bytes, resident_mib
from scaling_work import K, Work, append_all, drop_pages, figure, mib_since, peak_mib, recall, timed, timings
from scipy.stats import rankdata
from synthetic import likeness

import spade_faiss as sf
from spade_faiss.gallery.creation import SHARD_BYTES
from spade_faiss.index.image_index import ImageIndex

# What is compared, by the name that tables and plots have. Those of a choice of approximation are built for each recall
# target, the others once. At most so many images, where building takes too long beyond.
KINDS = ("auto", "flat", "ivf", "ivf-sq", "ivf-pq", "hnsw")
EXACT = {"flat"}
AT_MOST = {"hnsw": 10**5, "ivf": 10**5}


def index_options(kind: str, recall: float, memory: int | None) -> sf.IndexOptions:
    """Return options of this kind; memory counts for `auto` only."""
    return sf.IndexOptions(kind=kind, device="cpu", recall=recall, memory=memory if kind == "auto" else None)


def features(work: Work, normal: str, test: str) -> dict[str, Any]:
    """Extract the real features and fit the mixture; says how like them its draws are."""
    work.extract(Path(normal), Path(test))
    arrays, mixture = work.arrays, work.mixture
    return {
        "normal": len(arrays["normal"]),
        "test_good": int((~arrays["anomalous"]).sum()),
        "test_anomalous": int(arrays["anomalous"].sum()),
        "clusters": len(mixture.shares),
        "rank": mixture.deviations.shape[1],
        "seed": mixture.seed,
        "likeness": likeness(arrays["normal"], mixture, arrays["test"][~arrays["anomalous"]]),
    }


def build(work: Work, n: int, recall: float, memory: int) -> dict[str, Any]:
    """Make the gallery of n images from features that are ready, with index `auto`."""
    shutil.rmtree(work.gallery(n), ignore_errors=True)
    blocks = work.rows(n)
    first = next(blocks)
    before = resident_mib()

    def all_blocks() -> Any:
        yield first
        yield from blocks

    with PeakMemory() as memory_of_all:
        start = time.perf_counter()
        options = index_options("auto", recall, memory)
        with sf.Gallery.create(work.gallery(n), work.spec, options, patches="recompute") as gallery:
            with gallery.writer() as writer:
                append_all(writer, all_blocks())
                writer.commit()
                stored = time.perf_counter()
            built = time.perf_counter()
            facts = gallery.info()
    return {
        "append_seconds": figure(stored - start),
        "index_seconds": figure(built - stored),
        "seconds": figure(built - start),
        "peak_mib": peak_mib(),
        "peak_mib_above_start": round(memory_of_all.peak - before),
        "features_mib": round(n * 4 * work.spec.image_dim / 2**20),
        "disk_bytes": facts["bytes"],
        "shards": facts["shards"],
        "index": facts["index"],
    }


def reindex(work: Work, n: int, kind: str, recall: float, memory: int) -> dict[str, Any]:
    """Give a gallery another index."""
    options = index_options(kind, recall, memory)
    with work.open(n) as gallery:
        before = resident_mib()
        start = time.perf_counter()
        try:
            gallery.reindex(kind=options.kind, memory=options.memory, recall=options.recall)
        except sf.OptionError as error:
            return {"left_out": str(error)}
        seconds = time.perf_counter() - start
    return {"seconds": figure(seconds), "peak_mib": peak_mib(), "peak_mib_above_start": round(peak_mib() - before)}


def retrieval(work: Work, n: int, singles: int, batch: int) -> dict[str, Any]:
    """Measure a gallery's index beside an exact flat one: recall, seconds, and what the difference does to scores."""
    queries, real = work.queries, len(work.arrays["test"])
    k = min(K, n)
    with work.open(n) as gallery:
        snapshot = gallery.snapshot()
        entry = snapshot.manifest.index
        truth, exact = nearest(snapshot.rows.blocks(), queries, k)
        flat = None
        if 2.2 * 4 * n * queries.shape[1] < available_bytes():  # first, as it takes twice its size while it grows
            flat = ImageIndex.build(snapshot.rows, queries.shape[1], sf.IndexOptions("flat", device="cpu"))
        before = resident_mib()
        start = time.perf_counter()
        gallery.search(queries[:1], k)
        loaded, resident = time.perf_counter() - start, mib_since(before)
        index = snapshot.indexes.image_index()
        if index.stands_in:
            return {"left_out": f"too few images for this kind: {n}"}
        ids, found = gallery.search(queries, k)
        ways = {"index": lambda q: gallery.search(q, k)}
        if flat is not None:
            ways = {"exact": lambda q: flat.search(q, k), **ways}
        times = timings(ways, queries, singles, batch)
        facts = gallery.info()["index"]
        description = str(gallery.index_state())
    scores, exact_scores = found.mean(axis=1, dtype=np.float64), exact.mean(axis=1, dtype=np.float64)
    change = np.abs(scores - exact_scores) / np.maximum(exact_scores, 1e-12)
    anomalous = work.arrays["anomalous"]
    return {
        "index": facts,
        "description": description,
        "k": k,
        "index_file_bytes": entry.bytes if entry else None,
        "index_resident_mib": resident,
        "load_seconds": figure(loaded),
        "recall": recall(ids, truth),
        "recall_real_test": recall(ids[:real], truth[:real]),
        "recall_synthetic": recall(ids[real:], truth[real:]),
        **times["index"],
        "exact_flat": times.get("exact", "has no room in memory"),
        "speedup_single": ratio(times, "p50_ms"),
        "speedup_batch": ratio(times, "batch_ms_a_query"),
        "score_change_median": figure(np.median(change)),
        "score_change_max": figure(change.max()),
        "auroc_exact": auroc(exact_scores[:real], anomalous),
        "auroc": auroc(scores[:real], anomalous),
    }


def nearest(blocks: Iterable[np.ndarray], queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and squared distances (m, k) of the true nearest, in one pass over all, as sums of squares."""
    ids, distances = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    start = 0
    for block in blocks:
        found, at = faiss.knn(queries, block, min(k, len(block)))
        # What knn gives is |q|^2 + |x|^2 - 2 q x: small distances drown in its rounding.
        found = np.stack([((block[row] - query) ** 2).sum(1) for row, query in zip(at, queries, strict=True)])
        ids, distances = np.hstack([ids, at + start]), np.hstack([distances, found])
        order = np.lexsort((ids, distances), axis=1)[:, :k]
        ids, distances = np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
        start += len(block)
    return ids, distances


def ratio(times: dict[str, dict[str, Any]], name: str) -> float | None:
    """Return how many times faster than exact the index is, where both were measured."""
    return figure(times["exact"][name] / times["index"][name]) if "exact" in times else None


def auroc(scores: np.ndarray, anomalous: np.ndarray) -> float | None:
    """Area under the ROC curve by ranks; None where there is one class only."""
    positive, negative = int(anomalous.sum()), int((~anomalous).sum())
    if not positive or not negative:
        return None
    ranks = rankdata(scores)[anomalous].sum()
    return round(float((ranks - positive * (positive + 1) / 2) / (positive * negative)), 5)


def stored(work: Work, n: int) -> dict[str, Any]:
    """Read K images' keys and levels from a gallery with stored patches, in as many shards as it would have.

    The levels are a few values each, as those of full size would take 0.26 MB an image.
    """
    path, full = work.folder / "stored.gallery", sf.ExtractorSpec.from_json(json.loads(str(work.arrays["spec"])))
    shutil.rmtree(path, ignore_errors=True)
    spec = sf.ExtractorSpec("few values", tuple((1, 1, 1) for _ in full.level_shapes), 1)
    a_shard = max(1, SHARD_BYTES["stored"] // full.bytes_per_image)
    values = np.zeros((a_shard, 1, 1, 1), np.float16)
    shard_bytes = a_shard * spec.bytes_per_image
    with sf.Gallery.create(path, spec, "flat", shard_bytes=shard_bytes) as gallery, gallery.writer() as writer:
        for start in range(0, n, a_shard):
            names = [f"line 1/camera 2/{row:08d}.png" for row in range(start, min(start + a_shard, n))]
            few = values[: len(names)]
            writer.append(names, sf.Features(few[:, :, 0, 0].astype(np.float32), [few] * len(spec.level_shapes)))
    rng, k = np.random.default_rng(4), min(K, n)
    with sf.Gallery.open(path, "cpu") as gallery:
        snapshot, before, seconds = gallery.snapshot(), resident_mib(), []
        for _ in range(300):
            ids = rng.choice(n, k, replace=False)
            seconds.append(timed(lambda ids=ids: (snapshot.keys(ids), snapshot.levels(ids))))
        grown = mib_since(before)
    shutil.rmtree(path)
    return {
        "shards": -(-n // a_shard),
        "images_a_shard": a_shard,
        "first_ms": figure(1000 * seconds[0]),
        "p50_ms_of_the_last_100": figure(1000 * np.median(seconds[-100:])),
        "grown_mib": grown,
    }


def opening(work: Work, n: int, cold: bool) -> dict[str, Any]:
    """Open a gallery and search once, in this fresh process."""
    [query] = work.queries[:1]
    folder, k = work.gallery(n), min(K, n)
    if cold:
        drop_pages(folder)
    before = resident_mib()
    start = time.perf_counter()
    with work.open(n) as gallery:
        opened, after_open = time.perf_counter(), mib_since(before)
        ids, _ = gallery.search(query[None], k)
        searched, after_search = time.perf_counter(), mib_since(before)
        gallery.keys(ids[0])
        named = time.perf_counter()
        index = gallery.info()["index"]
    return {
        "files": "not in the page cache" if cold else "as they are in the page cache",
        "index": index,
        "open_seconds": figure(opened - start),
        "first_search_seconds": figure(searched - opened),
        "first_keys_seconds": figure(named - searched),
        "resident_mib_above_start_opened": after_open,
        "resident_mib_above_start_searched": after_search,
        "peak_mib": peak_mib(),
        "start_mib": round(before),
    }
