"""A query from image to detection: retrieve, match, score, judge."""

from .audit import Suspect, find_suspects
from .calibration import Calibration, Judgement
from .detection import Detection, Neighbours
from .detector import Detector
from .query_files import query_files
from .regions import Region

__all__ = [
    "Calibration",
    "Detection",
    "Detector",
    "Judgement",
    "Neighbours",
    "Region",
    "Suspect",
    "find_suspects",
    "query_files",
]
