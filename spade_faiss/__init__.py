"""spade-faiss: SPADE anomaly detection whose cost hardly depends on how many normal images there are.

From an image to its verdict: images -> extractors -> gallery (of store and index) -> patch_search -> scoring, put
together in detect.

Letters for shapes, here and throughout: B images of a batch, N normal images, K neighbours, L levels, (h, w) grid of a
level, c channels, d dimensions of an image feature, (H, W) pixels of an image. Distances are squared L2, unless an
option says cosine.
"""

from .system import interrupts as interrupts  # isort: skip # before what takes long to import
from .system import faiss_guard as faiss_guard  # isort: skip

from ._version import __version__ as __version__
from .cluster.cluster import Cluster
from .cluster.federation import Federation
from .cluster.membership import MemberOptions
from .detect.audit import Suspect, find_suspects
from .detect.calibrate import calibrate
from .detect.calibration import Calibration, Judgement
from .detect.detection import Detection, Neighbours
from .detect.detector import Detector
from .detect.regions import Region
from .errors import (
    CorruptGalleryError,
    DeviceError,
    FeatureError,
    GalleryError,
    GalleryLockedError,
    GalleryNotFoundError,
    ImageError,
    KeyConflictError,
    MemberError,
    NotEnoughImagesError,
    OptionError,
    OutputError,
    ResultsError,
    SourceError,
    SpadeError,
    SpecMismatchError,
    WeightsError,
    WorkerError,
)
from .extractors.features import Features
from .extractors.registry import Extractor, load_extractor
from .extractors.spec import ExtractorSpec
from .gallery.gallery import Gallery
from .gallery.verify import Problem
from .ingest.pipeline import IngestReport, Skipped
from .object_store.pull import Pulled, pull
from .object_store.push import Pushed, push
from .options import FeatureOptions, IndexOptions, ScoreOptions, SearchOptions
from .patch_search.search import search_levels, search_patches
from .recipes import RECIPES, Recipe

__all__ = [
    "RECIPES",
    "Calibration",
    "Cluster",
    "CorruptGalleryError",
    "Detection",
    "Detector",
    "DeviceError",
    "Extractor",
    "ExtractorSpec",
    "FeatureError",
    "FeatureOptions",
    "Features",
    "Federation",
    "Gallery",
    "GalleryError",
    "GalleryLockedError",
    "GalleryNotFoundError",
    "ImageError",
    "IndexOptions",
    "IngestReport",
    "Judgement",
    "KeyConflictError",
    "MemberError",
    "MemberOptions",
    "Neighbours",
    "NotEnoughImagesError",
    "OptionError",
    "OutputError",
    "Problem",
    "Pulled",
    "Pushed",
    "Recipe",
    "Region",
    "ResultsError",
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
    "pull",
    "push",
    "search_levels",
    "search_patches",
]
