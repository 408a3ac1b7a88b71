"""Feed damaged artifacts to the CPU engine: each must run or be refused with a message, and none may crash the process.

    python tools/fuzz_artifacts.py ARTIFACT [--inputs 100000] [--seed 0] [--workers 2]

ARTIFACT is a small artifact in quern's own format. Every input is a copy of it with some damage: bytes of a shard's
header or data, numbers and words of config.json, a shard cut short. What loads is fed a few tokens. A worker that dies
leaves the first seed of its batch, which reproduces it. Prints counts as JSON; exit code 1 if anything crashed or raised
another error.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from quern.core.errors import QuernError

BATCH = 500
"""Inputs of one process."""


def main() -> int:
    """Run all inputs in worker processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.batch:
        print(json.dumps(run_batch(options.artifact, *options.batch)))
        return 0
    total: Counter[str] = Counter()
    firsts = list(range(options.seed, options.seed + options.inputs, BATCH))
    while firsts:
        now, firsts = firsts[: options.workers], firsts[options.workers :]
        stop = options.seed + options.inputs
        running = [(first, _start(options.artifact, first, min(BATCH, stop - first))) for first in now]
        for first, process in running:
            out, errors = process.communicate()
            told = "\n".join(line for line in errors.splitlines() if not line.startswith("[transformers]"))
            if told:
                print(f"\nbatch of seed {first}, exit code {process.returncode}:\n{told[-4000:]}", file=sys.stderr)
            if process.returncode:
                total["crashed"] += 1
            else:
                total.update(json.loads(out.splitlines()[-1]))
        done = sum(total.values())
        print(f"\r{done} of {options.inputs} inputs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(json.dumps({"inputs": options.inputs, "seed": options.seed, **total}))
    return 1 if total["crashed"] or total["other error"] else 0


def _start(artifact: Path, first: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(artifact), "--batch", str(first), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_batch(artifact: Path, first: int, count: int) -> dict[str, int]:
    """Outcomes of the inputs of the seeds ``first ...``; what is no ``QuernError`` is printed with its seed."""
    outcome: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="quern-fuzz-") as temporary:
        for seed in range(first, first + count):
            folder = Path(temporary, "artifact")
            shutil.copytree(artifact, folder)
            damage(folder, random.Random(seed))
            try:
                outcome[load_and_feed(folder)] += 1
            except Exception:
                outcome["other error"] += 1
                print(f"seed {seed}:\n{traceback.format_exc()}", file=sys.stderr)
            shutil.rmtree(folder)
    return dict(outcome)


def load_and_feed(folder: Path) -> str:
    """``ran`` or ``refused``."""
    from quern.engines.cpu import CpuEngine

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = CpuEngine().load(folder, threads=1)
            model.start().feed([1, 2, 3])
    except QuernError:
        return "refused"
    return "ran"


def damage(folder: Path, generator: random.Random) -> None:
    """One to three kinds of damage."""
    for _ in range(generator.randint(1, 3)):
        generator.choice(DAMAGES)(folder, generator)


def _shard(folder: Path, generator: random.Random) -> Path:
    return generator.choice(sorted(folder.glob("*.safetensors")))


def _header_bytes(folder: Path, generator: random.Random) -> None:
    path = _shard(folder, generator)
    data = bytearray(path.read_bytes())
    end = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    for _ in range(generator.randint(1, 4)):
        if end:
            data[generator.randrange(end)] = generator.choice(b'0123456789,:[]{}"-IFUBx')
    path.write_bytes(data)


def _data_bytes(folder: Path, generator: random.Random) -> None:
    path = _shard(folder, generator)
    data = bytearray(path.read_bytes())
    begin = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    for _ in range(generator.randint(1, 64)):
        if begin < len(data):
            data[generator.randrange(begin, len(data))] = generator.randrange(256)
    path.write_bytes(data)


def _cut(folder: Path, generator: random.Random) -> None:
    path = _shard(folder, generator)
    with path.open("r+b") as file:
        file.truncate(generator.randrange(path.stat().st_size + 1))


def _config_value(folder: Path, generator: random.Random) -> None:
    """Replace one value somewhere in config.json."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError:
        return
    place, key = config, generator.choice(sorted(config))
    while isinstance(place[key], dict) and place[key] and generator.random() < 0.8:
        place = place[key]
        key = generator.choice(sorted(place))
    old = place[key]
    numbers = [0, 1, -1, 2, 3, 5, 7, 8, 15, 16, 17, 63, 255, 300, 2**31 - 1, 2**31, 2**63, 0.5, -0.0]
    words = ["", "integer", "trellis", "none", "group", "channel", "tensor", "float32", "bfloat16", "qwen2", "llama"]
    options = [None, True, False, [], {}, *numbers, *words]
    if type(old) is int:
        options += [old + 1, old - 1, old * 2, old // 2]
    place[key] = generator.choice(options)
    path.write_text(json.dumps(config), "utf-8")


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    _header_bytes,
    _data_bytes,
    _cut,
    _config_value,
    _config_value,
    _config_value,
)

if __name__ == "__main__":
    sys.exit(main())
