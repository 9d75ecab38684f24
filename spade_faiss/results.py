"""A query over files and folders: results.jsonl, anomaly maps and overlays, written as they come."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from .detection import Detection
from .detector import Detector
from .errors import ImageError
from .images import Pixels, Source, batched, decode, find_images, read_ahead
from .ingest import Skipped
from .storage import storage_errors
from .visual import Scale, overlay

SCALE_IMAGES = 8  # normal images from which the colour scale of overlays is taken


def as_json(source: Source, detection: Detection) -> dict[str, Any]:
    """Return a detection as a line of results.jsonl."""
    neighbours = detection.neighbours
    return {
        "path": str(source.path),
        "key": source.key,
        "image_score": detection.image_score,
        "map_max": detection.map_max,
        "region": detection.region,
        "neighbours": [
            {"key": key, "sq_distance": float(sq_distance)}
            for key, sq_distance in zip(neighbours.keys, neighbours.sq_distances, strict=True)
        ],
        **_judged(detection),
        "seconds": {stage: round(seconds, 6) for stage, seconds in detection.seconds.items()},
    }


def _judged(detection: Detection) -> dict[str, Any]:
    found = detection.judgement
    if found is None:
        return {"verdict": None}
    regions = [asdict(region) for region in found.regions]
    return {"verdict": found.verdict, "p_value": found.p_value, "score": found.score, "regions": regions}


@dataclass(frozen=True)
class _Read:
    """An image as the readers hand it on, or why there is none."""

    source: Source
    pixels: Pixels | None
    seconds: float
    error: str = ""


def query_sources(
    detector: Detector,
    paths: Sequence[str | Path],
    skipped: list[Skipped],
    strict: bool = False,
    progress: bool = False,
) -> Iterator[tuple[Source, Pixels, Detection]]:
    """Query every image of files and folders, in order, reading ahead.

    Args:
        detector: what to query.
        paths: files and folders.
        skipped: receives the images that cannot be read.
        strict: raise at the first such image instead.
        progress: a bar on stderr, where that is a terminal.

    Raises:
        ImageError: a source without images; with strict, the first image that cannot be read.
    """
    sources = find_images(paths)

    def read(source: Source) -> _Read:
        start = time.perf_counter()
        try:
            return _Read(source, decode(source.path), time.perf_counter() - start)
        except ImageError as error:
            if strict:
                raise
            return _Read(source, None, 0.0, str(error))

    batch_size = detector.extractor.batch_size
    reads = read_ahead(sources, read, min(8, os.cpu_count() or 1), 2 * batch_size)
    with tqdm(total=len(sources), unit="image", disable=None if progress else True, desc="query") as bar:
        for batch in batched(reads, batch_size):
            skipped += [Skipped(image.source.path, image.error) for image in batch if image.pixels is None]
            bar.update(sum(image.pixels is None for image in batch))
            good = [image for image in batch if image.pixels is not None]
            # A map is handed on, and can be let go, before the next is made.
            for image, detection in zip(good, detector.stream(image.pixels for image in good), strict=True):  # type: ignore[misc]
                detection.seconds["decode"] = image.seconds
                yield image.source, image.pixels, detection  # type: ignore[misc]
                bar.update()


class ResultFolder:
    """The folder that a query writes: results.jsonl, maps/<key>.npy, overlays/<key>.png, skipped.jsonl."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        """Make the folder.

        Raises:
            GalleryError: it cannot be written.
        """
        self.folder = folder
        self._scale = scale
        with storage_errors(f"cannot write {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "scale.json").write_text(json.dumps(asdict(scale)) + "\n")
            self._results: TextIO = (folder / "results.jsonl").open("w", encoding="utf-8")

    def write(self, source: Source, pixels: Pixels, detection: Detection) -> None:
        """Write one image's map and overlay, then its line: a line is there only when its files are."""
        with storage_errors(f"cannot write results to {self.folder}"):
            _write(self.folder / "maps" / f"{source.key}.npy", _npy(detection.anomaly_map))
            _write(
                self.folder / "overlays" / f"{source.key}.png",
                _png(overlay(pixels, detection.anomaly_map, self._scale)),
            )
            self._results.write(json.dumps(as_json(source, detection), ensure_ascii=False) + "\n")
            self._results.flush()

    def close(self, skipped: Sequence[Skipped]) -> None:
        """Finish, and name the images that were skipped."""
        with storage_errors(f"cannot write results to {self.folder}"):
            self._results.close()
        write_skipped(self.folder / "skipped.jsonl", skipped)


def write_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    """Write a line for each image that was skipped; no file where there is none."""
    lines = [json.dumps({"path": str(item.path), "reason": item.reason}, ensure_ascii=False) for item in skipped]
    with storage_errors(f"cannot write {path}"):
        if lines:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            path.unlink(missing_ok=True)


def colour_scale(detector: Detector) -> Scale:
    """Take the colour scale of overlays from a few normal images, each compared with the others."""
    ids = list(detector.gallery.snapshot().id_of.values())
    if len(ids) < 2:
        return Scale(0.0, 1.0)
    chosen = np.random.default_rng(0).choice(ids, min(SCALE_IMAGES, len(ids)), replace=False)
    return Scale.from_normal([found.anomaly_map for found in detector.leave_one_out([int(row) for row in chosen])])


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
