"""The rows that a comparison writes and that the report and the recommendation read: ``results.json``.

Documented in ``docs/results.md``. Every number is measured; what was not measured is null.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from quern.core.errors import BadFileError
from quern.core.former_results import completed
from quern.core.text.encoding import decode_utf8
from quern.core.text.language import gettext

METRICS_VERSION = 2
"""Rules of measuring, described in docs/results.md. 2: all options of a choice are scored from one place."""

Scenario = Literal["storage", "speed", "overall", "mix"]
"""What counts. ``overall``: size, speed and loss alike; ``mix``: the user's own weights."""

FORMER_SCENARIOS: dict[str, Scenario] = {"balanced": "overall"}
"""Names that results of earlier versions and old scripts may give; a recipe has that name too."""

RowKind = Literal["unquantized", "quern", "peer"]
"""The checkpoint as it is; a quantized one that quern's engines run; another tool's artifact, run by that tool."""

WeightName = Literal["size", "speed", "loss"]

Target = Literal["transformers", "vllm", "llama.cpp", "openvino", "onnxruntime", "quern"]
"""A runtime that an artifact can be deployed to."""

FOREIGN_LIMIT = 0.25
"""Processors that others keep busy: from here on timings are marked, and repeated first. Half of a second thread's gain
on two cores."""

DRIFT_LIMIT = 0.1
"""Relative change of the unquantized model's speed between two groups of contenders from which on it is noted, and
counts where their speeds are compared."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Spread(_Strict):
    """Median, least and greatest of the interleaved rounds of one timing."""

    median: float
    low: float
    high: float
    rounds: int


class Figure(_Strict):
    """What one measure found of one contender."""

    value: float
    interval: tuple[float, float] | None = None
    """95 % interval; of a timing, which has ``rounds``, the least and greatest of these."""
    unit: str
    """As the measure declares it; empty for a number without a unit."""
    rounds: int | None = None
    """Timed rounds of which ``value`` is the median."""


class LayerError(_Strict):
    """What rounding cost one linear."""

    linear: str
    bits_per_weight: float
    relative_error: float
    """tr(E H E^T) / tr(W H W^T): E the change, W the weight, H the (token-weighted) Hessian, or the identity without one."""
    predicted_loss: float | None = None
    """Share of the mean KL divergence, in nats a token, that planning predicted; null where the recipe has no allocation."""
    drift_share: float | None = None
    """How much of what would make up for the drift of its inputs its target has, from 0 to 1; null where it has its own."""
    rows_left: float | None = None
    """What feedback among rows leaves of the loss of gradients that took no part in it; 1: the matrix has none, because
    these would lose by it. Null where rounding is not two-sided."""
    met_share: float | None = None
    """Share of the calibration tokens that met the expert it belongs to; null where every token does."""
    stand_in: Literal["router weights", "all tokens", "nearest"] | None = None
    """What stood in for the tokens of an expert that met too few; null where they were enough."""


class TunedBlock(_Strict):
    """What tuning gained of one decoder block."""

    block: int
    """Counted from 0."""
    before: float
    """Squared error of its outputs over the squared outputs, each token weighted as the recipe says, on the calibration
    sequences that tuning left out; of the block as it was rounded."""
    after: float
    """The same of what is stored; never more."""
    steps: int
    """That were made."""
    best_step: int
    """After which the stored state was reached; 0: the block is as it was rounded."""
    problem: str | None = None
    """Why tuning ended before it was done; null where it did not."""


class Tool(_Strict):
    """What made an artifact, and what runs it."""

    name: str
    """As its makers write it."""
    version: str
    licence: str
    """SPDX identifier."""
    runtime: str
    """In which it was measured."""
    targets: list[str]
    """Runtimes that load the artifact, by the names of ``Target``."""
    homepage: str = ""


class GroupShift(_Strict):
    """How a text's inputs to linears that share them differ from those of calibration."""

    linears: list[str]
    """Full names."""
    reach_ratio: float
    """What 99.9 % of |x| lie within, on the text over in calibration."""
    profile_distance: float
    """Hellinger distance of the shares of energy in 16 runs of channels."""
    beyond: float
    """Share of |x| above the greatest of calibration."""
    clipped: float | None
    """Share of |x| that a static scale clips; null where there is none."""
    clipped_in_calibration: float | None
    score: float | None
    """The greater of both differences, in units of what texts of this length differ by where they are like calibration's."""


