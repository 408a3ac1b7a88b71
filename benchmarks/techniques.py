"""Every technique on one model: what it costs and buys, and the page that says so.

    python benchmarks/techniques.py [MODEL] [-o FOLDER] [--page docs/techniques.md] [--no-speed]
        [--calibration TEXT...] [--text TEXT...] [--recipes NAME...] [--from RESULTS] [--also RESULTS]

Runs ``quern compare`` over the recipes below (default model: the bundled one; an interrupted run continues in FOLDER) and
writes the page, up to its first section, from results.json alone: ``--from RESULTS.json`` writes it again without measuring,
``--also`` adds columns with the size and the loss of another model.
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
    parser.add_argument("--also", type=Path)
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--calibration", nargs="*", default=[])
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--recipes", nargs="*", help="Some of the techniques only, by their recipes.")
    options = parser.parse_args()
    if options.results is None:
        wanted = [one.recipe for one in TECHNIQUES if options.recipes is None or one.recipe in options.recipes]
        recipes = [path if (path := MINE / f"{name}.yaml").is_file() else name for name in wanted]
        quern.compare(
            options.model,
            options.output,
            recipes=recipes,
            calibration=options.calibration,
            texts=options.text,
            tokens=options.tokens,
            speed_rounds=0 if options.no_speed else 3,
        )
        options.results = options.output / "results.json"
    also = load_results(options.also) if options.also else None
    text = page(load_results(options.results), also)
    if options.page:
        write_head(options.page, text)
    print(text)


def page(results: Results, also: Results | None = None) -> str:
    """The page of these results, with what the same recipes did to another model."""
    rows = {row.name: row for row in results.rows}
    others = {} if also is None else {row.name: row for row in also.rows}
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
    ]
    head = ["technique", "recipe", "what it is", "when", "bits", "smaller by", "loss (KL)", "tokens/s"]
    if also is not None:
        name = Path(also.model.path).name
        lines[-1:] = [_about(also), ""]
        head += [f"bits, {name}", f"loss (KL), {name}"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for technique in TECHNIQUES:
        if technique.recipe in rows:
            cells = line(technique, rows[technique.recipe])
            if also is not None:
                other = others.get(technique.recipe)
                cells += ("-", "-") if other is None else (f"{other.bits_per_weight:.2f}", loss_of(other))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _about(also: Results) -> str:
    texts = "; ".join(f"{source.tokens} tokens of `{source.name}`" for source in also.texts)
    return (
        f"The last two columns are of `{Path(also.model.path).name}` ({also.created[:10]}): {texts}. Made by the same\n"
        "command with MODEL, `--calibration` and `--text`, whose results `--also` then takes."
    )


def line(technique: Technique, row: Row) -> tuple[str, ...]:
    """The cells of a row of the table."""
    speed = "-" if row.decode_tokens_per_s is None else f"{row.decode_tokens_per_s:.0f}"
    return (technique.name, f"`{technique.recipe}`", technique.what, technique.when, f"{row.bits_per_weight:.2f}",
            f"{100 * row.compression:.0f} %", loss_of(row), speed)  # fmt: skip


def loss_of(row: Row) -> str:
    """KL with its interval."""
    low, high = row.kl_ci95 or (float("nan"), float("nan"))
    return "-" if row.kl_mean is None else f"{row.kl_mean:.3g} ({low:.3g} to {high:.3g})"


if __name__ == "__main__":
    main()
