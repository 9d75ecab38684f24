"""The pyramid levels of neighbours: read from shards or re-extracted from image files, and cached."""

from .cache import LevelCache, PyramidCache
from .reader import PyramidSource, StoredPyramids
from .recomputed import RecomputedPyramids, pyramids_of

__all__ = ["LevelCache", "PyramidCache", "PyramidSource", "RecomputedPyramids", "StoredPyramids", "pyramids_of"]
