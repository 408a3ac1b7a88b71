"""Measure one model: size, accuracy loss, speed and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quern.advisor.hardware import measured_rates, rate_warnings
from quern.checkpoint.checkpoint import Checkpoint
from quern.comparison.input_shift import measured_shift, sentence
from quern.comparison.inputs import MeasurementSettings, prepare_inputs
from quern.comparison.measure import measure_all
from quern.comparison.row_builder import Contender, contender_of
from quern.comparison.task_scores import task_scores
from quern.core.artifact import quantization_of
from quern.core.machine.parallel import available_threads
from quern.core.machine.temporary import temporary_folder
from quern.core.progress import Progress, Silent
from quern.core.results import Row
from quern.engines.base import AUTO, DtypeName, engine_for
from quern.engines.cpu import cache_named
from quern.evaluation.choice import ChoiceSet
from quern.evaluation.tasks import wanted_tasks
from quern.evaluation.texts import load_windows
from quern.loading.fitting import open_model
from quern.texts.source import Text


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
    cache: str | None = None,
    tasks: Sequence[str] | None = None,
    tasks_path: str | Path | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Row:
    """Measure the model at ``model`` (artifact, folder, Hub id or GGUF file), against ``reference`` if it is given.

    ``texts`` are files to score (see ``evaluation/texts.py``; default: held-out files of the running Python),
    ``choices`` JSONL files (see ``evaluation/choice.py``). An unquantized model without a reference is its own: its
    divergence is then the noise floor. ``engine`` runs the model (``auto``: the fastest that can); reference logits are
    always the reference engine's. A quantized one without a reference has no divergence. ``cache`` is how the cpu engine
    keeps keys and values (see ``generation.generate``), which the divergence then shows: positions of a window attend to
    what the cache holds of those before.

    With ``texts``, an artifact that was calibrated is also run once on the reference engine, to see whether the inputs of
    its linears are like those of calibration: the row's ``input_shift``.

    ``tasks`` names tasks of lm-eval (the extra ``quern[lm-eval]``), ``tasks_path`` a folder with further ones, ``limit`` how
    many items of each are run (default: all); their scores are the row's ``tasks``. Raises ``UserError``.
    """
    wanted = wanted_tasks(tasks, tasks_path, limit)
    settings = MeasurementSettings(
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
    checkpoint = open_model(model, progress=progress)
    chosen = engine_for(checkpoint, engine)
    contender = replace(contender_of(checkpoint, chosen), cache=cache_named(cache, chosen))
    if reference is not None:
        original: Contender | None = Contender(name="reference", path=reference, timed=False)
    else:
        original = contender if contender.kind == "unquantized" else None
        if original is not None and original.engine != "reference":  # which is what reference logits come from
            original = Contender(name="reference", path=checkpoint.path, timed=False)
    with temporary_folder("evaluate") as folder:
        source = checkpoint if reference is None else open_model(reference, progress=progress)
        inputs = prepare_inputs(source, folder, texts=texts, choices=choices, settings=settings)
        rates = measured_rates([threads or available_threads()]) if speed_rounds else None
        for warning in [] if rates is None else rate_warnings(rates):
            progress.log(f"warning: {warning}")
        others = [] if original is contender else [contender]
        measurement = measure_all(
            others, original, inputs, settings=settings, hardware={"measured": rates}, progress=progress
        )
        windows = load_windows(inputs.windows) if texts else ()
        asked: DtypeName = dtype  # type: ignore[assignment]  # the settings let no other through
        shift = measured_shift(checkpoint, windows, dtype=asked, threads=threads, progress=progress) if texts else None
    row = measurement.rows[-1]
    scores: dict[str, dict[str, float]] = {}
    if wanted is not None:
        scores = task_scores(checkpoint, contender.engine, wanted, dtype=dtype, threads=threads, seed=seed,
                             progress=progress, cache=contender.cache)  # fmt: skip
    of_reference = [] if reference is None else _reference_notes(source)
    told = [] if shift is None or (said := sentence(shift)) is None else [said]
    notes = [*inputs.taken, *of_reference, *row.notes, *told]
    return row.model_copy(update={"tasks": scores, "input_shift": shift, "notes": notes})


def _reference_notes(source: Checkpoint) -> list[str]:
    """What should be known of the model that losses are measured against."""
    quantization = quantization_of(source.config)
    method = None if quantization is None else str(quantization.get("quant_method"))[:40]
    quantized = (
        [] if method is None else [f"it is itself quantized, by {method}: what that cost stays and is not measured"]
    )
    return [f"the reference: {note}" for note in (*quantized, *source.notes)]
