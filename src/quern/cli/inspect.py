"""``quern inspect``."""

from __future__ import annotations

from quern.cli import options
from quern.cli.terminal.outcome import show, verb


@verb("quern inspect quantized")
def inspect(path: options.ArtifactPath, stream: options.Stream = False, json: options.Json = False) -> None:
    """Say how every tensor of PATH is stored: shape, codec, granularity, bits, bytes, and the totals."""
    from quern.cli.views import results as render
    from quern.pipeline.inspect import inspect as api

    show(api(path, stream=stream), json, render.inspection)
