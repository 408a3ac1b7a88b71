"""Is a commit as fast and as small as another one?

    python benchmarks/before_after.py OLD NEW [--rounds 3] [--layer]

Lays both beside each other, as tools/compare_commits.py does, and runs what `make demo` runs with either of them in turn:
wall time and the greatest resident memory of a process, medians and spread, and the ratios of NEW to OLD. ``--layer`` runs
benchmarks/layer_72b.py's quantization instead (about 5 GB of disk). Both in one interleaved run, so that a noisy machine is
as noisy for one as for the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measured import write_result
from synthetic import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from compare_commits import SIDES, compile_native, lay_out  # noqa: E402

MODEL = ROOT / "models" / "python-7m"
DEMO = ("compare", str(MODEL), "--recipes", "compact,fast,balanced,rtn4", "--choice", str(MODEL / "choice.jsonl"))
LAYER = ("--recipe", str(ROOT / "benchmarks" / "recipes" / "gptq4-g128-plain.yaml"))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layer", action="store_true", help="one layer of Qwen2-72B in place of the demo")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quern-before-after-") as scratch:
        folder = Path(scratch)
        trees = [lay_out(revision, folder / side) for revision, side in zip((options.old, options.new), SIDES)]
        compile_native(trees)
        arguments = DEMO
        if options.layer:
            model = folder / "model"
            write_checkpoint(model, hidden=8192, intermediate=29568, heads=64, key_value_heads=8, layers=1)
            arguments = ("quantize", str(model), *LAYER)
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for number in range(options.rounds):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                runs[side].append(run(folder, side, number, arguments))
                print(f"round {number + 1}, {side}: {runs[side][-1]}", flush=True)
    found = summary(runs)
    print(json.dumps(found, indent=1))
    content = {
        "old": options.old,
        "new": options.new,
        "quern": [Path(word).name for word in arguments],
        "runs": runs,
        **found,
    }
    print(write_result("before_after_layer" if options.layer else "before_after_demo", content))


def run(folder: Path, side: str, number: int, arguments: Sequence[str]) -> dict[str, float]:
    """One run in a folder of its own: seconds, and the greatest resident bytes of the process or one that it started."""
    output = folder / side / f"out{number}"
    command = [str(folder / side / "venv/bin/python"), "-c", "from quern.cli.main import run; run()", *arguments, "-o"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, str(output)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{side} failed with status {status}: {' '.join(command)} {output}")
    return {"seconds": seconds, "peak_rss_bytes": usage.ru_maxrss * 1024}


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Median and spread of each side, and the ratio of the medians."""
    found: dict[str, Any] = {}
    for key in ("seconds", "peak_rss_bytes"):
        sides = {side: [run[key] for run in runs[side]] for side in SIDES}
        medians = {side: statistics.median(values) for side, values in sides.items()}
        spread = {side: [min(values), max(values)] for side, values in sides.items()}
        found[key] = {"medians": medians, "spread": spread, "ratio": medians["new"] / medians["old"]}
    return found


if __name__ == "__main__":
    main()
