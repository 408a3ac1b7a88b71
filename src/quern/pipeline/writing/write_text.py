"""Calibration text in a model's own words: it goes on from beginnings of texts, and answers first questions.

Statistics for quantization are wanted on what a model reads when it is used, and for a chat model most of that is what it
wrote itself. Text of the model's own also needs no licence and no download (Liu et al. 2023, LLM-QAT, arXiv 2305.17888,
section 3.1; Williams et al. 2024, self-calibration, arXiv 2410.17170).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import quern
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import write_bytes
from quern.checkpoint.jobs.output_place import OutputFile
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.checkpoint.tokenizer import load_tokenizer
from quern.core.errors import UserError, option
from quern.core.progress import Progress, Silent
from quern.engines.base import AUTO
from quern.generation.batch import continuations
from quern.generation.generate import load_model
from quern.generation.sampling import SamplingOptions
from quern.generation.stopping import end_tokens
from quern.loading.fitting import open_model
from quern.pipeline.writing.beginnings import Beginning, Lengths, beginnings, read_texts
from quern.texts.source import Text

SUFFIX = ".jsonl"
RECORD = ("text", "tokens", "written_by")
LEAST = 32
"""Tokens that a record is reckoned to have behind its beginning, where beginnings are counted: some texts end early."""


@dataclass(frozen=True)
class WrittenText:
    """What ``write_text`` made."""

    path: Path
    records: int
    tokens: int
    """Of all records, beginnings included."""
    written_tokens: int
    """Of these, what the model wrote."""
    seconds: float
    """Wall-clock time of this run."""
    resumed: bool
    notes: list[str]


def write_text(
    model: str | Path,
    output: str | Path,
    *,
    texts: Sequence[str | Path | Text] = (),
    tokens: int = 65536,
    begin: int = 32,
    length: int = 512,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    fresh: bool = False,
    threads: int | None = None,
    engine: str = AUTO,
    progress: Progress | None = None,
) -> WrittenText:
    """Let the model at ``model`` (artifact, folder, GGUF file, Hub id) write at least ``tokens`` tokens into the JSON lines
    file ``output``.

    It goes on from windows of ``begin`` tokens of ``texts`` until a record has ``length``, or ends; of conversations it
    answers the first question, in at most ``length`` tokens (default: modules of the running Python's standard library).
    Texts of several kinds take turns. The same arguments give the same file at any number of ``threads``; an interrupted run
    goes on. Raises ``UserError`` for what cannot be done, and ``BadFileError`` for damaged input.
    """
    progress = progress or Silent()
    _check(tokens, begin, length)
    sampling = SamplingOptions(temperature, top_k, top_p)
    target = _target(output, model, fresh)
    started = time.perf_counter()
    checkpoint = open_model(model)
    tokenizer = load_tokenizer(checkpoint.path)
    opened = read_texts(texts)
    asked = {
        "quern": quern.__version__,
        "model_sha256": checkpoint.sha256(progress),
        "texts": [text.sha256 for text in opened],
        "tokens": tokens,
        "begin": begin,
        "length": length,
        "sampling": asdict(sampling),
        "seed": seed,
        "engine": engine,
    }
    notes: list[str] = []
    loaded = load_model(checkpoint, engine, threads, None, notes.append)
    lengths = Lengths(begin, min(length, loaded.maximum_length), loaded.maximum_length)
    if begin >= lengths.whole:
        raise UserError(
            f"{option('begin', '--begin')} is {begin}, and the model's context {lengths.context}, which leaves no room to "
            "go on; give less"
        )
    wanted = -(-tokens // (begin + min(LEAST, length - begin)))
    found, said = beginnings(opened, tokenizer, lengths, loaded.vocabulary_size, wanted, seed)
    with WorkFolder.open(target.work, asked, fresh) as work:
        records, resumed = _written(work, checkpoint, loaded, tokenizer, found, tokens, sampling, seed, progress)
        count = sum(record["tokens"] for record in records)
        if count < tokens:
            said.append(f"the texts have no more beginnings: {count} tokens were written in place of {tokens}")
        file = work.path(f"written{SUFFIX}")
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_bytes(file, "".join(lines).encode())
        own = count - sum(len(one.ids) for one in found[: len(records)])
        work.publish_file(file, target.path, replaces=True)
    seconds = time.perf_counter() - started
    return WrittenText(target.path, len(records), count, own, seconds, resumed, [*notes, *said])


def _check(tokens: int, begin: int, length: int) -> None:
    """Raises ``UserError`` for numbers that make no sense."""
    named = {option("tokens", "--tokens"): tokens, option("begin", "--begin"): begin}
    for name, value in named.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{name} is {value!r}; it must be a whole number from 1 on")
    if type(length) is not int or length <= begin:
        raise UserError(
            f"{option('length', '--length')} is {length!r}, and a record begins with {begin} tokens of text; give more than "
            "that"
        )


def _target(output: str | Path, model: str | Path, fresh: bool) -> OutputFile:
    """The output file, tried out. Raises ``UserError``."""
    if not str(output).lower().endswith(SUFFIX):
        raise UserError(f"records are written as JSON lines: {str(output)!r} should end in {SUFFIX}")
    target = OutputFile.of(output, model, _is_written)
    if not fresh and target.path.is_file() and target.path.stat().st_size:
        raise UserError(
            f"{target.path} is finished. Choose another output, or pass {option('fresh=True', '--fresh')} to replace it"
        )
    return target


def _is_written(path: Path) -> bool:
    """Whether the first line of a file is a record of this command's."""
    with open(path, "rb") as file:
        line = file.readline(1 << 24)
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and tuple(record) == RECORD


def _written(
    work: WorkFolder,
    checkpoint: Checkpoint,
    model: Any,
    tokenizer: Any,
    found: list[Beginning],
    tokens: int,
    sampling: SamplingOptions,
    seed: int,
    progress: Progress,
) -> tuple[list[dict[str, Any]], bool]:
    """Records until they have so many ``tokens``, each kept in the work folder as it is done; whether some were there."""
    records: list[dict[str, Any]] = []
    while (kept := work.done(f"record {len(records)}")) is not None:
        records.append(kept)
    count = sum(record["tokens"] for record in records)
    resumed, first = bool(records), len(records)
    task = work.telling(progress).task("tokens written", tokens, min(count, tokens))
    name, ends = checkpoint.path.name, end_tokens(checkpoint, tokenizer)
    texts = continuations(model, [one.ids for one in found], [one.count for one in found], sampling, ends, seed, first)
    if count < tokens:
        with closing(texts):
            for number, written in enumerate(texts, start=first):
                beginning = found[number]
                size = len(beginning.ids) + len(written)
                text = beginning.record(tokenizer, written)
                records.append(dict(zip(RECORD, (text, size, name), strict=True)))
                work.finish(f"record {number}", [], records[-1])
                task.advance(size)
                count += size
                if count >= tokens:
                    break
    task.done()
    return records, resumed
