"""Reading a file that may turn out to be a named pipe, which would block for ever."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import ImageError

NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # opens a pipe at once; Windows has neither


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        ImageError: it is a pipe, a socket or a device, or larger than the memory that is free.
        OSError: it cannot be read.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ImageError(f"{path}: expected an image file, found a pipe, a socket or a device")
        try:
            return file.read()
        except MemoryError as error:
            raise ImageError(f"{path}: too large to read in the memory that is free: {found.st_size} bytes") from error
