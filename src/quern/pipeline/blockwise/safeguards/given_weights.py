"""What a job is given stays what it was, and is fit for use: asked before there is anything to lose."""

from __future__ import annotations

from pathlib import Path

from quern.architectures.base import Architecture
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import read_json
from quern.checkpoint.jobs.journal import parse_journal
from quern.core.errors import BadFileError, option
from quern.core.machine.heap import release_freed
from quern.pipeline.blockwise.job import Job

CHECKED = "weights checked"
FILES = "files"
"""Key of the journal's line "started": ``Checkpoint.hashed``."""


def check_weights(job: Job) -> None:
    """Read every weight once, so that NaN and infinities are refused before hours of work, by the tensor's name. Raises
    ``BadFileError``."""
    if job.work.done(CHECKED) is not None:
        return
    checkpoint = job.checkpoint
    names = [name for name in _read_by(job.architecture) if name in checkpoint.source.infos]
    task = job.progress.task("checking the weights", sum(checkpoint.info(name).elements for name in names))
    for name in names:
        if checkpoint.at_hand:  # what comes from a seed is numbers; what comes from afar is looked at when it comes
            checkpoint.read(name, finite=True)
        task.advance(checkpoint.info(name).elements)
    task.done()
    release_freed()
    job.work.finish(CHECKED, [], {})


def _read_by(architecture: Architecture) -> list[str]:
    """Every tensor that quantization reads, once each."""
    blocks = [
        source.tensor
        for block in architecture.blocks
        for name in architecture.parameters(block.index)
        for source in block.sources_of(name)
    ]
    outer = [f"{name}.weight" for name in (*architecture.outer, architecture.final_norm)]
    return list(dict.fromkeys([*outer, *blocks]))


def refuse_changed(work: Path, checkpoint: Checkpoint, sha256: str) -> None:
    """Raise ``BadFileError`` with the name of the file where the job in ``work`` was begun with other bytes in it.

    ``sha256``: the checkpoint's, computed just now. Files are hashed one behind the other, so that the first one that
    differs is known.
    """
    fingerprint, journal = work / "fingerprint.json", work / "journal.jsonl"
    if not fingerprint.is_file() or not journal.is_file() or read_json(fingerprint).get("model_sha256") == sha256:
        return
    steps, _ = parse_journal(journal.read_bytes())
    then = steps["started"].data.get(FILES, {}) if "started" in steps else {}
    if list(then) != list(checkpoint.hashed):
        return  # another model, which the work folder says
    first = next(name for name in then if then[name] != checkpoint.hashed[name])
    weights = {path.name: path for path in checkpoint.source.weight_files}
    if first in weights:
        raise BadFileError(
            weights[first],
            f"has changed since the job in {work} began",
            f"What was finished is kept. Put the former file back and run the same command again, or pass "
            f"{option('fresh=True', '--fresh')} to start over",
        )
