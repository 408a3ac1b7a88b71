"""The same GGUF file in quern's cpu engine and in llama.cpp: tokens a second of decoding and of a prompt, in turns.

    python benchmarks/gguf_decode.py [FILE.gguf ...] [--types Q4_K Q6_K ...] [--shape 1.5B] [--threads 1 2] [--rounds 7]
        [--more RESULT.json]

Without files, models of Qwen2 shapes with random blocks are timed (``gguf_models.py``), one for each type. llama.cpp is the
one that ``quern peers install llama.cpp`` built. Both hold the file in processes of their own that wait while the other one
works; in every round each decodes ``--new`` tokens behind a short prompt and reads a prompt of ``--prompt``. The ratio is
the median over the rounds, with the middle half: ratios within one run are results, absolute times on a shared machine are
not. ``--more`` adds to the rows of an earlier result, each of which says its load.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from decode import SHAPES, config_of
from gguf_models import write_gguf
from measured import write_result
from native_matrices import spread

import quern
from quern.peers.environment import Environment

PACKAGE = Path(quern.__file__).parent
TYPES = ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q3_K", "Q2_K", "Q4_K_M")

CHILD = """
import json, sys, time, types
from pathlib import Path
package, engine, folder, file, threads = *sys.argv[1:5], int(sys.argv[5])
if engine == "quern":
    from quern.engines.cpu import CpuEngine
    model = CpuEngine().load(file, threads=threads)
else:
    sys.modules["quern"] = stub = types.ModuleType("quern")
    stub.__path__ = [package]
    from quern.peers.llama_library import LlamaModel
    model = LlamaModel(Path(folder), Path(file), threads, 1)


def timed(work, tokens):
    begin = time.perf_counter()
    work()
    return tokens / (time.perf_counter() - begin)


print(json.dumps({}), flush=True)
for line in sys.stdin:
    prompt, new = json.loads(line)
    session = model.start()
    session.feed(list(range(16)))
    decode = timed(lambda: [session.feed([i % 1000]) for i in range(new)], new)
    session = model.start()
    prefill = timed(lambda: session.feed([i % 1000 for i in range(prompt)]), prompt)
    print(json.dumps({"decode": decode, "prefill": prefill, "notes": list(getattr(model, "notes", []))}), flush=True)
"""


class Contender:
    """One engine with one file, in a process that waits for its turns."""

    def __init__(self, engine: str, file: Path, threads: int, environment: Environment) -> None:
        llama = engine != "quern"
        python = [str(environment.python), "-P", "-s"] if llama else [sys.executable]
        folder = environment.prefix / "llama.cpp" / "bin"
        command = [*python, "-c", CHILD, str(PACKAGE), engine, str(folder), str(file), str(threads)]
        variables = environment.variables() if llama else None
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables
        )
        self.notes: list[str] = []
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a process ended early")
        found: dict[str, Any] = json.loads(line)
        return found

    def run(self, prompt: int, new: int) -> dict[str, float]:
        """Tokens a second of one turn. What the engine did otherwise than asked is in ``notes`` afterwards."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([prompt, new]) + "\n")
        self._process.stdin.flush()
        found = self._answer()
        self.notes = found.pop("notes")
        return found

    def close(self) -> None:
        self._process.communicate()


def measure(file: Path, threads: int, options: argparse.Namespace, environment: Environment) -> dict[str, Any]:
    """Both engines in turns; the first round warms up."""
    contenders = {name: Contender(name, file, threads, environment) for name in ("quern", "llama.cpp")}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    loads = []
    for number in range(options.rounds + 1):
        loads.append(os.getloadavg()[0])
        for name, contender in contenders.items():
            found = contender.run(options.prompt, options.new)
            if number > 0:
                rounds[name].append(found)
    row: dict[str, Any] = {"file": file.name, "bytes": file.stat().st_size, "threads": threads, "loads": loads}
    row |= {"rounds": options.rounds, "prompt": options.prompt, "new": options.new}
    row["notes"] = contenders["quern"].notes
    for contender in contenders.values():
        contender.close()
    for what in ("decode", "prefill"):
        speeds = {name: [one[what] for one in found] for name, found in rounds.items()}
        row[what] = {name: spread(values) for name, values in speeds.items()}
        row[what]["ratio"] = spread([a / b for a, b in zip(speeds["quern"], speeds["llama.cpp"], strict=True)])
    told = "  ".join(
        f"{what} x{row[what]['ratio']['median']:.2f} "
        f"({row[what]['ratio']['lower_quartile']:.2f}-{row[what]['ratio']['upper_quartile']:.2f})"
        for what in ("decode", "prefill")
    )
    print(f"{file.name} {threads} threads: {told} as fast as llama.cpp", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--shape", default="1.5B", choices=SHAPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="Keeps the random models for another run.")
    parser.add_argument("--more", type=Path, help="A result whose rows are kept.")
    parser.add_argument("--dry", action="store_true", help="write no result file")
    options = parser.parse_args()
    environment = Environment.of("llama.cpp")
    if (installed := environment.installed()) is None:
        raise SystemExit("llama.cpp is not installed; run: quern peers install llama.cpp")
    with tempfile.TemporaryDirectory(prefix="quern-gguf-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = list(options.files)
        for kind in () if files else options.types:
            file = folder / f"{options.shape}-{kind}.gguf"
            if not file.is_file():
                write_gguf(file, config_of(options.shape), kind)
            files.append(file)
        rows = json.loads(options.more.read_text("utf-8"))["rows"] if options.more else []
        for file in files:
            for threads in options.threads:
                rows.append(measure(file, threads, options, environment))
                if not options.dry:
                    print(write_result("gguf_decode", {"llama_cpp": str(installed), "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
