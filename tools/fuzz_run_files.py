"""Damage a run file in many ways and give each to quern-run: it must run, or refuse with exit code 2 and one line of text.

    python tools/fuzz_run_files.py PROGRAM FILE [--inputs 200] [--seed 0]

PROGRAM is a quern-run with sanitizers (cmake -DQUERN_RUN=ON -DQUERN_SANITIZE=ON -DQUERN_ISAS=scalar). Prints how many ran
and were refused; exits with 1 and says with which numbers where one crashed, hung or printed anything else.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HEADER = struct.Struct("<8sIIQQQQQQ")
PATIENCE = 60
"""Seconds."""
EDGES = (0, 1, 2, 3, 4, 7, 15, 16, 255, 256, 65535, 65537, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


def damaged(good: bytes, generator: random.Random) -> bytes:
    """A copy of a run file with one to three changes: numbers of its parts, bits, its length."""
    file = bytearray(good)
    _, _, _, _, program_at, program_bytes, tokenizer_at, tokenizer_bytes, _ = HEADER.unpack_from(good)
    places = [
        (0, HEADER.size),
        (program_at, program_bytes),
        (program_at, program_bytes),
        (tokenizer_at, tokenizer_bytes),
    ]
    for _ in range(generator.randint(1, 3)):
        at, size = generator.choice(places)
        # What counts and kinds are stands in front of each part.
        reach = generator.choice([64, 512, size])
        place = at + generator.randrange(max(1, min(size, reach) - 8))
        match generator.randrange(6):
            case 0:
                struct.pack_into("<I", file, place // 4 * 4, generator.choice(EDGES))
            case 1:
                struct.pack_into("<I", file, place, generator.choice(EDGES))
            case 2:
                struct.pack_into(
                    "<Q", file, place, generator.choice([1 << 40, (1 << 64) - 64, len(file), len(file) - 64])
                )
            case 3:
                file[place] ^= 1 << generator.randrange(8)
            case 4:
                old = struct.unpack_from("<I", file, place // 4 * 4)[0]
                struct.pack_into("<I", file, place // 4 * 4, (old + generator.choice([-1, 1, 64])) & 0xFFFFFFFF)
            case 5:
                other = at + generator.randrange(max(1, size - 16))
                file[place : place + 8] = file[other : other + 8]
    if generator.random() < 0.1:
        del file[generator.randrange(len(file)) :]
    if len(file) >= 24 and generator.random() < 0.8:  # else the length alone would be refused
        struct.pack_into("<Q", file, 16, len(file))
    return bytes(file)


def attempts(program: list[str], good: bytes, inputs: int, seed: int) -> Iterator[tuple[int, str, str]]:
    """Number, what became of it (``ran``, ``refused`` or what was wrong) and stderr of each."""
    environment = {**os.environ, "ASAN_OPTIONS": "abort_on_error=1"}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "damaged.run"
        for number in range(inputs):
            generator = random.Random(f"{seed} {number}")
            place.write_bytes(damaged(good, generator))
            prompt = generator.choice([["-p", "a b<|x|> é\u0301 12"], ["--ids", "1,2,3,4,5"]])
            command = [*program, str(place), *prompt, "-n", "2", "--context", "32", "--threads", "1"]
            try:
                ended = subprocess.run(
                    command,
                    capture_output=True,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    timeout=PATIENCE,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                yield number, "hung", ""
                continue
            said = ended.stderr.decode("utf-8", "replace")
            refused = ended.returncode == 2 and said.startswith("error: ") and said.count("\n") == 1
            yield (
                number,
                "ran" if ended.returncode == 0 else "refused" if refused else f"ended with {ended.returncode}",
                said,
            )


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", help="quern-run with sanitizers")
    parser.add_argument("file", type=Path)
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    tally: collections.Counter[str] = collections.Counter()
    for number, result, said in attempts([given.program], given.file.read_bytes(), given.inputs, given.seed):
        tally[result] += 1
        if result not in ("ran", "refused"):
            print(f"seed {given.seed}, input {number}: {result}\n{said[:3000]}", file=sys.stderr)
    print(json.dumps(tally))
    return 0 if set(tally) <= {"ran", "refused"} else 1


if __name__ == "__main__":
    sys.exit(main())
