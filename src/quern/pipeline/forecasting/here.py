"""What is foretold of this machine: short runs of the real code, carried over to the whole model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil
import torch

from quern.advisor.forecasting import running
from quern.advisor.forecasting.quantizing import Term, at_rate, quantize_seconds
from quern.advisor.forecasting.results import Foretold, RecipeForecast
from quern.advisor.hardware import BUFFER_BYTES, read_bandwidth
from quern.checkpoint.tokenizer import usable_tokenizer
from quern.core.machine.memory import free_memory
from quern.core.progress import Progress
from quern.core.text.units import bytes_text, percent_text, seconds_text, significant
from quern.pipeline.blockwise.calibration_text import CalibrationText
from quern.pipeline.forecasting import short_decoding, short_quantization
from quern.pipeline.forecasting.counted import Bytes, Case, bytes_of, disk_of, memory_of
from quern.pipeline.forecasting.subject import Subject
from quern.pipeline.request import calibration_sequences

SPARE = 0.9
"""Share of the free memory that the cpu engine's pool of keys and values plans with."""
PROMPT_ROWS = 256
"""Tokens of a prompt that the cpu engine computes at once."""
_LOADER = """
import json, sys
import psutil
from quern.architectures.base import architecture_of
from quern.engines.cpu import CpuEngine
architecture_of(json.load(sys.stdin)).build_rotary()
print(psutil.Process().memory_info().rss)
"""


