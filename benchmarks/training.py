"""What training wins back of what rounding loses, at the same bytes.

    python benchmarks/training.py [MODEL] [--recipes NAME...] [--calibration FILE...] [--calibration-tokens N]
        [--train codes] [--train-tokens 106496] [--passes 3] [--text NAME=FILE...] [--tokens 8192] [--threads N]
        [-o FOLDER] [--page docs/training.md]
    python benchmarks/training.py --from RESULT.json --page docs/training.md

Quantizes MODEL (default: the bundled one) by every recipe on the calibration text, trains that on the same text, and
measures the divergence of both on each text by itself. Artifacts and what was measured stay in FOLDER, so that the same
command goes on after an interruption; the result is written as results/training_*.json.
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
from quern.core.artifact import PROVENANCE
from quern.core.recipe import Recipe
from quern.core.results import METRICS_VERSION
from quern.core.text.units import significant


def main() -> None:
    parser = parser_of(__doc__, "build/training")
    parser.add_argument("--recipes", nargs="+", default=["ternary", "int2-g64", "trellis2"])
    parser.add_argument("--calibration-tokens", type=int)
    parser.add_argument("--compute-dtype", default="auto")
    parser.add_argument("--train", default="codes", choices=["codes", "scales"])
    parser.add_argument("--train-tokens", type=int, default=106496)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--text", nargs="*", type=named_file, default=[], metavar="NAME=FILE")
    parser.add_argument("--threads", type=int)
    run(parser, measure, section)


def measure(options: argparse.Namespace) -> Path:
    """Measure every row that is not known yet, and keep all; the file."""
    settings = {key: getattr(options, key) for key in ("train", "train_tokens", "passes", "tokens")}
    content = {"model": Path(options.model).name, **settings, "metrics_version": METRICS_VERSION}
    content["calibration"] = [Path(file).name for file in options.calibration]
    return write_result(
        f"training_{Path(options.model).name}", {**content, "rows": [row(options, name) for name in options.recipes]}
    )


def calibrated(options: argparse.Namespace, name: str) -> Recipe:
    """A recipe, shipped or of this folder, as the options calibrate it, in the format that training reads."""
    recipe = recipe_called(name)
    changes: dict[str, Any] = {"compute_dtype": options.compute_dtype}
    if options.calibration_tokens is not None:
        changes["tokens"] = options.calibration_tokens
    calibration = recipe.calibration.model_copy(update=changes)
    return recipe.model_copy(update={"calibration": calibration, "format": "quern", "storage": "plain"})


def row(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """What rounding and training by one recipe cost and lose; what the folder knows is not done again."""
    folder = Path(options.output)
    texts = dict(options.text) or {HELD_OUT: None}
    given: dict[str, Any] = {"threads": options.threads}
    before, after = folder / name, folder / f"{name}-{options.train}-{options.train_tokens}-{options.passes}"
    quantized = quern.quantize(
        options.model, before, recipe=calibrated(options, name), calibration=options.calibration, **given
    )
    trained = quern.train(
        options.model,
        after,
        artifact=before,
        texts=options.calibration,
        train=options.train,
        tokens=options.train_tokens,
        passes=options.passes,
        **given,
    )
    record: dict[str, Any] = {"recipe": name, "bits_per_weight": quantized.bits_per_weight, "bytes": trained.bytes}
    record |= {"steps": trained.steps, "best_step": trained.best_step, "notes": trained.notes}
    for key, artifact, seconds in (("quantized", before, quantized.seconds), ("trained", after, trained.seconds)):
        known = folder / f"{artifact.name}.measured.json"
        found = json.loads(known.read_text("utf-8")) if known.is_file() else {}
        made_as = json.loads((artifact / PROVENANCE).read_text("utf-8"))["fingerprint"]
        if found.get("asked") != (asked := [texts, options.tokens, made_as]):
            found = {"asked": asked, "seconds": seconds}
            found["texts"] = {
                text: divergence(options, artifact, [file] if file else []) for text, file in texts.items()
            }
            known.write_text(json.dumps(found), "utf-8")
        record[key] = {"seconds": found["seconds"], "texts": found["texts"]}
    print(name, *(f"{key} {significant(mean(record[key]), 3)}" for key in ("quantized", "trained")), flush=True)
    return record


def section(result: Mapping[str, Any]) -> str:
    """The section of the page."""
    texts = list(result["rows"][0]["quantized"]["texts"])
    columns = [*texts, "mean"] if len(texts) > 1 else texts
    lines = [
        f"## {result['model']}: before and after",
        "",
        f"{result['date']}, {result['hardware']['cpu_model']}; calibrated and trained on "
        f"{', '.join(result['calibration']) or 'the usual text'}, `--train {result['train']} "
        f"--tokens {result['train_tokens']} "
        f"--passes {result['passes']}`; {result['tokens']} tokens of each text; made by",
        "`python benchmarks/training.py`. KL in nats a token before -> after.",
        "",
        f"| recipe | bits per weight | {' | '.join(columns)} |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for row in result["rows"]:
        before, after = row["quantized"], row["trained"]
        pairs = [(before["texts"][text]["kl"], after["texts"][text]["kl"]) for text in texts]
        if len(texts) > 1:
            pairs.append((mean(before), mean(after)))
        cells = [f"{significant(a, 3)} -> {significant(b, 3)} ({100 * (b / a - 1):+.0f} %)" for a, b in pairs]
        lines.append(f"| `{row['recipe']}` | {row['bits_per_weight']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
