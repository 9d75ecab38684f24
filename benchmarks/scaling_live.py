"""Cells of the scaling benchmark about galleries in use: whole queries, and adding images while others query."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scaling_work import K, Work, append_all, drop_pages, figure, load_extractor, peak_mib
from synthetic import HELD_OUT

import spade_faiss as sf
from spade_faiss.images.decode import decode
from spade_faiss.pyramids.reader import Identity
from spade_faiss.store.manifest import Manifest
from spade_faiss.store.snapshot import Snapshot
from spade_faiss.system.prefetch import batched

ADDED = 1_000
PLANTED = K  # of those added, so near to the reader's query that they are all of its neighbours, or none is there yet
SCRIPT = Path(__file__).with_name("scaling.py")


def fill_pool(work: Work, images: int) -> dict[str, Any]:
    """Make the gallery whose stored patches stand in for those of all others: of real images, also mirrored."""
    extractor = load_extractor()
    shutil.rmtree(work.pool, ignore_errors=True)
    paths, start = work.arrays["normal_paths"].tolist(), time.perf_counter()
    mirrored = (np.s_[:, :], np.s_[:, ::-1], np.s_[::-1, :], np.s_[::-1, ::-1])
    with sf.Gallery.create(work.pool, extractor.spec, "flat") as pool, pool.writer() as writer:
        wanted = [(turn, path) for turn in range(len(mirrored)) for path in paths][:images]
        for some in batched(wanted, extractor.batch_size):
            seen = [(turn, extractor.spec.view.apply(decode(path))) for turn, path in some]
            views = [np.ascontiguousarray(pixels[mirrored[turn]]) for turn, pixels in seen]
            writer.append([f"{turn}/{path}" for turn, path in some], extractor.extract(views))
    return {
        "images": len(wanted),
        "patches_mib": round(len(wanted) * (extractor.spec.bytes_per_image - 4 * extractor.spec.image_dim) / 2**20),
        "seconds": figure(time.perf_counter() - start),
    }


class PatchesElsewhere:
    """An extractor of full-size patches, for galleries that say theirs are elsewhere."""

    def __init__(self, extractor: sf.Extractor, spec: sf.ExtractorSpec) -> None:
        self._extractor = extractor
        self.spec = spec
        self.batch_size = extractor.batch_size

    def extract(self, views: Sequence[np.ndarray]) -> sf.Features:
        return self._extractor.extract(views)


class PooledPyramids:
    """Full-size levels from the pool for every image of a gallery, under the identities of the gallery's images."""

    def __init__(self, snapshot: Snapshot, pool: Snapshot) -> None:
        self._snapshot, self._pool = snapshot, pool
        self.spec = pool.manifest.spec

    def identity(self, row_id: int) -> Identity:
        return self._snapshot.identity(row_id)

    def read_into(self, ids: Sequence[int], out: Sequence[list[np.ndarray]]) -> None:
        self._pool.read_into([row_id % len(self._pool) for row_id in ids], out)


class PooledDetector(sf.Detector):
    """Takes the neighbours' levels from the pool."""

    pool: Snapshot

    def _pyramids(self, snapshot: Snapshot) -> Any:
        return PooledPyramids(snapshot, self.pool)


def whole(work: Work, n: int, images: int) -> dict[str, Any]:
    """Time whole queries of real test images, one at a time, with default settings."""
    paths = work.arrays["test_paths"]
    chosen = paths[np.linspace(0, len(paths) - 1, min(images, len(paths))).astype(int)]
    with work.open(n) as gallery, sf.Gallery.open(work.pool) as pool:
        detector = PooledDetector(gallery, PatchesElsewhere(load_extractor(), gallery.spec))
        detector.pool = pool.snapshot()
        for path in chosen[:3]:
            detector.query(str(path))  # libraries, kernels and the index are loaded
        misses, stages, totals = detector._caches.host.misses, dict[str, list[float]](), []
        for path in chosen:
            drop_pages(work.pool)  # what the detector has not in its own cache comes from the disk
            start = time.perf_counter()
            detection = detector.query(str(path))
            totals.append(time.perf_counter() - start)
            named = {**detection.seconds, "other": totals[-1] - sum(detection.seconds.values())}
            for stage, seconds in named.items():
                stages.setdefault(stage, []).append(seconds)
        return {
            "queries": len(chosen),
            "k": detector.k,
            "seconds_median": {stage: figure(statistics.median(seconds)) for stage, seconds in stages.items()},
            "total_median": figure(statistics.median(totals)),
            "total_p99": figure(np.percentile(totals, 99)),
            "read_from_disk_a_query": round((detector._caches.host.misses - misses) / len(chosen), 1),
            "peak_mib": peak_mib(),
            "index": gallery.info()["index"],
        }


