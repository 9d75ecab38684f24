"""Routes of the page, its events and metrics."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter, Form, Header, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse
from markupsafe import Markup

from ..._version import __version__
from ...report.colour_scale import css_colours
from ..errors import ServiceError
from ..events import BEHIND
from ..log.inspections import as_result
from ..service import Service
from ..tokens import COOKIE
from .access import ERRORS, Ours, Reader, caller_of

router = APIRouter(responses=ERRORS)
MISSED = 200  # parts that a page which was away is told of; if there are more, it is told so
LARGEST = 2**63 - 1  # number of a line of the log
HELLO = "retry: 1000\nevent: hello\ndata: {}\n\n"
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#1d5a9e"/>'
    '<path d="M16 5 27 16 16 27 5 16Z" fill="none" stroke="#fff" stroke-width="2.5"/>'
    '<circle cx="16" cy="16" r="3.5" fill="#fff"/></svg>'
)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("spade_faiss.service.web"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


@cache
def _assets() -> dict[str, Any]:
    """Return style and scripts, and the policy that lets a page run these and load from the service alone."""
    folder = files("spade_faiss.service.web") / "templates"
    style = (folder / "page.css").read_text("utf-8")
    script = "\n".join((folder / name).read_text("utf-8") for name in ("base.js", "picture.js", "charts.js", "page.js"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    policy = (
        f"default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; style-src 'sha256-{hashes[0]}'; "
        f"script-src 'sha256-{hashes[1]}'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
    return {"style": Markup(style), "script": Markup(script), "policy": policy}


def _page(template: str, status: int = 200, **values: Any) -> HTMLResponse:
    assets = _assets()
    text = _environment().get_template(template).render(**assets, version=__version__, **values)
    return HTMLResponse(text, status, {"Content-Security-Policy": assets["policy"]})


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page(request: Request, service: Ours) -> Response:
    """Answer with the page, or with the one that asks for a token."""
    try:
        caller = caller_of(request)
    except ServiceError as error:
        return _page("login.html", 401, wrong="token_wrong" in error.code)
    start = {
        "galleries": list(service.settings.galleries),
        "scope": caller.scope,
        "who": caller.name,
        "colours": css_colours(),
    }
    text = json.dumps(start).replace("<", "\\u003c")  # else a name could end the element that it stands in
    return _page(
        "page.html", start=Markup(text), galleries=list(service.settings.galleries), has_tokens=bool(service.tokens)
    )


@router.post("/login", include_in_schema=False)
async def login(service: Ours, token: Annotated[str, Form(max_length=1000)]) -> Response:
    """Give a browser the cookie of a token. It is not sent from other sites, and no script reads it."""
    cookie = service.tokens.cookie_of(token.strip()) if service.tokens else None
    if cookie is None:
        return _page("login.html", 401, wrong=True)
    answer = RedirectResponse("/", 303)
    answer.set_cookie(COOKIE, cookie, max_age=30 * 86400, httponly=True, samesite="strict")
    return answer


@router.post("/logout", include_in_schema=False)
async def logout() -> Response:
    """Take the cookie back."""
    answer = RedirectResponse("/", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


@router.get("/icon.svg", include_in_schema=False)
async def icon() -> Response:
    """Answer with the page's icon."""
    return Response(ICON, media_type="image/svg+xml", headers={"Cache-Control": "max-age=86400"})


@router.get("/v1/events", include_in_schema=False)
async def events(
    request: Request, service: Ours, caller: Reader, last_event_id: Annotated[str | None, Header(max_length=20)] = None
) -> Response:
    """Stream what happens; a page that comes back is first told the parts that it has missed."""
    given = last_event_id or ""
    known = int(given) if given.isdecimal() else LARGEST

    async def hello() -> tuple[str, set[int]]:
        if known >= LARGEST:
            return HELLO, set()
        lines = await service.helped(service.inspections.last, None, MISSED + 1, None, known)
        text = HELLO if len(lines) <= MISSED else HELLO + BEHIND.text
        told = lines[:MISSED][::-1]
        text += "".join(f"id: {line.id}\nevent: inspection\ndata: {json.dumps(as_result(line))}\n\n" for line in told)
        return text, {line.id for line in told}

    stream = service.events.stream(hello, request.is_disconnected)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


@router.get("/metrics", response_class=Response, summary="Metrics for Prometheus.")
async def metrics(service: Ours, caller: Reader) -> Response:
    """Answer with all metrics as text."""
    return Response(await asyncio.to_thread(_measured, service), media_type="text/plain; version=0.0.4; charset=utf-8")


def _measured(service: Service) -> bytes:
    service.metrics.depth.set(service.pool.depth)
    return service.metrics.text()
