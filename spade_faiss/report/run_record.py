"""What a result folder says of its run: the gallery, the thresholds, and whether it was finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .._version import __version__
from ..detect.detector import Detector
from ..object_store.address import is_address
from ..system.atomic_files import write_whole
from .output_files import RUN

FORMAT, FORMAT_VERSION = "spade-faiss results", 1


@dataclass(frozen=True)
class RunRecord:
    """What the results of a run were found by."""

    gallery: str  # its path
    generation: int  # of the gallery
    thresholds: Mapping[str, float] | None  # "image", "pixel" and "false_alarms"; None: nothing was judged
    min_region: int = 1  # px; smaller regions do not count
    images: int | None = None  # lines of results.jsonl; None: the run has not ended
    directory: str | None = None  # that relative paths of images start from; None: an earlier release did not say

    @classmethod
    def of(cls, detector: Detector) -> RunRecord:
        """Begin the record of a run of a detector."""
        found = detector.calibration
        thresholds = None
        if found:
            thresholds = {
                "image": found.image_threshold,
                "pixel": found.pixel_threshold,
                "false_alarms": found.false_alarms,
            }
        gallery = detector.gallery
        path = gallery.path if is_address(gallery.path) else gallery.path.resolve()
        return cls(str(path), gallery.generation, thresholds, detector.score.min_region, directory=str(Path.cwd()))

    def finished(self, images: int) -> RunRecord:
        """Return it with the number of images, which ends it."""
        return replace(self, images=images)

    def write(self, folder: Path) -> None:
        """Write run.json into a result folder.

        Raises:
            OSError: it cannot be written.
        """
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, "created_by": __version__, **asdict(self)}
        write_whole(folder / RUN, (json.dumps(values) + "\n").encode())
