"""Who shares a scale, or a table of values: what each granularity costs and buys, for 8- and 4-bit integers and k-means.

    python benchmarks/granularity.py [MODEL] [-o FOLDER] [--page docs/techniques.md]
    python benchmarks/granularity.py --from RESULT.json --page docs/techniques.md

Makes a recipe for each codec and granularity below, which differ in nothing else, runs ``quern compare`` over them (default
model: the bundled one; an interrupted run continues in FOLDER), keeps the figures as results/granularity_*.json and writes
its section into the page. The second form writes the section again without measuring.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from measured import write_result
from rich.console import Console
from section_script import parser_of, run

import quern
from quern.cli.terminal.progress import progress_on
from quern.core.recipe import Recipe, parse_recipe
from quern.core.results import Results
from quern.core.text.units import significant

TOKENS = 8192
OUTER = {"bits": 8, "granularity": "channel"}
"""Of embedding and head, in every recipe."""
TENSOR, CHANNEL = {"granularity": "tensor"}, {"granularity": "channel"}
GROUP_128, GROUP_32 = ({"granularity": "group", "group_size": size} for size in (128, 32))
BLOCK_32 = {"granularity": "block", "group_size": 32}
SHARED_BY = {
    "tensor": "the whole matrix",
    "channel": "a row",
    "group 128": "128 inputs of a row",
    "group 32": "32 inputs of a row",
    "block 32": "32 rows and 32 inputs",
}
CODECS: tuple[tuple[str, dict[str, Any], tuple[dict[str, Any], ...]], ...] = (
    ("8-bit integers", {"codec": "integer", "bits": 8}, (TENSOR, CHANNEL, BLOCK_32, GROUP_128, GROUP_32)),
    ("4-bit integers", {"codec": "integer", "bits": 4}, (TENSOR, CHANNEL, BLOCK_32, GROUP_128, GROUP_32)),
    ("k-means, 4 bits", {"codec": "kmeans", "bits": 4}, (TENSOR, CHANNEL, GROUP_128)),
)
"""In words, scheme, and the granularities that the codec is measured with; all symmetric, all with the usual observer."""


def main() -> None:
    parser = parser_of(__doc__, "build/granularity", TOKENS)
    parser.add_argument("--text", nargs="*", default=[])
    run(parser, measure, section)


def recipes() -> Iterable[tuple[str, Recipe]]:
    """The codec in words and the recipe, of every row."""
    for words, scheme, granularities in CODECS:
        for choice in granularities:
            name = f"{scheme['codec']}{scheme['bits']}-{'-'.join(map(str, choice.values()))}"
            data = {"name": name, "weights": {**scheme, **choice}, "embedding": OUTER, "head": OUTER}
            yield words, parse_recipe({**data, "rounding": {"method": "gptq"}}, name)


def measure(options: argparse.Namespace) -> Path:
    """Run the comparison and keep its figures; the file."""
    made = list(recipes())
    with progress_on(Console(stderr=True)) as progress:
        results = quern.compare(
            options.model, options.output, recipes=[recipe for _, recipe in made], calibration=options.calibration,
            texts=options.text, tokens=options.tokens, speed_rounds=0, progress=progress,
        )  # fmt: skip
    return write_result(f"granularity_{Path(options.model).name}", figures(results, dict(_words(made))))


def _words(made: Iterable[tuple[str, Recipe]]) -> Iterable[tuple[str, str]]:
    return ((recipe.name, words) for words, recipe in made)


def figures(results: Results, words: Mapping[str, str]) -> dict[str, Any]:
    """What is kept: how it was measured, and a row for each recipe. ``words``: the codec's, by recipe."""
    rows = []
    for row in results.rows:
        if row.name not in words or row.recipe is None:
            continue
        weights = row.recipe["weights"]
        size = weights["group_size"]
        step = f"{weights['granularity']} {size}" if size else weights["granularity"]
        rows.append({
            "name": row.name, "codec": words[row.name], "granularity": step, "engine": row.engine, "bytes": row.bytes,
            "bits_per_weight": row.bits_per_weight, "kl": row.kl_mean, "interval": row.kl_ci95,
        })  # fmt: skip
    floors = [row.kl_noise_floor for row in results.rows if row.kl_noise_floor is not None]
    return {
        "model": {"name": Path(results.model.path).name, "sha256": results.model.sha256},
        "texts": [text.model_dump(mode="json") for text in results.texts],
        "metrics_version": results.metrics_version,
        "noise_floor": max(floors, default=None),
        "rows": rows,
    }


def section(result: Mapping[str, Any]) -> str:
    """The section of the page."""
    engines = " and ".join(sorted({row["engine"] for row in result["rows"]}))
    tokens = sum(text["tokens"] for text in result["texts"])
    lines = [
        "## Granularity: who shares a scale",
        "",
        f"Model `{result['model']['name']}`, {tokens:,} tokens, {engines} engine, {result['date']}; made by",
        "`python benchmarks/granularity.py --page docs/techniques.md`. Every recipe rounds with error feedback (`gptq`) and",
        "keeps embedding and head at 8 bits a row, whose loss is part of every row: rows of one codec differ in the",
        "granularity of the linears alone. Bits are those of all weights with their scales and tables. *KL to tensor* is",
        "the loss as a share of the same codec's where each matrix has one scale, or one table. Noise floor of the KL (the",
        f"unquantized model against itself): {significant(result['noise_floor'])}.",
        "",
        "| codec | granularity | shared by | bits | bytes | loss (KL) | KL to tensor |",
        "|---|---|---|---:|---:|---|---:|",
    ]
    whole = {row["codec"]: row["kl"] for row in result["rows"] if row["granularity"] == "tensor"}
    lines += [_line(row, whole[row["codec"]]) for row in result["rows"]]
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any], whole: float) -> str:
    low, high = row["interval"]
    cells = (row["codec"], row["granularity"], SHARED_BY[row["granularity"]], f"{row['bits_per_weight']:.3f}",
             f"{row['bytes']:,}", f"{significant(row['kl'])} ({significant(low)} to {significant(high)})",
             f"{row['kl'] / whole:.2f}")  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
