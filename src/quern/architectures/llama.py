"""Llama 1 to 3 and the many models that use its layout (SmolLM, TinyLlama, Yi)."""

from __future__ import annotations

from quern.architectures.base import ARCHITECTURES
from quern.architectures.gated_decoder import GatedDecoder


@ARCHITECTURES.add("llama")
class Llama(GatedDecoder):
    """transformers' ``llama``."""

    model_type = "llama"
    module = "transformers.models.llama.modeling_llama"
    class_prefix = "Llama"
