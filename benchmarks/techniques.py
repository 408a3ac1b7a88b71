"""Every technique on one model: what it costs and buys, and the page that says so.

    python benchmarks/techniques.py [MODEL] [-o FOLDER] [--page docs/techniques.md] [--no-speed]

Runs ``quern compare`` over the recipes below (default model: the bundled one; an interrupted run continues in FOLDER) and
writes the page, up to its first section, from results.json alone: ``--from RESULTS.json`` writes it again without measuring.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import yaml
from pages import write_head

import quern
from quern.core.results import Results, Row, load_results

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "python-7m"
MINE = ROOT / "benchmarks" / "recipes"


@dataclass(frozen=True)
class Technique:
    """A row of the page (techniques.yaml)."""

    name: str
    recipe: str
    """A shipped one, or a file of benchmarks/recipes."""
    what: str
    when: str


TECHNIQUES = [
    Technique(**entry) for entry in yaml.safe_load((ROOT / "benchmarks" / "techniques.yaml").read_text("utf-8"))
]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=MODEL)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "techniques")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--from", dest="results", type=Path)
    parser.add_argument("--no-speed", action="store_true")
    options = parser.parse_args()
    if options.results is None:
        recipes = [path if (path := MINE / f"{t.recipe}.yaml").is_file() else t.recipe for t in TECHNIQUES]
        quern.compare(options.model, options.output, recipes=recipes, speed_rounds=0 if options.no_speed else 3)
        options.results = options.output / "results.json"
    text = page(load_results(options.results))
    if options.page:
        write_head(options.page, text)
    print(text)


def page(results: Results) -> str:
    """The page of these results."""
    rows = {row.name: row for row in results.rows}
    lines = [
        "# Techniques, measured",
        "",
        f"Model `{Path(results.model.path).name}`, {results.hardware.get('cpu_model')}, {results.created[:10]}; made by",
        "`python benchmarks/techniques.py --page docs/techniques.md`. `quern recipes` and benchmarks/recipes have the",
        "recipes, [recipes.md](recipes.md) their keys. Bits are those of all weights with their scales, embedding and head.",
        "Accuracy loss is the KL divergence from the unquantized model in nats a token, with its 95 % interval, as",
        "[results.md](results.md) defines it. What a technique does to a small model need not be what it does to a",
        "large one.",
        "",
        "| technique | recipe | what it is | when | bits | smaller by | loss (KL) | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [line(technique, rows[technique.recipe]) for technique in TECHNIQUES if technique.recipe in rows]
    return "\n".join(lines) + "\n"


def line(technique: Technique, row: Row) -> str:
    """A row of the table."""
    low, high = row.kl_ci95 or (float("nan"), float("nan"))
    loss = "-" if row.kl_mean is None else f"{row.kl_mean:.3g} ({low:.3g} to {high:.3g})"
    speed = "-" if row.decode_tokens_per_s is None else f"{row.decode_tokens_per_s:.0f}"
    cells = (technique.name, f"`{technique.recipe}`", technique.what, technique.when, f"{row.bits_per_weight:.2f}",
             f"{100 * row.compression:.0f} %", loss, speed)  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
