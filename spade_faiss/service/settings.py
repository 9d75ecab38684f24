"""Every setting of the service, with its check."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import OptionError
from ..object_store.address import refuse_address
from ..options import MIB, FeatureOptions

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")  # of a gallery in a URL
LOCAL_NAMES = ("localhost",)


@dataclass(frozen=True)
class ServiceSettings:
    """What is served, where, and within which bounds."""

    galleries: Mapping[str, Path]  # by the name that URLs have; loaded when first asked for
    data: Path = Path("spade-service")  # folder of the log and of the pictures that were added
    normal: tuple[Path, ...] = ()  # folders that galleries were built from: the page shows these pictures
    host: str = "127.0.0.1"  # another address needs tokens
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()  # more names that the service is called by, in the header Host
    tokens: Path | None = None  # file of tokens, a line each: NAME SCOPE TOKEN
    queue: int = 32  # images that wait at the most
    deadline: float = 30.0  # seconds that an image may wait
    body_seconds: float = 30.0  # seconds that a request may take to arrive
    body_bytes: int = 64 * MIB  # of a request
    pixels: int = 64_000_000  # of an image
    batch_size: int = FeatureOptions.batch_size  # images in one pass through the network, and of one v2 request
    device: str = "auto"
    weights: Path | None = None
    loaded: int = 4  # galleries in memory at the most
    kept: int = 2000  # inspections whose pictures and maps are kept; their lines in the log stay
    lock_seconds: float = 5.0  # how long an edit waits for another process that is writing
    poll_seconds: float = 0.25  # between looks for a new commit
    recalibrate: bool = True  # calibrate again in the background where the gallery has changed
    watch: tuple[Path, ...] = ()  # folders whose new images are inspected, for the first gallery
    label_files: Path | None = None  # root of Label Studio's local files: the only ones that its tasks may name
    webhook: str | None = None  # URL that results are posted to
    mqtt: str | None = None  # mqtt://HOST[:PORT]/TOPIC that results are published to
    extra: Mapping[str, str] = field(default_factory=dict, repr=False)  # of the environment: the token

    def __post_init__(self) -> None:
        if not self.galleries:
            raise OptionError("galleries: expected at least one to serve, found none")
        for name in self.galleries:
            if not NAME.fullmatch(name):
                raise OptionError(
                    "galleries: expected names of letters, digits, '.', '_' and '-', at most 64, as URLs have them, "
                    f"found {name!r}; give NAME=GALLERY"
                )
        for name in ("queue", "body_bytes", "pixels", "batch_size", "loaded", "kept"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}: expected a number >= 1, found {getattr(self, name)}")
        for name in ("deadline", "body_seconds", "lock_seconds", "poll_seconds"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise OptionError(f"{name}: expected seconds above 0, found {value}")
        if not 0 <= self.port < 2**16:
            raise OptionError(f"port: expected 0 to {2**16 - 1}, found {self.port}")
        for name, folders in (("normal", self.normal), ("label_files", (self.label_files,))):
            for folder in folders:
                if folder is not None and not folder.is_dir():
                    found = "a file" if folder.exists() else "none"
                    raise OptionError(f"{name}: expected a folder, found {found}: {folder}")

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine can reach the service."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host in LOCAL_NAMES


def named_galleries(arguments: tuple[str, ...]) -> dict[str, Path]:
    """Return galleries by name, from NAME=PATH or PATH, whose last part without its suffix is then the name.

    Raises:
        OptionError: two have one name, or a path is empty.
        GalleryError: a path is the address of an object store.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not NAME.fullmatch(name):
            name, path = (
                re.sub(r"[^A-Za-z0-9._-]+", "-", Path(argument).resolve().stem).strip(".-_") or "gallery",
                argument,
            )
        if name in found:
            raise OptionError(f"galleries: expected a name each, found {name!r} twice; give NAME=GALLERY")
        if not path:
            raise OptionError(f"galleries: expected a path, found an empty text in {argument!r}")
        refuse_address(path)
        found[name] = Path(path)
    return found
