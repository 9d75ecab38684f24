"""The documentation site: `make docs` builds it, and every warning is an error."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # document this checkout, whatever is installed

from docutils import nodes

import spade_faiss

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "spade-faiss"
author = "The spade-faiss authors"
copyright = "2026, The spade-faiss authors"
version = release = spade_faiss.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
smartquotes = False  # it would turn the -- of an option into a dash

myst_heading_anchors = 4
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types of NumPy and torch, whose own sites are not asked

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # several classes have an attribute of one name, which would each be a target
autoclass_content = "both"  # the arguments of Detector stand in its __init__
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
autodoc_type_aliases = {name: name for name in ("Array", "Ids", "Pixels", "ImageLike", "Patches", "Engine")}
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"spade-faiss {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": "https://github.com/spade-faiss/spade-faiss/",
    "source_branch": "main",
    "source_directory": "docs/",
}

CODE = re.compile(r"(?<![`:])`([^`]+)`(?!`)")
MARKUP = re.compile(r"\*|\||(?<=\w)_(?!\w)")


def escape_docstring(app: Sphinx, what: str, name: str, item: object, options: Any, lines: list[str]) -> None:
    """Show a docstring as it was written: `x` is code, and *, | and a trailing _ are themselves.

    The docstrings are written for people who read the source, not as reStructuredText.
    """
    for number, line in enumerate(lines):
        parts = CODE.split(line)  # text, code, text, ...
        parts[::2] = [MARKUP.sub(lambda found: "\\" + found[0], text) for text in parts[::2]]
        parts[1::2] = [f"``{code}``" for code in parts[1::2]]
        lines[number] = "".join(parts)


def shorten_aliases(
    app: Sphinx, what: str, name: str, item: object, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Show a type alias inside another type by its name alone: list[Array]."""
    alias = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")
    short = [text and alias.sub(r"\1", text) for text in (signature, returns)]
    return short[0], short[1]


def set_dashes(app: Sphinx, doctree: nodes.document) -> None:
    """Put a dash between a parameter and its description, where Sphinx leaves two hyphens to smartquotes."""
    for text in doctree.findall(nodes.Text):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def setup(app: Sphinx) -> None:
    """Escape docstrings before napoleon reads them, and tidy signatures."""
    app.connect("autodoc-process-docstring", escape_docstring, priority=100)
    app.connect("autodoc-process-signature", shorten_aliases)
    app.connect("doctree-read", set_dashes)
