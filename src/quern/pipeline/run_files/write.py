"""A model as one file for quern-run (docs/run.md): its decoder's steps, the weights as kernels read them, its tokenizer.

The native decoder is made as the cpu engine makes it, and describes itself; so whatever that engine runs can be written, and
nothing is rounded. csrc/program/format.h has the layout.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import InputFile, atomic_output
from quern.checkpoint.jobs.output_place import output_file
from quern.checkpoint.tokenizer import usable_tokenizer
from quern.core.errors import UserError
from quern.core.machine.memory import forget_peak, peak_rss
from quern.engines.cpu import CpuEngine
from quern.generation.stopping import end_tokens, named_ends
from quern.loading.fitting import open_model
from quern.pipeline.run_files.tokenizer import UnknownTokenizerError, no_tokenizer, tokenizer_tables
from quern.texts.tokens import leading_special

MAGIC, VERSION = b"QUERNRUN", 1
SUFFIX = ".run"
ALIGNMENT = 64
_HEADER = struct.Struct("<8sIIQQQQQQ")


@dataclass(frozen=True)
class RunFile:
    """What was written."""

    path: Path
    bytes: int
    array_bytes: int
    """Of weights, norms and biases; the rest is the program and the tokenizer."""
    seconds: float
    peak_rss_bytes: int
    notes: list[str]


def is_run_file(path: Path) -> bool:
    """Whether quern wrote the file."""
    with InputFile(path) as file:
        return file.size >= ALIGNMENT and file.read(0, len(MAGIC)) == MAGIC


def write_run_file(model: str | Path, output: str | Path) -> RunFile:
    """Write ``model`` (whatever the cpu engine runs) as the file ``output``, whole or not at all.

    A tokenizer that quern-run does not know is left out, and a note says why; it is then fed token numbers. Raises
    ``UserError`` for a model that the cpu engine does not run and for an output that must not be written,
    ``BadFileError`` for damage.
    """
    if not str(output).lower().endswith(SUFFIX):
        raise UserError(f"format run writes one file, whose name ends in {SUFFIX}; the output is {str(output)!r}")
    path = output_file(output, is_run_file)
    started = time.perf_counter()
    forget_peak()
    checkpoint = open_model(model)
    tokenizer, notes = _tokenizer(checkpoint)
    loaded = CpuEngine().load(checkpoint.path, threads=1)
    program, arrays = loaded.program()
    end = max(at + len(array) for at, array in arrays)
    program_at = _aligned(end)
    tokenizer_at = _aligned(program_at + len(program))
    size = tokenizer_at + len(tokenizer)
    header = _HEADER.pack(MAGIC, VERSION, 0, size, program_at, len(program), tokenizer_at, len(tokenizer), 0)
    with atomic_output(path, size) as file:
        file.write(header)
        pieces: list[tuple[int, Any]] = [*arrays, (program_at, program), (tokenizer_at, tokenizer)]
        for at, piece in pieces:
            file.write(bytes(at - file.tell()))
            file.write(piece)
    return RunFile(
        path=path,
        bytes=size,
        array_bytes=sum(len(array) for _, array in arrays),
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss(),
        notes=[*checkpoint.lasting_notes, *loaded.notes, *notes],
    )


def _tokenizer(checkpoint: Checkpoint) -> tuple[bytes, list[str]]:
    """Tables of the model's tokenizer, and notes."""
    tokenizer: Any = usable_tokenizer(checkpoint.path, False)
    if tokenizer is None:
        return no_tokenizer("the model has no tokenizer", named_ends(checkpoint)), []
    ends = end_tokens(checkpoint, tokenizer)
    try:
        return tokenizer_tables(tokenizer, leading_special(tokenizer), ends), []
    except UnknownTokenizerError as unknown:
        reason = f"quern-run does not know the model's tokenizer: {unknown}"
        return no_tokenizer(reason, ends), [f"{reason}; it takes token numbers (--ids)"]


def _aligned(place: int) -> int:
    return -(-place // ALIGNMENT) * ALIGNMENT
