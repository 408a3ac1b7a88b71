"""Decode and prefill speed of whole models beside llama.cpp: same shapes, random weights, same threads, same machine.

    python benchmarks/decode.py --llama-bench PATH [--shapes 0.5B 1.5B 7B] [--threads 1 2] [--rounds 3] [--folder DIR]

llama-bench comes from llama.cpp built natively, for instance from the source distribution of llama-cpp-python 0.3.36:
unpack it, then `cmake -S vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON && cmake --build build
--target llama-bench`. Every contender runs in a process of its own; contenders alternate over the rounds; the result is
the median with the extremes. Ratios within one run are results, absolute times on a shared machine are not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gguf_models import write_gguf
from measured import write_result

from quern.core.recipe import load_recipe
from quern.pipeline.forecasting.random_artifact import write_random_artifact

HERE = Path(__file__).parent
PROMPT, NEW = 512, 64
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
}
LLAMA = ("Q4_0", "Q4_K_M", "Q2_K", "IQ3_S", "IQ2_XXS")
OURS = ("speed-int4", "speed-trellis4", "speed-trellis3", "speed-trellis2", "speed-int8")

CHILD = """
import json, sys, time
from quern.engines.cpu import CpuEngine
path, threads, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
model = CpuEngine().load(path, threads=threads)
model.start().feed(list(range(16)))
session = model.start()
begin = time.perf_counter()
session.feed([i % 1000 for i in range(prompt)])
prefill = prompt / (time.perf_counter() - begin)
session = model.start()
begin = time.perf_counter()
for i in range(new):
    session.feed([i])
print(json.dumps({"prefill": prefill, "decode": new / (time.perf_counter() - begin)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["0.5B", "1.5B"], choices=SHAPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-types", nargs="+", default=list(LLAMA))
    parser.add_argument("--recipes", nargs="+", default=list(OURS))
    parser.add_argument("--folder", type=Path, help="Keeps the random models for another run.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quern-decode-") as temporary:
        rows: list[dict[str, Any]] = []
        for name in options.shapes:
            models = _models(name, options, options.folder or Path(temporary))
            for threads in options.threads:
                rows += _measure(name, models, threads, options)
                content = {"prompt": PROMPT, "new_tokens": NEW, "rows": rows}
                print(write_result(f"decode_{'_'.join(options.shapes)}", content), flush=True)


def _measure(name: str, models: dict[str, Path], threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    rounds: dict[str, list[dict[str, float]]] = {contender: [] for contender in models}
    loads = []
    for _ in range(options.rounds):
        loads.append(os.getloadavg()[0])
        for contender, path in models.items():
            run = _llama if path.suffix == ".gguf" else _ours
            rounds[contender].append(run(path, threads, options))
    for contender, found in rounds.items():
        row: dict[str, Any] = {"shape": name, "threads": threads, "contender": contender, "loads": loads}
        row["bytes"] = _bytes(models[contender])
        for kind in ("decode", "prefill"):
            values = sorted(value[kind] for value in found)
            row[kind] = {"median": statistics.median(values), "least": values[0], "most": values[-1]}
        rows.append(row)
        told = "  ".join(
            f"{kind} {row[kind]['median']:7.1f} ({row[kind]['least']:.1f}-{row[kind]['most']:.1f})"
            for kind in ("decode", "prefill")
        )
        print(f"{name} {threads} threads {contender:16} {row['bytes'] / 1e6:7.0f} MB  {told} tokens/s", flush=True)
    return rows


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a Qwen2 model of one of ``SHAPES``."""
    hidden, inner, layers, heads, pairs, tied = SHAPES[name]
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": pairs,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


def _models(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    config = config_of(name)
    models = {}
    for recipe in options.recipes:
        path = folder / f"{name}-{recipe}"
        if not (path / "config.json").is_file():
            write_random_artifact(path, config, load_recipe(HERE / "recipes" / f"{recipe}.yaml"))
        models[recipe] = path
    for kind in options.llama_types:
        path = folder / f"{name}-{kind}.gguf"
        if not path.is_file():
            write_gguf(path, config, kind)
        models[f"llama.cpp {kind}"] = path
    return models


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _ours(path: Path, threads: int, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, str(path), str(threads), str(PROMPT), str(NEW)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _llama(path: Path, threads: int, options: argparse.Namespace) -> dict[str, float]:
    command = [str(options.llama_bench), "-m", str(path), "-p", str(PROMPT), "-n", str(NEW), "-t", str(threads)]
    done = subprocess.run([*command, "-r", "1", "-o", "json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    tests = json.loads(done.stdout)
    speed = {"prefill" if test["n_prompt"] else "decode": float(test["avg_ts"]) for test in tests}
    return speed


if __name__ == "__main__":
    main()
