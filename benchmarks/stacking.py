"""Every pair of parts that can be stacked, tried on one model: the figures of ``quern check`` and of docs/stacking.md.

    python benchmarks/stacking.py [-o FOLDER] [--tokens 4096] [--calibration 4096] [--only KIND ...]
    python benchmarks/stacking.py --page          writes docs/stacking.md from what was measured

Each pair that is not refused is quantized and run beside its parts alone (pipeline/stacking/trial.py has the rule by which
that becomes a label). FOLDER keeps what was measured, so that the same command goes on after an interruption. ``--noise``
quantizes some stacks by several calibration texts instead and prints by how much their losses differ.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import quern
from quern.advisor.hardware import probe
from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.stacking import Part
from quern.core.text.units import significant
from quern.evaluation.heldout import held_out_text
from quern.evaluation.texts import Window, cut_windows
from quern.loading.fitting import open_model
from quern.pipeline.stacking import matrix as matrices
from quern.pipeline.stacking.answer import pairs, together
from quern.pipeline.stacking.matrix import Cell, Matrix, matrix
from quern.pipeline.stacking.trial import NOISE, Trials, tried
from quern.texts.source import Text

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "python-7m"
PAGE = ROOT / "docs" / "stacking.md"
SEEDS = range(4)
WINDOW = 256
SIGNS = {"works": "+", "degrades": "**~**", "refuses": "x"}


INTRODUCTION = """# Can these be stacked?

