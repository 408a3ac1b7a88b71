"""Other tools' rows: install the tool, have it quantize the model, and hand its artifact to the measuring.

Whatever goes wrong in another tool is the reason of a failed row and stops nothing else. Two tools never run at once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from quern.architectures.base import architecture_of
from quern.checkpoint.files import explain_write_errors, read_json, write_bytes, write_json
from quern.checkpoint.tokenizer import load_tokenizer
from quern.comparison.artifact_size import stored_folder
from quern.comparison.row_builder import Contender
from quern.comparison.tool_process import launch_of
from quern.comparison.worker_process import Launch, Worker
from quern.core.errors import QuernError, UserError
from quern.core.machine.parallel import thread_count
from quern.core.progress import telling
from quern.core.recipe_parts import Calibration
from quern.core.results import Failure, Tool
from quern.peers.base import PeerVariant
from quern.peers.environment import Environment, Installed
from quern.pipeline.artifacts import ArtifactRequest
from quern.pipeline.blockwise.calibration_text import CalibrationText

TIME_LIMIT_S = 3600.0
"""Most seconds that a tool may take to make one artifact, and again to be measured with it."""
TELL_S = 60.0
"""Seconds between two lines about a tool that quantizes."""


@dataclass(frozen=True)
class Tools:
    """How other tools are run in one comparison."""

    scratch: Path
    """A folder that they may litter."""
    time_limit_s: float
    environments: Path | None = None
    """Where their environments are; None: the user's cache folder."""


class _StageError(QuernError):
    """An error with the stage at which it happened."""

    def __init__(self, stage: Literal["install", "quantize"], error: QuernError) -> None:
        super().__init__(str(error))
        self.stage = stage


def make_all(
    making: ArtifactRequest, tools: Tools, variants: Sequence[PeerVariant]
) -> tuple[list[Contender], list[Failure]]:
    """The contenders that other tools made, and the rows that they failed to make."""
    contenders: list[Contender] = []
    failures: list[Failure] = []
    if variants and making.checkpoint.path.is_file():
        raise UserError(f"other tools quantize folders of safetensors; {making.checkpoint.path} is a file")
    for chosen in variants:
        try:
            contenders.append(_make(making, tools, chosen))
        except _StageError as error:
            tool = Environment.of(chosen.peer, tools.environments).peer.tool
            making.progress.log(f"{chosen.row} failed to {error.stage}: {str(error).splitlines()[0]}")
            failures.append(Failure(name=chosen.row, tool=tool, stage=error.stage, reason=str(error)))
    return contenders, failures


@contextmanager
def _at(stage: Literal["install", "quantize"]) -> Iterator[None]:
    try:
        yield
    except QuernError as error:
        raise _StageError(stage, error) from None


def _make(making: ArtifactRequest, tools: Tools, chosen: PeerVariant) -> Contender:
    environment = Environment.of(chosen.peer, tools.environments)
    with _at("install"):
        installed = environment.install(making.progress)
    launch = launch_of(environment, tools.scratch, making.memory, tools.time_limit_s)
    with _at("quantize"):
        record = _quantized(making, chosen, installed, launch)
    peer = environment.peer
    notes = (environment.warning(), environment.versions_note(), *peer.remarks(chosen.variant))
    return Contender(
        name=chosen.row,
        path=making.folder / "artifacts" / chosen.row,
        kind="peer",
        recipe=chosen.recipe(),
        tool=Tool(
            name=peer.tool,
            version=installed.version,
            licence=peer.licence,
            runtime=peer.runtime,
            targets=list(peer.targets),
            homepage=peer.homepage,
        ),
        launch=launch,
        runs_in=environment.identity(),
        engine=chosen.peer,
        sha256=record["artifact_sha256"],
        original_sha256=making.model_sha256,
        quantize_seconds=record["quantize_seconds"],
        quantize_peak_rss_bytes=record["quantize_peak_rss_bytes"],
        notes=(*filter(None, notes), *record["notes"]),
    )


