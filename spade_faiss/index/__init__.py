"""The FAISS index that finds the nearest images."""

from .image_index import ImageIndex
from .metadata import IndexFacts

__all__ = ["ImageIndex", "IndexFacts"]
