"""Image features to the nearest images, by FAISS."""

from .image_index import ImageIndex
from .metadata import IndexFacts

__all__ = ["ImageIndex", "IndexFacts"]
