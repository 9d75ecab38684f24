"""An extractor that is loaded at its first image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from ..arrays import Pixels
from .features import Features
from .registry import Extractor
from .spec import ExtractorSpec


class LateExtractor:
    """See registry.Extractor. Whoever compares only what is stored does not wait seconds for a network."""

    def __init__(self, spec: ExtractorSpec, batch_size: int, load: Callable[[], Extractor]) -> None:
        """Keep what is known before.

        Args:
            spec: of the extractor.
            batch_size: of the extractor.
            load: returns the extractor; called once, and raises what is wrong with it.
        """
        self.spec = spec
        self.batch_size = batch_size
        self._load = load

    @cached_property
    def _extractor(self) -> Extractor:
        return self._load()

    def extract(self, views: Sequence[Pixels]) -> Features:
        """Extract the features of n images; see registry.Extractor."""
        return self._extractor.extract(views)
