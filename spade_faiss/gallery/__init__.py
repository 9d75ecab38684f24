"""The public object over a store: fill, search, read, verify, repair."""

from .gallery import Gallery
from .repair import Repair
from .verify import Problem

__all__ = ["Gallery", "Problem", "Repair"]
