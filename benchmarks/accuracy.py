"""Accuracy of recipes side by side on one model.

    python benchmarks/accuracy.py MODEL --calibration C4 --text WIKITEXT --choice BLIMP.jsonl ... [-o FOLDER]

Round to nearest, GPTQ with and without Fisher token weights at 4 and 3 bits, trellis codes, and the shipped profiles;
16,384 tokens of calibration. Prints the KL ratios that the project watches, then scores the shipped profiles on the choices.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

from rich.console import Console

import quern
from quern.cli.terminal.progress import progress_on
from quern.core.results import Results

HERE = Path(__file__).parent
SHIPPED = ["fast", "balanced", "compact"]
PAIRS = [("gptq4-g64", "nearest4-g64"), ("gptq4-g64-plain", "nearest4-g64"), ("gptq3-g64", "nearest3-g64")]
"""Pairs of the same bytes whose ratio of KL the project watches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--choice", nargs="*", default=[])
    parser.add_argument("--recipes", nargs="*", help="Names in recipes/ and shipped ones; default: all.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--theme", default="divergence", help="The result file's name begins with it.")
    parser.add_argument("-o", "--output", default="build/accuracy")
    options = parser.parse_args()
    ours = {path.stem: str(path) for path in sorted((HERE / "recipes").glob("*.yaml")) if _meant(path.stem)}
    chosen = [ours.get(name, name) for name in options.recipes or [*ours, *SHIPPED]]
    kl = {row.name: row.kl_mean for row in _compare(options, options.theme, chosen, []).rows}
    for gptq, nearest in PAIRS:
        mine, theirs = kl.get(gptq), kl.get(nearest)
        if mine is not None and theirs is not None:
            print(f"KL of {gptq} / {nearest} = {mine:.4f} / {theirs:.4f} = {mine / theirs:.3f}")
    if options.choice:
        _compare(options, "choices", SHIPPED, options.choice)


def _meant(recipe: str) -> bool:
    """Whether a recipe is there for its accuracy."""
    return not recipe.startswith("speed-") and "g128" not in recipe


def _compare(options: argparse.Namespace, theme: str, recipes: list[str], choices: list[str]) -> Results:
    with progress_on(Console(stderr=True)) as progress:
        results = quern.compare(
            options.model,
            options.output,
            recipes=recipes,
            calibration=options.calibration,
            texts=options.text,
            choices=choices,
            tokens=options.tokens,
            speed_rounds=0,
            progress=progress,
        )
    for row in results.rows:
        print(row.name, json.dumps(row.model_dump(exclude={"recipe", "layers", "artifact_sha256"}, mode="json")))
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    target = HERE / "results" / f"{theme}_{Path(options.model).name}_{date}.json"
    named = results.model.model_copy(update={"path": Path(options.model).name})  # not where it lies on this machine
    target.write_text(results.model_copy(update={"model": named}).model_dump_json(indent=2) + "\n", "utf-8")
    print(target, flush=True)
    return results


if __name__ == "__main__":
    main()
