"""From what workers measured to rows of ``results.json``: sizes counted from files, fractions of measured limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from quern.architectures.base import BlockSpec, architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.checkpoint.files import read_json
from quern.comparison.artifact_size import ArtifactSize
from quern.comparison.worker_process import OURS, Launch
from quern.core import metrics
from quern.core.artifact import PROVENANCE
from quern.core.errors import BadFileError
from quern.core.results import Figure, LayerError, Row, RowKind, Spread, Tool, TunedBlock
from quern.engines.cpu import ORDINARY, CachePrecision
from quern.evaluation.measures.base import all_measures
from quern.loading.fitting import model_config


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to measure."""

    name: str
    path: str | Path
    kind: RowKind = "unquantized"
    recipe: dict[str, Any] | None = None
    quantize_seconds: float | None = None
    layers: tuple[LayerError, ...] = ()
    tuning: tuple[TunedBlock, ...] = ()
    engine: str = "reference"
    cache: CachePrecision | None = None
    """How the cpu engine keeps keys and values; None: as it does where nobody says."""
    sha256: str | None = None
    """Of the checkpoint or artifact, where it is known already."""
    original_sha256: str | None = None
    """Of the checkpoint that an artifact says it was made from."""
    timed: bool = True
    """Whether its speed is measured too."""
    tool: Tool | None = None
    """The other tool that made it, of kind ``peer``."""
    launch: Launch = OURS
    """How the process that measures it is started."""
    runs_in: str | None = None
    """Hash of the other tool's environment and adapter: figures hold as long as it is the same."""
    quantize_peak_rss_bytes: int | None = None
    notes: tuple[str, ...] = ()


def contender_of(checkpoint: Checkpoint, engine: str = "reference") -> Contender:
    """The contender that lies in a folder; recipe and layer errors as quern wrote them beside the weights."""
    quantization = checkpoint.config.get("quantization_config")
    name = checkpoint.path.name
    if not isinstance(quantization, dict):
        return Contender(name=name, path=checkpoint.path, engine=engine, notes=checkpoint.notes)
    recipe, made_from, notes = quantization, None, []
    layers: list[LayerError] = []
    tuning: list[TunedBlock] = []
    provenance = checkpoint.path / PROVENANCE
    if provenance.is_file():
        try:
            found = read_json(provenance)
            recipe, made_from = found["fingerprint"]["recipe"], found["fingerprint"].get("model_sha256")
            notes = [str(note) for note in found.get("notes", [])]
            layers = [LayerError.model_validate(layer) for layer in found["layers"]]
            tuning = [TunedBlock.model_validate(block) for block in found.get("tuning", [])]
        except (KeyError, TypeError, ValueError) as error:
            raise BadFileError(provenance, f"is not what quern writes: {error}", "Quantize the model again") from None
    return Contender(
        name=name, path=checkpoint.path, kind="quern", recipe=recipe, layers=tuple(layers), tuning=tuple(tuning),
        engine=engine, original_sha256=made_from, notes=(*checkpoint.notes, *notes),
    )  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Measured limits, for the number of threads that the contenders ran with."""

    read_gb_s: float | None
    gemm_gop_s: Mapping[str, float]
    """By dtype: float32, bfloat16, int8."""

    @classmethod
    def of(cls, hardware: Mapping[str, Any] | None, threads: int) -> Machine:
        """The limits in what ``probe`` returned; nothing for a number of threads that was not measured."""
        measured = (hardware or {}).get("measured") or {}
        rates = {
            name: (by_threads or {}).get(str(threads)) for name, by_threads in measured.get("gemm_gop_s", {}).items()
        }
        return cls(
            measured.get("read_bandwidth_gb_s", {}).get(str(threads)),
            {name: rate for name, rate in rates.items() if rate is not None},
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one contender."""

    bytes_per_token: int
    figures: dict[str, Figure]
    """By the names of the measures. Those of text and choices are missing where the logits are not finite."""
    correct: list[bool] | None
    """Whether each multiple-choice item was answered correctly; None without items, or where the logits are not finite."""
    foreign_load: float | None = None
    """Processors that others kept busy in the timed rounds; None where nothing was timed for long enough to tell."""
    machine: Machine | None = None
    """The machine's limits in the run that measured this."""
    seconds: float | None = None
    """Wall time of measuring it, without what was done for others meanwhile."""
    group_speed: float | None = None
    """Decode speed of the unquantized model in its group, over that in the first one; None where it did not run."""
    notes: tuple[str, ...] = ()

    @property
    def decode_speed(self) -> float | None:
        """Tokens/s; None where no speed was measured."""
        decode = self.figures.get("decode")
        return None if decode is None else decode.value


@dataclass(frozen=True)
class Original:
    """The unquantized model as sizes are measured against it."""

    parameters: int
    """Tied weights once."""
    bf16_bytes: int
    block_parameters: int
    """Entries of the matrices inside the decoder blocks that a token of a prompt is multiplied with. The head is
    left out, which prefill needs for the last token only."""


