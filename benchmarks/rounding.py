"""What drift targets, sweeps and both sides of a linear are worth, each alone and all together, at the same bytes.

    python benchmarks/rounding.py [MODEL] [--calibration C4] [--text NAME=FILE...] [--recipes NAME...] [--choices NAME...]
        [--tokens 8192] [-o FOLDER] [--page docs/accuracy.md]
    python benchmarks/rounding.py --from RESULT.json --page docs/accuracy.md

Quantizes MODEL (default: the bundled one) by every recipe with every choice of rounding, and measures the divergence on each
text by itself. What was measured is kept in FOLDER, so that the same command goes on after an interruption, and as
results/rounding_*.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measured import quantize_in_child, write_result
from section_script import parser_of, recipe_called, run

import quern
from quern.core.recipe import Recipe
from quern.core.recipe_parts import Rounding
from quern.core.results import METRICS_VERSION
from quern.core.text.units import significant

RECIPES = ("balanced", "trellis3", "trellis2", "compact", "gptq4-g64", "gptq3-g64")
CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "drift": {"target": "drift"},
    "sweep": {"sweeps": 1},
    "two-sided": {"two_sided": True},
    "all": {"target": "drift", "sweeps": 1, "two_sided": True},
}
HELD_OUT = "held-out Python"
"""The text where none is given."""


def main() -> None:
    parser = parser_of(__doc__, "build/rounding")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--choices", nargs="*", default=list(CHOICES), choices=list(CHOICES))
    run(parser, measure, section)


def measure(options: argparse.Namespace) -> Path:
    """Measure every row that is not known yet, and keep all; the file."""
    texts = dict(given.split("=", 1) for given in options.text) or {HELD_OUT: None}
    rows = [
        row(options, recipe_with(recipe, choice), options.calibration, texts) | {"recipe": recipe, "choice": choice}
        for recipe in options.recipes
        for choice in options.choices
    ]
    content = {"model": Path(options.model).name, "tokens": options.tokens, "metrics_version": METRICS_VERSION}
    return write_result(f"rounding_{Path(options.model).name}", {**content, "rows": rows})


def recipe_with(name: str, choice: str) -> Recipe:
    """A recipe, shipped or of this folder, rounded by a choice."""
    recipe = recipe_called(name)
    rounding = Rounding.model_validate({**recipe.rounding.model_dump(), **CHOICES[choice]})
    return recipe.model_copy(update={"name": f"{recipe.name}-{choice}", "rounding": rounding})


def row(
    options: argparse.Namespace, recipe: Recipe, calibration: list[str], texts: Mapping[str, str | None]
) -> dict[str, Any]:
    """Bytes, cost and divergences of one recipe, or what is known of them in the folder ``options.output``."""
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    known, artifact = folder / f"{recipe.name}.json", folder / "artifact"
    given = [recipe.to_json(), options.model, calibration, dict(texts), options.tokens]
    asked = json.dumps(given, sort_keys=True)
    record: dict[str, Any] = json.loads(known.read_text("utf-8")) if known.is_file() else {}
    if record.get("asked") != asked:
        made = quantize_in_child(
            model=options.model,
            output=str(artifact),
            recipe=write_recipe(folder, recipe),
            calibration=calibration,
            fresh=True,
        )
        record = {
            "asked": asked,
            **{key: made[key] for key in ("bytes", "bits_per_weight", "seconds", "peak_rss_bytes")},
        }
        record["texts"] = {
            name: divergence(options, artifact, [] if file is None else [file]) for name, file in texts.items()
        }
        known.write_text(json.dumps(record), "utf-8")
    found = {key: value for key, value in record.items() if key != "asked"}
    print(recipe.name, found["bytes"], {name: one["kl"] for name, one in found["texts"].items()}, flush=True)
    return found


def write_recipe(folder: Path, recipe: Recipe) -> str:
    """The file of a recipe, for another process."""
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe.to_json()), "utf-8")
    return str(path)


def divergence(options: argparse.Namespace, artifact: Path, texts: list[str]) -> dict[str, Any]:
    """KL from the unquantized model in nats a token, on the cpu engine."""
    found = quern.evaluate(artifact, reference=options.model, texts=texts, tokens=options.tokens, speed_rounds=0)
    return {"kl": found.kl_mean, "interval": found.kl_ci95, "noise_floor": found.kl_noise_floor}


def section(result: Mapping[str, Any]) -> str:
    """The section of the page."""
    texts = list(result["rows"][0]["texts"])
    choices = list(dict.fromkeys(row["choice"] for row in result["rows"]))
    lines = [
        f"## {result['model']}",
        "",
        f"{result['date']}, {result['hardware']['cpu_model']}, {result['tokens']} tokens of {', '.join(texts)}; made by",
        "`python benchmarks/rounding.py`. KL in nats a token"
        + (", the mean of the texts" if len(texts) > 1 else "")
        + "; in",
        "brackets what is left of that of `plain`.",
        "",
        f"| recipe | bytes | {' | '.join(choices)} |",
        "|---" * (2 + len(choices)) + "|",
    ]
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        rows = {row["choice"]: row for row in result["rows"] if row["recipe"] == recipe}
        plain = mean(rows["plain"]) if "plain" in rows else None
        cells = [cell(rows[choice], plain) if choice in rows else "-" for choice in choices]
        lines.append(f"| `{recipe}` | {next(iter(rows.values()))['bytes']:,} | {' | '.join(cells)} |")
    lines += ["", "Seconds to quantize, of which the machine's other work is a part, and peak memory in MiB:", ""]
    lines += [f"| recipe | {' | '.join(choices)} |", "|---" * (1 + len(choices)) + "|"]
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        rows = {row["choice"]: row for row in result["rows"] if row["recipe"] == recipe}
        cells = [
            f"{rows[c]['seconds']:.0f} s, {rows[c]['peak_rss_bytes'] / 2**20:.0f}" if c in rows else "-"
            for c in choices
        ]
        lines.append(f"| `{recipe}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean(row: Mapping[str, Any]) -> float:
    """KL over the texts."""
    found = [float(one["kl"]) for one in row["texts"].values()]
    return sum(found) / len(found)


def cell(row: Mapping[str, Any], plain: float | None) -> str:
    """A divergence, and its share of the plain one."""
    found = mean(row)
    return significant(found, 3) + (f" ({found / plain:.2f})" if plain else "")


if __name__ == "__main__":
    main()
