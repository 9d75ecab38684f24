"""Regions as the files of label tools: COCO, Label Studio, CVAT, masks."""

from .export import export
from .outlines import joined, outlines
from .regions import LabelledImage

__all__ = ["LabelledImage", "export", "joined", "outlines"]
