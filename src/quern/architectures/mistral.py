"""Mistral 7B and its kin."""

from __future__ import annotations

from quern.architectures.base import ARCHITECTURES
from quern.architectures.gated_decoder import GatedDecoder


@ARCHITECTURES.add("mistral")
class Mistral(GatedDecoder):
    """transformers' ``mistral``."""

    model_type = "mistral"
    module = "transformers.models.mistral.modeling_mistral"
    class_prefix = "Mistral"

    def window(self, index: int) -> int:
        return int(self.config.sliding_window or 0)
