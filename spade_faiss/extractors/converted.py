"""Converted networks in the user's cache folder: one file each, which is whole or absent and checked before it is used.

A file is a ZIP of the network as OpenVINO writes it (model.xml, model.bin) and of about.json: what it was made of, the
SHA-256 of both, how far its features are from torch's, and how long both took. Whoever deletes one has it made again.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..system.user_cache import cache_folder, drop_the_oldest, file_to_keep

VERSION = 2  # of these files, and of what is converted; another number makes all of them again
MOST = 50  # files that are kept, those that were written last
ABOUT, PARTS = "about.json", ("model.xml", "model.bin")


class DamagedError(Exception):
    """What was found in place of the converted network that was looked for."""


@dataclass(frozen=True)
class Conversion:
    """What became of the attempt to convert a network."""

    parts: tuple[bytes, bytes] | None = field(default=None, repr=False)  # model.xml, model.bin; None: it failed
    error: str = ""  # why it failed
    difference: float = 0.0  # from torch's features; see runtimes.difference
    seconds: dict[str, float] = field(default_factory=dict)  # an image, by runtime


def path_of(identity: dict[str, Any]) -> Path:
    """Return the path of the network that was made of something.

    Raises:
        OSError: the user has no home folder.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_folder("openvino") / f"{identity['name'].replace(':', '-')}-{digest[:24]}.zip"


def read(path: Path, identity: dict[str, Any]) -> Conversion | None:
    """Read a converted network; None: there is none.

    Args:
        path: see path_of.
        identity: what it must have been made of.

    Raises:
        DamagedError: the file is cut short or changed, or was made of something else.
        OSError: it cannot be read.
    """
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            about = json.loads(file.read(ABOUT))
            parts = None if about["error"] else (file.read(PARTS[0]), file.read(PARTS[1]))
        found, digests = dict(about["identity"]), about["sha256"]
        conversion = Conversion(parts, str(about["error"]), float(about["difference"]), dict(about["seconds"]))
    except OSError:
        raise
    except Exception as error:  # zipfile has many ways to fail on changed bytes
        raise DamagedError(f"a file that is cut short or changed ({type(error).__name__})") from error
    differing = [name for name in {**identity, **found} if found.get(name) != identity.get(name)]
    if differing:
        raise DamagedError(f"another network or machine ({', '.join(differing)})")
    if parts and digests != _digests(parts):
        raise DamagedError("a model with another checksum")
    return conversion


def write(path: Path, identity: dict[str, Any], conversion: Conversion) -> None:
    """Write a converted network, in place of another if there is one.

    Raises:
        OSError: it cannot be written.
    """
    about = asdict(conversion)
    parts = about.pop("parts")
    about |= {"identity": identity, "sha256": _digests(parts) if parts else []}
    with file_to_keep(path) as opened, zipfile.ZipFile(opened, "w") as file:
        file.writestr(ABOUT, json.dumps(about, indent=1))
        for part, content in zip(PARTS, parts or (), strict=False):
            file.writestr(part, content)
    drop_the_oldest(path.parent, MOST)


def _digests(parts: tuple[bytes, bytes]) -> list[str]:
    return [hashlib.sha256(part).hexdigest() for part in parts]
