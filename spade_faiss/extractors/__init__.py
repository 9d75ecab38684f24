"""Pixels to features: image features and pyramid levels, by a network or by hand."""

from .features import Features
from .registry import Extractor, load_extractor
from .spec import ExtractorSpec

__all__ = ["Extractor", "ExtractorSpec", "Features", "load_extractor"]
