"""A whole 72B on one machine: quantized with calibration, loaded, decoded; docs/qwen-72b.md has what came out.

    python benchmarks/whole_72b.py FOLDER [--blocks 12] [--tokens 16384] [--memory 16GiB] [--threads N]
        [--only quantize repeat decode llama report] [--shape qwen2.5-72b] [--recipe NAME] [--compute-dtype float32]
        [--new 24] [--llama-bench PATH] [--page docs/qwen-72b.md docs/qwen-72b.zh-CN.md]

The model is drawn from its seed (tools/make_synthetic_checkpoint.py): it lies on no disk, and its losses say nothing of a
trained one. Steps, each of which may be run alone, once those before it are done:

quantize   The first --blocks blocks of it, as a model of their own, by the recipe, under the cap --memory. Stopped by
           Ctrl-C or killed, it goes on with the same command. --compute-dtype float32 saves conversions where the
           processor has no instructions for bfloat16, and takes more memory.
repeat     The artifact of the whole: finished blocks are repeated under the names of those that were not quantized
           (repeated_blocks.py), as copies that decoding reads from memory of their own.
decode     Loads that and decodes, in a process of its own, between two measurements of the read bandwidth; then reads a
           prompt of 512 tokens. Nothing else should run meanwhile.
llama      A part of the same shapes in llama.cpp, in turns with quern: needs llama-bench, of the installed peer or by its
           path.
report     results/whole_*.json, and with --page its section of these pages.

FOLDER/journal.jsonl keeps what each step and each block took, over all runs. Another shape, recipe, number of blocks or
tokens needs another FOLDER. The disk has to hold the artifact one and a half times at most (Qwen2.5-72B: 31 GB).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decode import _llama, _ours
from gguf_models import write_gguf
from pages import write_section
from repeated_blocks import repeat
from section_script import ROOT, recipe_called
from whole_report import sections, summary

from quern.advisor.hardware import BUFFER_BYTES
from quern.architectures.base import architecture_of
from quern.checkpoint.folder import CONFIG
from quern.checkpoint.synthetic import SYNTHETIC
from quern.core.machine.memory import free_memory, peak_rss
from quern.core.machine.parallel import available_threads
from quern.core.machine.time_left import Work
from quern.core.progress import Task
from quern.core.text.units import bytes_text, parse_size
from quern.engines.cpu import cache_sizes
from quern.peers.environment import Environment
from quern.pipeline.forecasting.counted import bytes_of, case_of
from quern.pipeline.forecasting.subject import open_subject
from quern.pipeline.quantize import quantize

STEPS = ("quantize", "repeat", "decode", "llama", "report")
TIMED = ("token weights", "quantizing blocks")
PROMPT, CONTEXT = 512, 4096
LLAMA_LAYERS, LLAMA_ROUNDS = 8, 3
BESIDE = 1 << 30
"""Bytes that decoding takes besides weights, keys and values, about."""
DECODE = """
import json, statistics, sys, time
from quern.advisor.hardware import read_bandwidth
from quern.core.machine.memory import forget_peak, peak_rss
from quern.engines.cpu import CpuEngine
path, threads, prompt, new, buffer = sys.argv[1], *map(int, sys.argv[2:])
bandwidth = [read_bandwidth([threads], buffer)[threads]]
forget_peak()
begin = time.perf_counter()
model = CpuEngine().load(path, threads=threads)
ids = [i % min(1000, model.vocabulary_size) for i in range(max(prompt, new))]
session = model.start()
session.feed(ids[:16])
loaded = time.perf_counter() - begin
seconds = []
for token in ids[:new]:
    begin = time.perf_counter()
    session.feed([token])
    seconds.append(time.perf_counter() - begin)
del session
session = model.start()
begin = time.perf_counter()
session.feed(ids[:prompt])
middle = time.perf_counter()
for token in ids[:min(new, 8)]:
    session.feed([token])
