"""Imported, it makes flushing to disk do nothing: that costs more than all else here.

A killed process loses nothing that it has written, flushed or not. Tests that cut the power see what is flushed by a
patch of their own.
"""

from __future__ import annotations

import os

os.fsync = lambda fd: None
