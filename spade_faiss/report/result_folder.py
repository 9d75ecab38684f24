"""A query over files and folders: results.jsonl, maps, matches, overlays and a report, written as they come."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from ..arrays import Pixels
from ..detect.detection import Detection
from ..detect.explanation import match_arrays
from ..images.sources import ImageFile
from ..ingest.pipeline import Skipped
from ..system.atomic_files import output_errors
from .colour_scale import Scale
from .drawing import encode, outline, overlay, stroke
from .report import Report


def as_json(source: ImageFile, detection: Detection) -> dict[str, Any]:
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


class ResultFolder:
    """The folder that a query writes; a context manager.

    results.jsonl has a line an image, scale.json the range of the colours, skipped.jsonl what could not be read. For
    each image there are maps/<key>.npy, matches/<key>.npz (see explanation.match_arrays) and overlays/<key>.png.
    """

    def __init__(self, folder: Path, scale: Scale, report: Report | None = None) -> None:
        """Make the folder.

        Args:
            folder: to write to.
            scale: colours of the overlays.
            report: takes every image as well, and is closed with the folder.

        Raises:
            OutputError: it cannot be written.
        """
        self.folder = folder
        self._scale = scale
        self._report = report
        with output_errors(f"cannot write {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "scale.json").write_text(json.dumps(asdict(scale)) + "\n")
            self._results: TextIO = (folder / "results.jsonl").open("w", encoding="utf-8")

    def __enter__(self) -> ResultFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._results.close()

    def write(
        self,
        source: ImageFile,
        pixels: Pixels,
        detection: Detection,
        mask: NDArray[np.bool_] | None = None,
        label: str | None = None,
    ) -> None:
        """Write one image's files, then its line: a line is there only when its files are.

        Args:
            source: the image's file and key.
            pixels: (H, W, 3) uint8.
            detection: what was found in it.
            mask: (H, W) ground truth for the report, if there is one.
            label: the image's kind for the report, where it is known.
        """
        key, shown = source.key, overlay(pixels, detection.anomaly_map, self._scale)
        if detection.regions:
            shown = outline(shown, detection.region_mask, stroke(shown))
        with output_errors(f"cannot write results to {self.folder}"):
            _write(self.folder / "maps" / f"{key}.npy", _npy(detection.anomaly_map))
            _write(self.folder / "matches" / f"{key}.npz", _npz(match_arrays(detection)))
            _write(self.folder / "overlays" / f"{key}.png", encode(shown))
            self._results.write(json.dumps(as_json(source, detection), ensure_ascii=False) + "\n")
            self._results.flush()
        if self._report:
            self._report.add(key, pixels, detection, mask, label)

    def close(self, skipped: Sequence[Skipped]) -> None:
        """Finish, and name the images that were skipped."""
        with output_errors(f"cannot write results to {self.folder}"):
            self._results.close()
        write_skipped(self.folder / "skipped.jsonl", skipped)
        if self._report:
            few = "1 image was" if len(skipped) == 1 else f"{len(skipped)} images were"
            self._report.close(notes=[f"{few} skipped; skipped.jsonl says which, and why."] if skipped else [])


def write_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    """Write a line for each image that was skipped; no file where there is none."""
    lines = [json.dumps({"path": str(item.path), "reason": item.reason}, ensure_ascii=False) for item in skipped]
    with output_errors(f"cannot write {path}"):
        if lines:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        else:
            path.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _npz(arrays: dict[str, np.ndarray[Any, Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type] # takes an array named allow_pickle for the option
    return buffer.getvalue()
