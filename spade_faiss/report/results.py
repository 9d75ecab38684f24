"""A result folder, read back: what a query found in each image."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..detect.regions import Labels, Region, find_regions
from ..errors import ResultsError
from .colour_scale import Scale
from .output_files import PARTS, RESULTS, RUN, SCALE
from .run_record import FORMAT, FORMAT_VERSION, RunRecord

AGAIN = "run `query` again"
NUMBER = (int, float)
BOX = ("left", "top", "right", "bottom")


@dataclass(frozen=True)
class Result:
    """What was found in one image."""

    folder: Path
    line: dict[str, Any]  # of results.jsonl
    run: RunRecord

    @property
    def key(self) -> str:
        """The image's key."""
        return str(self.line["key"])

    @property
    def path(self) -> Path:
        """The image's file, where it was when it was queried."""
        return Path(self.run.directory or "", self.line["path"])

    @property
    def regions(self) -> list[Region]:
        """What is above the pixel threshold, highest peak first; none in a normal image."""
        return [
            Region((left, top, right, bottom), one["area"], one["peak"])
            for one in self.line.get("regions", [])
            for left, top, right, bottom in [one["box"]]
        ]

    def anomaly_map(self) -> NDArray[np.float32]:
        """Read the image's (H, W) map.

        Raises:
            ResultsError: it is gone, or no map.
        """
        path = self.folder / self.line["map"]
        try:
            scores = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ResultsError(f"{path}: expected the map of {self.key}, found none ({error}); {AGAIN}") from error
        if not isinstance(scores, np.ndarray) or scores.ndim != 2 or scores.dtype != np.float32 or not scores.size:
            raise ResultsError(f"{path}: expected an (H, W) map of float32, found another array; {AGAIN}")
        return scores

    def labels(self, scores: NDArray[np.float32] | None = None) -> Labels:
        """Return the (H, W) numbers of the regions; see detect.regions.Labels.

        Args:
            scores: the image's map; None: read it.

        Raises:
            ResultsError: no map, or one that does not have the regions of results.jsonl.
        """
        scores = self.anomaly_map() if scores is None else scores
        if not self.regions or self.run.thresholds is None:
            return np.zeros(scores.shape, np.uint8)
        found, labels = find_regions(scores, self.run.thresholds["pixel"], self.run.min_region)
        if found != self.regions:
            raise ResultsError(
                f"{self.folder / self.line['map']}: expected a map with the regions of {self.key} in {RESULTS}, "
                f"{len(self.regions)} of them, found {len(found)} or others: one of both was changed; {AGAIN}"
            )
        return labels


@dataclass(frozen=True)
class Results:
    """The results of a query that has ended, image by image. A sequence as far as len and iteration go."""

    folder: Path
    run: RunRecord
    scale: Scale

    @classmethod
    def open(cls, folder: str | Path) -> Results:
        """Open what `query --output` wrote.

        Raises:
            ResultsError: the folder is no result folder, was written by another release, or its run has not ended.

        >>> Results.open("results").run.thresholds["image"] > 0  # doctest: +SKIP
        True
        """
        folder = Path(folder)
        if not (folder / RESULTS).is_file():
            raise ResultsError(
                f"{folder}: expected a folder that `query --output` wrote, with a {RESULTS}, found none; "
                "give the folder of --output"
            )
        values = _json(folder / RUN)
        if (values.get("format"), version := values.get("format_version")) != (FORMAT, FORMAT_VERSION):
            raise ResultsError(
                f"{folder / RUN}: expected {FORMAT!r} of version {FORMAT_VERSION}, found "
                f"{values.get('format')!r} of version {version}; {AGAIN} with this release"
            )
        try:
            run = _record(values)
        except (KeyError, TypeError) as error:
            raise ResultsError(f"{folder / RUN}: not as it is written: {error!r}; {AGAIN}") from error
        scale_values = _json(folder / SCALE)
        try:
            _require(scale_values, {"low": NUMBER, "high": NUMBER})
            scale = Scale(**scale_values)
        except (KeyError, TypeError) as error:
            raise ResultsError(f"{folder / SCALE}: not as it is written: {error!r}; {AGAIN}") from error
        if run.images is None:
            raise ResultsError(
                f"{folder}: expected the results of a run that has ended, found an unfinished one; {AGAIN}"
            )
        return cls(folder, run, scale)

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Result]:
        return (Result(self.folder, line, self.run) for line in self._lines)

    @cached_property
    def _lines(self) -> list[dict[str, Any]]:
        """The lines of results.jsonl.

        Raises:
            ResultsError: a line is damaged, a key is there twice, or lines are missing.
        """
        path, keys, found = self.folder / RESULTS, set[str](), []
        for number, text in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                line = json.loads(text)
                _require_line(line)
                key, named = line["key"], PurePosixPath(line["map"])
                inside = named.parts[0] == PARTS["map"][0] and ".." not in named.parts and str(named) == line["map"]
            except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
                raise ResultsError(f"{path}:{number}: expected a result as JSON, found {error!r}; {AGAIN}") from error
            if not inside:
                raise ResultsError(
                    f"{path}:{number}: expected a map in {PARTS['map'][0]}/, found {line['map']!r}; {AGAIN}"
                )
            if key in keys:
                raise ResultsError(f"{path}:{number}: expected a line for each image, found {key!r} twice; {AGAIN}")
            keys.add(key)
            found.append(line)
        if len(found) != self.run.images:
            raise ResultsError(f"{path}: expected {self.run.images} lines, found {len(found)}; {AGAIN}")
        return found


def _record(values: dict[str, Any]) -> RunRecord:
    """Return the record of a run.json.

    Raises:
        KeyError, TypeError: a value is missing, or of another type.
    """
    _require(values, {"gallery": str, "generation": int, "min_region": int})
    _require(values, {"images": (int, type(None)), "thresholds": (dict, type(None))})
    if values["thresholds"] is not None:
        _require(values["thresholds"], {"image": NUMBER, "pixel": NUMBER, "false_alarms": NUMBER})
    values = {"directory": None, **values}  # which earlier releases did not name
    _require(values, {"directory": (str, type(None))})
    return RunRecord(**{one.name: values[one.name] for one in fields(RunRecord)})


def _require_line(line: Any) -> None:
    """Check what is read of a line of results.jsonl.

    Raises:
        KeyError, TypeError, ValueError: a value is missing, or of another type.
    """
    _require(line, {"path": str, "key": str, "map": str, "image_score": NUMBER})
    for one in line.get("neighbours", []):
        _require(one, {"key": str})
    for one in line.get("regions", []):
        _require(one, {"box": list, "area": int, "peak": NUMBER})
        _require(dict(zip(BOX, one["box"], strict=True)), dict.fromkeys(BOX, int))


def _require(values: Any, kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    for name, kind in kinds.items():
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise TypeError(f"{name}: {values[name]!r}"[:80])


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ResultsError(
            f"{path.parent}: expected a {path.name}, found none: an earlier release wrote these results; {AGAIN}"
        ) from error
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read: {error}; {AGAIN}") from error
    if not isinstance(values, dict):
        raise ResultsError(f"{path}: expected a JSON object, found {type(values).__name__}; {AGAIN}")
    return values
