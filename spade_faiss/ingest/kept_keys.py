"""Whether images that a gallery holds come again under other keys, as they do from other sources."""

from __future__ import annotations

from ..errors import ImageError
from ..images.decode import read_file
from ..images.sources import Listing
from ..store.snapshot import Snapshot
from ..store.source_images import content_digest

FOLDERS, DEPTH = 8, 4  # how many folders are compared, by keys of up to so many more parts


def require_kept_keys(snapshot: Snapshot, files: Listing) -> None:
    """Refuse keys from a common folder where the gallery has these images by the keys of their own sources.

    Raises:
        ImageError: an image would be taken a second time, under another key.
    """
    if files.plain_keys is None or not len(snapshot):
        return
    there, plain = snapshot.find_all([file.key for file in files]), snapshot.find_all(files.plain_keys)
    for file, plain_key, new, old in zip(files, files.plain_keys, there, plain, strict=True):
        if new is None and old is not None:
            raise ImageError(
                f"{snapshot.folder}: it has the image {plain_key!r}, which would be {file.key!r} now, because several "
                f"sources hold files of one name ({file.path}); add the sources one by one, or rename those files"
            )


def renamed(snapshot: Snapshot, files: Listing) -> list[str]:
    """Return a note if the gallery has the first image of a folder by a key from a folder above or below.

    Keys depend on the source: the same image from another source has another one.
    """
    firsts = {file.path.parent: file for file in reversed(files)}
    for file in list(firsts.values())[:FOLDERS]:
        parts, depth = file.path.absolute().parts, file.key.count("/") + 1
        keys = ["/".join(parts[-n:]) for n in range(depth + 1, min(depth + DEPTH, len(parts)))]
        keys += file.key.split("/", 1)[1:]
        ids = [row_id for row_id in snapshot.find_all(keys) if row_id is not None]
        if not ids or snapshot.find(file.key) is not None:
            continue
        try:
            digest = content_digest(read_file(file.path))
        except ImageError:  # which is reported when its turn comes
            continue
        for key, kept in zip(snapshot.keys(ids), snapshot.digests(ids), strict=True):
            if kept == digest:
                return [
                    f"{file.path} is in {snapshot.folder} as {key!r}, and would be {file.key!r} now: keys are paths "
                    "from the source; give the sources that the gallery was built from"
                ]
    return []
