"""One decoder layer of a given shape: seconds and peak memory of rounding by each of the choices of docs/accuracy.md.

    python benchmarks/layer_cost.py [WORK_FOLDER] [--hidden 8192] [--intermediate 29568] [--heads 64] [--key-value-heads 8]
        [--tokens 8192] [--recipe gptq4-g64] [--choices plain drift sweep two-sided all] [--threads N]

Random bf16 weights with biases on queries, keys and values (by default those of a layer of Qwen2-72B), sequences of 512
tokens, bfloat16 arithmetic as for large models. Each choice runs in a process of its own; ``planned_bytes`` is what `quern
quantize` would have said it needs. ``rows_left`` and ``drift_share`` say of each linear what became of the choice there.
What was measured is kept in WORK_FOLDER, so that the same command goes on after an interruption. Target: all together at
most 2.5 times plain and 16 GB. Needs about 8 GB of disk at the default shape.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from measured import quantize_in_child, write_result
from rounding import CHOICES, recipe_with, write_recipe
from synthetic import write_checkpoint

from quern.core.artifact import PROVENANCE
from quern.core.errors import OutOfMemoryCapError
from quern.core.machine.parallel import available_threads
from quern.core.recipe import Recipe
from quern.pipeline.quantize import quantize

VERSIONS = ("quern", "torch", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--intermediate", type=int, default=29568)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--key-value-heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--recipe", default="gptq4-g64")
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=list(CHOICES))
    parser.add_argument("--threads", type=int, default=available_threads())
    options = parser.parse_args()
    if options.folder is None:
        with tempfile.TemporaryDirectory(prefix="quern-layer-") as folder:
            measure(options, Path(folder))
    else:
        measure(options, options.folder)


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Every choice that is not known yet, and a result file with all of them."""
    shape = {
        "hidden": options.hidden,
        "intermediate": options.intermediate,
        "heads": options.heads,
        "key_value_heads": options.key_value_heads,
    }
    model = folder / f"model-{'-'.join(map(str, shape.values()))}"
    if not (model / "model.safetensors.index.json").is_file():  # written last
        write_checkpoint(model, **shape, layers=1)
    rows = [cost(options, model, folder, choice) for choice in options.choices]
    known = {row["choice"]: row["seconds"] for row in rows}
    ratios = {name: seconds / known["plain"] for name, seconds in known.items()} if "plain" in known else {}
    print("times plain:", {name: round(ratio, 2) for name, ratio in ratios.items()})
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    asked = {"shape": shape, "tokens": options.tokens, "threads": options.threads, "recipe": options.recipe}
    print(write_result(f"layer_cost_{options.hidden}", {**asked, "versions": versions, "rows": rows, "ratios": ratios}))


def cost(options: argparse.Namespace, model: Path, folder: Path, choice: str) -> dict[str, Any]:
    """What one choice takes."""
    recipe = recipe_for(options, choice)
    known = folder / f"{model.name}-{recipe.name}-{options.tokens}-{options.threads}.json"
    if not known.is_file():
        artifact = folder / "artifact"
        shutil.rmtree(artifact, ignore_errors=True)
        given = {"model": str(model), "recipe": write_recipe(folder, recipe), "threads": options.threads}
        planned = planned_bytes(**given, output=str(artifact))
        found = quantize_in_child(**given, output=str(artifact), fresh=True)
        kept = {key: found[key] for key in ("seconds", "peak_rss_bytes", "bytes")}
        row = {"choice": choice, **kept, "planned_bytes": planned, **decided(artifact)}
        known.write_text(json.dumps(row), "utf-8")
    row = json.loads(known.read_text("utf-8"))
    peak, planned = row["peak_rss_bytes"] / 1e9, row["planned_bytes"] / 1e9
    print(f"{choice}: {row['seconds']:.0f} s, peak resident memory {peak:.2f} GB of {planned:.2f} planned", flush=True)
    return dict(row)


def recipe_for(options: argparse.Namespace, choice: str) -> Recipe:
    """The recipe with a choice of rounding, calibrated as that of a large model is."""
    recipe = recipe_with(options.recipe, choice)
    changed = {"tokens": options.tokens, "sequence_length": 512, "compute_dtype": "bfloat16"}
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=changed)})


def planned_bytes(**given: Any) -> int:
    """What the plan of memory says: a cap that nothing fits is refused before any work."""
    try:
        quantize(**given, memory=1, fresh=True)
    except OutOfMemoryCapError as error:
        return error.least_bytes
    raise AssertionError("one byte was enough")


def decided(artifact: Path) -> dict[str, dict[str, float]]:
    """By linear: what is left of held-out gradients' loss, and the share of the shift for drift."""
    layers = json.loads((artifact / PROVENANCE).read_text("utf-8"))["layers"]
    return {
        key: {layer["linear"].rpartition(".")[2]: layer[key] for layer in layers if layer.get(key) is not None}
        for key in ("rows_left", "drift_share")
    }


if __name__ == "__main__":
    main()
