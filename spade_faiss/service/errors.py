"""What can go wrong with a request: a status, a code for programs, a sentence for people."""

from __future__ import annotations

import errno
import sqlite3

from ..errors import (
    CorruptGalleryError,
    GalleryLockedError,
    GalleryNotFoundError,
    ImageError,
    KeyConflictError,
    NotEnoughImagesError,
    OptionError,
    SourceError,
    SpadeError,
)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CODES = {  # of statuses that the web framework raises by itself
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "wrong_content_type",
    422: "bad_parameter",
}
KINDS: tuple[tuple[type[SpadeError], int, str], ...] = (  # the first that fits
    (ImageError, 422, "bad_image"),
    (GalleryLockedError, 423, "gallery_locked"),
    (KeyConflictError, 409, "key_conflict"),
    (GalleryNotFoundError, 503, "gallery_gone"),
    (SourceError, 503, "source_missing"),
    (CorruptGalleryError, 503, "gallery_damaged"),
    (NotEnoughImagesError, 409, "not_enough_images"),
    (OptionError, 422, "bad_parameter"),
)


class ServiceError(Exception):
    """A request that is not answered with what it asked for."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers or {}


def as_service_error(error: BaseException) -> ServiceError | None:
    """Return an error of the engine or of the log as the answer to a request; None: it is a mistake of ours."""
    if isinstance(error, ServiceError):
        return error
    if _is_full(error):
        return ServiceError(507, "disk_full", f"The disk is full; nothing was changed: {error}")
    for kind, status, code in KINDS:
        if isinstance(error, kind):
            return ServiceError(status, code, str(error), {"Retry-After": "1"} if status == 423 else None)
    if isinstance(error, SpadeError):
        return ServiceError(503, "gallery_unavailable", str(error))
    return None


def _is_full(error: BaseException | None) -> bool:
    """Return whether a full disk is behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
            return True
        error = error.__cause__
    return False
