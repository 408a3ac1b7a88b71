"""Artifacts in ONNX Runtime beside quern's own engine: bytes, divergence and decode speed of the same stored values.

    python benchmarks/onnx_files.py FOLDER [--recipes NAME...] [--rounds 6] [-o RESULT.json]

Needs ONNX Runtime (``quern peers install onnxruntime``). Each recipe is quantized once in format quern and exported; the
loss is the mean KL divergence to the unquantized model in float32 on the same held-out tokens, by the reference engine (the
stored values as they are), by the cpu engine, and by ONNX Runtime with both accuracy levels. Rounds of decoding alternate
between the cpu engine and ONNX Runtime, one thread each. FOLDER keeps what was made, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import quern
from quern.advisor.hardware import probe
from quern.checkpoint.tokenizer import load_tokenizer
from quern.comparison.tool_process import launch_of
from quern.comparison.worker_process import Worker, as_other_tools
from quern.engines.base import ENGINES
from quern.evaluation.heldout import held_out_text
from quern.evaluation.speed import prompt_of
from quern.peers.environment import Environment
from quern.pipeline.export import export
from quern.pipeline.output import artifact_size
from quern.pipeline.quantize import quantize

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "python-7m"
JUDGE = ROOT / "tests" / "onnx_judge.py"
OWN = ROOT / "benchmarks" / "recipes"
RECIPES = ("rtn4", "hadamard-gptq4-g64", "fast")
SEQUENCES, LENGTH = 16, 256
PROMPT, NEW = 64, 64
LIMIT_S = 3600.0
LEVELS, ENGINE_NAMES = ("1", "4"), ("reference", "cpu")


def held_out_ids() -> list[list[int]]:
    ids = load_tokenizer(MODEL).encode("\n".join(text for _, text in held_out_text()))[: SEQUENCES * LENGTH]
    return [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]


def by_onnxruntime(environment: Environment, folder: Path, models: list[Path], ids: list[list[int]]) -> None:
    """``NAME.npz`` beside each model that has none."""
    missing = [str(model) for model in models if not Path(f"{model}.npz").is_file()]
    request = folder / "request.json"
    asked = {"products": [], "folders": missing, "ids": ids, "prompt": LENGTH, "generate": []}
    request.write_text(json.dumps(asked), "utf-8")
    command = [str(environment.python), "-P", "-s", str(JUDGE), str(Path(quern.__file__).parent), str(request)]
    subprocess.run(command, env=environment.variables(), check=True)


def log_softmax(logits: Any) -> torch.Tensor:
    return torch.as_tensor(logits).double().log_softmax(-1)


def divergence(exact: torch.Tensor, logits: Any) -> float:
    """Mean KL divergence in nats a token."""
    return float((exact.exp() * (exact - log_softmax(logits))).sum(-1).mean())


def decode_speeds(environment: Environment, scratch: Path, ours: Path, theirs: Path, rounds: int) -> dict[str, Any]:
    """Medians and ranges of tokens a second, rounds in turn, and of the ratio of each round."""
    found: dict[str, list[float]] = {"quern": [], "onnxruntime": []}
    with (
        Worker("quern", as_other_tools()) as first,
        Worker("onnxruntime", launch_of(environment, scratch, None, LIMIT_S)) as second,
    ):
        first.ask({"do": "load", "path": str(ours), "threads": 1, "engine": "cpu", "dtype": "float32"})
        loaded = second.ask({"do": "load", "path": str(theirs), "threads": 1})
        prompt = prompt_of(PROMPT, loaded["vocabulary_size"], seed=0)
        asked = {"do": "measure", "name": "decode", "prompt": prompt, "decode_tokens": NEW}
        for number in range(rounds + 1):
            for name, worker in (("quern", first), ("onnxruntime", second)):
                raw = worker.ask(asked)["raw"]
                if number:  # the first warms up
                    found[name].append(raw["decode_tokens"] / raw["decode_s"])
    ratios = [theirs / ours for ours, theirs in zip(found["quern"], found["onnxruntime"], strict=True)]
    named = {**found, "ratio": ratios}
    return {name: [statistics.median(all_), min(all_), max(all_)] for name, all_ in named.items()}


def stored_values(
    environment: Environment, folder: Path, name: str, exact: Any, ids: list[list[int]]
) -> dict[str, Any]:
    """Bytes and losses of a recipe, by all that run it; read from FOLDER where they are known. ``exact``: log
    probabilities of the unquantized model, when they are asked for."""
    known = folder / f"{name}.json"
    if known.is_file():
        found: dict[str, Any] = json.loads(known.read_text("utf-8"))
        return found
    artifact, own = folder / name, OWN / f"{name}.yaml"
    quantize(MODEL, artifact, recipe=own if own.is_file() else name)
    exported = {level: folder / f"{name}-onnx-{level}" for level in LEVELS}
    for level, path in exported.items():
        export(artifact, path, format="onnx", format_options={"accuracy-level": level})
    by_onnxruntime(environment, folder, list(exported.values()), ids)
    logits = {
        engine: ENGINES.get(engine)().load(artifact, dtype="float32").logits(torch.tensor(ids))
        for engine in ENGINE_NAMES
    }
    logits |= {f"onnxruntime {level}": np.load(f"{path}.npz")["whole"] for level, path in exported.items()}
    row = {
        "recipe": name,
        "bytes": {"quern": artifact_size(artifact), "onnx": artifact_size(exported["4"])},
        "kl": {who: divergence(exact(), found) for who, found in logits.items()},
    }
    known.write_text(json.dumps(row), "utf-8")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    environment, ids = Environment.of("onnxruntime"), held_out_ids()
    if (installed := environment.installed()) is None:
        raise SystemExit("onnxruntime is not installed; run: quern peers install onnxruntime")

    @cache
    def exact() -> torch.Tensor:
        return log_softmax(ENGINES.get("reference")().load(MODEL, dtype="float32").logits(torch.tensor(ids)))

    rows = []
    for name in given.recipes:
        row = stored_values(environment, folder, name, exact, ids)
        if not given.no_speed:
            found = folder / name, folder / f"{name}-onnx-4"
            row["decode"] = decode_speeds(environment, folder, *found, given.rounds)
        rows.append(row)
        print(json.dumps(row))
    if given.output is not None:
        timed = {} if given.no_speed else {"decode": {"prompt": PROMPT, "tokens": NEW}}
        result = {
            "model": str(MODEL.relative_to(ROOT)), "date": datetime.date.today().isoformat(), "quern": quern.__version__,
            "onnxruntime": installed.version, "processor": probe(measure=False)["cpu_model"],
            "scored": {"sequences": SEQUENCES, "tokens": LENGTH}, "rows": rows,
        } | timed  # fmt: skip
        given.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
