"""What tuning blocks is worth at the same bytes, recipe by recipe.

    python benchmarks/tuning.py [MODEL] [--calibration FILE...] [--text FILE...] [--recipes NAME...] [--choices NAME...]
        [--tokens 8192] [--threads N] [-o FOLDER] [--page docs/accuracy.md]
    python benchmarks/tuning.py --from RESULT.json --page docs/accuracy.md

Quantizes MODEL (default: the bundled one) by every recipe with every choice of tuning. What was measured is kept in FOLDER,
so that the same command goes on after an interruption, and as results/tuning_*.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measured import write_result
from rounding import CHOICES
from section_script import parser_of, recipe_called, run

import quern
from quern.core.recipe import Recipe, parse_recipe
from quern.core.results import METRICS_VERSION
from quern.core.text.units import significant

RECIPES = ("int2-g64", "gptq3-g64", "trellis2", "compact", "ternary")
TUNINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scales": {"tuning": {"train": "scales", "between": 0}},
    "codes": {"tuning": {"between": 0}},
    "tuned": {"tuning": {}},
    "tuned at 0.001": {"tuning": {"learning_rate": 0.001}},
    "rounding's all": {"rounding": CHOICES["all"]},
    "all, tuned at 0.001": {"rounding": CHOICES["all"], "tuning": {"learning_rate": 0.001}},
}
"""``tuned``: as recipes have it that say no more; what is not rounded yet, too. ``all``: as in rounding.py."""


def main() -> None:
    parser = parser_of(__doc__, "build/tuning")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--choices", nargs="+", default=list(TUNINGS), choices=list(TUNINGS))
    parser.add_argument("--threads", type=int)
    run(parser, measure, section)


def measure(options: argparse.Namespace) -> Path:
    """Measure every row that is not known yet, and keep all; the file."""
    rows = [
        row(options, recipe_with(recipe, choice)) | {"recipe": recipe, "choice": choice}
        for choice in options.choices
        for recipe in options.recipes
    ]
    content = {"model": Path(options.model).name, "tokens": options.tokens, "metrics_version": METRICS_VERSION}
    return write_result(f"tuning_{Path(options.model).name}", {**content, "rows": rows})


def recipe_with(name: str, choice: str) -> Recipe:
    """A recipe, shipped or of this folder, with a choice of tuning and rounding."""
    recipe = recipe_called(name)
    data, chosen = recipe.to_json(), TUNINGS[choice]
    data["rounding"] |= chosen.get("rounding", {})
    label = "".join(letter for letter in choice if letter.isalnum())
    return parse_recipe({**data, **chosen, "rounding": data["rounding"], "name": f"{name}-{label}"}, name)


def row(options: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """Bytes, time and divergence of one recipe, or what is known of them in the folder ``options.output``."""
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    known, artifact = folder / f"{recipe.name}.json", folder / "artifacts" / recipe.name
    asked = json.dumps(
        [recipe.to_json(), options.model, options.calibration, options.text, options.tokens], sort_keys=True
    )
    record: dict[str, Any] = json.loads(known.read_text("utf-8")) if known.is_file() else {}
    if record.get("asked") != asked:
        made = quern.quantize(
            options.model,
            artifact,
            recipe=recipe,
            calibration=options.calibration,
            threads=options.threads,
            cache=folder / "cache",
        )
        scored = quern.evaluate(
            artifact, reference=options.model, texts=options.text, tokens=options.tokens, speed_rounds=0
        )
        record = {
            "asked": asked,
            "tensor_bytes": sum(path.stat().st_size for path in artifact.glob("*.safetensors")),
            "bits_per_weight": made.bits_per_weight,
            "seconds": made.seconds,
            "kl": scored.kl_mean,
            "interval": scored.kl_ci95,
            "blocks": [block.model_dump() for block in made.tuning],
        }
        known.write_text(json.dumps(record), "utf-8")
    found = {key: value for key, value in record.items() if key != "asked"}
    print(recipe.name, found["tensor_bytes"], found["kl"], flush=True)
    return found


def section(result: Mapping[str, Any]) -> str:
    """The section of the page."""
    choices = list(dict.fromkeys(row["choice"] for row in result["rows"]))
    lines = [
        f"## {result['model']}: tuning",
        "",
        f"{result['date']}, {result['hardware']['cpu_model']}, {result['tokens']} tokens; made by",
        "`python benchmarks/tuning.py`. KL in nats a token; in brackets what is left of that of `plain`.",
        "",
        f"| recipe | bytes of tensors | {' | '.join(choices)} |",
        "|---" * (2 + len(choices)) + "|",
    ]
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        rows = {row["choice"]: row for row in result["rows"] if row["recipe"] == recipe}
        plain = rows["plain"]["kl"] if "plain" in rows else None
        cells = [cell(rows[choice], plain) if choice in rows else "-" for choice in choices]
        sizes = dict.fromkeys(f"{row['tensor_bytes']:,}" for row in rows.values())
        lines.append(f"| `{recipe}` | {', '.join(sizes)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(row: Mapping[str, Any], plain: float | None) -> str:
    """A divergence, and its share of the plain one."""
    return significant(row["kl"], 3) + (f" ({row['kl'] / plain:.2f})" if plain else "")


if __name__ == "__main__":
    main()
