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
from ..errors import OutputError
from ..images.sources import ImageFile
from ..ingest.pipeline import Skipped
from ..system.atomic_files import output_errors
from .colour_scale import Scale
from .drawing import encode, outline, overlay, stroke
from .output_files import (
    ONE_IMAGE,
    RESULTS,
    SCALE,
    SKIPPED,
    OutputNames,
    clear_earlier_evaluation,
    clear_earlier_run,
    concerns_one_image,
    json_line,
    refuse_foreign,
    write_files,
)
from .report import Report
from .run_record import RunRecord


def as_json(source: ImageFile, detection: Detection) -> dict[str, Any]:
    """Return a detection as a line of results.jsonl."""
    neighbours = detection.neighbours
    return {
        "path": str(source.path),
        "key": source.key,
        "image_score": detection.image_score,
        "map_max": detection.map_max,
        "region": detection.region,
        **({"tiles": len(detection.tiles)} if detection.tiles else {}),
        "neighbours": [
            {"key": key, "sq_distance": float(sq_distance)}
            for key, sq_distance in zip(neighbours.keys, neighbours.sq_distances, strict=True)
        ],
        **({"left_out": [neighbours.keys[at] for at in detection.left_out]} if detection.left_out else {}),
        **_judged(detection),
        **({"missing": list(detection.missing)} if detection.missing else {}),
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

    results.jsonl has a line an image, scale.json the range of the colours, run.json what the run went by and whether
    it has ended, skipped.jsonl what could not be read. For each image there are maps/<key>.npy, matches/<key>.npz (see
    explanation.match_arrays) and overlays/<key>.png; a name that the file system does not take is shortened, and each
    line says where its files are.

    What the results.jsonl of an earlier run names is deleted first. Nothing else in the folder is.
    """

    def __init__(self, folder: Path, scale: Scale, report: Report | None = None, run: RunRecord | None = None) -> None:
        """Make the folder.

        Args:
            folder: to write to.
            scale: colours of the overlays.
            report: takes every image as well, and is closed with the folder.
            run: what the results are found by; None: the folder does not say it, and cannot be exported.

        Raises:
            OutputError: it cannot be written, or is a gallery or a folder of images.
        """
        self.folder = folder
        self._scale = scale
        self._report = report
        self._run = run
        self._images = 0
        self._names = OutputNames(folder)
        refuse_foreign(folder)
        clear_earlier_run(folder)
        clear_earlier_evaluation(folder)  # whose page would be of other images
        with output_errors(f"cannot write {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SCALE).write_text(json.dumps(asdict(scale)) + "\n")
            if run:
                run.write(folder)
            self._results: TextIO = (folder / RESULTS).open("w", encoding="utf-8")

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
        contents = {
            "map": npy(detection.anomaly_map),
            "matches": _npz(match_arrays(detection)),
            "overlay": encode(shown),
        }
        with output_errors(f"cannot write the results of {key} to {self.folder}"):
            paths = self._write_files(key, contents)
            self._results.write(json_line({**as_json(source, detection), **paths}))
            self._results.flush()
        self._images += 1
        if self._report:
            self._report.add(key, pixels, detection, mask, label)

    def write_or_skip(
        self, source: ImageFile, pixels: Pixels, detection: Detection, strict: bool = False
    ) -> list[Skipped]:
        """Write one image's files as write does; returns it as skipped if its name, or its place, does not allow that.

        Raises:
            OutputError: nothing can be written, as on a full disk; with `strict`, any error.
        """
        try:
            self.write(source, pixels, detection)
        except OutputError as error:
            if strict or not concerns_one_image(error):
                raise
            if self._report:
                self._report.add(source.key, pixels, detection)
            return [Skipped(source.path, str(error))]
        return []

    def _write_files(self, key: str, contents: dict[str, bytes]) -> dict[str, str]:
        """Write an image's files under the first name that the file system takes; returns their relative paths."""
        choices = list(self._names.choices(key))
        for paths in choices:
            try:
                write_files(self.folder, paths, contents)
            except OSError as error:
                if error.errno not in ONE_IMAGE or paths is choices[-1]:
                    raise
            else:
                return paths
        raise AssertionError("there is always a choice")

    def close(self, skipped: Sequence[Skipped]) -> None:
        """Finish, and name the images that were skipped."""
        with output_errors(f"cannot write results to {self.folder}"):
            self._results.close()
            if self._run:
                self._run.finished(self._images).write(self.folder)
        write_skipped(self.folder / SKIPPED, skipped)
        if self._report:
            few = "1 image was" if len(skipped) == 1 else f"{len(skipped)} images were"
            self._report.close(notes=[f"{few} skipped; skipped.jsonl says which, and why."] if skipped else [])


def write_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    """Write a line for each image that was skipped; no file where there is none."""
    lines = [json_line({"path": str(item.path), "reason": item.reason}) for item in skipped]
    with output_errors(f"cannot write {path}"):
        if lines:
            path.write_text("".join(lines), encoding="utf-8")
        else:
            path.unlink(missing_ok=True)


def npy(array: np.ndarray[Any, Any]) -> bytes:
    """Return an array as an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _npz(arrays: dict[str, np.ndarray[Any, Any]]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type] # takes an array named allow_pickle for the option
    return buffer.getvalue()
