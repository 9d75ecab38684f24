"""Files on disk to pixels, and pixels to the view that a network gets.

In the order of the data: `sources` lists image files and their keys, `decode` reads them, `view` resizes and crops.
"""

from .sources import ImageFile, find_images
from .view import View

__all__ = ["ImageFile", "View", "find_images"]
