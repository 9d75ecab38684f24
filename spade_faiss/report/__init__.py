"""Results for people and programs: overlays, result folders, one HTML page."""

from .colour_scale import Scale
from .report import Report
from .result_folder import ResultFolder
from .results import Results

__all__ = ["Report", "ResultFolder", "Results", "Scale"]
