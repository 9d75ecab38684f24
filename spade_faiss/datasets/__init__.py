"""Labelled sets by their layout: images to train with, samples to test with, masks."""

from .category import Category, Sample
from .folders import from_folders
from .layouts import open_dataset

__all__ = ["Category", "Sample", "from_folders", "open_dataset"]
