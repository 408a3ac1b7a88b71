"""Measure models: size, accuracy loss, speed and memory, each one in a process of its own.

Reference logits are the unquantized model's with float32 activations. The unquantized model as it is stored, measured
against them like every contender, gives the noise floor. Timed rounds of all contenders alternate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from quern.advisor.hardware import measured_rates
from quern.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quern.core.errors import UserError
from quern.core.metrics import NonFiniteError
from quern.core.parallel import available_threads
from quern.core.progress import Progress, Silent
from quern.core.results import Row
from quern.engines.base import AUTO, engine_for
from quern.evaluation.accuracy import Accuracy, DocumentScore, summarize_scores
from quern.evaluation.choice import ChoiceSet
from quern.evaluation.reference_cache import ReferenceKey, has_reference
from quern.evaluation.speed import Speed, SpeedRound, summarize_rounds
from quern.evaluation.texts import Text
from quern.pipeline.inputs import Inputs, Settings, prepare_inputs, reference_key
from quern.pipeline.rows import (
    Contender,
    Machine,
    Measured,
    Original,
    contender_of,
    original_of,
    row_of,
    weight_bytes,
)
from quern.pipeline.worker_process import COMMAND, Worker

_Scores = tuple[Accuracy | None, list[bool] | None, tuple[str, ...]]

WARM_UP_TOKENS = 4
"""Decoded in the round that is not timed."""
LOADED_BYTES = 1 << 30
"""What a process needs beside its weights: interpreter, libraries, activations and a batch of logits."""


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    texts: Sequence[str | Path | Text] = (),
    choices: Sequence[str | Path | ChoiceSet] = (),
    tokens: int = 4096,
    window: int = 1024,
    dtype: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    speed_rounds: int = 3,
    prompt_tokens: int = 256,
    decode_tokens: int = 32,
    engine: str = AUTO,
    progress: Progress | None = None,
) -> Row:
    """Measure the model at ``model`` (artifact, folder, Hub id or GGUF file), against ``reference`` if it is given.

    ``texts`` are files to score (see ``evaluation/texts.py``; default: held-out files of the running Python),
    ``choices`` JSONL files (see ``evaluation/choice.py``). An unquantized model without a reference is its own: its
    divergence is then the noise floor. ``engine`` runs the model (``auto``: the fastest that can); reference logits are
    always the reference engine's. A quantized one without a reference has no divergence. Raises ``UserError``.
    """
    settings = Settings(
        tokens=tokens,
        window=window,
        dtype=dtype,
        threads=threads,
        seed=seed,
        speed_rounds=speed_rounds,
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
    )
    progress = progress or Silent()
    checkpoint = open_checkpoint(model, progress=progress)
    contender = contender_of(checkpoint, engine_for(checkpoint, engine))
    if reference is not None:
        original: Contender | None = Contender(name="reference", path=reference, timed=False)
    else:
        original = contender if contender.recipe is None else None
        if original is not None and original.engine != "reference":  # which is what reference logits come from
            original = Contender(name="reference", path=checkpoint.path, timed=False)
    with tempfile.TemporaryDirectory(prefix="quern-evaluate-") as folder:
        source = checkpoint if reference is None else open_checkpoint(reference, progress=progress)
        inputs = prepare_inputs(source, Path(folder), texts=texts, choices=choices, settings=settings)
        rates = measured_rates([threads or available_threads()]) if speed_rounds else None
        others = [] if original is contender else [contender]
        rows = measure_all(others, original, inputs, settings=settings, hardware={"measured": rates}, progress=progress)
    return rows[-1]


def measure_all(
    contenders: Sequence[Contender],
    reference: Contender | None,
    inputs: Inputs,
    *,
    settings: Settings,
    hardware: dict[str, Any] | None = None,
    progress: Progress | None = None,
    command: Sequence[str] = COMMAND,
) -> list[Row]:
    """Measure ``reference`` (the unquantized model, or None) and ``contenders``; their rows in this order.

    ``hardware`` is what ``probe`` returned, for the fractions of its limits; ``command`` starts a worker. Contenders
    that fit in memory together are loaded together and their timed rounds alternate; otherwise each one is loaded and
    measured by itself, which its row's notes say. Raises ``UserError``, and ``WorkerError`` for a process that failed.
    """
    progress = progress or Silent()
    everyone = [*([] if reference is None else [reference]), *contenders]
    opened = [open_checkpoint(contender.path, progress=progress) for contender in everyone]
    hashes = [c.sha256 or checkpoint.sha256(progress) for c, checkpoint in zip(everyone, opened)]
    if reference is not None:
        _check_vocabularies(everyone, opened)
    original = original_of(opened[0])
    key = None if reference is None else reference_key(reference.engine, hashes[0], inputs, settings)
    run = _Run(inputs, key, settings, progress, command)
    measured = _measure(run, everyone, opened, original)
    if reference is not None:
        measured = [_with_origin_noted(found, hashes[0]) for found in measured]
    machine = Machine.of(hardware, settings.threads or available_threads())
    unquantized = None if reference is None else measured[0]
    return [
        row_of(
            found,
            unquantized,
            checkpoint=checkpoint,
            original=original,
            sha256=sha256,
            machine=machine,
            dtype=settings.dtype,
            seed=settings.seed,
        )
        for found, checkpoint, sha256 in zip(measured, opened, hashes)
    ]


def _check_vocabularies(everyone: Sequence[Contender], opened: Sequence[Checkpoint]) -> None:
    sizes = [checkpoint.config.get("vocab_size") for checkpoint in opened]
    for contender, size in zip(everyone, sizes):
        if size != sizes[0]:
            raise UserError(
                f"{contender.name} has a vocabulary of {size} tokens, its reference one of {sizes[0]}: they are not "
                "versions of one model. Give the checkpoint that it was made from as the reference"
            )


def _with_origin_noted(measured: Measured, reference_sha256: str) -> Measured:
    if measured.contender.original_sha256 in (None, reference_sha256):
        return measured
    note = (
        "quantized from another checkpoint than the reference, as its quern.json says: the loss holds that difference"
    )
    return replace(measured, notes=(*measured.notes, note))


@dataclass(frozen=True)
class _Run:
    inputs: Inputs
    key: ReferenceKey | None
    settings: Settings
    progress: Progress
    command: Sequence[str]

    def load(self, worker: Worker, engine: str, path: Path, dtype: str) -> None:
        """Ask for a model without waiting for it."""
        request = {"do": "load", "engine": engine, "path": str(path), "dtype": dtype}
        worker.send({**request, "threads": self.settings.threads})

    def cache(self) -> dict[str, Any]:
        """Where the reference logits are, as workers are told."""
        if self.key is None:
            return {"cache": None, "key": None}
        return {"cache": str(self.inputs.folder), "key": self.key.to_json()}


def _measure(
    run: _Run, everyone: Sequence[Contender], opened: Sequence[Checkpoint], original: Original
) -> list[Measured]:
    pairs = [(contender, checkpoint.path) for contender, checkpoint in zip(everyone, opened)]
    together = _fit_in_memory(opened, original)
    missing = run.key is not None and not has_reference(run.inputs.folder, run.key)
    if missing and not together:
        _compute_reference(run, *pairs[0])
    measured: list[Measured] = []
    for group in [pairs] if together else [[pair] for pair in pairs]:
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker(contender.name, run.command)) for contender, _ in group]
            for worker, (contender, path) in zip(workers, group):
                run.load(worker, contender.engine, path, run.settings.dtype)
            if missing and together:  # while the contenders load
                _compute_reference(run, *pairs[0])
            measured += _measure_loaded(run, [contender for contender, _ in group], workers)
    note = () if together else ("measured alone: all contenders together do not fit in memory",)
    return [replace(found, notes=(*found.notes, *note)) for found in measured]


def _fit_in_memory(opened: Sequence[Checkpoint], original: Original) -> bool:
    """All contenders and the reference with float32 weights."""
    needed = 4 * original.parameters + sum(weight_bytes(checkpoint) for checkpoint in opened)
    return needed + (len(opened) + 1) * LOADED_BYTES <= psutil.virtual_memory().available


def _compute_reference(run: _Run, reference: Contender, path: Path) -> None:
    task = run.progress.task("reference logits", run.inputs.scored_tokens)
    with Worker("reference in float32", run.command) as worker:
        run.load(worker, reference.engine, path, "float32")
        worker.receive()
        worker.ask({"do": "reference", "windows": str(run.inputs.windows), **run.cache()}, task.advance)
    task.done()


def _measure_loaded(run: _Run, contenders: Sequence[Contender], workers: Sequence[Worker]) -> list[Measured]:
    """Speed first, while nothing else runs; then each one's peak memory, before scoring adds its own."""
    loads = [worker.receive() for worker in workers]
    speeds = _alternate_rounds(run, contenders, workers)
    peaks = [worker.ask({"do": "peak"})["peak_rss_bytes"] for worker in workers]
    return [
        Measured(
            contender=contender,
            bytes_per_token=load["bytes_per_token"],
            speed=speed,
            peak_rss_bytes=peak,
            accuracy=accuracy,
            correct=correct,
            notes=(*notes, *(run.inputs.notes if speed else ())),
        )
        for contender, load, speed, peak, (accuracy, correct, notes) in zip(
            contenders, loads, speeds, peaks, _score_all(run, workers)
        )
    ]


