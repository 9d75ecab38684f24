"""The report's templates, style and script, and how they become a page."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    import jinja2


@cache
def _environment() -> jinja2.Environment:
    import jinja2  # here: most commands write no page

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spade_faiss.report"),
        autoescape=True,  # keys are file names, which may hold anything
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["figure"] = figure
    return environment


def figure(value: float) -> str:
    """Write a figure: four digits, or whole numbers from 1 000 on."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def template(name: str) -> jinja2.Template:
    """Return a template; what it is given is escaped, unless it is Markup."""
    return _environment().get_template(name)


def style_and_script() -> dict[str, Markup]:
    """Return the style and script of a page, and the policy that lets it run these and load nothing."""
    contents = {
        name: (files("spade_faiss.report") / "templates" / name).read_text("utf-8")
        for name in ("report.css", "report.js")
    }
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in contents.values())
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return {"style": Markup(contents["report.css"]), "script": Markup(contents["report.js"]), "policy": Markup(policy)}