end, peak = time.perf_counter(), peak_rss()
bandwidth.append(read_bandwidth([threads], buffer)[threads])
print(json.dumps({
    "load_seconds": loaded, "token_seconds": seconds, "bytes_per_token": model.bytes_per_token(),
    "prefill_tokens": prompt, "prefill_seconds": middle - begin, "behind_prompt_token_seconds": (end - middle) / min(new, 8),
    "read_gb_s": bandwidth, "peak_rss_bytes": peak, "fed": prompt + min(new, 8), "threads": threads,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="qwen2.5-72b", help="A name that the tool knows, or a config.json.")
    parser.add_argument("--recipe", default="qwen-72b-24gb")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--memory", default="16GiB")
    parser.add_argument("--compute-dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--new", type=int, default=24, help="Tokens to decode.")
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--llama-type", default="IQ2_XXS")
    parser.add_argument("--only", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--page", nargs="*", type=Path, default=[])
    options = parser.parse_args()
    if options.blocks < 1 or options.tokens < 1 or options.new < 1:
        parser.error("--blocks, --tokens and --new: at least one")
    whole = Whole(options)
    for step in STEPS:
        if step in options.only:
            getattr(whole, step)()


class Journal:
    """Lines that are appended and never rewritten."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Whole ones; what a kill tore is none."""
        text = self.path.read_text("utf-8") if self.path.is_file() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def add(self, step: str, **said: Any) -> None:
        """One line."""
        torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + json.dumps({"step": step, "at": stamp, **said}) + "\n")


class Kept:
    """A ``Progress`` that keeps what each step takes."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def task(self, description: str, total: float, done: float = 0, work: Sequence[Work] | None = None) -> Task:
        return _KeptTask(self.journal if description in TIMED else None, description, int(done))

    def log(self, message: str) -> None:
        print(message, flush=True)


class _KeptTask:
    def __init__(self, journal: Journal | None, description: str, done: int) -> None:
        self.journal, self.description, self.place, self.last = journal, description, done, time.perf_counter()

    def advance(self, steps: float = 1) -> None:
        now = time.perf_counter()
        if self.journal is not None:
            said = {"task": self.description, "place": self.place, "seconds": now - self.last}
            self.journal.add("time", **said, peak_rss_bytes=peak_rss())
            print(
                f"{self.description} {self.place}: {now - self.last:.1f} s, peak {bytes_text(peak_rss())}", flush=True
            )
        self.place, self.last = self.place + int(steps), now

    def done(self) -> None:
        pass


class Whole:
    """The steps, in one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.folder / "journal.jsonl")
        self.shape, self.model = self.folder / "shape", self.folder / "model"
        self.part, self.artifact = self.folder / "blocks", self.folder / "whole"
        asked = {name: getattr(options, name) for name in ("shape", "recipe", "blocks", "tokens", "compute_dtype")}
        asked["shape"] = Path(asked["shape"]).name
        began = next((line for line in self.journal.lines if line["step"] == "begin"), None)
        changed = [] if began is None else [name for name in asked if began[name] != asked[name]]
        if began is not None and changed:
            said = "; ".join(f"{name} {began[name]}, now {asked[name]}" for name in changed)
            raise SystemExit(f"{self.folder} was begun with {said}. Give another folder, or the former values")
        recipe = recipe_called(options.recipe)
        calibration = recipe.calibration.model_copy(update={"compute_dtype": options.compute_dtype})
        self.recipe = recipe.model_copy(update={"calibration": calibration})
        if began is None:
            self._make_model()
            self.journal.add("begin", **asked)
        self.config = json.loads((self.shape / CONFIG).read_text("utf-8"))
        self.layers = int(self.config["num_hidden_layers"])

    def _make_model(self) -> None:
        """The description of the whole, and that of its first blocks."""
        spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "make_synthetic_checkpoint.py")
        assert spec is not None
        assert spec.loader is not None
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        shape = self.options.shape
        if shape not in tool.KNOWN and not Path(shape).is_file():
            raise SystemExit(f"--shape {shape!r} is neither a config.json nor one of {', '.join(tool.KNOWN)}")
        config = dict(tool.KNOWN.get(shape) or json.loads(Path(shape).read_text("utf-8")))
        if self.options.blocks > config["num_hidden_layers"]:
            raise SystemExit(f"--blocks is {self.options.blocks}, and the model has {config['num_hidden_layers']}")
        tool.make(self.shape, config)
        tool.make(self.model, {**config, "num_hidden_layers": self.options.blocks})
        described = json.loads((self.shape / SYNTHETIC).read_text("utf-8"))
        names = json.loads((self.model / SYNTHETIC).read_text("utf-8"))["tensors"]
        described["tensors"] = {name: described["tensors"][name] for name in names}
        (self.model / SYNTHETIC).write_text(json.dumps(described), "utf-8")

    def quantize(self) -> None:
        """The true blocks."""
        options, begin = self.options, time.perf_counter()
        said = {"memory": options.memory, "threads": options.threads}
        self.journal.add("quantize begins", **said)
        finished = False
        try:
            report = quantize(
                self.model, self.part, recipe=self.recipe, calibration_tokens=options.tokens,
                memory=parse_size(options.memory, "--memory"), threads=options.threads, progress=Kept(self.journal),
            )  # fmt: skip
            finished = True
        finally:
            seconds, peak = time.perf_counter() - begin, peak_rss()
            self.journal.add("quantize ends", **said, finished=finished, seconds=seconds, peak_rss_bytes=peak)
        print(
            f"{options.blocks} blocks, {bytes_text(report.bytes)}, peak {bytes_text(report.peak_rss_bytes)}", flush=True
        )

    def repeat(self) -> None:
        """The artifact of the whole."""
        self._need(self.part / "quern.json", "quantize")
        copied = repeat(self.part, self.artifact, self.layers)
        size = _bytes(self.artifact)
        told = bytes_of(case_of(open_subject(self.shape), self.recipe)).files.value
        self.journal.add("repeat", true_blocks=self.options.blocks, repeated=copied, bytes=size, foretold_bytes=told)
        print(f"{self.options.blocks} true blocks, {copied} repeated, {bytes_text(size)}", flush=True)

    def decode(self) -> None:
        """Tokens/s of the whole."""
        self._need(self.artifact / CONFIG, "repeat")
        needed, free = _bytes(self.artifact) + BESIDE, free_memory()
        if needed > free:
            raise SystemExit(f"decoding takes about {bytes_text(needed)} of memory, and {bytes_text(free)} are free")
        words = [str(self.artifact), *map(str, (self.options.threads, PROMPT, self.options.new, BUFFER_BYTES))]
        done = subprocess.run([sys.executable, "-c", DECODE, *words], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        cache = cache_sizes(architecture_of(self.config))["float16"]
        self.journal.add("decode", **found, cache_bytes_per_token=cache, context=CONTEXT)
        print(json.dumps(found), flush=True)

    def llama(self) -> None:
        """A part of the same shapes by llama.cpp, in turns with quern's."""
        bench = self.options.llama_bench or Environment.of("llama.cpp").prefix / "llama.cpp" / "bin" / "llama-bench"
        if not bench.is_file():
            print(f"llama.cpp is not measured: there is no {bench}. quern peers install llama.cpp", flush=True)
            return
        self._need(self.part / "quern.json", "quantize")
        layers, kind = min(LLAMA_LAYERS, self.layers), self.options.llama_type
        config = {**self.config, "num_hidden_layers": layers}
        mine, theirs = self.folder / f"part-{layers}", self.folder / f"part-{layers}-{kind}.gguf"
        repeat(self.part, mine, layers)
        if not theirs.is_file():
            write_gguf(theirs.with_suffix(".part"), config, kind)
            theirs.with_suffix(".part").rename(theirs)
        self.options.llama_bench = bench
        rounds: dict[str, list[dict[str, float]]] = {"quern": [], f"llama.cpp {kind}": []}
        for _ in range(LLAMA_ROUNDS):
            rounds["quern"].append(_ours(mine, self.options.threads, self.options))
            rounds[f"llama.cpp {kind}"].append(_llama(theirs, self.options.threads, self.options))
        sizes = {"quern": _bytes(mine), f"llama.cpp {kind}": theirs.stat().st_size}
        self.journal.add("llama", layers=layers, rounds=rounds, bytes=sizes)

    def report(self) -> None:
        """The result so far, and its sections."""
        from measured import write_result

        found = summary(self.journal.lines, self.layers, self.options.blocks)
        path = write_result(
            f"whole_{Path(self.options.shape).name.removesuffix('.json')}", {"recipe": self.recipe.to_json(), **found}
        )
        result = json.loads(path.read_text("utf-8"))
        for page in self.options.page:
            write_section(page, sections(result)["zh" if ".zh" in page.name else "en"])
        print(sections(result)["en"])
        print(path)

    def _need(self, path: Path, step: str) -> None:
        if not path.is_file():
            raise SystemExit(f"{path} is not there yet: run the step {step} first")


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


if __name__ == "__main__":
    main()
