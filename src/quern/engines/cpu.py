"""The CPU engine: a whole decoder in C++ that reads the artifact's own bytes, memory-mapped.

Weights stay packed; activations become int8, with one scale for each token and group of inputs, in front of every packed
product. Python is called once a token. The reference engine judges it (tests/end_to_end/test_cpu_engine.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quern.architectures._decoder import GatedDecoder
from quern.architectures.base import Architecture, architecture_of
from quern.checkpoint.checkpoint import Checkpoint
from quern.core.artifact import METHOD, module_schemes, quantization_of
from quern.core.errors import QuernError, UserError
from quern.core.parallel import thread_count
from quern.core.recipe import Recipe, parse_recipe
from quern.engines._cpu_layers import ACTIVATIONS, gated_decoder
from quern.engines._cpu_model import CpuModel
from quern.engines._cpu_pool import CachePrecision as CachePrecision
from quern.engines._cpu_weights import MappedWeights, unsupported
from quern.engines.base import ENGINES, DtypeName, Engine
from quern.loading.fitting import model_config, open_model

ROTARY = ("default", "linear", "yarn", "llama3", "dynamic", "longrope")
"""Scaling variants that are known; ``_rotary`` says how frequencies depend on the text's length."""


@ENGINES.add("cpu")
class CpuEngine(Engine):
    """Packed weights on CPUs, decoder and all in C++."""

    def supports(self, recipe: Recipe | None) -> str | None:
        if recipe is None:
            return None
        if recipe.format != METHOD:
            return f"it reads artifacts of the format {METHOD}, not {recipe.format}"
        if recipe.activations.mode == "static":
            return "static activations run on the reference engine only"
        for scheme in (recipe.weights, recipe.embedding, recipe.head, *recipe.overrides):
            if (reason := unsupported(scheme)) is not None:
                return reason
        return None

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
        """
        checkpoint = open_model(path)
        if (reason := self.runs(checkpoint)) is not None:
            raise UserError(f"the cpu engine does not run {path}: {reason}. Use the reference engine")
        config = quantization_of(checkpoint.config)
        schemes = {} if config is None else module_schemes(config)
        recipe = None if config is None else parse_recipe(config.get("recipe"), "of the artifact")
        architecture = architecture_of(model_config(checkpoint))
        assert isinstance(architecture, GatedDecoder)
        weights = MappedWeights(checkpoint, schemes)
        # Whether the blocks were made for int8 activations with one scale a token.
        scale_per_token = recipe is not None and recipe.activations.mode == "dynamic"
        try:
            decoder, bytes_per_token = gated_decoder(architecture, weights, scale_per_token, thread_count(threads))
        except QuernError:
            raise
        except ValueError as error:
            raise UserError(f"{path} cannot be run: {error}") from None
        return CpuModel(decoder, architecture.config, bytes_per_token, cache)


def _unknown(architecture: Architecture) -> str | None:
    """What the native decoder does not know of a model; None if it knows all."""
    config = architecture.config
    if not isinstance(architecture, GatedDecoder):
        return f"it does not know the layout of {architecture.model_type}"
    rotary: Any = architecture.build_rotary()
    if rotary.rope_type not in ROTARY:
        return f"it knows the rotary scalings {', '.join(ROTARY)}; config.json asks for {rotary.rope_type!r}"
    if config.hidden_act not in ACTIVATIONS:
        return f"it knows the activations {', '.join(ACTIVATIONS)}; config.json asks for {config.hidden_act!r}"
    return None
