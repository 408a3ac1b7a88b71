"""Stacks tried on a model: what a pair loses, beside what its parts lose alone, and which label that makes.

A transform or a rounding is there to lose less, and storage, format and runtime change no number: what they are added to
must not get worse by them. What codecs, activations and caches cost adds up. Two parts of a kind that exclude each other
have linears of their own, and the whole lies between the two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from quern.core import metrics
from quern.core.engine import LoadedModel
from quern.core.errors import UserError
from quern.core.recipe import parse_recipe
from quern.core.stacking import Label, Part
from quern.engines.base import ENGINES
from quern.engines.cpu import CpuEngine, cache_named
from quern.evaluation.accuracy import DocumentScore, reference_logits, score_windows
from quern.evaluation.texts import Window
from quern.formats.base import FORMATS
from quern.pipeline.quantize import quantize
from quern.pipeline.stacking.answer import Together, runtime_obstacle
from quern.pipeline.stacking.parts import NEUTRAL, PLAIN, REMEDIES, Keys

NOISE = 0.08
"""By how much of a loss two calibrations of one recipe may differ (``benchmarks/stacking.py --noise``)."""


_STANDING_IN = {"vllm": "reference", "llama.cpp": "cpu", "onnxruntime": "cpu"}
"""What runs here what is for runtimes that need not be here."""


@dataclass(frozen=True)
class Use:
    """How an artifact is run."""

    runtime: str = "cpu"
    cache: str | None = None
    stands_in: bool = False
    """Whether that is instead of what the artifact is for."""

    @classmethod
    def of(cls, *parts: Part) -> Use:
        """How what has these parts is run here. vLLM's artifacts are run by the reference engine, through transformers;
        llama.cpp's, and those of vLLM that quern opens as values, by the cpu engine, decoded or packed; so are
        those that quern does not open, in format quern."""
        named = {part.kind: part.name for part in parts}
        format = named.get("format", "quern")
        decoded = FORMATS.get(format).opened_as_values or not FORMATS.get(format).opened
        usual = "cpu" if format == "quern" or decoded else "reference"
        runtime = named.get("runtime", usual)
        stands_in = "cache" not in named and ("runtime" not in named or runtime in _STANDING_IN)
        if decoded and runtime in _STANDING_IN:
            runtime = "cpu"
        return cls(_STANDING_IN.get(runtime, runtime), named.get("cache"), stands_in)

    @classmethod
    def cached(cls, part: Part) -> Use:
        """How a part is tried alone: in quern's own format on the cpu engine, with the cache that it may be."""
        return cls(cache=part.name if part.kind == "cache" else None)


@dataclass(frozen=True)
class Loss:
    """Divergence of some windows of text from the unquantized model, document by document."""

    nats: np.ndarray[Any, np.dtype[np.float64]]
    """Summed over a document's tokens, float64 ``(documents,)``."""
    tokens: np.ndarray[Any, np.dtype[np.int64]]

    @classmethod
    def of(cls, scores: Sequence[DocumentScore]) -> Loss:
        """That of scores that have a reference."""
        return cls(np.array([score.divergence for score in scores]), np.array([score.tokens for score in scores]))

    @property
    def mean(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / self.tokens.sum())

    def beyond(self, bound: np.ndarray[Any, np.dtype[np.float64]]) -> metrics.Estimate:
        """Mean of what is lost above ``bound`` (nats of each document), and its 95 % interval over documents."""
        return metrics.weighted_mean(self.nats - bound, self.tokens, seed=0)


@dataclass(frozen=True)
class Verdict:
    """What a trial found."""

    label: Label
    kl: float
    """Of the stack, nats a token."""
    bound: float
    """What it may lose and still be said to work, noise apart."""

    @property
    def change(self) -> float:
        """By how much of the bound it loses more."""
        return self.kl / self.bound - 1


