"""How a region is written: as the mask that it is, or as a polygon that a person can drag."""

from __future__ import annotations

from typing import Literal

Shapes = Literal["masks", "polygons"]
