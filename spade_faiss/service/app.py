"""The application: the service's parts behind routes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from .._version import __version__
from ..errors import SpadeError
from .errors import CODES, ServiceError, as_service_error
from .service import Post, Service
from .settings import ServiceSettings
from .watch import WAITED_FOR
from .web import routes_galleries, routes_health, routes_inspect, routes_label_studio, routes_page, routes_v2
from .web.access import ERRORS, V2_ERRORS
from .web.examples import add_examples
from .web.middleware import Around, error_answer, request_id_of

logger = logging.getLogger("spade_faiss.service")
DESCRIPTION = "Finds defects by comparing images with normal ones only. Errors are JSON with a code and a sentence."


class _App(FastAPI):
    """Describes itself with examples, once someone asks."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            add_examples(super().openapi())
        return super().openapi()


def create_app(settings: ServiceSettings) -> FastAPI:
    """Return the application of a service.

    Args:
        settings: what is served, and within which bounds.

    Raises:
        OptionError: settings that do not go together.
        OutputError: the log cannot be opened.
    """
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.events.open()
        service.start()
        watching = asyncio.create_task(service.watch.run(_inspector(service)))
        try:
            yield
        finally:
            watching.cancel()
            try:
                with suppress(asyncio.CancelledError):
                    await watching
            finally:
                await asyncio.to_thread(service.close)

    app = _App(
        title="spade-faiss",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    for routes in (routes_inspect, routes_galleries, routes_v2, routes_label_studio, routes_page):
        app.include_router(routes.router)
    for prefix, errors in (("", ERRORS), ("/v2", V2_ERRORS)):
        app.include_router(routes_health.router, prefix=prefix, responses=errors)
    _add_handlers(app, service)
    app.add_middleware(Around, service=service)
    return app


def _inspector(service: Service):  # type: ignore[no-untyped-def]
    async def inspect(name: str, content: bytes) -> object:
        gallery = next(iter(service.settings.galleries))

        async def stays() -> bool:
            return False

        try:
            await service.loaded(gallery)
        except Exception as error:  # whatever it is, it is not about this image
            raise ServiceError(503, "gallery_unavailable", str(error) or type(error).__name__) from error
        try:
            [answer] = await service.inspect(Post(gallery, [(name, content)], "watch", "watch"), stays)
        except ServiceError:
            raise
        except Exception as error:  # as of a full disk
            known = as_service_error(error)
            if known is None:
                raise
            raise known from error
        if answer.get("status") in WAITED_FOR:
            raise ServiceError(answer["status"], answer["error"]["code"], answer["error"]["message"])
        return answer

    return inspect


def _add_handlers(app: FastAPI, service: Service) -> None:
    """Answer every error as JSON with a code, a sentence and the request's id."""

    def answer(request: Request, error: ServiceError) -> Response:
        service.metrics.rejected.labels(error.code).inc()
        return error_answer(error, request_id_of(request), request.url.path)

    async def own(request: Request, error: Exception) -> Response:
        known = as_service_error(error)
        return await unknown(request, error) if known is None else answer(request, known)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = CODES.get(error.status_code, "refused")
        message = f"{str(error.detail).rstrip('.')}."
        return answer(request, ServiceError(error.status_code, code, message, dict(error.headers or {})))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
        return answer(request, ServiceError(422, "bad_parameter", f"{where}: {first['msg']}."))

    async def gone(request: Request, error: Exception) -> Response:
        return answer(request, ServiceError(499, "client_gone", "The client has gone."))

    async def unknown(request: Request, error: Exception) -> Response:
        logger.error("request %s failed", request_id_of(request), exc_info=error)
        return answer(request, ServiceError(500, "internal", "The service made a mistake; its log has the details."))

    for kind in (ServiceError, SpadeError):
        app.add_exception_handler(kind, own)
    import sqlite3

    app.add_exception_handler(sqlite3.Error, own)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, unknown)