def _alternate_rounds(run: _Run, contenders: Sequence[Contender], workers: Sequence[Worker]) -> list[Speed | None]:
    """``speed_rounds`` rounds of each timed contender after one to warm up, in another order every time."""
    settings = run.settings
    turns = [number for number, contender in enumerate(contenders) if contender.timed and settings.speed_rounds]
    if not turns:
        return [None] * len(workers)
    rounds: dict[int, list[SpeedRound]] = {number: [] for number in turns}
    task = run.progress.task("timing", len(turns) * (settings.speed_rounds + 1))
    for repeat in range(settings.speed_rounds + 1):
        decode_tokens = settings.decode_tokens if repeat > 0 else min(settings.decode_tokens, WARM_UP_TOKENS)
        for number in turns:
            request = {"do": "speed_round", "prompt": run.inputs.prompt, "decode_tokens": decode_tokens}
            answer = workers[number].ask(request)
            if repeat > 0:
                rounds[number].append(SpeedRound(**answer["round"]))
            task.advance()
        turns = [*turns[1:], *turns[:1]]
    task.done()
    return [summarize_rounds(rounds[number]) if rounds.get(number) else None for number in range(len(workers))]


def _score_all(run: _Run, workers: Sequence[Worker]) -> list[_Scores]:
    """As many workers at once as there are threads, each with its share of them."""
    threads = run.settings.threads or available_threads()
    at_once = min(len(workers), threads)
    task = run.progress.task("scoring", len(workers) * (run.inputs.scored_tokens + run.inputs.option_count))
    with ThreadPoolExecutor(at_once) as pool:
        try:
            scores = list(pool.map(lambda worker: _score(run, worker, threads // at_once, task.advance), workers))
        except BaseException:
            for worker in workers:  # or the pool would wait for their answers
                worker.kill()
            raise
    task.done()
    return scores


def _score(run: _Run, worker: Worker, threads: int, advance: Callable[[int], None]) -> _Scores:
    """Accuracy on the text and on the choices; a model whose logits overflow gets none, and a note that says so."""
    correct = None
    request = {"threads": threads, "windows": str(run.inputs.windows), **run.cache()}
    try:
        answer = worker.ask({"do": "accuracy", **request}, advance)
        documents = [DocumentScore(**document) for document in answer["documents"]]
        if run.inputs.options is not None:
            request = {"threads": threads, "options": str(run.inputs.options)}
            correct = worker.ask({"do": "choice", **request}, advance)["correct"]
        accuracy = summarize_scores(documents, seed=run.settings.seed)
    except NonFiniteError as error:
        return None, None, (f"accuracy not measured: {error}",)
    worker.close()
    return accuracy, correct, ()