def _quantized(making: ArtifactRequest, chosen: PeerVariant, installed: Installed, launch: Launch) -> dict[str, Any]:
    """The record beside the artifact; quantizes if there is none that fits."""
    artifact = making.folder / "artifacts" / chosen.row
    record_path = artifact.with_name(f"{chosen.row}.json")
    sequences, text, sha256 = _calibration(making)
    fingerprint = {
        "model_sha256": making.model_sha256,
        "settings": chosen.recipe(),
        "tool": installed.version,
        "installed": installed.created,
        "calibration_sha256": sha256 if chosen.variant.calibrated else None,
        "seed": making.seed,
    }
    known = read_json(record_path) if record_path.is_file() and not making.fresh else {}
    if known.get("fingerprint") == fingerprint and artifact.is_dir():
        return known
    making.progress.log(f"quantizing by {chosen.row}")
    unfinished = artifact.with_name(f".{chosen.row}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    request = {
        "do": "quantize",
        "model": str(Path(making.checkpoint.path).resolve()),
        "output": str(unfinished.resolve()),
        "variant": asdict(chosen.variant),
        "sequences": str(sequences.resolve()),
        "text": str(text.resolve()),
        "threads": thread_count(making.threads),
        "seed": making.seed,
    }
    try:
        with Worker(chosen.row, launch) as worker, _telling_how_long(making, chosen.row):
            answer = worker.ask(request)
        record = {
            "fingerprint": fingerprint,
            "artifact_sha256": stored_folder(unfinished).sha256,
            "quantize_seconds": float(answer["seconds"]),
            "quantize_peak_rss_bytes": int(answer["peak_rss_bytes"]),
            "notes": [str(note) for note in answer["notes"]],
        }
        _replace(artifact, unfinished, record_path, record)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return record


def _telling_how_long(making: ArtifactRequest, row: str) -> AbstractContextManager[None]:
    """A line a minute: the tool's own output is kept for its errors."""
    started = time.monotonic()
    return telling(
        making.progress, lambda: f"quantizing by {row}: for {(time.monotonic() - started) / 60:.0f} min", TELL_S
    )


def _replace(artifact: Path, unfinished: Path, record_path: Path, record: dict[str, Any]) -> None:
    """The new artifact and its record in place of the old ones. After a kill in between there is no artifact.

    Never is there one beside the record of another, and never one without a record, which would not be known as quern's.
    """
    old = unfinished.with_name(f".{artifact.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    with explain_write_errors(artifact, 0):
        if artifact.is_dir():
            os.replace(artifact, old)
        write_json(record_path, record)
        os.replace(unfinished, artifact)
    shutil.rmtree(old, ignore_errors=True)


def _calibration(making: ArtifactRequest) -> tuple[Path, Path, str]:
    """The token ids and the text that every calibrated tool gets, as files, and the hash of the ids.

    They are those that quern's own recipes calibrate on where they ask for as many tokens, as they do by default.
    """
    folder = making.folder / "cache"
    config = architecture_of(making.checkpoint.config).config
    tokenizer = load_tokenizer(making.checkpoint.path)
    calibration = CalibrationText(making.calibration, tokenizer, Calibration(tokens=making.calibration_tokens))
    tokens = calibration.sequences(config.max_position_embeddings, config.vocab_size, making.seed).numpy()
    digest = hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest()
    sequences, text = folder / f"calibration-{digest[:16]}.npy", folder / f"calibration-{digest[:16]}.txt"
    if not (sequences.is_file() and text.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(text, "\n\n".join(tokenizer.decode(row) for row in tokens.tolist()).encode())
        temporary = sequences.with_suffix(".tmp.npy")
        np.save(temporary, tokens, allow_pickle=False)
        os.replace(temporary, sequences)
    return sequences, text, digest
