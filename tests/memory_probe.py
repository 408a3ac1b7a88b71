"""A process of its own that quantizes and tells its peak memory: ``python memory_probe.py MODEL OUT RECIPE.json TEXT THREADS SLACK``.

With SLACK (bytes, or ``none``) the cap is the plan's own figure plus so much. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from quern.core.errors import OutOfMemoryCapError
from quern.core.machine.memory import peak_rss
from quern.core.recipe import parse_recipe
from quern.pipeline.quantize import quantize


def main(model: str, output: str, recipe: str, text: str, threads: str, slack: str) -> None:
    chosen = parse_recipe(json.loads(Path(recipe).read_text()), recipe)

    def run(cap: int | None) -> None:
        quantize(model, output, recipe=chosen, calibration=[text], memory=cap, threads=int(threads))

    cap = None
    if slack != "none":
        for _ in range(2):  # the first attempt loads libraries, which then count as the process's own
            try:
                run(1)
            except OutOfMemoryCapError as error:
                cap = error.least_bytes + int(slack)
    before = peak_rss()
    run(cap)
    print(json.dumps({"cap": cap, "before": before, "peak": peak_rss()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