def original_of(checkpoint: Checkpoint) -> Original:
    """Sizes of an unquantized checkpoint, or of the model that an artifact was made from.

    An artifact's own shapes are those of packed codes; the shapes of the original then follow from ``config.json``.
    """
    met = entries_per_token(checkpoint)
    if "quantization_config" not in checkpoint.config:
        return Original(checkpoint.parameters, checkpoint.bf16_bytes, met)
    parameters = sum(prod(shape) for shape in architecture_of(model_config(checkpoint)).expected_shapes().values())
    others = sum(path.stat().st_size for path in checkpoint.files if path not in checkpoint.source.weight_files)
    return Original(parameters, 2 * parameters + others, met)


def entries_per_token(checkpoint: Checkpoint) -> int:
    """Entries of the matrices inside the decoder blocks that a token meets."""
    return round(sum(map(_entries_of_block, architecture_of(model_config(checkpoint)).blocks)))


def _entries_of_block(block: BlockSpec) -> float:
    """Of the experts' matrices those of as many as a token is sent to."""
    experts = len({linear.expert for linear in block.linears} - {None})
    share = block.experts_per_token / experts if experts else 0.0
    return sum(prod(linear.shape) * (1 if linear.expert is None else share) for linear in block.linears)


def row_of(
    contender: Contender, measured: Measured, reference: Measured | None, *, stored: ArtifactSize, original: Original,
    dtype: str, seed: int,
) -> Row:  # fmt: skip
    """The row of one contender; ``reference`` is the unquantized model in its stored dtype, measured alike."""
    floor = reference.figures.get("kl") if reference else None
    difference = _difference(measured, reference, seed)
    arithmetic = None if contender.kind == "peer" else _arithmetic(contender.recipe, stored.config, dtype)
    return Row(
        name=contender.name,
        kind=contender.kind,
        recipe=contender.recipe,
        tool=contender.tool,
        artifact_sha256=stored.sha256,
        bytes=stored.bytes,
        bits_per_weight=metrics.bits_per_weight(stored.weight_bytes, original.parameters),
        compression=metrics.compression(stored.bytes, original.bf16_bytes),
        kl_noise_floor=floor.value if floor else None,
        choice_difference=difference.mean if difference else None,
        choice_difference_ci95=difference.interval if difference else None,
        **_figure_fields(measured.figures),
        **_limit_fields(measured, original, measured.machine or Machine.of(None, 1), arithmetic),
        quantize_seconds=contender.quantize_seconds,
        quantize_peak_rss_bytes=contender.quantize_peak_rss_bytes,
        measure_seconds=measured.seconds,
        foreign_load=measured.foreign_load,
        group_speed=measured.group_speed,
        engine=contender.engine,
        cache=contender.cache or (ORDINARY if contender.engine == "cpu" else None),
        layers=list(contender.layers),
        tuning=list(contender.tuning),
        notes=[*contender.notes, *measured.notes],
    )


def _difference(measured: Measured, reference: Measured | None, seed: int) -> metrics.Estimate | None:
    if reference is None or reference is measured or not measured.correct or not reference.correct:
        return None
    return metrics.paired_accuracy_difference(measured.correct, reference.correct, seed=seed)


def _figure_fields(figures: Mapping[str, Figure]) -> dict[str, Any]:
    """The fields of a row that measures fill, each as its measure declares."""
    fields: dict[str, Any] = {"figures": {}}
    spreads: dict[str, Spread] = {}
    for each in all_measures():
        figure = figures.get(each.name)
        if each.run is None:
            continue
        if each.field is None:
            fields["figures"] |= {each.name: figure} if figure else {}
            continue
        fields[each.field] = figure.value if figure else None
        if each.interval_field is not None:
            fields[each.interval_field] = figure.interval if figure else None
        if figure and figure.rounds and figure.interval:
            low, high = figure.interval
            spreads[each.field] = Spread(median=figure.value, low=low, high=high, rounds=figure.rounds)
    return {**fields, "speed_spread": spreads or None}


def _limit_fields(measured: Measured, original: Original, machine: Machine, arithmetic: str | None) -> dict[str, Any]:
    """``arithmetic`` None: a tool's, which it does not declare, so no rate of the machine is its limit."""
    decode, prefill = measured.decode_speed, measured.figures.get("prefill")
    if decode is None or prefill is None:
        return {"decode_limit_fraction": None}
    rate = None if arithmetic is None else machine.gemm_gop_s.get(arithmetic)
    return {
        "decode_limit_fraction": _fraction(measured.bytes_per_token * decode, machine.read_gb_s),
        "prefill_limit_fraction": _fraction(2 * original.block_parameters * prefill.value, rate),
        "limit_read_gb_s": machine.read_gb_s,
        "limit_gemm_gop_s": rate,
        "limit_gemm_dtype": None if rate is None else arithmetic,
    }


def _fraction(rate: float, limit_giga: float | None) -> float | None:
    return rate / (limit_giga * 1e9) if limit_giga else None


def _arithmetic(recipe: Mapping[str, Any] | None, config: Mapping[str, Any], dtype: str) -> str:
    """What the matrix products of the blocks multiply: ``int8`` with quantized activations, else their dtype."""
    if ((recipe or {}).get("activations") or {}).get("mode", "none") != "none":
        return "int8"
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    return str(stored) if dtype == "auto" else dtype
