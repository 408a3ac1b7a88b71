"""One self-contained HTML page from a ``results.json``: style, script and data inside, no request to anywhere.

The page carries a content security policy that names its one style and its one script by hash, so that nothing that a
results file contains can run or load anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from quern.checkpoint.jobs.output_place import output_file, write_output
from quern.core.results import Results, load_results
from quern.core.text.language import ENGLISH, gettext, ngettext, spoken
from quern.report.view import page_data, page_view, unbroken

STYLES = ("page.css", "parts.css", "plans.css", "tools.css", "stacking.css")
SCRIPTS = (
    *("common.js", "table.js", "chart.js", "labels.js", "grids.js", "layers.js", "plans.js", "tools.js", "export.js"),
    "page.js",
)
_MARKS = (b'<meta name="generator" content="quern">', b": quantized side by side</title>")
"""What tells quern's pages from others: the mark of page.html, and the title of pages written before there was one."""
_HEAD_BYTES = 64 * 1024


def render(results: Results) -> str:
    """The whole page as text. The same results give the same text."""
    environment = Environment(
        loader=PackageLoader("quern", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = unbroken
    environment.globals.update(gettext=gettext, ngettext=ngettext)
    style = "\n".join(_asset(name) for name in STYLES)
    # One function around all files keeps their names out of the page's global scope.
    script = '(() => {\n"use strict";\n' + "\n".join(_asset(name) for name in SCRIPTS) + "})();\n"
    return environment.get_template("page.html").render(
        **page_view(results),
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src {_hash(style)}; script-src {_hash(script)}",
        data=Markup(embedded_json(page_data(results) | script_messages(script))),
    )


def write_report(results_path: str | Path, output: str | Path) -> Path:
    """Write the page for the results file at ``results_path`` to ``output``; where it is, absolute, links followed.

    Folders are made. Raises:
        BadFileError: The results file is missing, malformed or of another version.
        UserError: ``output`` is a folder or a file that quern did not write, or cannot be written.
    """
    path = output_file(output, is_report)
    write_output(path, render(load_results(results_path)).encode())
    return path


def is_report(path: Path) -> bool:
    """Whether the file is a page that quern wrote."""
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    return any(mark in head for mark in _MARKS)


def embedded_json(data: dict[str, Any]) -> str:
    """JSON that is safe inside a script element: no character of it can end the element or open a comment."""
    text = json.dumps(data, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def script_messages(script: str) -> dict[str, dict[str, str]]:
    """The messages that the page's own script shows, with their translations; nothing in English."""
    if spoken() == ENGLISH:
        return {}
    found = re.findall(r'\bgettext\("((?:[^"\\]|\\.)*)"', script)
    return {"messages": {message: gettext(message) for message in found}}


def _asset(name: str) -> str:
    return resources.files("quern.report").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
