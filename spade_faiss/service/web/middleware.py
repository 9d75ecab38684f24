"""Around every request: its id, who may call from where, headers of safety, a line in the log."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ServiceError
from ..service import Service

logger = logging.getLogger("spade_faiss.service.requests")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
SAFE = ("GET", "HEAD", "OPTIONS")
ANYWHERE = ("0.0.0.0", "::", "")  # addresses that say nothing of the names the service is called by
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
POLICY = "default-src 'none'; frame-ancestors 'none'"  # of everything but the page, which has its own


def error_answer(error: ServiceError, request_id: str, path: str) -> JSONResponse:
    """Return an error as every client gets it; under /v2 the sentence alone is `error`, as that protocol has it."""
    facts = {"code": error.code, "message": error.message, "request_id": request_id}
    body = {**facts, "error": error.message} if path.startswith("/v2") else {"error": facts}
    return JSONResponse(body, error.status, {**error.headers, "X-Request-ID": request_id})


def request_id_of(request: Request) -> str:
    """Return the id of a request."""
    return str(request.scope.get("state", {}).get("request_id", "-"))


class Around:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, unless it comes from where it should not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, start = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-ID"] = request_id
                for name, value in HEADERS.items():
                    out.setdefault(name, value)
                out.setdefault("Content-Security-Policy", POLICY)
                out.setdefault("Cache-Control", "no-store")
            await send(message)

        left = self._service.settings.body_bytes

        async def receiving() -> Message:
            """Count a body that came without its length; FastAPI's own limit would answer in plain text."""
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large("more")
            return message

        try:
            refused = self._refusal(scope, headers)
            if refused is not None:
                self._service.metrics.rejected.labels(refused.code).inc()
                await error_answer(refused, request_id, scope["path"])(scope, receive, sending)
            else:
                await self._app(scope, receiving, sending)
        finally:
            self._service.metrics.requests.labels(str(status)).inc()
            self._log(scope, request_id, status, time.perf_counter() - start)

    def _refusal(self, scope: Scope, headers: Headers) -> ServiceError | None:
        """Return why a request is not answered: another site may have sent it through somebody's browser."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return ServiceError(421, "wrong_host", f"Expected a name of this service in Host, found {host!r}.")
        length, limit = headers.get("content-length", ""), self._service.settings.body_bytes
        if length.isdecimal() and int(length) > limit:
            return self._too_large(length)
        if scope["method"] in SAFE:
            return None
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return ServiceError(
                403, "wrong_origin", f"Expected a request of this service's own page, found {origin!r}."
            )
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return ServiceError(403, "wrong_origin", "Expected a request of this service's own page.")
        return None

    def _too_large(self, found: str) -> ServiceError:
        limit = self._service.settings.body_bytes
        return ServiceError(413, "body_too_large", f"Expected a request of at most {limit} bytes, found {found}.")

    def _is_ours(self, host: str) -> bool:
        settings = self._service.settings
        if settings.host in ANYWHERE and not settings.allowed_hosts:
            return True
        return host_name(host) in known_hosts(settings.host, settings.allowed_hosts)

    def _log(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        client = scope.get("client")
        values = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request": request_id,
            "client": client[0] if client else None,
            "who": scope["state"].get("who"),
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(1000 * seconds, 2),
        }
        logger.info(json.dumps(values))


def host_name(host: str) -> str:
    """Return a Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0].lstrip("[").lower()
    return host.partition(":")[0].lower()


def known_hosts(own: str, allowed: Sequence[str]) -> set[str]:
    """Return the names that the service may be called by."""
    return {"localhost", "127.0.0.1", "::1", own.lower(), *(name.lower() for name in allowed)}