def told_here(
    subject: Subject, cases: Sequence[Case], context: int, most: int, threads: int, progress: Progress
) -> list[RecipeForecast]:
    """All recipes on this machine; memory is counted before the runs, which take some of their own."""
    base = process_bytes(subject)
    counted = [(bytes_of(case), memory_of(case, threads)) for case in cases]
    room = int(SPARE * free_memory())
    before = torch.get_num_threads()
    try:
        bandwidth = 1e9 * read_bandwidth([threads], BUFFER_BYTES)[threads]
    finally:
        torch.set_num_threads(before)
    task = progress.task("short runs", 2 * len(cases))
    known = _Known()
    told = []
    for case, (size, memory) in zip(cases, counted, strict=True):
        layers = case.architecture.layers
        seconds = _quantize_seconds(subject, case, threads, known)  # first, for what the first run takes longer
        task.advance()
        pace = short_decoding.pace_of(case, sum(size.read.values()) // layers, threads, min(context, most))
        task.advance()
        told.append(_told(case, size, memory, seconds, pace, bandwidth, base, room, context, most, threads))
    task.done()
    return told


@dataclass
class _Known:
    """What holds for all recipes of one forecast."""

    texts: dict[str, float] = field(default_factory=dict)
    """Seconds to gather the calibration text, by what is asked of it."""
    first: float | None = None
    """Seconds that the first quantization in a process takes longer."""


def process_bytes(subject: Subject) -> int:
    """Resident memory of a process that is about to load a model into the cpu engine, found by starting one."""
    done = subprocess.run(
        [sys.executable, "-c", _LOADER], input=json.dumps(subject.checkpoint.config), capture_output=True, text=True
    )
    if done.returncode != 0:
        return psutil.Process().memory_info().rss
    return int(done.stdout.split()[-1])


def _told(
    case: Case,
    size: Bytes,
    memory: Foretold,
    seconds: Foretold,
    pace: short_decoding.Pace | str,
    bandwidth: float,
    base: int,
    room: int,
    context: int,
    most: int,
    threads: int,
) -> RecipeForecast:
    runtime = f"quern, engine {'cpu' if isinstance(pace, short_decoding.Pace) else 'reference'}"
    weights = size.held
    cache = size.cache.get("float16", 0)
    buffers = _buffers(case)
    if isinstance(pace, str):
        prefill = decode = Foretold(value=None, unit="tokens/s", basis="measured", derivation=pace)
    else:
        prefill, decode = _prefill(case, pace), _decode(case, pace, sum(size.read.values()), bandwidth)
    return RecipeForecast(
        recipe=case.recipe.name,
        format=case.recipe.format,
        runtime=runtime,
        artifact_bytes=size.files,
        bits_per_weight=8 * size.data / case.subject.checkpoint.parameters if size.data else None,
        quantize_seconds=seconds,
        quantize_memory=memory,
        quantize_disk=disk_of(case, threads),
        run_memory=running.run_memory(
            base + buffers, weights, cache * context, context, "process and buffers", "measured"
        ),
        prefill=prefill,
        decode=decode,
        contexts=running.contexts(room, base + buffers, weights, size.cache, most, "counted"),
        notes=[*case.subject.checkpoint.notes],
    )


def _buffers(case: Case) -> int:
    """Bytes of what the cpu engine computes a piece of a prompt in, about."""
    config = case.architecture.config
    widths = 6 * config.hidden_size + 2 * getattr(config, "intermediate_size", config.hidden_size)
    return 4 * (PROMPT_ROWS * int(widths) + int(config.vocab_size))


def _prefill(case: Case, pace: short_decoding.Pace) -> Foretold:
    layers = case.architecture.layers
    whole = layers * pace.prompt_block + pace.token_head
    rate = case.forward_operations / layers * pace.prompt / pace.prompt_block
    said = (
        f"{pace.prompt} tokens / ({layers} blocks x {seconds_text(pace.prompt_block)} + head "
        f"{seconds_text(pace.token_head)}); {pace.blocks} of the blocks were run, at {significant(rate / 1e9)} Gop/s"
    )
    return Foretold(value=pace.prompt / whole, unit="tokens/s", basis="measured", derivation=said)


def _decode(case: Case, pace: short_decoding.Pace, read: int, bandwidth: float) -> Foretold:
    layers = case.architecture.layers
    token = layers * pace.token_block + pace.token_head
    share = read / token / bandwidth
    said = (
        f"1 / ({layers} blocks x {seconds_text(pace.token_block)} + head {seconds_text(pace.token_head)}); {pace.blocks} of "
        f"the blocks were run; {bytes_text(read)} a token are so read at {percent_text(share)} of the "
        f"{significant(bandwidth / 1e9)} GB/s measured"
    )
    return Foretold(value=1 / token, unit="tokens/s", basis="measured", derivation=said)


def _quantize_seconds(subject: Subject, case: Case, threads: int, known: _Known) -> Foretold:
    """From short quantizations; what is done once is timed as it is."""
    rates = short_quantization.rates_of(case, threads)
    outer = short_quantization.outer_rate(case, threads)
    work, tokens = case.work, case.tokens
    rounded, head = work.weights.total(), work.outer_weights.total()
    if known.first is None:
        known.first = rates.first
    terms = [
        at_rate("token weights", tokens * work.weighing_operations, rates.weighing, "op"),
        at_rate("gradients at the head", tokens * work.head_operations, rates.head, "op"),
        at_rate("passes and Hessians", tokens * (work.token_operations - work.weighing_operations), rates.blocks, "op"),
        at_rate("error feedback", work.feedback_operations, rates.blocks, "op"),
        Term("rounding", rates.weight * rounded, f"{rounded / 1e9:.3g} G weights x {1e9 * rates.weight:.3g} ns"),
        Term("embedding and head", outer * head, f"{head / 1e9:.3g} G weights x {1e9 * outer:.3g} ns"),
        Term("start and end", rates.once, "what a model of one block took besides"),
        Term("first use of libraries", known.first, "what the first run took longer than the second"),
    ]
    if case.tokens and subject.tokenizer:
        terms.append(Term("calibration text", _text_seconds(case, known.texts), "read and tokenized once"))
    if subject.checkpoint.at_hand:
        terms.append(
            Term(
                "look at all weights", 2 * rates.checking * subject.checkpoint.parameters, "read once before the start"
            )
        )
    if (rate := short_quantization.drawing_rate(case)) is not None:
        terms.append(at_rate("drawing weights from their seed", _drawn_bytes(case), rate, "B"))
    return quantize_seconds(terms, "measured")


def _drawn_bytes(case: Case) -> int:
    """Of all weights that are read: those of blocks three times where there is a pass for token weights, forward and
    backward, embedding and head twice; else each once, and the embedding once more for the unquantized stream."""
    table = 2 * case.architecture.config.vocab_size * case.architecture.config.hidden_size
    outer = table * len(case.architecture.outer)
    blocks = 2 * case.subject.checkpoint.parameters - outer
    streams = case.recipe.tuning is not None or any(
        one.rounding.target == "drift" for one in case.plan.quantized().values()
    )
    weighs = bool(case.work.weighing_operations)
    return int((3 if weighs else 1) * blocks + (2 if weighs else 1) * outer + streams * table)


def _text_seconds(case: Case, known: dict[str, float]) -> float:
    """To gather the default calibration text with the model's tokenizer."""
    settings = case.recipe.calibration
    key = settings.model_dump_json()
    if key not in known:
        text = CalibrationText((), usable_tokenizer(case.subject.checkpoint.path, True), settings)
        begin = short_quantization.now()
        calibration_sequences(case.architecture, text, 0, or_fewer=True)
        known[key] = short_quantization.now() - begin
    return known[key]
