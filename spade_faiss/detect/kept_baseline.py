"""Baselines in the user's cache folder: commands measure that of a gallery that is not calibrated once for each commit.

A file each, which is whole or absent, sealed, and named after all that a baseline depends on: of another commit, of
other settings or by another release there is none. Whoever deletes one has it measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..arrays import Ids
from ..errors import CorruptGalleryError, OutputError
from ..store.manifest import Manifest
from ..store.snapshot import TEXTS_TOGETHER, Snapshot
from ..system.prefetch import batched
from ..system.sealed_json import read_sealed, sealed
from ..system.user_cache import cache_folder, drop_the_oldest, file_to_keep
from .baseline import Baseline

VERSION = 2  # of these files, and of how a baseline is measured; another number makes all of them again
MOST = 200  # files that are kept: those that were written last
LARGEST = 2**24  # bytes of one: a baseline has some figures for each position, and a line for each image compared


def identity_of(
    manifest: Manifest,
    folder: Path | str,
    images: Mapping[str, Any],
    settings: Mapping[str, Any],
    k: int,
    trusted: Mapping[str, str],
) -> dict[str, Any]:
    """Return what a baseline depends on, as JSON values.

    Args:
        manifest: of the gallery.
        folder: of the gallery.
        images: see images_of.
        settings: see Detector.settings.
        k: number of neighbours: of the settings, or the recipe's.
        trusted: digests by key, see Gallery.trust.
    """
    return {
        "version": VERSION,
        "release": __version__,
        "folder": str(folder) if "://" in str(folder) else os.path.realpath(folder),
        "generation": manifest.generation,
        **images,
        "spec": manifest.spec.to_json(),
        "settings": dict(settings),
        "k": k,
        "trusted": _digest(sorted(trusted.items())),
    }


def images_of(snapshot: Snapshot, manifest: Manifest, ids: Ids, start: int = 0) -> dict[str, Any]:
    """Return what says which images a gallery has, as JSON values.

    Args:
        snapshot: of the gallery, or of the cluster that it is a member of.
        manifest: of the gallery.
        ids: of its images in the snapshot, ascending.
        start: the id of its first row in the snapshot.
    """
    files = manifest.index, manifest.keys  # of image features and of keys, with their checksums; both may lag
    covered = min(entry.images if entry else 0 for entry in files)
    later = ids[np.searchsorted(ids, start + covered) :]
    rows: list[Any] = [(one.file, one.images, one.bytes, one.removed.hex()) for one in manifest.shards]
    for some in batched(later.tolist(), TEXTS_TOGETHER):
        rows += zip(snapshot.keys(some), snapshot.digests(some), strict=True)
    return {"files": [entry and entry.xxh3 for entry in files], "rows": _digest(rows)}


def read_kept(identity: Mapping[str, Any]) -> Baseline | None:
    """Return the baseline that was kept; None: there is none, or what is there cannot be used."""
    try:
        path = _path_of(identity)
        if not path.is_file() or path.stat().st_size > LARGEST:
            return None
        values = read_sealed(path, "delete it")
        if values is None or values["identity"] != json.loads(json.dumps(identity)):
            return None
        found = Baseline.from_json(values["baseline"])
        shapes = tuple((int(c), int(h), int(w)) for c, h, w in identity["spec"]["level_shapes"])
    except (OSError, CorruptGalleryError, KeyError, TypeError, ValueError, OverflowError):
        return None  # it is measured again, and written over
    return found if found.fits(shapes) else None


def keep(identity: Mapping[str, Any], baseline: Baseline) -> None:
    """Keep a baseline, if the cache folder can be written: else the next command measures it again.

    One that a user is warned of, as there was nothing to compare or image scores tie, is measured and warned of again.
    """
    if not baseline.keys or (baseline.ties and identity["settings"]["image_score"] == "map"):
        return
    with contextlib.suppress(OSError, OutputError):
        path = _path_of(identity)
        with file_to_keep(path) as file:
            file.write(sealed({"identity": identity, "baseline": baseline.to_json()}))
        drop_the_oldest(path.parent, MOST)


def _path_of(identity: Mapping[str, Any]) -> Path:
    return cache_folder("baselines") / f"{_digest(identity)[:32]}.json"


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
