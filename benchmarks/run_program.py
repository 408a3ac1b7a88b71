"""quern-run beside llama.cpp's llama-bench on the same blocks of the same model: size, start-up, memory, tokens a second.

    python benchmarks/run_program.py [MODEL] [--type q4_k] [--threads 1] [--new 64] [--rounds 7]
        [--program build/run/quern-run] [--dry]

MODEL is quantized once, to a GGUF file, which both run: quern-run through ``quern export --format run``, which keeps its
blocks. llama.cpp is the one that ``quern peers install llama.cpp`` built; its program that times itself is llama-bench,
whose shared libraries are counted with it. Start-up is the wall time of a process that makes one token. Both take turns;
ratios within one run are results, absolute times on a shared machine are not.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measured import write_result
from native_matrices import spread

from quern.core.recipe import parse_recipe
from quern.peers.environment import Environment
from quern.pipeline.export import export
from quern.pipeline.quantize import quantize

ROOT = Path(__file__).resolve().parents[1]
PROMPT = 16
"""Tokens in front of those that are timed."""
POLL = 0.001
"""Seconds."""
SPEED = re.compile(r"([\d.]+) tokens/s")


def peak_of(process: subprocess.Popen[bytes]) -> int:
    """Peak resident bytes of a process, asked again and again until it ends: what the system says of one that has ended
    counts whoever started it."""
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = max([peak, *(int(number) for number in re.findall(r"VmHWM:\s+(\d+)", status))])
        time.sleep(POLL)
    process.wait()
    return 1024 * peak


def ended(command: list[str], variables: dict[str, str] | None) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and everything that a process wrote. Raises ``SystemExit`` where it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables)
        peak = peak_of(process)
        seconds = time.perf_counter() - started
        output.seek(0)
        said = output.read().decode("utf-8", "replace")
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{said}")
    return seconds, peak, said


class Contender:
    """A program, how it is asked for tokens, and how it says how fast it made them."""

    def __init__(
        self,
        files: list[Path],
        command: Callable[[int], list[str]],
        speed: Callable[[str], float],
        variables: Any = None,
    ) -> None:
        self.bytes = sum(file.stat().st_size for file in files)
        self.command, self.speed, self.variables = command, speed, variables
        self.rounds: list[dict[str, float]] = []

    def turn(self, new: int) -> None:
        """Start it twice: for one token, and for ``new``."""
        startup, _, _ = ended(self.command(1), self.variables)
        _, peak, said = ended(self.command(new), self.variables)
        self.rounds.append({"startup_seconds": startup, "peak_rss_bytes": peak, "tokens_per_second": self.speed(said)})


def quern_run(program: Path, file: Path, threads: int) -> Contender:
    """This repository's program."""
    ids = ",".join(map(str, range(1, PROMPT + 1)))

    def command(new: int) -> list[str]:
        return [str(program), str(file), "--ids", ids, "-n", str(new), "--threads", str(threads), "--tokens", "--stats"]

    return Contender([program], command, lambda said: float(SPEED.findall(said)[-1]))


def llama_bench(file: Path, threads: int) -> Contender:
    """llama.cpp's, from the environment of its own."""
    environment = Environment.of("llama.cpp")
    folder = environment.prefix / "llama.cpp" / "bin"
    program = folder / "llama-bench"
    if not program.is_file():
        raise SystemExit("llama.cpp is not installed: quern peers install llama.cpp")
    variables = {**environment.variables(), "LD_LIBRARY_PATH": str(folder)}

    def command(new: int) -> list[str]:
        most = [
            "-p",
            "0",
            "-n",
            str(new),
            "-d",
            str(PROMPT),
            "-r",
            "1",
            "--no-warmup",
            "-t",
            str(threads),
            "-o",
            "json",
        ]
        return [str(program), "-m", str(file), *most]

    _, _, linked = ended(["ldd", str(program)], variables)
    libraries = [Path(path) for path in re.findall(r"=> (/\S+)", linked) if Path(path).parent == folder]
    return Contender([program, *libraries], command, _benched, variables)


def _benched(said: str) -> float:
    rows = json.loads(said[said.index("[") : said.rindex("]") + 1])
    return float(rows[-1]["avg_ts"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / "models/python-7m")
    parser.add_argument("--type", default="q4_k", help="ggml's block type")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--program", type=Path, default=ROOT / "build/run/quern-run")
    parser.add_argument("--dry", action="store_true", help="write no result file")
    options = parser.parse_args()
    if not options.program.is_file():
        raise SystemExit(f"{options.program} is not there: make run")
    with tempfile.TemporaryDirectory() as folder:
        blocks = {"codec": "ggml", "type": options.type}
        recipe = parse_recipe(
            {"name": options.type, "weights": blocks, "embedding": blocks, "rounding": {"method": "nearest"}}, ""
        )
        gguf = quantize(options.model, Path(folder) / "model.gguf", recipe=recipe, format="gguf", threads=1).path
        file = export(gguf, Path(folder) / "model.run", format="run").path
        contenders = {
            "quern-run": quern_run(options.program, file, options.threads),
            "llama-bench": llama_bench(gguf, options.threads),
        }
        for number in range(options.rounds + 1):
            for contender in contenders.values():
                contender.turn(options.new)
                if number == 0:  # which warms up
                    contender.rounds.clear()
        files = {"gguf": gguf.stat().st_size, "run": file.stat().st_size}
    rows = {}
    for name, contender in contenders.items():
        measured = {key: spread([row[key] for row in contender.rounds]) for key in contender.rounds[0]}
        rows[name] = {"program_bytes": contender.bytes, **measured}
        startup, peak, speed = (measured[key]["median"] for key in measured)
        print(
            f"{name:12} {contender.bytes / 1e6:7.2f} MB  start-up {1e3 * startup:6.1f} ms  memory {peak / 1e6:6.1f} MB  "
            f"{speed:8.1f} tokens/s"
        )
    if not options.dry:
        content = {"type": options.type, "threads": options.threads, "new": options.new, "files": files, "rows": rows}
        print(write_result("run_program", content))


if __name__ == "__main__":
    main()
