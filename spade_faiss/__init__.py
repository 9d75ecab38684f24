"""spade-faiss: SPADE anomaly detection whose cost hardly depends on how many normal images there are.

From an image to its anomaly map: images -> features -> gallery (shards, image_index) -> patch_search -> scoring, put
together in detector.

Letters for shapes, here and throughout: B images of a batch, N normal images, K neighbours, L levels, (h, w) grid of a
level, c channels, d dimensions of an image feature, (H, W) pixels of an image. Every distance is squared L2.
"""

from .audit import Suspect, find_suspects
from .calibration import Calibration, Judgement, Region, calibrate
from .detection import Detection, Neighbours
from .detector import Detector
from .errors import (
    CorruptGalleryError,
    DeviceError,
    FeatureError,
    GalleryError,
    GalleryLockedError,
    GalleryNotFoundError,
    ImageError,
    KeyConflictError,
    NotEnoughImagesError,
    OptionError,
    SourceError,
    SpadeError,
    SpecMismatchError,
    WeightsError,
    WorkerError,
)
from .features import Extractor, ExtractorSpec, Features, load_extractor
from .gallery import Gallery
from .ingest import IngestReport, Skipped
from .options import FeatureOptions, IndexOptions, ScoreOptions, SearchOptions
from .patch_search import search_patches
from .recipes import RECIPES, Recipe
from .verification import Problem

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "Calibration",
    "CorruptGalleryError",
    "Detection",
    "Detector",
    "DeviceError",
    "Extractor",
    "ExtractorSpec",
    "FeatureError",
    "FeatureOptions",
    "Features",
    "Gallery",
    "GalleryError",
    "GalleryLockedError",
    "GalleryNotFoundError",
    "ImageError",
    "IndexOptions",
    "IngestReport",
    "Judgement",
    "KeyConflictError",
    "Neighbours",
    "NotEnoughImagesError",
    "OptionError",
    "Problem",
    "Recipe",
    "Region",
    "ScoreOptions",
    "SearchOptions",
    "Skipped",
    "SourceError",
    "SpadeError",
    "SpecMismatchError",
    "Suspect",
    "WeightsError",
    "WorkerError",
    "calibrate",
    "find_suspects",
    "load_extractor",
    "search_patches",
]
