"""Baselines in the user's cache folder: commands measure that of a gallery that is not calibrated once for each commit.

A file each, which is whole or absent, sealed, and named after all that a baseline depends on: of another commit, of
other settings or by another release there is none. Whoever deletes one has it measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import CorruptGalleryError
from ..store.manifest import Manifest
from ..system.atomic_files import publish
from ..system.sealed_json import read_sealed, sealed
from ..system.user_cache import cache_folder
from .baseline import Baseline

VERSION = 1  # of these files, and of how a baseline is measured; another number makes all of them again
MOST = 200  # files that are kept: those that were written last


def identity_of(
    folder: Path | str, manifest: Manifest, settings: Mapping[str, Any], trusted: Mapping[str, str]
) -> dict[str, Any]:
    """Return what a baseline depends on, as JSON values.

    Args:
        folder: of the gallery.
        manifest: of the commit: with the checksums of its index of image features and of its keys.
        settings: see Detector.settings.
        trusted: digests by key, see Gallery.trust.
    """
    shards = [(one.file, one.images, one.bytes, one.removed.hex()) for one in manifest.shards]
    return {
        "version": VERSION,
        "release": __version__,
        "folder": str(folder) if "://" in str(folder) else os.path.realpath(folder),
        "generation": manifest.generation,
        "index": asdict(manifest.index) if manifest.index else None,
        "keys": asdict(manifest.keys) if manifest.keys else None,
        "shards": hashlib.sha256(json.dumps(shards).encode()).hexdigest(),
        "spec": manifest.spec.to_json(),
        "settings": dict(settings),
        "trusted": hashlib.sha256(json.dumps(sorted(trusted.items())).encode()).hexdigest(),
    }


def read_kept(identity: Mapping[str, Any]) -> Baseline | None:
    """Return the baseline that was kept; None: there is none, or what is there cannot be used."""
    try:
        values = read_sealed(_path_of(identity), "delete it")
        if values is None or values["identity"] != json.loads(json.dumps(identity)):
            return None
        return Baseline.from_json(values["baseline"])
    except (OSError, CorruptGalleryError, KeyError, TypeError, ValueError, OverflowError):
        return None  # it is measured again, and written over


def keep(identity: Mapping[str, Any], baseline: Baseline) -> None:
    """Keep a baseline, if the cache folder can be written: else the next command measures it again.

    One that a user is warned of, as there was nothing to compare or distances tie, is measured and warned of again.
    """
    if not baseline.keys or baseline.ties:
        return
    with contextlib.suppress(OSError):
        path = _path_of(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".tmp", path.stem, path.parent)  # its own name: several processes may write
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(sealed({"identity": identity, "baseline": baseline.to_json()}))
            publish(Path(name), path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _drop_the_oldest(path.parent)


def _path_of(identity: Mapping[str, Any]) -> Path:
    text = json.dumps(identity, sort_keys=True)
    return cache_folder("baselines") / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _drop_the_oldest(folder: Path) -> None:
    """Delete all but the MOST files that were written last; other processes may do so, too."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found)[:-MOST]:
        path.unlink(missing_ok=True)
