"""Kill a quantization at random moments, let it go on, and hold what comes out to the bytes of a run that nobody disturbed.

    python benchmarks/kills.py [MODEL] [--recipe compact] [--tokens 2048] [--kills 20] [--seed 0] [-o FOLDER]

MODEL (default: the bundled one) is quantized whole, once. Then the same job is started again and again and killed (SIGKILL)
some random part of half that time after the first line that it wrote into its journal, until there were so many kills. When
an artifact is finished on the way it is compared file by file, and the next one begins. Every second process has another
number of threads.
Exit code 1 where a byte differs, or where something unfinished looks finished. The result is results/kills_*.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen2.tokenization_qwen2  # noqa: F401 - so that the children need not
from measured import write_result

from quern.pipeline.quantize import quantize

MODEL = Path(__file__).resolve().parent.parent / "models" / "python-7m"
MOST_SECONDS = 3600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--recipe", default="compact")
    parser.add_argument("--tokens", type=int, default=2048, help="Of calibration text.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/kills"))
    options = parser.parse_args()
    if options.kills < 1:
        parser.error("--kills: at least one")
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    whole = run(options, "whole", 2, None)
    expected = hashes(options.output / "whole")
    print(f"undisturbed: {whole['seconds']:.1f} s of work, {whole['lines']} steps, {len(expected)} files", flush=True)
    kills, artifacts = kill(options, whole["seconds"], expected)
    differing = sum(not one["identical"] for one in artifacts)
    write_result(
        f"kills_{options.model.name}",
        {
            "model": options.model.name, "recipe": options.recipe, "tokens": options.tokens, "seed": options.seed,
            "undisturbed_seconds": whole["seconds"], "files": expected, "kills": kills, "artifacts": artifacts,
            "differing": differing,
        },
    )  # fmt: skip
    steps = len({one["last_step"] for one in kills})
    print(f"{len(kills)} kills behind {steps} different steps, {len(artifacts)} artifacts, {differing} of them differ")
    return 1 if differing else 0


def kill(
    options: argparse.Namespace, seconds: float, expected: dict[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """So many kills, and what was found of the artifacts that were finished in spite of them."""
    draw = random.Random(options.seed)
    kills: list[dict[str, Any]] = []
    artifacts: list[dict[str, Any]] = []
    killed = 0
    while len(kills) < options.kills or killed:
        name = f"out{len(artifacts)}"
        output = options.output / name
        delay = draw.uniform(0, seconds / 2) if len(kills) < options.kills else None
        found = run(options, name, 1 + len(kills) % 2, delay)
        if found["killed"]:
            killed += 1
            looks_finished = output.exists() and hashes(output) != expected
            kills.append({"artifact": len(artifacts), **found, "looks_finished": looks_finished})
            print(f"kill {len(kills)} after {found['seconds']:.1f} s: {found['last_step']}", flush=True)
            if looks_finished:
                raise SystemExit(f"{output} looks finished and is not what it should be")
            continue
        left = [path.name for path in options.output.iterdir() if path.name.startswith(f"{name}.")]
        identical = hashes(output) == expected and not left
        artifacts.append({"kills": killed, "identical": identical, "left": left})
        killed = 0
        shutil.rmtree(output)
    return kills, artifacts


def run(options: argparse.Namespace, name: str, threads: int, delay: float | None) -> dict[str, Any]:
    """One process that works on the artifact ``name``, killed ``delay`` seconds after its first line in the journal."""
    request = {
        "model": str(options.model), "output": str(options.output / name), "recipe": options.recipe,
        "calibration_tokens": options.tokens, "threads": threads,
    }  # fmt: skip
    work = options.output / f"{name}.quern-work"
    before = len(journal(work))
    begin = started = time.monotonic()
    process = os.fork()
    if process == 0:
        child(request)
    lines: list[str] = []
    while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        lines = journal(work) or lines
        if len(lines) <= before:
            started = time.monotonic()
        if time.monotonic() - started > (MOST_SECONDS if delay is None else delay):
            os.kill(process, signal.SIGKILL)
            break
        if time.monotonic() - begin > MOST_SECONDS:
            raise SystemExit(f"quantizing {name} takes more than {MOST_SECONDS:.0f} s")
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    lines = journal(work) or lines
    if code not in (0, -signal.SIGKILL) or (code and delay is None):
        raise SystemExit(f"quantizing {name} ended with {code}")
    return {
        "killed": code != 0, "seconds": round(time.monotonic() - started, 3), "threads": threads,
        "lines": len(lines), "last_step": lines[-1] if lines else None,
    }  # fmt: skip


def child(request: dict[str, Any]) -> None:
    """A fork of this process, which has everything imported and has computed nothing, carries the request out."""
    code = 1
    try:
        quantize(**request)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def journal(work: Path) -> list[str]:
    """The finished steps in a work folder; none where it is gone."""
    try:
        raw = (work / "journal.jsonl").read_bytes()
    except OSError:
        return []
    return [str(json.loads(line)["step"]) for line in raw.split(b"\n")[:-1]]


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an artifact."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    sys.exit(main())
