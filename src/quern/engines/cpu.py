"""The CPU engine: a whole decoder in C++ that reads the artifact's own bytes, memory-mapped.

Weights stay packed; activations become int8, with one scale for each token and group of inputs, in front of every packed
product. Python is called once a token. The reference engine judges it (tests/end_to_end/test_cpu_engine.py).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from quern.architectures.base import Architecture, architecture_of
from quern.architectures.gated_decoder import GatedDecoder
from quern.architectures.routed_decoder import RoutedDecoder
from quern.checkpoint.checkpoint import Checkpoint
from quern.core.artifact import quantization_of
from quern.core.errors import QuernError, UserError, option
from quern.core.machine.parallel import thread_count
from quern.core.text.suggest import did_you_mean
from quern.engines._cpu_layers import ACTIVATIONS, gated_decoder, kept_heads
from quern.engines._cpu_model import ORDINARY as ORDINARY
from quern.engines._cpu_model import CpuModel
from quern.engines._cpu_pool import CACHES as CACHES
from quern.engines._cpu_pool import CachePrecision as CachePrecision
from quern.engines._cpu_pool import cache_bytes_per_token
from quern.engines._cpu_routing import ROLES, shares_expert
from quern.engines._cpu_weights import MappedWeights as MappedWeights
from quern.engines._cpu_weights import unsupported
from quern.engines.base import ENGINES, DtypeName, Engine
from quern.formats.base import StoredModule, reader_of
from quern.formats.quern import METHOD
from quern.loading.fitting import model_config, open_model

ROTARY = ("default", "linear", "yarn", "llama3", "dynamic", "longrope")
"""Scaling variants that are known; ``_rotary`` says how frequencies depend on the text's length."""


SEVEN = sorted(("query", "key", "value", "output", "gate", "up", "down"))
"""Roles of the linears of a block that it runs, its first expert's where it has some."""
ROUTED = sorted((*SEVEN, *ROLES))
"""The same where an expert stands beside these that every token meets."""


@ENGINES.add("cpu")
class CpuEngine(Engine):
    """Packed weights on CPUs, decoder and all in C++."""

    def obstacle(self, format: str | None, modules: Collection[StoredModule]) -> str | None:
        if format not in (None, METHOD):
            return f"it reads artifacts of the format {METHOD}, not {format}"
        return next((reason for module in modules if (reason := unsupported(module.scheme)) is not None), None)

    def runs(self, checkpoint: Checkpoint) -> str | None:
        return super().runs(checkpoint) or _unknown(architecture_of(model_config(checkpoint)))

    def load(
        self,
        path: str | Path,
        *,
        dtype: DtypeName = "auto",
        threads: int | None = None,
        cache: CachePrecision | None = None,
    ) -> CpuModel:
        """Load a model. Hidden states are float32 whatever ``dtype`` says.

        ``cache`` is how keys and values are kept; None: as float16, and as float32 for a text whose values that cannot hold.
        ``int8`` has a scale for each head and token, ``int4`` one for every 32 channels; their keys and values go through a
        Hadamard transform first.
        """
        checkpoint = open_model(path)
        if (reason := self.runs(checkpoint)) is not None:
            raise UserError(f"the cpu engine does not run {path}: {reason}. Use the reference engine")
        architecture = architecture_of(model_config(checkpoint))
        assert isinstance(architecture, GatedDecoder)
        reader = reader_of(quantization_of(checkpoint.config), architecture)
        weights = MappedWeights(checkpoint, {} if reader is None else reader.plan())
        try:
            decoder, bytes_per_token = gated_decoder(architecture, weights, thread_count(threads))
        except QuernError:
            raise
        except ValueError as error:
            raise UserError(f"{path} cannot be run: {error}") from None
        model = CpuModel(decoder, architecture.config, bytes_per_token, cache)
        model.notes += weights.notes()
        return model


def cache_named(name: str | None, engine: str) -> CachePrecision | None:
    """The cache precision called ``name``, for a model that ``engine`` runs. Raises ``UserError``."""
    if name is None:
        return None
    given = option(f"cache={name!r}", f"--cache {name}")
    known = next((each for each in CACHES if each == name), None)
    if known is None:
        raise UserError(f"{given} is not known; give one of {', '.join(CACHES)}{did_you_mean(name, CACHES)}")
    if engine != "cpu":
        raise UserError(f"{given} is for the cpu engine; this model runs on the {engine} engine. Leave it out")
    return known


def cache_sizes(architecture: Architecture) -> dict[str, int]:
    """Bytes that keys and values of one token take, by precision; empty where the engine does not know the layout."""
    if not isinstance(architecture, GatedDecoder):
        return {}
    return {name: cache_bytes_per_token(kept_heads(architecture), name) for name in CACHES}


def _unknown(architecture: Architecture) -> str | None:
    """What the native decoder does not know of a model; None if it knows all."""
    config = architecture.config
    if not isinstance(architecture, GatedDecoder):
        return f"it does not know the layout of {architecture.model_type}"
    for block in architecture.blocks:
        roles = sorted(linear.role for linear in block.linears if linear.expert in (None, 0))
        if block.experts_per_token and (
            not isinstance(architecture, RoutedDecoder) or architecture.softmax_router is None
        ):
            return f"it does not know how {architecture.model_type} chooses experts"
        if roles != (ROUTED if shares_expert(block) else SEVEN):
            return f"it knows blocks of {', '.join(SEVEN)}, one of each, and those of {architecture.model_type} have others"
    rotary: Any = architecture.build_rotary()
    if rotary.rope_type not in ROTARY:
        return f"it knows the rotary scalings {', '.join(ROTARY)}; config.json asks for {rotary.rope_type!r}"
    if config.hidden_act not in ACTIVATIONS:
        return f"it knows the activations {', '.join(ACTIVATIONS)}; config.json asks for {config.hidden_act!r}"
    return None
