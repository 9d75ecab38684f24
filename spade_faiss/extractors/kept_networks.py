"""What networks are that OpenVINO runs, kept in the user's cache folder, so that torch need not make them.

timm and torchvision take longer to import than a hundred images to extract. Once a network is converted they serve to
learn its spec and the digest of its weights alone, and both are the same whenever the file of its weights, the options,
the libraries and this package's code are. So they are kept, in a sealed file named after all of these. Whoever deletes
it has the network made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from ..errors import CorruptGalleryError, OptionError, OutputError
from ..options import FeatureOptions
from ..system.sealed_json import read_sealed, sealed
from ..system.user_cache import cache_folder, file_to_keep
from .embedded import embedded_weights
from .spec import DEFAULT_EXTRACTOR, ExtractorSpec

VERSION = 1  # of these files; another number makes all of them again
LIBRARIES = ("torch", "torchvision", "timm")
ROOM = Path(__file__).parent
CODE = (*sorted(ROOM.glob("*.py")), ROOM.with_name("options.py"))  # what makes a network of its name
PIECE = 2**22  # bytes


def keep(
    name: str, weights: Path | None, options: FeatureOptions, spec: ExtractorSpec, identity: Mapping[str, Any]
) -> None:
    """Keep what a network that OpenVINO runs is, if the cache folder can be written: also for its galleries' queries.

    Args:
        name: of the extractor.
        weights: the file that they were loaded from; None: they are the embedded ones, or published ones.
        options: as they were given.
        spec: of the extractor.
        identity: see TorchNetwork.identity.
    """
    with contextlib.suppress(OSError, OutputError, PackageNotFoundError):
        for asked in (options, spec.options()):
            if request := _request(name, weights, asked):
                about = {"request": request, "spec": replace(spec, weights_path="").to_json(), "identity": {**identity}}
                with file_to_keep(_path_of(request)) as file:
                    file.write(sealed(about))


def read_kept(name: str, weights: Path | None, options: FeatureOptions) -> tuple[ExtractorSpec, dict[str, Any]] | None:
    """Return a network's spec and identity; None: none are kept, or what is there cannot be used."""
    try:
        request = _request(name, weights, options)
        values = read_sealed(_path_of(request), "delete it") if request else None
        if values is None or values["request"] != request:
            return None
        spec = ExtractorSpec.from_json(values["spec"])
        path = str(weights.absolute()) if weights else ""
        return replace(spec, weights=weights.name if weights else "", weights_path=path), dict(values["identity"])
    except (OSError, CorruptGalleryError, OptionError, PackageNotFoundError, KeyError, TypeError, ValueError):
        return None  # the network is made, and this is written over


def _request(name: str, weights: Path | None, options: FeatureOptions) -> dict[str, Any] | None:
    """Return all that decides what a network is, as JSON values; None: the file of its weights is not known.

    Raises:
        OSError: the file of its weights cannot be read.
        PackageNotFoundError: a library has no metadata.
    """
    path = weights or (embedded_weights() if name == DEFAULT_EXTRACTOR else None)
    if path is None or not path.is_file():
        return None
    asked = {key: value for key, value in asdict(options).items() if key not in ("batch_size", "device", "runtime")}
    request = {
        "version": VERSION,
        "name": name,
        "weights": [path.suffix, weights is None, _file_digest(path)],
        "options": asked,
        "libraries": [version(library) for library in LIBRARIES],
        "code": _code_digest(),
    }
    return dict(json.loads(json.dumps(request)))  # as it is read again


def _path_of(request: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    return cache_folder("networks") / f"{request['name'].replace(':', '-')}-{digest[:24]}.json"


def _file_digest(path: Path) -> str:
    """Return a checksum of a file's content."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


@cache
def _code_digest() -> str:
    """Return a checksum of the code that makes a network: a checkout's changes before its version does.

    Raises:
        OSError: it cannot be read.
    """
    return xxhash.xxh3_128_hexdigest(b"".join(path.read_bytes() for path in CODE))
