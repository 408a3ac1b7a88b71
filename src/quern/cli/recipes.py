"""``quern recipes``."""

from __future__ import annotations

from quern.cli import options
from quern.cli.terminal.outcome import show, verb


@verb("quern recipes")
def recipes(json: options.Json = False) -> None:
    """List the recipes that ship with quern, and the choices that your own recipe can be made of."""
    from quern.cli.views import results as render
    from quern.pipeline.catalogue import catalogue

    show(catalogue(), json, render.catalogue)