class InputShift(_Strict):
    """Whether a text's inputs leave what calibration saw."""

    tokens: int
    limit: float | None
    """Scores above it are no chance; null where calibration's text was too short to tell."""
    groups: list[GroupShift]
    """Greatest score first."""

    @property
    def beyond_chance(self) -> list[GroupShift]:
        """Those that are not like calibration's."""
        return [g for g in self.groups if self.limit is not None and g.score is not None and g.score > self.limit]


class Row(_Strict):
    """One contender: an artifact or the unquantized reference, measured."""

    name: str
    kind: RowKind
    recipe: dict[str, Any] | None
    """Of another tool's row the tool's settings (``peer``, ``name``, ``settings``); null for the unquantized model."""
    tool: Tool | None = None
    """Of a row of kind ``peer``; null for the others."""
    artifact_sha256: str | None
    bytes: Annotated[int, Field(gt=0)]
    bits_per_weight: float
    compression: Annotated[float, Field(lt=1)]
    """1 - bytes / bytes of the bf16 checkpoint."""
    kl_mean: float | None
    kl_ci95: tuple[float, float] | None
    kl_noise_floor: float | None
    perplexity: float | None
    top1_agreement: float | None
    choice_accuracy: float | None
    choice_difference: float | None = None
    """Accuracy minus the reference's on the same items (paired)."""
    choice_difference_ci95: tuple[float, float] | None = None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    decode_limit_fraction: float | None
    """Bytes read for one token x decode tokens/s / measured read bandwidth."""
    prefill_limit_fraction: float | None = None
    """Operations in the decoder blocks a second / measured rate of matrix products in the arithmetic used; null where a
    tool does not declare its arithmetic."""
    limit_read_gb_s: float | None = None
    """What ``decode_limit_fraction`` refers to: 10^9 bytes/s, probed in the start of the run that timed this row."""
    limit_gemm_gop_s: float | None = None
    """What ``prefill_limit_fraction`` refers to: 10^9 operations/s, probed in the same start."""
    limit_gemm_dtype: str | None = None
    """The arithmetic of that rate: float32, bfloat16, float16 or int8."""
    time_to_first_token_s: float | None
    speed_spread: dict[str, Spread] | None = None
    """Keys: prefill_tokens_per_s, decode_tokens_per_s, time_to_first_token_s."""
    peak_rss_bytes: int | None
    energy_joules_per_token: float | None
    quantize_seconds: float | None
    quantize_peak_rss_bytes: int | None = None
    measure_seconds: float | None = None
    """Wall time of measuring it: loading, timed rounds and scoring."""
    foreign_load: float | None = None
    """Processors that other programs kept busy while this row was timed; the median over its rounds."""
    group_speed: float | None = None
    """Decode speed of the unquantized model in the group that this row was timed in, over that in the first group."""
    figures: dict[str, Figure] = {}
    """By name, of the measures that have no field of their own above."""
    tasks: dict[str, dict[str, float]] = {}
    """By task of lm-eval: its metrics, and the standard error of each as ``<metric>_stderr`` where there is one."""
    input_shift: InputShift | None = None
    """Of ``quern evaluate --text`` on an artifact that was calibrated."""
    engine: str = "reference"
    cache: str | None = None
    """How the cpu engine kept keys and values; null for other engines and tools."""
    layers: list[LayerError] = []
    tuning: list[TunedBlock] = []
    notes: list[str] = []

    @model_validator(mode="after")
    def _check_kind(self) -> Row:
        if (self.kind == "peer") != (self.tool is not None):
            raise ValueError(f"a row of kind peer has a tool, and no other row has; {self.name} is of kind {self.kind}")
        return self


