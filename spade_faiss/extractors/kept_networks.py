"""What networks are that OpenVINO runs, kept in the user's cache folder, so that torch need not make them.

timm and torchvision take longer to import than a hundred images to extract. Once a network is converted they serve to
learn its spec and the digest of its weights alone, and both are the same whenever the file of its weights, the options,
the libraries and this package's code are: a request. So they are kept, in a sealed file for each request. Whoever
deletes it has the network made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import xxhash

from ..errors import CorruptGalleryError, OptionError, OutputError
from ..options import FeatureOptions
from ..system.sealed_json import read_sealed, sealed
from ..system.user_cache import cache_folder, drop_the_oldest, file_to_keep
from .embedded import embedded_weights
from .spec import DEFAULT_EXTRACTOR, ExtractorSpec

VERSION = 1  # of these files; another number makes all of them again
MOST = 200  # files that are kept: those that were written last
LIBRARIES = ("torchvision", "timm")  # beside torch
ROOM = Path(__file__).parent
CODE = (*sorted(ROOM.glob("*.py")), ROOM.with_name("options.py"))  # what makes a network of its name
PIECE = 2**22  # bytes

Request = dict[str, Any]  # all that decides what a network is, as JSON values


def request_of(name: str, weights: Path | None, options: FeatureOptions) -> Request | None:
    """Return all that decides what a network is; None: not all of it can be told, as of published weights.

    Args:
        name: of the extractor.
        weights: the file that they are loaded from; None: they are the embedded ones, or published ones.
        options: as they were given.
    """
    path = weights or (embedded_weights() if name == DEFAULT_EXTRACTOR else None)
    try:
        if path is None or not path.is_file():
            return None
        request = {
            "version": VERSION,
            "name": name,
            "weights": [path.suffix, weights is None, _file_digest(path)],
            "options": _asked(options),
            "libraries": [f"torch {torch.__version__}", *map(_version, LIBRARIES)],
            "code": xxhash.xxh3_128_hexdigest(b"".join(path.read_bytes() for path in CODE)),
        }
        return dict(json.loads(json.dumps(request)))  # as it is read again
    except (OSError, TypeError, ValueError):
        return None


def read_kept(request: Request, weights: Path | None) -> tuple[ExtractorSpec, dict[str, Any]] | None:
    """Return a network's spec and identity; None: none are kept, or what is there cannot be used.

    Args:
        request: see request_of.
        weights: as for request_of: the spec names it.
    """
    try:
        values = read_sealed(_path_of(request), "delete it")
        if values is None or values["request"] != request:
            return None
        spec = ExtractorSpec.from_json(values["spec"])
        path = str(weights.absolute()) if weights else ""
        return replace(spec, weights=weights.name if weights else "", weights_path=path), dict(values["identity"])
    except (OSError, CorruptGalleryError, OptionError, KeyError, TypeError, ValueError):
        return None  # the network is made, and this is written over


def keep(request: Request, spec: ExtractorSpec, identity: Mapping[str, Any]) -> None:
    """Keep what a network that OpenVINO runs is, if the cache folder can be written: also for its galleries' queries.

    Args:
        request: as it was before the network was made, and as it is now.
        spec: of the extractor.
        identity: see TorchNetwork.identity.
    """
    for options in (request["options"], json.loads(json.dumps(_asked(spec.options())))):
        asked = {**request, "options": options}
        about = {"request": asked, "spec": replace(spec, weights_path="").to_json(), "identity": dict(identity)}
        with contextlib.suppress(OSError, OutputError):
            path = _path_of(asked)
            with file_to_keep(path) as file:
                file.write(sealed(about))
            drop_the_oldest(path.parent, MOST)


def _asked(options: FeatureOptions) -> dict[str, Any]:
    """Return the options that features depend on."""
    return {key: value for key, value in asdict(options).items() if key not in ("batch_size", "device", "runtime")}


def _path_of(request: Request) -> Path:
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    return cache_folder("networks") / f"{request['name'].replace(':', '-')}-{digest[:24]}.json"


def _version(library: str) -> list[str]:
    """Return where a library would be imported from, and its file version.py, without importing it.

    Raises:
        OSError: there is none.
    """
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(library)
    return [spec.origin, Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")]


def _file_digest(path: Path) -> str:
    """Return a checksum of a file's content."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
