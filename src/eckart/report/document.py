"""One HTML file that needs no network: templates, style, script, and the policy that allows that script alone."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from eckart.records import as_plain
from eckart.report import format as fmt
from eckart.report import palette


def document(template: str, *, styles: Sequence[str], scripts: Sequence[str], **values: Any) -> str:
    """The page that ``template`` makes of ``values``, its style sheets and scripts inside.

    Every text is escaped; the page's own security policy allows no script but its own, by hash, and no
    request at all.
    """
    script = '(() => {\n  "use strict";\n' + "".join(_asset(name) for name in scripts) + "})();\n"
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(palette.style_sheet() + "".join(_asset(name) for name in styles)),
            script=Markup(script),
            script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            steps=range(palette.STEPS),
            **values,
        )
    )


def fragment(template: str, **values: Any) -> str:
    """A piece of HTML for inside of another page, without style or script; every text is escaped."""
    return _environment().get_template(template).render(**values)


def data_block(content: Mapping[str, Any]) -> Markup:
    """JSON for a ``<script type="application/json">``: nothing in it can end the element."""
    text = json.dumps(as_plain(content), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("eckart.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(fmt=fmt, code_parts=fmt.code_parts)
    return environment


@cache
def _asset(name: str) -> str:
    return (files("eckart.report") / "templates" / name).read_text(encoding="utf-8")
