"""Cells of the scaling benchmark about what users would take instead. Each has its own process."""

from __future__ import annotations

import gc
import time
from typing import Any

import faiss
import numpy as np
import torch
from common import resident_mib
from scaling_work import K, Work, figure, mib_since, recall, timed, timings
from torch.nn import functional as F

import spade_faiss as sf

PEERS = ("torch cdist", "scikit-learn brute", "usearch HNSW", "PatchCore-style bank")
BANK_IMAGES = (100, 1_000)  # of the bank that is measured; beyond, its memory is by formula
SIDE, CHANNELS = 56, 24 + 40 + 112  # efficientnet_lite0 at 224 px: the finest grid, the levels together
BANK_BYTES = SIDE * SIDE * CHANNELS * 4  # an image's patches in float32
EXPANSION = 512  # usearch's candidates in a search; its default, 64, hardly exceeds K


def peer(work: Work, n: int, name: str, singles: int, batch: int) -> dict[str, Any]:
    """Measure one of PEERS over the n image features of a gallery."""
    if name == "PatchCore-style bank":
        return bank(work, n)
    matrix, queries, k = work.matrix(n), work.queries, min(K, n)
    before = resident_mib()
    start = time.perf_counter()
    facts: dict[str, Any] = {}
    if name == "torch cdist":
        rows = torch.from_numpy(matrix)

        def search(q: np.ndarray) -> Any:
            # Blocks of queries: the reference implementations hold the distances of all pairs.
            return [
                torch.topk(torch.cdist(block, rows), k, largest=False)[1].numpy()
                for block in torch.from_numpy(q).split(64)
            ]
    elif name == "scikit-learn brute":
        from sklearn.neighbors import NearestNeighbors

        fitted = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(matrix)

        def search(q: np.ndarray) -> Any:
            return [fitted.kneighbors(q)[1]]
    else:
        from usearch.index import Index

        graph = Index(ndim=matrix.shape[1], metric="l2sq", dtype="f32", expansion_search=EXPANSION)
        graph.add(np.arange(n), matrix)
        facts = {"expansion_search": EXPANSION, "index_bytes": int(graph.memory_usage)}

        def search(q: np.ndarray) -> Any:
            return [graph.search(q, k).keys.astype(np.int64).reshape(len(q), k)]

    built = time.perf_counter() - start
    truth = faiss.knn(queries, matrix, k)[1]
    found = np.concatenate(search(queries))
    mib = matrix.nbytes / 2**20 if not facts else facts["index_bytes"] / 2**20
    times = timings({name: search}, queries, singles, batch)[name]
    return {
        "build_seconds": figure(built),
        "resident_mib": round(mib),
        "grown_mib": mib_since(before),
        "recall": recall(found, truth),
        **facts,
        **times,
    }


def bank(work: Work, n: int) -> dict[str, Any]:
    """Search a query's patches among all patches of all images: PatchCore's bank before its subsampling."""
    if n not in BANK_IMAGES:
        return {"resident_mib": round(n * BANK_BYTES / 2**20), "by_formula": f"{n} x {BANK_BYTES} bytes"}
    with sf.Gallery.open(work.pool, "cpu") as pool:
        if n > len(pool):
            return {"left_out": f"expected a pool of {n} images, found {len(pool)}"}
        start, before = time.perf_counter(), resident_mib()
        index = faiss.IndexFlatL2(CHANNELS)
        for row in range(n):
            index.add(_patches(pool.read([row])))
        built = time.perf_counter() - start
        gc.collect()
        resident = mib_since(before)
        query = _patches(pool.read([len(pool) - 1]))
        seconds = [timed(lambda: index.search(query, 1)) for _ in range(2 if n > 100 else 5)]
    return {
        "what": f"all {SIDE * SIDE} patches of a query image against all of {n} images, nearest one",
        "build_seconds": figure(built),
        "resident_mib": resident,
        "formula_mib": round(n * BANK_BYTES / 2**20),
        "p50_ms": figure(1000 * np.median(seconds)),
        "singles": len(seconds),
    }


def _patches(levels: list[np.ndarray]) -> np.ndarray:
    """Return an image's patches, (SIDE * SIDE, CHANNELS) float32: its levels upsampled and concatenated."""
    maps = [
        F.interpolate(torch.from_numpy(level.astype(np.float32)), (SIDE, SIDE), mode="bilinear", align_corners=False)
        for level in levels
    ]
    return np.ascontiguousarray(torch.cat(maps, 1)[0].flatten(1).numpy().T)
