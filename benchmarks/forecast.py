"""What `quern forecast` says of this machine against what is then measured: bytes, seconds, memory, tokens/s.

    python benchmarks/forecast.py [--only NAME,...] [--folder DIR] [--page benchmarks/README.md] [--from RESULT.json]
    python benchmarks/forecast.py --processor-seconds [--only NAME,...]

Each run is a model and a recipe: it is forecast in a process of its own, quantized in another one, and the artifact decoded
in a third one. The models are the bundled one, a small trained one where it is given by --small FOLDER, and random ones of
three shapes that are drawn from a seed (tools/make_synthetic_checkpoint.py). Takes about 8 minutes on two cores.
Targets: each figure within 15 % of what is measured, the median within 8 %.

With --processor-seconds the time to quantize alone is foretold and measured, with one thread, in seconds of the processor:
what others do on the machine meanwhile hardly counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measured import quantize_in_child, write_result
from pages import write_section

from quern.core.machine.foreign_load import ForeignLoad
from quern.core.text.units import bytes_text, seconds_text, significant

ROOT = Path(__file__).resolve().parents[1]
MINE = ROOT / "benchmarks" / "recipes"
NEW = 32
BASE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip


def shape(hidden: int, inner: int, layers: int, heads: int, pairs: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    """A config.json."""
    return {
        **BASE, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": pairs, "vocab_size": vocabulary, "tie_word_embeddings": tied,
    }  # fmt: skip


SHAPES = {
    "30M": shape(512, 1408, 8, 8, 4, 8192, True),
    "0.1B": shape(768, 2048, 12, 12, 4, 32000, True),
    "0.3B": shape(1024, 2816, 20, 16, 4, 32000, False),
}
RUNS: list[tuple[str, str, int | None]] = [
    ("bundled", "compact", None),
    ("bundled", "fast", None),
    ("bundled", "rtn4", None),
    ("small", "balanced", None),
    ("30M", "compact", 4096),
    ("30M", "gptq4-g64", 8192),
    ("0.1B", "balanced", 2048),
    ("0.1B", "fast", 4096),
    ("0.1B", "rtn4", None),
    ("0.3B", "rtn4", None),
    ("0.3B", "q8_0", 1024),
]
"""Model, recipe, calibration tokens (None: the recipe's)."""
FIGURES = {
    "artifact_bytes": bytes_text, "quantize_seconds": seconds_text, "quantize_memory": bytes_text,
    "run_memory": bytes_text, "prefill": significant, "decode": significant,
}  # fmt: skip
FORECAST = """
import json, sys, time
import quern
from quern.pipeline.forecasting import short_quantization
given = json.loads(sys.stdin.read())
if given["processor"]:
    short_quantization.clock = time.process_time
print(quern.forecast(given["model"], recipes=[given["recipe"]], context=given["context"],
                     calibration_tokens=given["tokens"], threads=given["threads"]).model_dump_json())
"""
QUANTIZE = """
import json, sys, time
from types import SimpleNamespace
from quern.pipeline import quantize
quantize.time = SimpleNamespace(perf_counter=time.process_time)
print(json.dumps({"quantize_seconds": quantize.quantize(**json.loads(sys.stdin.read())).seconds}))
"""
DECODE = """
import json, statistics, sys, time
from quern.core.machine.memory import peak_rss
from quern.engines.cpu import CpuEngine
path, prompt, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = CpuEngine().load(path)
ids = [i % min(1000, model.vocabulary_size) for i in range(prompt)]
model.start().feed(ids[:16])
prefill, decode = [], []
for _ in range(3):
    session = model.start()
    begin = time.perf_counter()
    session.feed(ids)
    middle = time.perf_counter()
    for token in ids[:new]:
        session.feed([token])
    decode.append(new / (time.perf_counter() - middle))
    prefill.append(prompt / (middle - begin))
print(json.dumps({"prefill": statistics.median(prefill), "decode": statistics.median(decode), "run_memory": peak_rss()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of runs, such as 30M-compact")
    parser.add_argument("--small", type=Path, help="a small trained model")
    parser.add_argument("--processor-seconds", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--from", dest="result", type=Path)
    options = parser.parse_args()
    if options.result is None:
        with tempfile.TemporaryDirectory(prefix="quern-forecast-") as temporary:
            rows = measured_rows(options, options.folder or Path(temporary))
        theme = "forecast_processor" if options.processor_seconds else "forecast"
        options.result = write_result(theme, {"rows": rows, **summary(rows)})
        print(options.result)
    text = section(json.loads(options.result.read_text("utf-8")))
    if options.page:
        write_section(options.page, text)
    print(text)


def measured_rows(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every run that was asked for."""
    rows = []
    for model, recipe, tokens in RUNS:
        name = f"{model}-{recipe}"
        if (options.only and name not in options.only.split(",")) or (model == "small" and options.small is None):
            continue
        folders = model_folder(model, options, folder), folder / "artifacts" / name
        rows.append(measured_row(name, *folders, recipe, tokens, options.processor_seconds))
        print(line(rows[-1]), flush=True)
    return rows


def model_folder(name: str, options: argparse.Namespace, folder: Path) -> Path:
    """A model's folder, made where it is a shape."""
    if name in SHAPES:
        path = folder / name
        if not path.is_dir():
            make_synthetic(path, SHAPES[name])
        return path
    return Path(options.small) if name == "small" else ROOT / "models" / "python-7m"


def make_synthetic(path: Path, config: dict[str, Any]) -> None:
    """By the tool."""
    spec = importlib.util.spec_from_file_location("synthetic_tool", ROOT / "tools" / "make_synthetic_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.make(path, config)


def measured_row(
    name: str, model: Path, output: Path, recipe: str, tokens: int | None, processor: bool
) -> dict[str, Any]:
    """One run: foretold, then done."""
    mine = MINE / f"{recipe}.yaml"
    chosen = str(mine) if mine.is_file() else recipe
    most = int(json.loads((model / "config.json").read_text("utf-8"))["max_position_embeddings"])
    prompt = min(512, most - NEW)
    load = ForeignLoad()
    given = {"model": str(model), "recipe": chosen, "context": prompt + NEW, "tokens": tokens,
             "processor": processor, "threads": 1 if processor else None}  # fmt: skip
    told = json.loads(child(["-c", FORECAST], json.dumps(given)))["recipes"][0]
    asked = {"model": str(model), "output": str(output), "recipe": chosen, "calibration_tokens": tokens, "fresh": True}
    if processor:
        found = json.loads(child(["-c", QUANTIZE], json.dumps({**asked, "threads": 1})))
    else:
        made = quantize_in_child(**asked)
        ran = json.loads(child(["-c", DECODE, str(output), str(prompt), str(NEW)], ""))
        found = {
            "artifact_bytes": made["bytes"], "quantize_seconds": made["seconds"],
            "quantize_memory": made["peak_rss_bytes"], **ran,
        }  # fmt: skip
    return {
        "run": name,
        "calibration_tokens": tokens,
        "foreign_processors": round(load.processors(), 2),
        "foretold": {key: told[key]["value"] for key in found},
        "derivation": {key: told[key]["derivation"] for key in found},
        "measured": found,
        "ratio": {key: told[key]["value"] / found[key] for key in found},
    }


def child(arguments: list[str], given: str) -> str:
    """The last line that a fresh Python prints."""
    done = subprocess.run([sys.executable, *arguments], input=given, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()[-1]


def line(row: Mapping[str, Any]) -> str:
    told = "  ".join(f"{key} {ratio:.3f}" for key, ratio in row["ratio"].items())
    return f"{row['run']:18} foretold / measured: {told}  foreign {row['foreign_processors']}"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By figure: how far off the worst and the middle one are."""
    off = {key: [abs(row["ratio"][key] - 1) for row in rows] for key in rows[0]["ratio"]}
    return {
        "worst": {key: max(values) for key, values in off.items()},
        "median": {key: statistics.median(values) for key, values in off.items()},
        "all": {
            "worst": max(value for values in off.values() for value in values),
            "median": statistics.median(value for values in off.values() for value in values),
        },
    }


def section(result: Mapping[str, Any]) -> str:
    """The section of the page."""
    names = {
        "artifact_bytes": "artifact", "quantize_seconds": "quantize", "quantize_memory": "its peak",
        "run_memory": "peak running", "prefill": "prefill tok/s", "decode": "decode tok/s",
    }  # fmt: skip
    figures = {key: show for key, show in FIGURES.items() if key in result["median"]}
    what = "Foretold and measured" if len(figures) > 1 else "Seconds of the processor, foretold and measured"
    lines = [
        f"## {what}, {result['date']}",
        "",
        f"`{result['command']}` on {result['hardware']['cpu_model']}, {result['hardware']['usable_cores']} cores. Each "
        "cell: foretold / measured (ratio).",
        "",
        f"| run | {' | '.join(names[key] for key in figures)} |",
        f"|---|{'---|' * len(figures)}",
    ]
    for row in result["rows"]:
        cells = [
            f"{show(row['foretold'][key])} / {show(row['measured'][key])} ({row['ratio'][key]:.2f})"
            for key, show in figures.items()
        ]
        lines.append(f"| {row['run']} | {' | '.join(cells)} |")
    middle = " | ".join(f"{100 * result['median'][key]:.1f} %" for key in figures)
    worst = " | ".join(f"{100 * result['worst'][key]:.1f} %" for key in figures)
    lines += [f"| median off by | {middle} |", f"| worst off by | {worst} |", ""]
    foreign = max(row["foreign_processors"] for row in result["rows"])
    lines.append(f"Other programs kept at most {foreign:g} processors busy meanwhile.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
