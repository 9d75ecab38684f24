"""Files on disk to pixels, and pixels to the view that a network gets."""

from .sources import ImageFile, find_images
from .view import View

__all__ = ["ImageFile", "View", "find_images"]
