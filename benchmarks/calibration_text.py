"""How the loss depends on which text calibration reads, and on how much of it, at the same bytes.

    python benchmarks/calibration_text.py [MODEL] [--recipe NAME] [--source NAME=FILE,FILE...] [--text NAME=FILE...]
        [--calibration-tokens 4096 16384 65536] [--tokens 8192] [-o FOLDER] [--page docs/accuracy.md]
    python benchmarks/calibration_text.py --from RESULT.json --page docs/accuracy.md

Quantizes MODEL (default: the bundled one) on so many tokens of every source, and measures the divergence on each text by
itself. A source of several files is a mix of them; without files it is what calibration takes if nothing is said, and a text
without a file is the held-out part of that. What was
measured is kept in FOLDER, so that the same command goes on after an interruption, and as results/calibration_text_*.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rounding
from measured import write_result
from rounding import HELD_OUT, mean
from section_script import parser_of, recipe_called, run

from quern.core.results import METRICS_VERSION
from quern.core.text.units import significant


def main() -> None:
    parser = parser_of(__doc__, "build/calibration-text")
    parser.add_argument("--recipe", default="gptq3-g64")
    parser.add_argument("--source", nargs="*", default=["standard library="], metavar="NAME=FILES")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--calibration-tokens", nargs="*", type=int, default=[4096, 16384, 65536])
    run(parser, measure, section)


def measure(options: argparse.Namespace) -> Path:
    """Measure every row that is not known yet, and keep all; the file."""
    sources = dict(given.split("=", 1) for given in options.source)
    rows = [row(options, name, files, count) for count in options.calibration_tokens for name, files in sources.items()]
    content = {"model": Path(options.model).name, "recipe": options.recipe, "tokens": options.tokens}
    content["metrics_version"] = METRICS_VERSION
    return write_result(f"calibration_text_{Path(options.model).name}", {**content, "rows": rows})


def row(options: argparse.Namespace, source: str, files: str, count: int) -> dict[str, Any]:
    """Cost and divergences of one source and number of tokens."""
    given = dict(text.split("=", 1) for text in options.text) or {HELD_OUT: ""}
    recipe = recipe_called(options.recipe)
    calibration = recipe.calibration.model_copy(update={"tokens": count})
    name = f"{source.replace(' ', '-')}-{count}"
    found = rounding.row(
        options,
        recipe.model_copy(update={"name": name, "calibration": calibration}),
        [file for file in files.split(",") if file],
        {text: file or None for text, file in given.items()},
    )
    return found | {"source": source, "calibration_tokens": count}


def section(result: Mapping[str, Any]) -> str:
    """The section of the page."""
    texts = list(result["rows"][0]["texts"])
    lines = [
        f"## {result['model']}: calibration text",
        "",
        f"{result['date']}, {result['hardware']['cpu_model']}, recipe `{result['recipe']}`, "
        f"{result['rows'][0]['bytes']:,} bytes,",
        f"{result['tokens']} tokens of each text; made by `python benchmarks/calibration_text.py`. KL in nats a token.",
        "",
        f"| calibration text | tokens | {' | '.join(texts)} |" + (" mean |" if len(texts) > 1 else ""),
        "|---" * (2 + len(texts) + (len(texts) > 1)) + "|",
    ]
    for one in result["rows"]:
        cells = [significant(one["texts"][text]["kl"], 3) for text in texts]
        cells += [significant(mean(one), 3)] if len(texts) > 1 else []
        lines.append(f"| {one['source']} | {one['calibration_tokens']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
