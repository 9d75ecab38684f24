"""Imported last by the process that others are forked from, so that they need not each do it again.

What has been imported is frozen: a child that looked through all of it for garbage would take 0.2 s, and copy it.
"""

from __future__ import annotations

import gc

from PIL import Image

Image.init()  # imports Pillow's formats
gc.collect()
gc.freeze()
