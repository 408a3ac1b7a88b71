"""Feed damaged models to the engines: each must run or be refused with a message, and none may crash the process.

    python tools/fuzz_artifacts.py MODEL... [--inputs 100000] [--seed 0] [--workers 2]

MODELs are small: artifacts, unquantized folders with their tokenizer, GGUF files (of a split one all parts are taken). The
input of a seed is a copy of one with some damage (tools/fuzz_damage.py): bytes, numbers and words of shards, index,
config.json, quantization_config, quern.json, tokenizer files, metadata and tensors of a GGUF; files cut short, missing or
swapped. The CPU engine loads it if it knows the format, and what loads is fed a few tokens under some instruction set; some
inputs go to the reference engine and to what reads a model without running it, its tokenizer among them. One input in eight
is a native matrix with hostile sizes and buffers instead. A single input: ``--seed SEED --inputs 1``. Prints counts as JSON;
exit code 1 if anything crashed, hung or raised another error.

Everything is imported once and the workers are forks of that process, each with a folder in memory of which only the
damaged files are written anew. They note in shared memory where they are, so that a crash names its seed and costs no
other input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from fuzz_damage import PROVENANCE, TOKENIZER, Files, damage, hostile_matrix

BATCH = 2000
"""Inputs of one process, so that a leak stays small."""
PATIENCE = 60
"""Seconds after which an input counts as hung."""
NATIVE, REFERENCE, INSPECTED = 0.125, 0.01, 0.1
"""Shares of the inputs."""
OUTCOMES = ("ran", "refused", "matrix multiplied", "matrix refused", "other error", "crashed", "hung")
RAN, REFUSED, MULTIPLIED, DECLINED, OTHER, CRASHED, HUNG = range(len(OUTCOMES))
TEXT = "def f(x):\n    return 12345  # \u00fc\u4f60\u597d"
FAILED = (ValueError, TypeError, KeyError, OverflowError)
LOOKED = {PROVENANCE, *TOKENIZER}
"""Files that only ``look`` reads."""
MEMORY = Path("/dev/shm")
"""A file system in memory, where there is one."""


@dataclass(frozen=True)
class Original:
    """A model as it was, the engine that it is for, and which of its files is given as MODEL (empty: their folder)."""

    files: Files
    engine: str
    opened: str = ""


@dataclass
class Worker:
    """A range of seeds and the process that works on it."""

    first: int
    stop: int
    board: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 8 * (1 + len(OUTCOMES))))
    """The seed in work, then the count of each outcome."""
    pid: int = 0
    seen: tuple[int, float] = (-1, 0.0)

    def read(self) -> tuple[int, list[int]]:
        seed, *counts = struct.unpack(f"{1 + len(OUTCOMES)}q", self.board[:])
        return seed, list(counts)

    def note(self, seed: int, outcome: int | None = None) -> None:
        counts = self.read()[1]
        if outcome is not None:
            counts[outcome] += 1
        self.board[:] = struct.pack(f"{1 + len(OUTCOMES)}q", seed, *counts)


def main() -> int:
    """Run all inputs in worker processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    begin = time.monotonic()
    originals = prepare(options.models)
    firsts = list(range(options.seed, options.seed + options.inputs, BATCH))
    waiting = [Worker(first, min(first + BATCH, options.seed + options.inputs)) for first in firsts]
    running: list[Worker] = []
    totals = [0] * len(OUTCOMES)
    with tempfile.TemporaryDirectory(prefix="quern-fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
        while waiting or running:
            while waiting and len(running) < options.workers:
                running.append(_forked(waiting.pop(0), originals, Path(folder)))
            time.sleep(0.02)
            for worker in [worker for worker in running if _ended(worker)]:
                running.remove(worker)
                seed, counts = worker.read()
                if seed < worker.stop:  # it died in the middle; the rest goes on without that input
                    worker.first = seed + 1
                    worker.note(seed + 1)
                    waiting.insert(0, worker)
                else:
                    totals = [total + count for total, count in zip(totals, counts)]
                    print(f"\r{sum(totals)} of {options.inputs} inputs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    tally = {"inputs": options.inputs, "seed": options.seed, "seconds": round(time.monotonic() - begin, 1)}
    print(json.dumps(tally | dict(zip(OUTCOMES, totals))))
    return 1 if sum(totals[OTHER:]) else 0


def prepare(models: list[Path]) -> list[Original]:
    """Import what the workers need, and read the models, each of which must run."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    originals = []
    for model in models:
        engines = [name for name in ("cpu", "reference") if run(model, random.Random(0), name) == RAN]
        if not engines:
            raise SystemExit(f"{model} runs on no engine; give models that run")
        files = sorted(model.iterdir()) if model.is_dir() else _parts(model)
        contents: Files = {path.name: path.read_bytes() for path in files}
        originals.append(Original(contents, engines[0], "" if model.is_dir() else model.name))
        look(model)  # imports what reads without running
    return originals


def _parts(file: Path) -> list[Path]:
    """A GGUF and the others of its split."""
    from quern.checkpoint.gguf.split import read_parts

    return list(read_parts(file).paths)


def _forked(worker: Worker, originals: list[Original], folder: Path) -> Worker:
    worker.seen = (worker.first, time.monotonic())
    worker.pid = os.fork()
    if worker.pid:
        return worker
    own = folder / str(worker.first)
    try:
        _work(worker, originals, own)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _ended(worker: Worker) -> bool:
    pid, status = os.waitpid(worker.pid, os.WNOHANG)
    seed = worker.read()[0]
    if pid:
        if status:
            print(f"\nseed {seed} crashed: status {os.waitstatus_to_exitcode(status)}", file=sys.stderr)
            worker.note(seed, CRASHED)
        return True
    if seed != worker.seen[0]:
        worker.seen = (seed, time.monotonic())
    if time.monotonic() - worker.seen[1] > PATIENCE:
        print(f"\nseed {seed} hung", file=sys.stderr)
        os.kill(worker.pid, signal.SIGKILL)
        os.waitpid(worker.pid, 0)
        worker.note(seed, HUNG)
        return True
    return False


def _work(worker: Worker, originals: list[Original], folder: Path) -> None:
    places = [folder / str(index) for index in range(len(originals))]
    for place, original in zip(places, originals):
        place.mkdir(parents=True)
        _write(place, original.files)
    for seed in range(worker.first, worker.stop):
        worker.note(seed)
        generator = random.Random(seed)
        try:
            if generator.random() < NATIVE:
                outcome = run_matrix(generator)
            else:
                which = generator.randrange(len(originals))
                outcome = _run_damaged(places[which], originals[which], generator)
        except Exception:
            outcome = OTHER
            print(f"\nseed {seed}:\n{traceback.format_exc()}", file=sys.stderr)
        worker.note(seed + 1, outcome)


def _run_damaged(place: Path, original: Original, generator: random.Random) -> int:
    files = dict(original.files)
    damage(files, generator)
    changed = [name for name in files if files[name] != original.files.get(name)]
    _write(place, {name: files[name] for name in changed})
    engine = "reference" if generator.random() < REFERENCE else original.engine
    model = place / original.opened
    try:
        if LOOKED.intersection(changed) or generator.random() < INSPECTED:
            look(model)
        return run(model, generator, engine)
    finally:
        _write(place, {name: original.files.get(name) for name in changed})


def _write(place: Path, files: Files) -> None:
    for name, content in files.items():
        (place / name).unlink(missing_ok=True)  # a new file: an earlier model may still map the old one
        if content is not None:
            (place / name).write_bytes(content)


def run(folder: Path, generator: random.Random, engine: str) -> int:
    """Load a model and feed what loads a prompt and a token."""
    from quern import _native
    from quern.core.errors import QuernError
    from quern.engines.cpu import CpuEngine
    from quern.engines.reference import ReferenceEngine

    try:
        if engine == "cpu":
            _native.use_isa(generator.choice(_native.isas()))
            model = CpuEngine().load(folder, threads=1, cache=generator.choice(("float32", "float16", "int8")))
        else:
            model = ReferenceEngine().load(folder, threads=1)
        session = model.start()
        session.feed([1, 2, 3])
        session.feed([4])
    except QuernError:
        return REFUSED
    return RAN


def look(folder: Path) -> None:
    """What reads a model without running it."""
    from quern.checkpoint.checkpoint import open_checkpoint
    from quern.checkpoint.gguf.split import first_part
    from quern.checkpoint.tokenizer import load_tokenizer
    from quern.comparison.row_builder import contender_of
    from quern.core.errors import QuernError
    from quern.pipeline.inspect import inspect

    def tokenize(path: Path) -> None:
        tokenizer = load_tokenizer(first_part(path))
        with contextlib.suppress(*FAILED):  # what a damaged tokenizer makes of text is its own affair
            tokenizer.decode(tokenizer(TEXT).input_ids)

    for reader in (inspect, lambda path: contender_of(open_checkpoint(path)), tokenize):
        with contextlib.suppress(QuernError):
            reader(folder)


def run_matrix(generator: random.Random) -> int:
    """Build a native matrix and a linear of it, and multiply."""
    import numpy as np

    from quern import _native

    keywords, columns = hostile_matrix(generator)
    _native.use_isa(generator.choice(_native.isas()))
    try:
        matrix = _native.Matrix(**keywords)
        if generator.random() < 0.1:
            _native.Linear(matrix, None, np.zeros(generator.randrange(40), np.uint8))
        if columns is not None:
            width = columns if generator.random() < 0.9 else generator.choice((columns + 1, columns - 1, 0))
            inputs = np.full((generator.choice((1, 2, 9)), width), generator.choice((0.5, np.inf, np.nan)), np.float32)
            _native.multiply(matrix, inputs)
    except (ValueError, TypeError):
        return DECLINED
    return MULTIPLIED


if __name__ == "__main__":
    sys.exit(main())