`quern check RECIPE [--for cpu|transformers|vllm|llama.cpp|onnxruntime] [--cache int8]` says whether the parts of a recipe
go together and whether a runtime runs the result, before any work is done; with `--model` for that model's shapes and
biases, and on how many GPUs vLLM can run it ([vllm.md](vllm.md#tensor-parallelism)). `quern check --matrix`
shows the table below for the quern that is installed, `--json` all reasons.

- **works** (`+`): no worse than without it, within noise. **degrades** (`~`): it runs and loses. **refuses** (`x`): it stops
  before work starts.
- What is refused is asked of those who refuse it: the recipe's rules, the format's writer, the engine, the runtimes that a
  format is for. What degrades follows from what components declare that they want and remove (`traits` of a transform,
  rounding or codec). Labels are held to the measurements below; a test also runs every pair on the first block, where one
  that works may exceed its bound by a fifth, and sees every refused one stop before a file exists.
- Order: channel scalings run as the recipe lists them, rotations behind them; everything else has its place. Two codecs,
  roundings or activation schemes share a model by linears (`overrides`), never one linear.
- Scales of AWQ and SmoothQuant are folded into the weights before anything is measured for the rounding that follows, and
  a rotation turns weights and Hessian alike: error feedback never sees a Hessian of other coordinates.

Rows first, columns second:
"""
PROTOCOL = """
## Measured

`python benchmarks/stacking.py`, model `{model}`, {cpu}, {date}: KL divergence in nats a token over {scored_tokens} held-out
tokens, calibrated with {calibration_tokens}. Everything is added to 4-bit integers in groups of 128, rounded to nearest.
*Bound*: what the pair may lose. A transform or rounding is there to lose less, and storage, format and runtime change no
number, so what they are added to must not get worse (two transforms or roundings: no worse than the better). What codecs,
activations and caches cost adds up. Two that share a model by linears: no worse than the worse. A pair degrades where it
loses more than that by more than {noise:.0%}, by which losses of a recipe differ with the calibration text (`--noise`), and
beyond the 95 % interval of the paired difference over documents. vLLM's column is tried with transformers, which reads the
same files; what keeps vLLM from a recipe is in [compressed-tensors.md](compressed-tensors.md).
"""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "stacking")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--calibration", type=int, default=4096)
    parser.add_argument("--only", nargs="*", default=[], metavar="KIND", help="pairs whose parts are of these kinds")
    parser.add_argument("--noise", action="store_true")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(matrix()), "utf-8")
        return
    scored = windows(options.tokens)
    if options.noise:
        print(json.dumps(noise(options, scored), indent=2))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    measured = measure(options, scored)
    facts = {"model": MODEL.name, "sha256": open_model(MODEL).sha256(), "quern": quern.__version__, "noise": NOISE}
    facts |= {"cpu": probe()["cpu_model"], "date": datetime.date.today().isoformat()}
    facts |= {"scored_tokens": options.tokens, "calibration_tokens": options.calibration}
    file = Path(matrices.__file__).with_name(matrices.MEASURED)
    file.write_text(json.dumps({**facts, "pairs": measured}, indent=1) + "\n", "utf-8")


def windows(tokens: int) -> Sequence[Window]:
    """Held-out text of the running Python."""
    text = Text.of("held-out", [text for _, text in held_out_text()])
    size = open_model(MODEL).config["vocab_size"]
    return cut_windows([text], load_tokenizer(MODEL), vocabulary_size=size, tokens=tokens, window=WINDOW).windows


def measure(options: argparse.Namespace, scored: Sequence[Window]) -> dict[str, dict[str, float]]:
    """``{"first, second": {"kl": ..., "bound": ...}}`` of every pair that is not refused."""
    known = options.output / f"pairs-{options.tokens}-{options.calibration}.json"
    found: dict[str, dict[str, float]] = json.loads(known.read_text("utf-8")) if known.is_file() else {}
    trials = fresh_trials(options, scored, 0)
    for first, second in pairs():
        pair = together(first, second)
        name, mirrored = f"{first}, {second}", f"{second}, {first}"
        if options.only and not {first.kind, second.kind} <= set(options.only):
            continue
        if pair.answer.label == "refuses" or name in found:
            continue
        if first.kind != second.kind and mirrored in found:  # the order is the recipe's, not the reader's
            found[name] = found[mirrored]
            continue
        verdict = tried(trials, pair)
        found[name] = {"kl": float(f"{verdict.kl:.5g}"), "bound": float(f"{verdict.bound:.5g}")}
        known.write_text(json.dumps(found, indent=1), "utf-8")
        told = "" if verdict.label == pair.answer.label else f"   DECLARED: {pair.answer.label}"
        print(f"{name:50} {verdict.label:9} {verdict.kl:.5f} {verdict.change:+.1%}{told}", flush=True)
    return found


def fresh_trials(options: argparse.Namespace, scored: Sequence[Window], seed: int) -> Trials:
    """Trials in an empty folder."""
    folder = options.output / f"artifacts-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Trials(MODEL, scored, folder, seed, tokens=options.calibration, sequence_length=WINDOW)


def noise(options: argparse.Namespace, scored: Sequence[Window]) -> dict[str, Any]:
    """Losses of some stacks by ``SEEDS``, which draw the calibration text, and how far they lie apart."""
    stacks = {
        "gptq": [Part("rounding", "gptq")],
        "gptq, kmeans": [Part("rounding", "gptq"), Part("codec", "kmeans")],
        "gptq, hadamard": [Part("rounding", "gptq"), Part("transform", "hadamard")],
        "smoothquant, static": [Part("transform", "smoothquant"), Part("activations", "static")],
    }
    found: dict[str, list[float]] = {name: [] for name in stacks}
    for seed in SEEDS:
        trials = fresh_trials(options, scored, seed)
        for name, parts in stacks.items():
            keys = together(*parts).keys[2] if len(parts) == 2 else together(parts[0], Part("codec", "integer")).keys[0]
            found[name].append(trials.loss(keys).mean)
    return {"losses": found, "largest_over_least": {name: max(losses) / min(losses) for name, losses in found.items()}}


def page(found: Matrix) -> str:
    """docs/stacking.md."""
    on = found.measured_on
    numbers = " | ".join(str(number) for number in range(1, len(found.parts) + 1))
    lines = [INTRODUCTION, f"| | {numbers} |", "|" + "---|" * (len(found.parts) + 1)]
    for number, first in enumerate(found.parts, start=1):
        signs = ["" if first == second else SIGNS[found.cell(first, second).answer.label] for second in found.parts]
        lines.append(f"| {number} {first} | {' | '.join(signs)} |")
    lines += ["", "## What degrades, and what refuses", "", "| pair | | why |", "|---|---|---|"]
    lines += [
        f"| {cell.first}, {cell.second} | {cell.answer.label} | {cell.answer.reason} |" for cell in told_once(found)
    ]
    lines += [PROTOCOL.format(**on), "| pair | KL | bound | change |", "|---|---|---|---|"]
    lines += [
        f"| {cell.first}, {cell.second} | {significant(one.kl)} | {significant(one.bound)} | {one.kl / one.bound - 1:+.1%} |"
        for cell in found.cells
        if (one := cell.measured) is not None and not (cell.first.kind > cell.second.kind)
    ]
    return "\n".join(lines) + "\n"


def told_once(found: Matrix) -> Iterator[Cell]:
    """The cells that do not work; of two that say the same of two parts, one."""
    seen = set()
    for cell in found.cells:
        if cell.answer.label != "works" and (cell.second, cell.first, cell.answer.reason) not in seen:
            seen.add((cell.first, cell.second, cell.answer.reason))
            yield cell


if __name__ == "__main__":
    main()
