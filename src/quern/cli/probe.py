"""``quern probe``."""

from __future__ import annotations

from quern.cli import options
from quern.cli.terminal.outcome import show, verb


@verb("quern probe --json")
def probe(json: options.Json = False) -> None:
    """Say what this machine is, and measure its read bandwidth and matrix product rates."""
    from quern.advisor.hardware import probe as api
    from quern.cli.views import results as render

    show(api(measure=True), json, render.hardware)