def planted(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Return the reader's query (d,), and what is added: PLANTED images very near to it, then others."""
    query = work.mixture.block(HELD_OUT + 1, 1)[0]
    rng = np.random.default_rng(3)
    near = np.maximum(query + rng.normal(0, 1e-3, (PLANTED, len(query))), 0)
    return query, np.concatenate([near, work.mixture.block(HELD_OUT + 2, ADDED - PLANTED)]).astype(np.float32)


def adding(work: Work, n: int) -> dict[str, Any]:
    """Add images to a copy of a gallery while another process queries it."""
    copy = work.folder / "added.gallery"
    shutil.rmtree(copy, ignore_errors=True)
    _linked(work.gallery(n), copy)
    script = [sys.executable, str(SCRIPT), "--child", "reader"]
    values = json.dumps({"work": str(work.folder), "gallery": str(copy)})
    with subprocess.Popen([*script, values], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdout.readline()  # it has loaded the index
        time.sleep(3)
        _, features = planted(work)
        start = time.monotonic()
        with sf.Gallery.open(copy, "cpu") as gallery:
            opened = time.monotonic()
            with gallery.writer() as writer:
                append_all(writer, iter([features]), "added/")
            done = time.monotonic()
            file = gallery.info()["index"]["file"]
        reader.stdout.readline()  # it has answered from the new generation
        time.sleep(3)
        reader.stdin.close()
        log = json.loads(reader.stdout.read())
    shutil.rmtree(copy)
    spans = {"before": (0, opened), "meanwhile": (opened, done), "after": (done, float("inf"))}
    return {
        "added": ADDED,
        "open_seconds": figure(opened - start),
        "add_seconds": figure(done - opened),
        "index_file_written_anew": file != Manifest.read(work.gallery(n)).index.file,  # type: ignore[union-attr]
        "peak_mib": peak_mib(),
        "reader": {
            "queries": len(log["queries"]),
            "failed": sum(query["error"] is not None for query in log["queries"]),
            "errors": sorted({query["error"] for query in log["queries"] if query["error"]}),
            "mixed_generations": sum(query["mixed"] for query in log["queries"]),
            "of_the_new_generation": sum(query["rows"] == n + ADDED for query in log["queries"]),
            "planted_found_in_the_new": min((q["planted"] for q in log["queries"] if q["rows"] > n), default=None),
            "new_generation_ready_after_seconds": figure(log["ready_after"]),
            "longest_ms": figure(1000 * max(query["seconds"] for query in log["queries"])),
            **{name: _latencies(log["queries"], *span) for name, span in spans.items()},
        },
    }


def _latencies(queries: list[dict[str, Any]], start: float, end: float) -> dict[str, Any]:
    seconds = [query["seconds"] for query in queries if start <= query["at"] < end]
    if not seconds:
        return {"queries": 0}
    p50, p99, most = (figure(1000 * np.percentile(seconds, q)) for q in (50, 99, 100))
    return {"queries": len(seconds), "p50_ms": p50, "p99_ms": p99, "max_ms": most}


def _linked(source: Path, target: Path) -> None:
    """Copy a gallery; files that are never changed are linked."""

    def link(path: str, to: str) -> None:
        if path.endswith((".h5", ".faiss")):
            os.link(path, to)
        else:
            shutil.copy2(path, to)

    shutil.copytree(source, target, copy_function=link)


def reader(work: Work, gallery: str) -> dict[str, Any]:
    """Query without end, moving on to a new generation when there is one; stops when stdin is closed."""
    import threading

    query, _ = planted(work)
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    log: list[dict[str, Any]] = []
    ready_after = float("nan")
    with sf.Gallery.open(gallery, "cpu") as opened:
        first = opened.snapshot().manifest
        opened.search(query[None], K)
        print("ready", flush=True)
        while not stop.is_set():
            seen = Manifest.read(opened.path)
            moved = time.monotonic() if seen.generation != opened.generation else None
            entry: dict[str, Any] = {"at": time.monotonic(), "error": None, "mixed": False, "rows": 0, "planted": 0}
            try:
                if moved is not None:
                    opened.refresh()
                snapshot = opened.snapshot()
                ids, _ = snapshot.search(query[None], K)
                keys = snapshot.keys(ids[0])
                entry["rows"] = rows = snapshot.manifest.rows
                entry["planted"] = sum(key.startswith("added/") for key in keys)
                # All of them, or none; and no row that this generation does not have.
                entry["mixed"] = bool(entry["planted"] not in ((0,) if rows == first.rows else (PLANTED,)))
                entry["mixed"] |= bool(ids.max() >= rows)
            except Exception as error:
                entry["error"] = f"{type(error).__name__}: {error}"
            entry["seconds"] = time.monotonic() - entry["at"]
            log.append(entry)
            if moved is not None and ready_after != ready_after and entry["rows"] > first.rows:
                ready_after = time.monotonic() - moved
                print("moved on", flush=True)
    return {"queries": log, "ready_after": ready_after}
