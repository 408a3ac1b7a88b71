"""An artifact in another format: its codes as they are, in the layout of another runtime. Nothing is rounded anew."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quern
from quern.architectures.base import Architecture, architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import read_json
from quern.checkpoint.jobs.work_folder import WorkFolder, finish_removal
from quern.checkpoint.tokenizer import usable_tokenizer
from quern.core.artifact import PROVENANCE, quantization_of
from quern.core.errors import BadFileError, UserError, option
from quern.core.machine.memory import forget_peak, peak_rss
from quern.core.packed import PackedLinear, QuantizedWeight
from quern.core.plan import KEPT, LinearPlan, Plan
from quern.core.progress import Progress, Silent
from quern.core.recipe import Recipe, parse_recipe
from quern.core.recipe_parts import ROTATION, Activations, Transform
from quern.core.scheme import UNQUANTIZED
from quern.core.text.scheme_text import scheme_text
from quern.formats.base import FORMATS, ArtifactReader, ArtifactWriter, StoredModule, reader_of
from quern.formats.quern import INPUT_SCALE, INPUT_SIGNS
from quern.formats.writing.cut import cut
from quern.loading.fitting import model_config, open_model
from quern.loading.padding import unpadded
from quern.pipeline.output import artifact_size, finished_layers, opened_by, output_target, publish, tensor_bytes

RUN = "run"
"""Called like a format, but no form of an artifact: the program of the cpu engine (docs/run.md)."""
AS_IT_IS = Recipe(name="unquantized", weights=UNQUANTIZED)
"""Of a model that nobody quantized."""


@dataclass(frozen=True)
class ExportReport:
    """What ``export`` wrote."""

    path: Path
    format: str
    recipe: str
    """Name of the artifact's recipe."""
    seconds: float | None
    """Wall-clock time; None for a file that was there already."""
    bytes: int
    bits_per_weight: float
    """8 x bytes of tensor data / parameters of the model."""
    peak_rss_bytes: int
    notes: list[str]


@dataclass(frozen=True)
class _Source:
    """What is exported."""

    checkpoint: Checkpoint
    architecture: Architecture
    reader: ArtifactReader | None
    stored: dict[str, StoredModule]
    recipe: Recipe
    provenance: dict[str, Any]
    kept: Architecture
    """As it is stored, with zeros that quern padded it with."""

    @classmethod
    def open(cls, path: str | Path, format: str, keep_padding: bool, progress: Progress) -> _Source:
        """Raises ``UserError`` for what is neither an artifact of quern's own format nor unquantized."""
        stored = open_model(path, progress=progress)
        checkpoint = stored if keep_padding else unpadded(stored)
        quantization = quantization_of(checkpoint.config)
        architecture = architecture_of(model_config(checkpoint))
        kept = architecture_of(model_config(stored))
        reader = reader_of(quantization, kept)
        if quantization is not None and (reader is None or reader.through_transformers):
            raise UserError(
                f"{path} is in the format {quantization.get('quant_method')}; export begins with artifacts of format quern "
                "and with unquantized models. What other tools quantized is taken over value by value by quern quantize "
                f"with rounding stored and {option(f'format={format!r}', f'--format {format}')}"
            )
        if reader is None:
            return cls(checkpoint, architecture, None, {}, AS_IT_IS, _no_provenance(checkpoint), kept)
        recipe = parse_recipe(reader.quantization.get("recipe"), "of the artifact")
        provenance = _provenance(checkpoint)
        if checkpoint is not stored:
            del provenance["padding"]
            recipe = recipe.model_copy(update={"padding": None})
        return cls(checkpoint, architecture, reader, reader.plan(), recipe, provenance, kept)

    def check(self, writer: ArtifactWriter) -> None:
        """Raise ``UserError`` with the reasons for what the format cannot store."""
        try:
            writer.check()
        except UserError as error:
            if self.kept.module_shapes() == self.architecture.module_shapes():
                raise
            keep = option("keep_padding=True", "--keep-padding")
            raise UserError(
                f"{error.message}. The artifact was padded with zeros, which {keep} leaves where they are"
            ) from None

    def plan(self) -> Plan:
        """What every matrix is stored as."""
        names = [*self.architecture.outer, *self.architecture.linears]
        return Plan({name: _plan(self.stored[name]) if name in self.stored else KEPT for name in names})

    def packed(self, module: str) -> PackedLinear:
        """A module as it is stored."""
        assert self.reader is not None
        stored, parts = self.stored[module], self.reader.parts(self.checkpoint, module)
        scale, signs = parts.pop(INPUT_SCALE, None), parts.pop(INPUT_SIGNS, None)
        rows, columns = self.kept.module_shapes()[f"{module}.weight"]
        weight = QuantizedWeight(stored.scheme, (rows, columns), parts)
        rows, columns = self.architecture.module_shapes()[f"{module}.weight"]
        if weight.shape != (rows, columns):
            found = cut(weight, (rows, columns)) if signs is None or weight.shape[1] == columns else None
            if found is None:
                keep = option("keep_padding=True", "--keep-padding")
                raise UserError(
                    f"{module} was padded with zeros, and its codes ({scheme_text(stored.scheme)}) do not fit its own shape "
                    f"{rows} x {columns}. Pass {keep} to write it as it is stored"
                )
            weight = found
        return PackedLinear(weight, stored.activations, None if scale is None else float(scale), signs)


