"""What the cells of the scaling benchmark share: the work folder, its features, timing in turns, memory.

The galleries hold real image features, then synthetic ones; their patches are "recompute", from image files that do
not exist, so that 10^6 images take 5 GB and not 260.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from common import resident_mib
from synthetic import Mixture, image_features, stream

import spade_faiss as sf
from spade_faiss.recipes import RECIPES

K = 50
SYNTHETIC_QUERIES = 200
TURN = 10  # single queries of one way, before the next way has its turn

Search = Callable[[np.ndarray], Any]


def load_extractor() -> sf.Extractor:
    """The default network with the settings of plain SPADE, whose queries need no pass over normal images first."""
    return sf.load_extractor(options=RECIPES["paper"].features)


class Work:
    """The folder with features and galleries."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.file = self.folder / "features.npz"

    def extract(self, normal: Path, test: Path) -> None:
        """Extract the real features and fit the mixture, unless that was done. Test images under good/ are normal."""
        if self.file.exists():
            return
        extractor = load_extractor()
        features, paths = image_features(normal, extractor)
        queries, query_paths = image_features(test, extractor)
        mixture = dataclasses.asdict(Mixture.fit(features))
        temporary = self.file.with_suffix(".partial.npz")
        np.savez(
            temporary,
            normal=features,
            test=queries,
            normal_paths=list(map(str, paths)),
            test_paths=list(map(str, query_paths)),
            anomalous=[path.relative_to(test).parts[0] != "good" for path in query_paths],
            spec=json.dumps(extractor.spec.to_json()),
            **{f"mixture_{name}": value for name, value in mixture.items()},
        )
        temporary.rename(self.file)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Everything in the file."""
        with np.load(self.file) as found:
            return dict(found)

    @cached_property
    def mixture(self) -> Mixture:
        """What the synthetic features are drawn from."""
        names = [field.name for field in dataclasses.fields(Mixture)]
        values = {name: self.arrays[f"mixture_{name}"] for name in names}
        return Mixture(**values | {"seed": int(values["seed"])})

    @property
    def spec(self) -> sf.ExtractorSpec:
        """The extractor's, but for the patches: one value that is never read, as full-size ones would be appended."""
        spec = sf.ExtractorSpec.from_json(json.loads(str(self.arrays["spec"])))
        elsewhere = f"{spec.name}, patches elsewhere"
        return dataclasses.replace(spec, name=elsewhere, level_shapes=((1, 1, 1),), level_names=())

    @property
    def queries(self) -> np.ndarray:
        """Real test images' features, then synthetic ones that are in no gallery."""
        return np.concatenate([self.arrays["test"], self.mixture.queries(SYNTHETIC_QUERIES)])

    def rows(self, n: int) -> Iterator[np.ndarray]:
        """Yield n image features in blocks."""
        return stream(self.arrays["normal"], self.mixture, n)

    def images(self, n: int) -> str:
        """Say what n images are."""
        real = min(n, len(self.arrays["normal"]))
        return f"{real} real" + (f" + {n - real} synthetic" if n > real else "")

    def gallery(self, n: int) -> Path:
        """Where the gallery of n images is."""
        return self.folder / f"{n}.gallery"

    def open(self, n: int) -> sf.Gallery:
        """Open it."""
        return sf.Gallery.open(self.gallery(n), "cpu")

    @property
    def pool(self) -> Path:
        """Where the gallery with stored patches is, which lends them to the others."""
        return self.folder / "pool.gallery"

    def matrix(self, n: int) -> np.ndarray:
        """Return all image features of a gallery, (n, d) float32."""
        with self.open(n) as gallery:
            matrix = np.empty((n, gallery.spec.image_dim), np.float32)
            start = 0
            for block in gallery.snapshot().rows.blocks():
                matrix[start : start + len(block)] = block
                start += len(block)
        return matrix


def append_all(writer: Any, blocks: Iterator[np.ndarray], prefix: str = "") -> None:
    """Append image features under made-up names."""
    start = 0
    for block in blocks:
        names = [f"{prefix}{number:08d}" for number in range(start, start + len(block))]
        features = sf.Features(block, [np.zeros((len(block), 1, 1, 1), np.float16)])
        writer.append(names, features, names, sources=[f"nowhere/{name}" for name in names])
        start += len(block)


def timings(ways: dict[str, Search], queries: np.ndarray, singles: int, batch: int) -> dict[str, dict[str, Any]]:
    """Time queries one at a time and as a batch; the ways take turns, so that a slow spell meets all.

    A way that takes more than a second a query gets 20 of them, more than 10 seconds three.
    """
    queries = np.random.default_rng(2).permutation(queries)
    left: dict[str, list[np.ndarray]] = {}
    for name, way in ways.items():
        way(queries[:1])  # what is loaded or started at the first call
        first = timed(lambda way=way: way(queries[1:2]))
        count = singles if first < 1 else 20 if first < 10 else 3
        left[name] = [queries[at % len(queries)][None] for at in range(count)]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    while any(left.values()):
        for name, way in ways.items():
            now, left[name] = left[name][:TURN], left[name][TURN:]
            seconds[name] += [timed(lambda way=way, query=query: way(query)) for query in now]
    many = np.concatenate([queries] * (batch // len(queries) + 1))[:batch]
    batches: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(3):
        for name, way in ways.items():
            if turn == 0 or batches[name][0] < 30:
                batches[name].append(timed(lambda way=way: way(many)))
    return {
        name: {
            "singles": len(seconds[name]),
            "p50_ms": figure(1000 * np.percentile(seconds[name], 50)),
            "p99_ms": figure(1000 * np.percentile(seconds[name], 99)),
            "batch": batch,
            "batch_ms_a_query": figure(1000 * statistics.median(batches[name]) / batch),
        }
        for name in ways
    }


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def figure(value: float) -> float:
    """Round to four figures."""
    return float(f"{float(value):.4g}")


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the (m, k) true neighbours that were found."""
    hits = [len(np.intersect1d(mine, true)) for mine, true in zip(found, truth, strict=True)]
    return round(sum(hits) / truth.size, 5)


def peak_mib() -> int:
    """Return the most memory that this process ever had; getrusage would count its parent's at the start as well."""
    status = Path("/proc/self/status").read_text()
    return round(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024)  # type: ignore[index]


def mib_since(before: float) -> int:
    return round(resident_mib() - before)


def drop_pages(folder: Path) -> None:
    """Tell the system to drop the pages of a folder's files from its cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
