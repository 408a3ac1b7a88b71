"""Qwen 1.5, 2 and 2.5 (dense): biases on q, k and v."""

from __future__ import annotations

from quern.architectures.base import ARCHITECTURES
from quern.architectures.gated_decoder import GatedDecoder, window_by_type


@ARCHITECTURES.add("qwen2")
class Qwen2(GatedDecoder):
    """transformers' ``qwen2``."""

    model_type = "qwen2"
    module = "transformers.models.qwen2.modeling_qwen2"
    class_prefix = "Qwen2"

    def window(self, index: int) -> int:
        return window_by_type(self.config, index)
