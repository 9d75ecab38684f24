"""Running the application: logs to stderr, SIGTERM that drains."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from types import FrameType

import uvicorn
from PIL import Image

from ..errors import GalleryNotFoundError, OptionError
from ..report.output_files import refuse_foreign
from ..store.manifest import FILE as MANIFEST
from .app import create_app
from .service import Service
from .settings import ServiceSettings
from .tokens import VARIABLE

DRAIN = 30  # seconds that open requests get when the service ends
GRACE = 2  # seconds that a thread gets whose work is given up, before the process ends without it
ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # errors for which an address of several is left out
BACKLOG = 2048  # connections that wait until they are taken up
logger = logging.getLogger("spade_faiss.service")


class Server(uvicorn.Server):
    """A server that ends the pages' streams when it is told to stop: they would keep it for ever."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so: from here on a signal ends it in order."""
        await super().startup(sockets)
        service: Service = self.config.loaded_app_service  # type: ignore[attr-defined]
        host, port = service.settings.host, sockets[0].getsockname()[1] if sockets else self.config.port
        host = f"[{host}]" if ":" in host else host
        logger.info("serving %s at http://%s:%s/", ", ".join(service.settings.galleries), host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End the streams, then stop: at the second Ctrl-C without waiting. uvicorn would raise the signal again."""
        self.config.loaded_app_service.events.end()  # type: ignore[attr-defined]
        self.force_exit = self.force_exit or (self.should_exit and sig == signal.SIGINT)
        self.should_exit = True


def run(settings: ServiceSettings) -> None:
    """Serve until SIGTERM or SIGINT; what waits then is answered first.

    Raises:
        GalleryNotFoundError: nothing is where a gallery should be.
        OptionError: an address that others can reach, and no token; one where it cannot listen; tokens or targets that
            are none.
        OutputError: the log cannot be opened, or would lie in a gallery or among images.
    """
    if not settings.is_local and settings.tokens is None and VARIABLE not in settings.extra:
        raise OptionError(
            f"host: expected an address of this machine without a token, as 127.0.0.1, found {settings.host!r}; "
            f"give tokens (tokens=FILE), or set {VARIABLE}"
        )
    for path in settings.galleries.values():
        if not (path / MANIFEST).exists():
            raise GalleryNotFoundError(f"{path}: expected a gallery to serve, found none; make one with Gallery.create")
    refuse_foreign(settings.data)
    with ExitStack() as stack:
        opened = all_listening(settings.host, settings.port)  # before anything else begins
        for one in opened:
            stack.enter_context(one)
        _serve(settings, opened)


def all_listening(host: str, port: int) -> list[socket.socket]:
    """Return a socket for each address that a name stands for, as localhost for 127.0.0.1 and ::1; all have one port.

    Raises:
        OptionError: as listening; an address of a name that this machine does not have is left out.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) if host else []
    except (OSError, UnicodeError):
        found = []  # listening says why
    addresses = list(dict.fromkeys(str(one[4][0]) for one in found if one[0] in (socket.AF_INET, socket.AF_INET6)))
    if len(addresses) < 2:
        return [listening(host, port)]
    opened: list[socket.socket] = []
    absent: OptionError | None = None
    for address in addresses:
        try:
            opened.append(listening(address, port))
            port = opened[0].getsockname()[1]
        except OptionError as error:
            if getattr(error.__cause__, "errno", None) not in ABSENT:
                for one in opened:
                    one.close()
                raise
            absent = absent or error
    if absent and not opened:
        raise absent
    return opened


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        OptionError: the port is in use, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a machine
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise OptionError(f"port: {port} is in use; choose another (port=N)") from error
        why = getattr(error, "strerror", None) or error
        raise OptionError(f"host, port: expected an address to listen at, found {host!r} and {port}: {why}") from error


def _serve(settings: ServiceSettings, opened: list[socket.socket]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if Image.MAX_IMAGE_PIXELS is not None:  # else Pillow decodes any image
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, settings.pixels)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        backlog=BACKLOG,
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=DRAIN,
        lifespan="on",
        ws="none",
    )
    config.loaded_app_service = app.state.service  # type: ignore[attr-defined]
    Server(config).run(opened)
    _let_go(app.state.service.threads)


def _let_go(threads: Sequence[threading.Thread]) -> None:
    """End the process without the threads whose work is given up, if one is still at it.

    The interpreter cannot end in order while a thread is in compiled code: it would abort. All is written by now.
    """
    end = time.monotonic() + GRACE
    for thread in filter(threading.Thread.is_alive, threads):
        thread.join(max(0.0, end - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(0)
