"""Labelled sets by their layout: images to train with, samples to test with, masks; draws from them."""

from .category import Category, Sample
from .draws import Draws, draw
from .folders import from_folders
from .layouts import open_dataset

__all__ = ["Category", "Draws", "Sample", "draw", "from_folders", "open_dataset"]