class Trials:
    """Stacks on one model and text; what was made is kept in ``folder``."""

    def __init__(self, model: Path, windows: Sequence[Window], folder: Path, seed: int = 0, **calibration: int) -> None:
        self.model, self.windows, self.folder, self.seed = model, windows, folder, seed
        self.plain: Keys = {**PLAIN, "calibration": {**PLAIN["calibration"], **calibration}}
        self._artifacts: dict[str, Path] = {}
        self._losses: dict[tuple[Path, Use], Loss] = {}
        self._reference = _Kept()
        reference_logits(ENGINES.get("reference")().load(model, dtype="float32"), windows, self._reference.keep)

    def loss(self, keys: Keys, use: Use = Use()) -> Loss:
        """What the stack of ``PLAIN`` and ``keys`` loses. Raises ``UserError`` where something refuses it."""
        artifact = self.artifact(keys)
        if not FORMATS.get(format := keys.get("format", "quern")).opened:
            if not use.stands_in:
                raise UserError(f"{use.runtime} does not open the format {format}")
            artifact = self.artifact({**keys, "format": "quern"})
        if (artifact, use) not in self._losses:
            scores = score_windows(self._loaded(artifact, use, keys), self.windows, self._reference)
            self._losses[artifact, use] = Loss.of(scores)
        return self._losses[artifact, use]

    def artifact(self, keys: Keys) -> Path:
        """The quantized model."""
        recipe = parse_recipe({**self.plain, **keys}, "stack")
        key = json.dumps(recipe.to_json(), sort_keys=True)
        if key not in self._artifacts:
            path = self.folder / f"{len(self._artifacts):04d}{FORMATS.get(recipe.format).suffix or ''}"
            quantize(self.model, path, recipe=recipe, seed=self.seed, threads=1)
            self._artifacts[key] = path
        return self._artifacts[key]

    def _loaded(self, artifact: Path, use: Use, keys: Keys) -> LoadedModel:
        if use.runtime == "cpu":
            return CpuEngine().load(artifact, threads=1, cache=cache_named(use.cache, "cpu"))
        if use.cache is not None:
            cache_named(use.cache, "reference")
        if use.runtime == "reference":
            return ENGINES.get("reference")().load(artifact, dtype="float32", threads=1)
        if why := runtime_obstacle(parse_recipe({**self.plain, **keys}, "stack"), use.runtime):
            raise UserError(why)
        return cast(LoadedModel, _Transformers(artifact))  # which is asked for logits alone


class _Kept:
    """Logits of windows in memory."""

    def __init__(self) -> None:
        self._logits: dict[int, Any] = {}

    def keep(self, number: int, logits: Any) -> None:
        self._logits[number] = logits.copy()

    def __len__(self) -> int:
        return len(self._logits)

    def window(self, number: int) -> Any:
        return self._logits[number]


class _Transformers:
    """An artifact as transformers loads it."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.vocabulary_size = self._model.config.vocab_size
        self.maximum_length = self._model.config.max_position_embeddings

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return cast(torch.Tensor, self._model(ids).logits.float())


def tried(trials: Trials, pair: Together) -> Verdict:
    """What a pair does that is not refused."""
    first, second, (ours, theirs, both) = pair.first, pair.second, pair.keys
    alone = trials.loss(ours, Use.cached(first)), trials.loss(theirs, Use.cached(second))
    return verdict(first, second, trials.loss(both, Use.of(first, second)), alone, trials.loss({}))


def verdict(first: Part, second: Part, both: Loss, alone: tuple[Loss, Loss], plain: Loss) -> Verdict:
    """The label of a pair by what was measured: ``alone`` each of its parts, ``plain`` neither.

    A pair degrades where it loses more than its bound by more than ``NOISE``, and does so beyond doubt (the 95 % interval of
    the difference over documents).
    """
    kinds = (first.kind, second.kind)
    if first.kind == second.kind != "transform":
        bound = max(alone, key=lambda loss: loss.mean).nats
    elif all(kind in REMEDIES for kind in kinds):
        bound = min(alone, key=lambda loss: loss.mean).nats
    elif (added := next((kind for kind in kinds if kind in NEUTRAL + REMEDIES), None)) is not None:
        neutral = next((kind for kind in kinds if kind in NEUTRAL), added)
        bound = alone[1 - kinds.index(neutral)].nats
    else:
        bound = alone[0].nats + alone[1].nats - plain.nats
    allowed = float(bound.sum() / both.tokens.sum())
    low = both.beyond(bound).interval
    certain = low is None or low[0] > 0
    worse = certain and both.mean > allowed * (1 + NOISE)
    return Verdict("degrades" if worse else "works", both.mean, allowed)
