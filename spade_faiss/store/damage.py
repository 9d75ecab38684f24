"""Errors for a shard that is not what was written: each says what mends the gallery."""

from __future__ import annotations

import errno
from pathlib import Path

from ..errors import CorruptGalleryError

# Of the system, about this process and not about the file: nothing is to be repaired.
NOT_OF_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EINTR)


def damaged(path: Path, what: str, cause: Exception | None = None) -> CorruptGalleryError:
    """Return the error for a damaged shard.

    Args:
        path: of the shard: GALLERY/shards/NAME, or its address in an object store.
        what: is wrong with it.
        cause: what reading it raised; the advice is left out where that says nothing of the file.
    """
    if getattr(cause, "errno", None) in NOT_OF_THE_FILE:
        return CorruptGalleryError(f"{path}: {what}")
    folder = path.parent.parent
    advice = f"mend {folder} with Gallery.repair"
    if "://" in str(folder):  # which is read only
        advice = "mend the folder that was pushed with Gallery.repair, and push it again"
    return CorruptGalleryError(f"{path}: {what}; {advice}")
