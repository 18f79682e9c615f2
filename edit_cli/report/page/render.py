"""Pages as HTML: templates with every text escaped, and a policy that lets nothing run or load but what is the page's
own.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from edit_cli.report.page.parts import Page
from edit_cli.terminal import visible

STYLE, SCRIPT = "page.css", "page.js"


def html(page: Page) -> str:
    """The whole file."""
    style, script = _asset(STYLE), _asset(SCRIPT)
    policy = f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}"
    return _environment().get_template("page.html").render(page=page, style=style, script=script, policy=policy)


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("edit_cli.report.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )


def _shown(value: Any) -> Any:
    """Texts may hold anything: what would change how others are read is shown, as in a terminal."""
    return visible(value) if type(value) is str else value


def _asset(name: str) -> Any:
    """A file of this package, which needs no escaping."""
    from markupsafe import Markup

    return Markup(resources.files("edit_cli.report.page").joinpath("templates", name).read_text(encoding="utf-8"))


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
