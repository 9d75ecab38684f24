"""Running the application: logs to stderr, SIGTERM that drains."""

from __future__ import annotations

import logging
import sys
from types import FrameType

import uvicorn
from PIL import Image

from ..errors import GalleryNotFoundError, OptionError
from ..store.manifest import FILE as MANIFEST
from .app import create_app
from .settings import ServiceSettings
from .tokens import VARIABLE

DRAIN = 30  # seconds that open requests get when the service ends


class Server(uvicorn.Server):
    """A server that ends the pages' streams when it is told to stop: they would keep it for ever."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End the streams, then as uvicorn does."""
        self.config.loaded_app_service.events.end()  # type: ignore[attr-defined]
        super().handle_exit(sig, frame)


def run(settings: ServiceSettings) -> None:
    """Serve until SIGTERM or SIGINT; what waits then is answered first.

    Raises:
        GalleryNotFoundError: nothing is where a gallery should be.
        OptionError: an address that others can reach, and no token; tokens or targets that are none.
        OutputError: the log cannot be opened.
    """
    if not settings.is_local and settings.tokens is None and VARIABLE not in settings.extra:
        raise OptionError(
            f"host: expected an address of this machine without a token, as 127.0.0.1, found {settings.host!r}; "
            f"give tokens (tokens=FILE), or set {VARIABLE}"
        )
    for path in settings.galleries.values():
        if not (path / MANIFEST).exists():
            raise GalleryNotFoundError(f"{path}: expected a gallery to serve, found none; make one with Gallery.create")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    own = logging.getLogger("spade_faiss.service")
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    own.propagate = False
    if Image.MAX_IMAGE_PIXELS is not None:  # else Pillow decodes any image
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, settings.pixels)
    app = create_app(settings)
    own.info("serving %s at http://%s:%s/", ", ".join(settings.galleries), settings.host, settings.port)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=DRAIN,
        lifespan="on",
        ws="none",
    )
    config.loaded_app_service = app.state.service  # type: ignore[attr-defined]
    Server(config).run()
