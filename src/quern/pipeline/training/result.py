"""A trained student as an ordinary artifact, through the writer of its format."""

from __future__ import annotations

from typing import Any

from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.jobs.work_folder import WorkFolder
from quern.core.packed import PackedLinear, QuantizedWeight
from quern.formats.base import ArtifactWriter
from quern.pipeline.training.artifact import Start
from quern.quantization.training.model import Student


def write_artifact(work: WorkFolder, writer: ArtifactWriter, start: Start, student: Student | None) -> None:
    """Every stage, below ``work.path("artifact")``; of no ``student`` what the artifact began with."""
    architecture = start.architecture
    last = architecture.layers + 1
    stages = {0: [architecture.embedding], last: [architecture.final_norm, *architecture.outer[1:]]}
    for stage in range(last + 1):
        if work.done(f"artifact {stage}") is not None:
            continue
        writer.begin(work, stage)
        if stage in stages:
            for module in stages[stage]:
                _put_outer(writer, start, student, module)
        else:
            _put_block(writer, start, student, stage - 1)
        work.finish(f"artifact {stage}", writer.end(), {})


def _put_outer(writer: ArtifactWriter, start: Start, student: Student | None, module: str) -> None:
    if module in start.stored:
        writer.put(module, _packed(start, module))
    elif module == start.architecture.final_norm and student is not None:
        writer.put_plain(f"{module}.weight", student.heads.norm.stored())
    else:
        writer.put_plain(f"{module}.weight", start.checkpoint.read(f"{module}.weight"))


def _put_block(writer: ArtifactWriter, start: Start, student: Student | None, index: int) -> None:
    spec = start.architecture.block(index)
    block = None if student is None else student.blocks[index]
    quantized = [linear.name for linear in spec.linears if spec.prefix + linear.name in start.stored]
    for name in quantized:
        parts = None if block is None else block.weights[name].trainable.parts()
        writer.put(spec.prefix + name, _packed(start, spec.prefix + name, parts))
    for name in start.architecture.parameters(index):
        if name.removesuffix(".weight") in quantized:
            continue
        trained = block is not None and name in block.vectors
        value = block.vectors[name].stored() if block is not None and trained else None
        writer.put_plain(spec.prefix + name, start.checkpoint.read(spec.prefix + name) if value is None else value)


def _packed(start: Start, module: str, trained: dict[str, Any] | None = None) -> PackedLinear:
    stored = start.stored[module]
    parts, scale, signs = start.parts(module)
    weight = QuantizedWeight(stored.scheme, start.shape(module), parts if trained is None else trained)
    return PackedLinear(weight, stored.activations, scale, signs)


def write_metadata(
    work: WorkFolder,
    writer: ArtifactWriter,
    start: Start,
    original: Checkpoint,
    fingerprint: dict[str, Any],
    training: dict[str, Any],
    notes: list[str],
) -> None:
    """The format's own files, provenance and tokenizer."""
    writer.finish(work, original.config, start.plan)
    before = start.provenance
    provenance = {
        **before,
        "fingerprint": fingerprint,
        "notes": [*before["notes"], *notes],
        "files": [],
        "training": training,
    }
    writer.accompany(work, provenance, original)