class Failure(_Strict):
    """A row that could not be made, and why."""

    name: str
    tool: str
    stage: Literal["install", "quantize", "load", "measure"]
    reason: str


class Protocol(_Strict):
    """How much was measured."""

    tokens: int
    """Of text, scored."""
    prompt_tokens: int
    decode_tokens: int
    speed_rounds: int
    threads: int
    quick: bool = False
    """Fewer tokens and rounds than usual."""
    interval_factor: float = 1.0
    """How many times as wide the intervals are as those of the usual number of tokens."""


class Model(_Strict):
    """The checkpoint that was quantized."""

    path: str
    sha256: str
    parameters: int
    architecture: str = ""
    bf16_bytes: int = 0


class TextSource(_Strict):
    """A text that was scored."""

    name: str
    sha256: str
    tokens: int
    taken: str | None = None
    """What was taken of a file of records: format, fields, number. Null for plain text."""


class Excluded(_Strict):
    """A row that is not recommended and why."""

    name: str
    reason: str


class Ranked(_Strict):
    """A row in the order of preference and why it stands there."""

    name: str
    score: float
    reason: str


class MeasuredOn(_Strict):
    """The machine that speeds and memory come from, and when; null is what the results do not say."""

    processor: str | None
    cores: int | None
    kernels: str | None
    """The instruction set whose kernels quern used."""
    created: str
    """UTC, ISO 8601."""


class Recommendation(_Strict):
    """Which row to use."""

    scenario: Annotated[Scenario, BeforeValidator(lambda name: FORMER_SCENARIOS.get(name, name))]
    weights: dict[WeightName, float] | None = None
    """What a halving of size, a doubling of speed and a halving's worth of loss counted; they add up to 1."""
    choice: str | None
    """Null when no row meets the constraints."""
    reasons: list[str]
    excluded: list[Excluded]
    ranking: list[Ranked] = []
    measured_on: MeasuredOn | None = None
    """Null inside a results file, whose ``hardware`` says it."""
    warnings: list[str] = []
    """What a reader on this machine has to know; only ``quern recommend`` knows the machine that it runs on."""


class StackedPair(_Strict):
    """Two parts of recipes of which one loses by the other, or that are refused together."""

    first: str
    """Kind and name: ``transform awq``, ``runtime vllm``."""
    second: str
    label: Literal["degrades", "refuses"]
    reason: str


class Stacking(_Strict):
    """What of the recipes' parts can be stacked; pairs that are not named work, in either order."""

    parts: list[str]
    pairs: list[StackedPair]


class Results(_Strict):
    """The whole of ``results.json``."""

    metrics_version: int
    created: str
    """UTC, ISO 8601."""
    quern_version: str
    model: Model
    hardware: dict[str, Any]
    versions: dict[str, str]
    texts: list[TextSource]
    seed: int
    protocol: Protocol | None = None
    rows: list[Row]
    failures: list[Failure] = []
    stacking: Stacking | None = None
    recommendation: Recommendation

    @model_validator(mode="before")
    @classmethod
    def _complete_former_rows(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("rows"), list):
            return {**data, "rows": [completed(row) for row in data["rows"]]}
        return data


def unquantized_row(rows: Sequence[Row]) -> Row | None:
    """What speeds are compared with: the unquantized model, in the engine that decodes it fastest; None without one."""
    found = [row for row in rows if row.kind == "unquantized"]
    return max(found, key=lambda row: row.decode_tokens_per_s or 0.0, default=None)


def load_results(path: str | Path) -> Results:
    """Read and check a ``results.json``. Raises ``BadFileError``."""
    try:
        return Results.model_validate_json(decode_utf8(path, Path(path).read_bytes()))
    except OSError as error:
        raise BadFileError(
            path,
            gettext("cannot be read: {error}", error=error),
            gettext("Give the results.json that `quern compare` wrote"),
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise BadFileError(
            path,
            gettext("is not a results file of this version ({where}: {problem})", where=where, problem=first["msg"]),
            gettext("Give the results.json that `quern compare` wrote"),
        ) from None
