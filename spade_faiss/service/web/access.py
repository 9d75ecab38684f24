"""What routes depend on: the service, and a caller of some scope."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Annotated, cast

from fastapi import Depends, Path, Request

from ..normal_set import Author
from ..service import Service
from ..tokens import COOKIE, Caller
from .answers import ErrorAnswer, InferenceError
from .middleware import request_id_of

REASONS = (
    (400, "The request is not as HTTP has it."), (401, "A token is missing or wrong."),
    (403, "The token's scope is too small, or another site sent the request."),
    (404, "There is no such thing."), (405, "Not with this method."), (408, "The request did not arrive in time."),
    (409, "Not in this state."), (413, "Too large."), (415, "A content type that is not taken."),
    (421, "Called by a name that is not its own."), (422, "A parameter or an image that is none."),
    (423, "Another process is writing."), (429, "The queue is full."), (499, "The client has gone."),
    (500, "A mistake of the service."), (503, "Not now."), (507, "The disk is full."),
)  # fmt: skip
ERRORS: dict[int | str, dict[str, object]] = {
    status: {"model": ErrorAnswer, "description": why} for status, why in REASONS
}
V2_ERRORS: dict[int | str, dict[str, object]] = {
    status: {"model": InferenceError, "description": why} for status, why in REASONS
}


def service_of(request: Request) -> Service:
    """Return the service that a request is for."""
    return cast("Service", request.app.state.service)


def caller_of(request: Request, as_password: bool = False) -> Caller:
    """Return who asks.

    Args:
        request: with its token in a header, or with the page's cookie.
        as_password: whether the token may also come as the password of HTTP's basic authentication.

    Raises:
        ServiceError: a token is missing or wrong.
    """
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip() if kind.lower() == "bearer" else None
    if as_password and kind.lower() == "basic":
        given = _password(token)
    caller = service_of(request).tokens.caller(given, request.cookies.get(COOKIE))
    request.scope["state"]["who"] = caller.name
    return caller


def _password(credentials: str) -> str:
    """Return the password of basic credentials; empty: there is none."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode().partition(":")[2]
    except ValueError:  # no base64, or no UTF-8
        return ""


def needs(scope: str, as_password: bool = False) -> Callable[[Request], Caller]:
    """Return a dependency that lets callers of a scope in; see caller_of."""

    def check(request: Request) -> Caller:
        caller = caller_of(request, as_password)
        caller.require(scope)
        return caller

    return check


def author(request: Request, caller: Caller) -> Author:
    """Return who asks for a change, and in which request."""
    return Author(caller.name, request_id_of(request))


Ours = Annotated[Service, Depends(service_of)]
Reader = Annotated[Caller, Depends(needs("read"))]
Inspector = Annotated[Caller, Depends(needs("inspect"))]
Curator = Annotated[Caller, Depends(needs("curate"))]
Name = Annotated[str, Path(max_length=64, description="name of a gallery", examples=["tiles"])]
Uid = Annotated[str, Path(max_length=64, description="id of an inspection", examples=["5f1c0a9be2d74c11"])]
