"""What rounding's keys, tuning of blocks and training leave of a recipe's loss, one on top of the other, at the same bytes.

    python benchmarks/least_loss.py [MODEL] [--recipes NAME...] [--stages NAME...] [--seeds N...] [--calibration FILE...]
        [--calibration-tokens N] [--train-tokens 131072] [--passes 1] [--text NAME=FILE...] [--tokens 8192] [--threads N]
        [-o FOLDER] [--page docs/accuracy.md]
    python benchmarks/least_loss.py --from RESULT.json --page docs/accuracy.md

Stages: ``plain`` is the recipe, ``medium`` and ``high`` are the efforts of that name (docs/accuracy.md), ``trained`` goes on
from ``high`` with ``quern train`` on the calibration text. Artifacts and what was measured stay in FOLDER, so that the same
command goes on after an interruption; the result is written as results/least_loss_*.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measured import write_result
from rounding import HELD_OUT, divergence, mean
from section_script import named_file, parser_of, recipe_called, run

import quern
from quern.core.effort import EFFORTS, with_effort
from quern.core.recipe import Recipe, parse_recipe
from quern.core.results import METRICS_VERSION
from quern.core.text.units import significant

RECIPES = ("balanced", "trellis3", "trellis2", "compact", "gptq4-g64", "gptq3-g64")
STAGES = ("plain", *EFFORTS, "trained")


def main() -> None:
    parser = parser_of(__doc__, "build/least_loss")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--calibration-tokens", type=int)
    parser.add_argument("--train-tokens", type=int, default=131072)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--text", nargs="*", type=named_file, default=[], metavar="NAME=FILE")
    parser.add_argument("--threads", type=int)
    run(parser, measure, section, check)


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the script where options do not go together, before anything is measured."""
    if "trained" in options.stages and "high" not in options.stages:
        parser.error("--stages: trained goes on from high, which is to be named too")
    options.stages.sort(key=STAGES.index)


def measure(options: argparse.Namespace) -> Path:
    """Measure every row that is not known yet, and keep all; the file."""
    rows = []
    for seed in options.seeds:
        for name in options.recipes:
            rows += [row(options, name, stage, seed) for stage in options.stages]
    asked = {key: getattr(options, key) for key in ("train_tokens", "passes", "tokens", "calibration_tokens")}
    content = {"model": Path(options.model).name, **asked, "metrics_version": METRICS_VERSION}
    content["calibration"] = [Path(file).name for file in options.calibration]
    return write_result(f"least_loss_{Path(options.model).name}", {**content, "rows": rows})


def recipe_at(options: argparse.Namespace, name: str, stage: str) -> Recipe:
    """A recipe, shipped or of this folder, as it is quantized for a stage."""
    data = {**recipe_called(name).to_json(), "format": "quern", "storage": "plain"}
    if options.calibration_tokens is not None:
        data["calibration"]["tokens"] = options.calibration_tokens
    return parse_recipe(with_effort(data, {"plain": None, "trained": "high"}.get(stage, stage), name), name)


def row(options: argparse.Namespace, name: str, stage: str, seed: int) -> dict[str, Any]:
    """Bytes, time and divergences of one recipe at one stage; what the folder knows is not done again."""
    folder = Path(options.output)
    texts = dict(options.text) or {HELD_OUT: None}
    artifact, known = folder / f"{name}-{stage}-{seed}", folder / f"{name}-{stage}-{seed}.measured.json"
    given: dict[str, Any] = {"threads": options.threads, "seed": seed}
    recipe = recipe_at(options, name, stage)
    asked = json.dumps(
        [
            recipe.to_json(),
            options.model,
            options.calibration,
            options.train_tokens,
            options.passes,
            texts,
            options.tokens,
        ]
    )
    record: dict[str, Any] = json.loads(known.read_text("utf-8")) if known.is_file() else {}
    if record.get("asked") != asked:
        if stage == "trained":
            trained = quern.train(
                options.model, artifact, artifact=folder / f"{name}-high-{seed}", texts=options.calibration,
                tokens=options.train_tokens, passes=options.passes, **given,
            )  # fmt: skip
            made = {"seconds": trained.seconds, "steps": trained.steps, "best_step": trained.best_step}
        else:
            quantized = quern.quantize(
                options.model, artifact, recipe=recipe, calibration=options.calibration, cache=folder / "cache", **given
            )
            made = {"seconds": quantized.seconds, "bits_per_weight": quantized.bits_per_weight}
        found = {text: divergence(options, artifact, [file] if file else []) for text, file in texts.items()}
        size = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
        record = {"asked": asked, "bytes": size, **made, "texts": found}
        known.write_text(json.dumps(record), "utf-8")
    print(name, stage, seed, record["bytes"], {text: one["kl"] for text, one in record["texts"].items()}, flush=True)
    found = {key: value for key, value in record.items() if key != "asked"}
    return {"recipe": name, "stage": stage, "seed": seed, **found}


def section(result: Mapping[str, Any]) -> str:
    """The section of the page."""
    stages = [stage for stage in STAGES if any(row["stage"] == stage for row in result["rows"])]
    texts = list(result["rows"][0]["texts"])
    seeds = {row["seed"] for row in result["rows"]}
    lines = [
        f"## {result['model']}: one on top of the other",
        "",
        f"{result['date']}, {result['hardware']['cpu_model']}; calibrated and trained on "
        f"{', '.join(result['calibration']) or 'the usual text'}, calibration seeds {', '.join(map(str, sorted(seeds)))}; "
        f"training: {result['train_tokens']} tokens, passes: {result['passes']};",
        f"{result['tokens']} scored tokens of each text; made by `python benchmarks/least_loss.py`. KL in nats a token, in "
        "brackets what is left of that of",
        "`plain`; bytes of all tensors.",
        "",
        f"| recipe | bytes | text | {' | '.join(stages)} |",
        "|---" * (3 + len(stages)) + "|",
    ]
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        rows = {stage: [r for r in result["rows"] if (r["recipe"], r["stage"]) == (recipe, stage)] for stage in stages}
        sizes = ", ".join(sorted({f"{row['bytes']:,}" for found in rows.values() for row in found}))
        for text in [*texts, "mean"] if len(texts) > 1 else texts:
            cells = [cell(rows[stage], rows.get("plain", []), text) for stage in stages]
            lines.append(f"| `{recipe}` | {sizes} | {text} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(rows: list[dict[str, Any]], plain: list[dict[str, Any]], text: str) -> str:
    """A divergence, the mean over seeds, and its share of the plain one where that is known."""
    if not rows:
        return "-"
    found, before = (sum(of_text(row, text) for row in given) / max(1, len(given)) for given in (rows, plain))
    return significant(found, 3) + (f" ({found / before:.2f})" if before and rows is not plain else "")


def of_text(row: Mapping[str, Any], text: str) -> float:
    """The divergence on a text, or the mean over all."""
    return mean(row) if text == "mean" else float(row["texts"][text]["kl"])


if __name__ == "__main__":
    main()