def export(
    artifact: str | Path,
    output: str | Path,
    *,
    format: str = "gguf",
    format_options: Mapping[str, str] | None = None,
    keep_padding: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write ``artifact`` (a folder of format quern, or an unquantized model) in another ``format``.

    Every stored value stays what it is; where the format's scales cannot hold one, notes say so. Zeros that the recipe
    padded the model with are cut off unless ``keep_padding``. ``format_options``: see docs/gguf.md and docs/onnx.md.
    ``format="run"`` writes a file for quern-run (docs/run.md) of any model that the cpu engine runs, with its padding.
    One block is in memory at a time. Raises ``UserError`` with the reasons for what the format cannot store,
    ``BadFileError`` for damage.
    """
    if format == RUN:
        return _export_run_file(artifact, output, format_options)
    progress = progress or Silent()
    target = output_target(output, artifact, fresh, format)
    output = Path(os.path.expanduser(output))
    source = _Source.open(artifact, format, keep_padding, progress)
    usable_tokenizer(source.checkpoint.path, False)
    recipe = source.recipe.model_copy(update={"format": format, "storage": "plain"})
    writer = FORMATS.get(format).writer(recipe, source.plan(), source.architecture)
    source.check(writer)
    writer.prepare(source.checkpoint, format_options or {})
    asked = {
        "quern": quern.__version__,
        "model_sha256": source.checkpoint.sha256(progress),
        "recipe": recipe.to_json(),
        "format_options": dict(format_options or {}),
        **({"keep_padding": True} if keep_padding else {}),
    }
    if finished_layers(target, asked, fresh) is not None:
        finish_removal(target.work, target.path)
        return _report(output, format, source, None, ["was finished already", *writer.notes()])
    started = time.perf_counter()
    forget_peak()
    with WorkFolder.open(target.work, {**asked, **writer.coder()}, fresh) as work:
        if work.finish_publishing() is None:
            _write(work, writer, source, asked, work.telling(progress))
            publish(work, target, fresh)
        else:
            work.remove()
    return _report(output, format, source, time.perf_counter() - started, writer.notes())


def _export_run_file(artifact: str | Path, output: str | Path, options: Mapping[str, str] | None) -> ExportReport:
    """A file for quern-run, which is written in one go of whatever the cpu engine runs."""
    from quern.pipeline.run_files.write import write_run_file

    if options:
        raise UserError(f"format {RUN} has no options; leave {', '.join(options)} out")
    written = write_run_file(artifact, output)
    checkpoint = open_model(artifact)
    quantization = quantization_of(checkpoint.config) or {}
    recipe = quantization.get("recipe")
    shapes = architecture_of(model_config(checkpoint)).module_shapes().values()
    return ExportReport(
        path=written.path,
        format=RUN,
        recipe=AS_IT_IS.name if recipe is None else parse_recipe(recipe, "of the artifact").name,
        seconds=written.seconds,
        bytes=written.bytes,
        bits_per_weight=8 * written.array_bytes / sum(math.prod(shape) for shape in shapes),
        peak_rss_bytes=written.peak_rss_bytes,
        notes=written.notes,
    )


def _write(
    work: WorkFolder, writer: ArtifactWriter, source: _Source, asked: dict[str, Any], progress: Progress
) -> None:
    if (known := writer.joining(work)) is not None:
        return writer.accompany(work, known, source.checkpoint)
    last = source.architecture.layers + 1
    task = progress.task("writing blocks", last + 1)
    for stage in range(last + 1):
        if work.done(f"stage {stage}") is None:
            writer.begin(work, stage)
            for module, parameter in _parameters(source, stage):
                if module in source.stored and parameter == "weight":
                    writer.put(module, source.packed(module))
                else:
                    name = f"{module}.{parameter}"
                    writer.put_plain(name, source.checkpoint.read(name, finite=True))
            work.finish(f"stage {stage}", writer.end(), {})
        task.advance()
    task.done()
    writer.finish(work, model_config(source.checkpoint), source.plan())
    before = source.provenance
    notes = [*before["notes"], *writer.notes()]
    writer.accompany(work, {**before, "fingerprint": asked, "notes": notes, "files": []}, source.checkpoint)


def _parameters(source: _Source, stage: int) -> Iterator[tuple[str, str]]:
    """Module and last name of every parameter of a stage, in the order in which quantizing writes them."""
    architecture = source.architecture
    if stage in (0, architecture.layers + 1):
        outer = [architecture.embedding] if stage == 0 else [architecture.final_norm, *architecture.outer[1:]]
        yield from ((module, "weight") for module in outer)
        return
    prefix = architecture.block_prefix(stage - 1)
    for name in architecture.parameters(stage - 1):
        module, _, parameter = name.rpartition(".")
        yield prefix + module, parameter


def _plan(stored: StoredModule) -> LinearPlan:
    activations = Activations(mode=stored.activations) if stored.activations != "none" else Activations()
    rotation = Transform(method=ROTATION) if stored.rotated else None
    return LinearPlan(stored.scheme, rotation=rotation, activations=activations)


def _no_provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"fingerprint": {}, "layers": [], "notes": list(checkpoint.lasting_notes)}


def _provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.path / PROVENANCE
    found = read_json(path)
    kinds = {"fingerprint": dict, "layers": list, "notes": list}
    if not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
        raise BadFileError(path, "is not what quern writes", "Quantize the model again")
    return found


def _report(output: Path, format: str, source: _Source, seconds: float | None, notes: list[str]) -> ExportReport:
    output = opened_by(output)
    data = tensor_bytes(output, format)
    return ExportReport(
        path=output,
        format=format,
        recipe=source.recipe.name,
        seconds=seconds,
        bytes=artifact_size(output),
        bits_per_weight=8 * data / sum(math.prod(shape) for shape in source.architecture.module_shapes().values()),
        peak_rss_bytes=peak_rss(),
        notes=list(dict.fromkeys(notes)),
    )
